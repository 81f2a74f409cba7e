//! Callers that do not read, do not send, or stay: they are bounded, and other callers do not notice them.

mod support;

use std::{
    convert::Infallible,
    io::ErrorKind,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use axum::{Router, body::Body};
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper::{
    body::Incoming,
    client::conn::http2::{self, SendRequest},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use support::{gateway::Gateway, *};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::Semaphore,
};

type Http2 = SendRequest<Empty<Bytes>>;

/// Returns an HTTP/2 connection to the gateway.
async fn http_2(gateway: &Gateway) -> Http2 {
    let connection = TokioIo::new(TcpStream::connect(gateway.address()).await.unwrap());
    let (sender, connection) = http2::handshake(TokioExecutor::new(), connection).await.unwrap();
    tokio::spawn(connection);
    sender
}

async fn get_over(connection: &mut Http2, gateway: &Gateway, path: &str) -> Response<Incoming> {
    connection.ready().await.unwrap();
    let request = Request::get(gateway.url(path)).body(Empty::new()).unwrap();
    in_time(connection.send_request(request)).await.unwrap()
}

/// Sends a raw request, reads the beginning of the response, and nothing more.
async fn begin_to_read(address: SocketAddr, path: &str) -> TcpStream {
    let mut connection = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n");
    connection.write_all(request.as_bytes()).await.unwrap();
    assert!(in_time(connection.read(&mut [0; 100])).await.unwrap() > 0);
    connection
}

/// An HTTP/2 upstream with 20 MB at `/large`, which counts the chunks that it sends, and a short text elsewhere.
async fn upstream() -> (SocketAddr, TestFile, Arc<AtomicUsize>) {
    let (listener, address, trusted) = tls::listen().await;
    let sent = Arc::new(AtomicUsize::new(0));
    let counted = sent.clone();
    let answer = move |request: Request<Body>| {
        let (is_large, counted) = (request.uri().path() == "/large", counted.clone());
        let chunk = move |_| {
            counted.fetch_add(1, SeqCst);
            Ok::<_, Infallible>(Bytes::from_static(&[0; 50_000]))
        };
        let large = || Body::from_stream(futures_util::stream::iter((0..400).map(chunk)));
        std::future::ready(if is_large { large() } else { Body::from(format!("{:?}", request.version())) })
    };
    tokio::spawn(async move { axum::serve(listener, Router::new().fallback(answer)).await });
    (address, trusted, sent)
}

/// Waits until a number grows no longer.
async fn at_rest(number: &AtomicUsize) {
    let mut before = 0;
    while number.load(SeqCst) != before {
        before = number.load(SeqCst);
        tokio::time::sleep(SECOND / 2).await;
    }
}

// With threads: the upstream is busy with sending.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s08_unread_responses_over_http_2_stop_nobody() {
    let (upstream, trusted, sent) = upstream().await;
    let gateway = tls::gateway(upstream.port(), &trusted, []).await;
    let mut unread = Vec::new();
    for _ in 0..10 {
        unread.push(begin_to_read(gateway.address(), "/large").await);
    }
    at_rest(&sent).await;
    assert!(sent.load(SeqCst) < 10 * 400, "nobody reads all of it");
    for _ in 0..10 {
        let response = in_time(http().get(gateway.url("/")).send()).await.unwrap();
        assert_eq!(response.text().await.unwrap(), "HTTP/2.0");
    }
}

#[tokio::test]
async fn s08_busy_http_2_connections_delay_no_request() {
    let (listener, upstream, trusted) = tls::listen().await;
    let (arrived, go_on) = (Arc::new(AtomicUsize::new(0)), Arc::new(Semaphore::new(0)));
    let (counted, waits) = (arrived.clone(), go_on.clone());
    let answer = move |_: Request<Body>| {
        let (counted, waits) = (counted.clone(), waits.clone());
        async move {
            counted.fetch_add(1, SeqCst);
            drop(waits.acquire().await);
            "fine"
        }
    };
    tokio::spawn(async move { axum::serve(listener, Router::new().fallback(answer)).await });
    // Pacing begins with a few requests at a time.
    let gateway = Arc::new(tls::gateway(upstream.port(), &trusted, ["--pace=false"]).await);
    // More than the 200 streams that this upstream allows on one connection.
    let requests: Vec<_> = (0..250)
        .map(|_| {
            let gateway = gateway.clone();
            tokio::spawn(async move { http().get(gateway.url("/")).send().await.unwrap().status() })
        })
        .collect();
    eventually("all requests are at the upstream", || arrived.load(SeqCst) == 250).await;
    go_on.add_permits(250);
    for request in requests {
        assert_eq!(in_time(request).await.unwrap(), 200);
    }
}

#[tokio::test]
async fn s08_an_unread_stream_ends_and_others_finish() {
    let (sender, body) = stream();
    let body = Arc::new(Mutex::new(Some(body)));
    let upstream = Server::start(move |request| {
        let is_large = request.uri().path() == "/large";
        let large = || Body::from(vec![0; 20_000_000]);
        std::future::ready(answer(200, if is_large { large() } else { body.lock().unwrap().take().unwrap() }))
    })
    .await;
    let gateway = Gateway::before(upstream.address(), &["a"], ["--send-timeout", "0.5"]).await;
    let mut connection = http_2(&gateway).await;
    let other = get_over(&mut connection, &gateway, "/").await;
    let unread = get_over(&mut connection, &gateway, "/large").await;
    eventually("the gateway breaks it off", || gateway.log().contains("responses are broken off")).await;
    // What was not sent never comes.
    assert!(in_time(unread.into_body().collect()).await.is_err());
    let mut sender = sender;
    sender.send_data("fine".into()).await.unwrap();
    drop(sender);
    assert_eq!(in_time(other.into_body().collect()).await.unwrap().to_bytes(), "fine");
    eventually("the connection ends", || connection.is_closed()).await;
}

/// Reads slowly, and lets the rest wait in the connection.
#[tokio::test]
async fn s08_slow_readers_over_http_2_get_everything() {
    let upstream = Server::answering(|| answer(200, Body::from(vec![0; 300_000]))).await;
    let arguments = ["--send-timeout", "2", "--keep-alive", "0.2", "--shutdown-limit", "200"];
    let mut gateway = Gateway::before(upstream.address(), &["a"], arguments).await;
    let connection = TokioIo::new(TcpStream::connect(gateway.address()).await.unwrap());
    let mut http_2 = http2::Builder::new(TokioExecutor::new());
    http_2.initial_stream_window_size(20_000);
    let (mut sender, connection) = http_2.handshake(connection).await.unwrap();
    tokio::spawn(connection);
    let mut body = get_over(&mut sender, &gateway, "/").await.into_body();
    let mut read = 0;
    while let Some(frame) = in_time(body.frame()).await {
        read += frame.unwrap().into_data().unwrap().len();
        // Less than the upstream has sent long ago is read when the gateway is told to stop.
        if read > 100_000 && read < 120_000 {
            gateway.terminate().await;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(read, 300_000);
    assert_eq!(gateway.ended().await.code(), Some(0));
}

#[tokio::test]
async fn s08_idle_http_2_connections_are_closed() {
    let upstream = Server::answering(|| answer(200, "fine")).await;
    let gateway = Gateway::before(upstream.address(), &["a"], ["--keep-alive", "0.3"]).await;
    let mut connection = http_2(&gateway).await;
    let response = get_over(&mut connection, &gateway, "/").await;
    assert_eq!(in_time(response.into_body().collect()).await.unwrap().to_bytes(), "fine");
    eventually("the gateway closes it", || connection.is_closed()).await;
}

#[tokio::test]
async fn s08_connections_beyond_the_limit_are_closed() {
    let upstream = Server::answering(|| answer(200, "fine")).await;
    let gateway = Gateway::before(upstream.address(), &["a"], ["--max-connections", "3"]).await;
    let mut idle = Vec::new();
    for _ in 0..3 {
        idle.push(begin_to_read(gateway.address(), "/").await);
    }
    let mut refused = TcpStream::connect(gateway.address()).await.unwrap();
    match in_time(refused.read(&mut [0; 1])).await {
        Ok(read) => assert_eq!(read, 0),
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
    }
    eventually("it is logged", || gateway.log().contains("connections are refused")).await;
    idle.pop();
    eventually_asked(&gateway).await;
}

/// Waits until a new connection is served.
async fn eventually_asked(gateway: &Gateway) {
    let mut is_served = false;
    for _ in 0..1_000 {
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        is_served = client.get(gateway.url("/")).send().await.is_ok();
        if is_served {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(is_served);
}

#[tokio::test]
async fn s08_requests_beyond_the_limit_get_503() {
    let (sender, body) = stream();
    let body = Arc::new(Mutex::new(Some(body)));
    let take = move || body.lock().unwrap().take().unwrap_or_else(|| Body::from("fine"));
    let upstream = Server::answering(move || answer(200, take())).await;
    let gateway = Gateway::before(upstream.address(), &["a"], ["--max-requests", "1"]).await;
    let streaming = http().get(gateway.url("/")).send().await.unwrap();
    let refused = http().get(gateway.url("/")).send().await.unwrap();
    assert_eq!(
        (refused.status(), &refused.headers()["retry-after"]),
        (StatusCode::SERVICE_UNAVAILABLE, &"1".parse().unwrap())
    );
    drop(sender);
    drop(streaming);
    eventually_asked(&gateway).await;
    for _ in 0..1_000 {
        if http().get(gateway.url("/")).send().await.unwrap().status() == 200 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the place of the first request is not free");
}
