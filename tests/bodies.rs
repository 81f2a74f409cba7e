//! Which bodies are read on their way to the caller, and that the caller gets all of them.

// A test may panic, and so may what it calls.

mod support;

use std::{
    convert::Infallible,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{
    StreamExt,
    stream::{iter, once},
};
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full, channel::Sender};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use support::*;
use tokio::time::sleep;
use tower::{Layer, ServiceExt};
use tower_key_rotation::{
    Failover, KeyRotationLayer,
    classify::{LlmGateway, TooManyRequests},
    clock::ManualClock,
};

const RETRY_INFO: &str = r#"{"error":{"code":429,"details":[{"@type":"type.googleapis.com/google.rpc.RetryInfo","retryDelay":"300s"}]}}"#;

/// How long a key rests after a 429 with that body, of which so much is read; and what the caller got.
async fn rest_after(
    headers: Vec<(&'static str, &'static str)>,
    body: &'static str,
    read: Option<usize>,
) -> (Duration, String) {
    let pool = pool(["alpha"], &ManualClock::new());
    let server = Server::answering(move || {
        let mut reply = answer(429, body);
        for (name, value) in &headers {
            reply.headers_mut().insert(*name, value.parse().unwrap());
        }
        reply
    })
    .await;
    let layer = KeyRotationLayer::new(&pool);
    let response = match read {
        Some(most) => get(&layer.read_error_bodies(most).layer(http()), &server.url()).await,
        None => get(&layer.layer(http()), &server.url()).await,
    };
    let body = response.unwrap().text().await.unwrap();
    (time_left(&pool, "alpha").unwrap(), body)
}

#[tokio::test]
async fn body_hints_count_only_with_read_error_bodies() {
    assert_eq!(rest_after(vec![], RETRY_INFO, Some(1024)).await, (5 * MINUTE, RETRY_INFO.into()));
    assert_eq!(rest_after(vec![], RETRY_INFO, None).await, (2 * MINUTE, RETRY_INFO.into()));
}

type Bodies = Arc<Mutex<Vec<Sender<Bytes, Infallible>>>>;

/// A server that answers with that status and with bodies that the test sends.
async fn sending(status: u16) -> (Server, Bodies) {
    let bodies = Bodies::default();
    let server = Server::start({
        let bodies = bodies.clone();
        move |_| {
            let (sender, body) = stream();
            bodies.lock().unwrap().push(sender);
            std::future::ready(answer(status, body))
        }
    });
    (server.await, bodies)
}

#[tokio::test]
async fn a_hint_past_the_read_limit_is_ignored() {
    const LATE: &str = r#"{"error":{"message":"................................................................","details":[{"@type":"type.googleapis.com/google.rpc.RetryInfo","retryDelay":"300s"}]}}"#;
    // One chunk is read at least, however long: so this body comes in many.
    let pool = pool(["alpha"], &ManualClock::new());
    let (server, bodies) = sending(429).await;
    let client = KeyRotationLayer::new(&pool).read_error_bodies(16).layer(http());
    let response = tokio::spawn({
        let url = server.url();
        async move { get(&client, &url).await }
    });
    eventually("the request is there", || server.count() == 1).await;
    let mut body = bodies.lock().unwrap().remove(0);
    body.send_data(LATE[..20].into()).await.unwrap();
    // 20 bytes are more than the limit: no more is waited for.
    let response = in_time(response).await.unwrap().unwrap();
    assert_eq!(time_left(&pool, "alpha"), Some(2 * MINUTE));
    body.send_data(LATE[20..].into()).await.unwrap();
    drop(body);
    assert_eq!(in_time(response.text()).await.unwrap(), LATE);
}

#[tokio::test]
async fn header_hints_take_precedence_over_body_hints() {
    let headers = vec![("retry-after", "600")];
    assert_eq!(rest_after(headers, RETRY_INFO, Some(1024)).await, (10 * MINUTE, RETRY_INFO.into()));
}

#[tokio::test]
async fn a_body_without_a_hint_passes_unchanged() {
    for body in [
        "",
        "<html>",
        "{",
        "[]",
        r#"{"error":{"details":[{"@type":"google.rpc.RetryInfo","retryDelay":"-1s"}]}}"#,
    ] {
        assert_eq!(rest_after(vec![], body, Some(1024)).await, (2 * MINUTE, body.into()));
    }
}

/// 300 kB in pieces, each of which says which it is.
fn pieces() -> Vec<String> {
    (0..3_000).map(|number| format!("{number:0>100}")).collect()
}

#[tokio::test]
async fn a_chunked_body_past_the_limit_arrives_whole() {
    for limit in [0, 1, 99, 100, 4_096, 1_000_000] {
        let pool = pool(["alpha", "beta"], &ManualClock::new());
        let server = Server::answering(|| {
            answer(
                429,
                axum::body::Body::from_stream(iter(pieces().into_iter().map(Ok::<_, std::io::Error>))),
            )
        })
        .await;
        let rotation = KeyRotationLayer::new(&pool).read_error_bodies(limit);
        let response = get(&rotation.layer(http()), &server.url()).await.unwrap();
        assert_eq!(response.text().await.unwrap(), pieces().concat(), "limit {limit}");

        // And where it is read a second time, for the next attempt; here over hyper's client.
        pool.reset("alpha").await.unwrap();
        let http = Client::builder(TokioExecutor::new()).build_http::<Full<Bytes>>();
        let client = rotation.failover(Failover::attempts(3).drain_up_to(limit)).layer(http);
        let request = Request::get(server.url()).body(Full::default()).unwrap();
        let response = client.oneshot(request).await.unwrap();
        assert_eq!(response.status(), 429);
        assert_eq!(
            response.into_body().collect().await.unwrap().to_bytes(),
            pieces().concat(),
            "limit {limit}"
        );
    }
}

/// A body of which the beginning is sent before the connection is closed in the middle of it.
fn broken_off() -> axum::body::Body {
    let gone = once(async {
        sleep(Duration::from_millis(20)).await;
        Err(std::io::Error::other("gone"))
    });
    axum::body::Body::from_stream(iter([Ok("begun")]).chain(gone))
}

#[tokio::test]
async fn a_truncated_error_body_reaches_the_caller_truncated() {
    let pool = pool(["alpha"], &ManualClock::new());
    let server = Server::answering(|| answer(429, broken_off())).await;
    let client = KeyRotationLayer::new(&pool).read_error_bodies(1024).layer(http());
    let mut response = get(&client, &server.url()).await.unwrap();
    assert_eq!(time_left(&pool, "alpha"), Some(2 * MINUTE));
    let mut received = Vec::new();
    let error = loop {
        match response.chunk().await {
            Ok(Some(chunk)) => received.extend(chunk),
            Ok(None) => panic!("it is said to be whole"),
            Err(error) => break error,
        }
    };
    assert!(error.is_body() || error.is_decode(), "{error:?}");
    assert_eq!(received, b"begun");
}

#[tokio::test]
async fn f27_bodies_are_not_read_ahead_without_a_429() {
    for status in [200, 206, 302, 500] {
        let pool = pool(["alpha", "beta"], &ManualClock::new());
        let (server, bodies) = sending(status).await;
        let rotation = KeyRotationLayer::new(&pool).read_error_bodies(1024);
        let client = rotation.failover(Failover::attempts(3)).layer(http());
        // The head arrives before any of the body, and each chunk before the next is sent.
        let mut response = in_time(get(&client, &server.url())).await.unwrap();
        assert_eq!(response.status(), status);
        let mut body = bodies.lock().unwrap().remove(0);
        for chunk in ["first", "second"] {
            body.send_data(chunk.into()).await.unwrap();
            assert_eq!(in_time(response.chunk()).await.unwrap().unwrap(), chunk);
        }
        drop(body);
        assert_eq!(in_time(response.chunk()).await.unwrap(), None);
        assert_eq!(server.count(), 1);
    }
}

#[tokio::test]
async fn f27_a_429_marks_its_key_before_body_arrives() {
    let pool = pool(["alpha"], &ManualClock::new());
    let (server, bodies) = sending(429).await;
    let response = in_time(get(&rotating(&pool), &server.url())).await.unwrap();
    assert_eq!((response.status().as_u16(), time_left(&pool, "alpha")), (429, Some(2 * MINUTE)));
    let mut body = bodies.lock().unwrap().remove(0);
    body.send_data("wait".into()).await.unwrap();
    drop(body);
    assert_eq!(in_time(response.text()).await.unwrap(), "wait");
}

#[tokio::test]
async fn f27_a_broken_stream_is_never_retried() {
    let pool = pool(["alpha", "beta"], &ManualClock::new());
    let server = Server::answering(|| answer(200, broken_off())).await;
    let client = failing_over(failover(&pool));
    let response = get(&client, &server.url()).await.unwrap();
    assert!(response.bytes().await.is_err());
    assert_eq!((server.count(), pool.stats().healthy), (1, 2));
}

#[tokio::test]
async fn endless_error_bodies_are_read_for_one_second() {
    let clock = ManualClock::new();
    let pool = pool(["alpha"], &clock);
    let (server, bodies) = sending(429).await;
    let client =
        KeyRotationLayer::new(&pool).classify(LlmGateway::new()).read_error_bodies(1024).layer(http());
    let response = tokio::spawn({
        let url = server.url();
        async move { get(&client, &url).await }
    });
    eventually("the request is there", || server.count() == 1).await;
    let mut body = bodies.lock().unwrap().remove(0);
    body.send_data("Budget has been exceeded! ".into()).await.unwrap();
    settle().await;
    assert!(!response.is_finished());
    clock.advance(SECOND);
    let response = in_time(response).await.unwrap().unwrap();
    assert_eq!(pool.stats().exhausted, 1, "what was read by then counts");
    body.send_data("and the rest".into()).await.unwrap();
    drop(body);
    assert_eq!(in_time(response.text()).await.unwrap(), "Budget has been exceeded! and the rest");
}

#[tokio::test]
async fn body_hints_turn_configured_statuses_into_rate_limits() {
    let pool = pool(["alpha", "beta"], &ManualClock::new());
    let server = Server::start(|request| async move {
        answer(503, if key_of(&request) == Some("alpha") { RETRY_INFO } else { "down" })
    })
    .await;
    let classify = TooManyRequests::new().or_with_a_hint([StatusCode::SERVICE_UNAVAILABLE]);
    let client = KeyRotationLayer::new(&pool).classify(classify).read_error_bodies(1024).layer(http());
    assert_eq!(status(&client, &server.url()).await, 503);
    assert_eq!(status(&client, &server.url()).await, 503);
    assert_eq!(time_left(&pool, "alpha"), Some(5 * MINUTE));
    assert_eq!(time_left(&pool, "beta"), None);
}
