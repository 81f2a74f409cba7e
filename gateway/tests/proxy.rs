//! The gateway as a process, between clients and an upstream of these tests.

#[path = "../src/proxy/body.rs"]
mod body;
mod support;

use std::{
    convert::Infallible,
    ffi::OsStr,
    io,
    net::SocketAddr,
    os::unix::ffi::OsStrExt,
    process::Output,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::{Body, HttpBody},
    serve::Listener,
};
use base64::prelude::{BASE64_STANDARD, Engine};
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt};
use http::{Method, Request, Response, StatusCode, Version};
use http_body_util::{
    BodyExt, Full,
    channel::{Channel, Sender},
};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use mongodb::bson::{Document, doc};
use serde_json::{Value, json};
use support::{
    gateway::{Gateway, command, ended, refusal},
    mongo::Mongo,
    raw::{exchange, raw_upstream},
    tls, *,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    process::Command,
    sync::{Notify, Semaphore},
    time::timeout,
};

use self::body::BodyLimits;

type KeptBody = self::body::KeptBody<Body>;

/// An upstream that receives each request before its body is complete.
async fn upstream<F, A>(answer: F) -> SocketAddr
where
    F: Fn(Request<Body>) -> A + Clone + Send + Sync + 'static,
    A: Future<Output = Response<Body>> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, Router::new().fallback(answer)).await });
    address
}

fn limits(keep: usize, most: usize) -> BodyLimits {
    BodyLimits { keep, most, room: Arc::new(Semaphore::new(1_000)) }
}

/// An upstream that answers one request with this.
async fn answering_once(kind: &'static str, body: Body) -> Server {
    let body = Arc::new(Mutex::new(Some(body)));
    let take = move || body.lock().unwrap().take().unwrap();
    Server::answering(move || answer_with(200, [("content-type", kind)], take())).await
}

/// A streaming body for `reqwest`, fed by the test.
fn streaming() -> (Sender<Bytes, Infallible>, reqwest::Body) {
    let (sender, body) = Channel::new(16);
    (sender, reqwest::Body::wrap_stream(body.into_data_stream()))
}

fn header<'r>(response: &'r reqwest::Response, name: &str) -> Option<&'r str> {
    response.headers().get(name).map(|value| value.to_str().unwrap())
}

async fn json_of(response: reqwest::Response) -> Value {
    assert_eq!(header(&response, "content-type"), Some("application/json"));
    response.json().await.unwrap()
}

#[tokio::test]
async fn it_works_with_keys_in_memory() {
    let upstream = Server::start(async |request| {
        answer_with(201, [("x-answer", "yes")], format!("{} {}", request.method(), request.uri()))
    })
    .await;
    let gateway = Gateway::before(upstream.address(), &["a", "b"], []).await;
    let response = http()
        .put(gateway.url("/v1/things?page=2&q=%C3%A4"))
        .header("x-version", "7")
        .body("a thing")
        .send()
        .await
        .unwrap();
    assert_eq!(response.status(), 201);
    assert_eq!(header(&response, "x-answer"), Some("yes"));
    assert_eq!(response.text().await.unwrap(), "PUT /v1/things?page=2&q=%C3%A4");
    let seen = &upstream.requests()[0];
    assert_eq!(seen.headers()["authorization"], "Bearer sk-a");
    assert_eq!(seen.headers()["x-version"], "7");
    assert_eq!(seen.headers()["host"], upstream.address().to_string());
    assert_eq!(seen.headers()["content-length"], "7");
    assert_eq!(seen.body(), "a thing");
    http().get(gateway.url("/")).send().await.unwrap();
    assert_eq!(upstream.keys(), ["a", "b"]);
    assert!(!upstream.requests()[1].headers().contains_key("transfer-encoding"));
}

#[tokio::test]
async fn a_kept_body_is_retried_with_another_key() {
    let upstream = Server::limiting(["a", "b"]).await;
    let gateway = Gateway::before(upstream.address(), &["a", "b", "c"], ["--keep-body", "1000"]).await;
    let body = "x".repeat(1000);
    let response = http().post(gateway.url("/")).body(body.clone()).send().await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(upstream.keys(), ["a", "b", "c"]);
    assert!(upstream.requests().iter().all(|request| *request.body() == body));
}

#[tokio::test]
async fn bodies_over_the_keep_limit_are_sent_once() {
    let upstream =
        Server::start(async |_| answer_with(429, [("retry-after", "7")], "the upstream's own words")).await;
    let gateway = Gateway::before(upstream.address(), &["a", "b"], ["--keep-body", "1000"]).await;
    let response = in_time(http().post(gateway.url("/")).body("x".repeat(1001)).send()).await.unwrap();
    assert_eq!(response.status(), 429);
    assert_eq!(header(&response, "retry-after"), Some("7"));
    assert_eq!(response.text().await.unwrap(), "the upstream's own words");
    assert_eq!(upstream.keys(), ["a"]);
    assert_eq!(upstream.requests()[0].body().len(), 1001);
}

#[tokio::test]
async fn an_oversized_body_gets_413_announced_or_chunked() {
    let upstream = Server::answering(|| answer(200, "fine")).await;
    let gateway = Gateway::before(upstream.address(), &["a"], ["--max-body", "1000"]).await;
    let large = || "x".repeat(8 << 20);
    let chunked =
        || reqwest::Body::wrap_stream(futures_util::stream::once(async move { Ok::<_, io::Error>(large()) }));
    for body in [reqwest::Body::from(large()), chunked()] {
        let response = http().post(gateway.url("/v1/responses")).body(body).send().await.unwrap();
        assert_eq!(response.status(), 413);
        assert_eq!(json_of(response).await["error"]["code"], "request_too_large");
    }
    let response = http().post(gateway.url("/v1/messages")).body(large()).send().await.unwrap();
    assert_eq!(json_of(response).await["error"]["type"], "request_too_large");
    assert_eq!(upstream.count(), 0);
    let asks_first =
        "POST / HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 1001\r\n\r\n";
    let refused = timeout(4 * SECOND, exchange(gateway.address(), asks_first)).await;
    assert!(refused.expect("it waits for the body").starts_with("HTTP/1.1 413"));
    let largest = http().post(gateway.url("/")).body("x".repeat(1000)).send().await.unwrap();
    assert_eq!(largest.status(), 200);
}

#[tokio::test]
async fn server_sent_events_arrive_one_by_one() {
    let (mut events, body) = stream();
    let upstream = answering_once("text/event-stream", body).await;
    let gateway = Gateway::before(upstream.address(), &["a"], []).await;
    events.send_data("data: 1\n\n".into()).await.unwrap();
    let mut response = in_time(http().get(gateway.url("/")).send()).await.unwrap();
    assert_eq!(in_time(response.chunk()).await.unwrap().unwrap(), "data: 1\n\n");
    // The upstream sends the second chunk only now.
    events.send_data("data: 2\n\n".into()).await.unwrap();
    assert_eq!(in_time(response.chunk()).await.unwrap().unwrap(), "data: 2\n\n");
    drop(events);
    assert_eq!(response.chunk().await.unwrap(), None);
}

#[tokio::test]
async fn request_bodies_arrive_chunk_by_chunk() {
    let first = Arc::new(Notify::new());
    let arrived = first.clone();
    let upstream = upstream(move |request| {
        let arrived = arrived.clone();
        async move {
            let mut body = request.into_body().into_data_stream();
            assert_eq!(body.next().await.unwrap().unwrap(), "one ");
            arrived.notify_one();
            answer(200, body.next().await.unwrap().unwrap())
        }
    })
    .await;
    let gateway = Gateway::before(upstream, &["a"], []).await;
    let (mut chunks, body) = streaming();
    let response = tokio::spawn(http().post(gateway.url("/")).body(body).send());
    chunks.send_data("one ".into()).await.unwrap();
    in_time(first.notified()).await;
    chunks.send_data("two".into()).await.unwrap();
    drop(chunks);
    assert_eq!(response.await.unwrap().unwrap().text().await.unwrap(), "two");
}

/// An upstream that limits `a` before it reads the body, and echoes the body to other keys.
async fn limiting_a_early(keys: Arc<Mutex<Vec<String>>>, limited: Arc<Notify>) -> SocketAddr {
    upstream(move |request| {
        let key = key_of(&request).unwrap_or("none").to_owned();
        keys.lock().unwrap().push(key.clone());
        let limited = limited.clone();
        async move {
            if key == "a" {
                limited.notify_one();
                return answer(429, "too many requests");
            }
            answer(200, request.into_body().collect().await.unwrap().to_bytes())
        }
    })
    .await
}

#[tokio::test]
async fn retrying_a_streaming_request_loses_no_chunk() {
    let (keys, limited) = (Arc::default(), Arc::new(Notify::new()));
    let upstream = limiting_a_early(Arc::clone(&keys), limited.clone()).await;
    let gateway = Gateway::before(upstream, &["a", "b"], []).await;
    let (mut chunks, body) = streaming();
    let response = tokio::spawn(http().post(gateway.url("/")).body(body).send());
    chunks.send_data("one ".into()).await.unwrap();
    in_time(limited.notified()).await;
    eventually("it is sent again", || keys.lock().unwrap().len() == 2).await;
    chunks.send_data("two".into()).await.unwrap();
    drop(chunks);
    let response = in_time(response).await.unwrap().unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(response.text().await.unwrap(), "one two");
    assert_eq!(*keys.lock().unwrap(), ["a", "b"]);
}

fn kept_body(keep: usize) -> (Sender<Bytes, axum::Error>, KeptBody) {
    let (chunks, body) = Channel::new(16);
    (chunks, KeptBody::new(Body::new(body), limits(keep, 1_000)))
}

async fn next(body: &mut KeptBody) -> Result<Bytes, String> {
    let frame = in_time(body.frame()).await.expect("it has ended");
    Ok(frame.map_err(|error| error.to_string())?.into_data().unwrap())
}

#[tokio::test]
async fn a_pending_retry_pauses_reads_past_the_limit() {
    let (mut chunks, mut first) = kept_body(6);
    chunks.send_data("one ".into()).await.unwrap();
    assert_eq!(next(&mut first).await.unwrap(), "one ");
    let mut second = first.clone();
    assert!(first.is_first() && !second.is_first());
    assert!(second.hold());
    chunks.send_data("two ".into()).await.unwrap();
    assert!(first.frame().now_or_never().is_none());

    // The second attempt starts after all.
    assert_eq!(next(&mut second).await.unwrap(), "one ");
    assert_eq!(next(&mut first).await.unwrap_err(), "the request was sent again");
    assert_eq!(next(&mut second).await.unwrap(), "two ");
    assert!(!second.clone().hold(), "the body exceeds the limit");
    chunks.send_data("three".into()).await.unwrap();
    drop(chunks);
    assert_eq!(next(&mut second).await.unwrap(), "three");
    assert!(in_time(second.frame()).await.is_none());
}

#[tokio::test]
async fn the_latest_started_attempt_takes_over_the_body() {
    let (mut chunks, mut first) = kept_body(10);
    let (mut with_another_key, mut once_more) = (first.clone(), first.clone());
    chunks.send_data("one ".into()).await.unwrap();
    assert!(once_more.hold());
    assert_eq!(next(&mut once_more).await.unwrap(), "one ");
    assert_eq!(next(&mut first).await.unwrap_err(), "the request was sent again", "it had not begun");
    assert!(with_another_key.hold());
    assert_eq!(next(&mut with_another_key).await.unwrap(), "one ");
    chunks.send_data("two".into()).await.unwrap();
    assert_eq!(next(&mut once_more).await.unwrap_err(), "the request was sent again");
    assert_eq!(next(&mut with_another_key).await.unwrap(), "two");
}

#[tokio::test]
async fn dropping_the_next_attempt_resumes_the_earlier_one() {
    let (mut chunks, mut first) = kept_body(6);
    let second = first.clone();
    assert!(second.hold());
    chunks.send_data("one ".into()).await.unwrap();
    let waiting = tokio::spawn(async move { next(&mut first).await });
    settle().await;
    assert!(!waiting.is_finished());
    drop(second);
    assert_eq!(in_time(waiting).await.unwrap().unwrap(), "one ");
}

#[tokio::test]
async fn a_polled_body_without_data_awaits_its_caller() {
    let (mut chunks, mut body) = kept_body(6);
    let caller = body.caller();
    assert!(!caller.is_waited_for(), "nothing has polled the body");
    assert!(body.frame().now_or_never().is_none());
    assert!(caller.is_waited_for());
    chunks.send_data("one".into()).await.unwrap();
    assert_eq!(next(&mut body).await.unwrap(), "one");
    assert!(!caller.is_waited_for());
}

#[tokio::test]
async fn each_attempt_reports_the_exact_body_size() {
    let mut first = KeptBody::new(Body::from("12345"), limits(10, 10));
    assert_eq!((first.size_hint().exact(), first.is_end_stream()), (Some(5), false));
    next(&mut first).await.unwrap();
    assert_eq!((first.size_hint().exact(), first.is_end_stream()), (Some(0), true));
    let second = first.clone();
    assert_eq!((second.size_hint().exact(), second.is_end_stream()), (Some(5), false));
    let none = KeptBody::new(Body::empty(), limits(10, 10));
    assert!(none.is_end_stream() && none.clone().is_end_stream());
}

#[tokio::test]
async fn hop_by_hop_headers_are_stripped_both_ways() {
    let (upstream, seen) = raw_upstream(
        "HTTP/1.1 200 OK\r\nConnection: x-of-upstream, close\r\nX-Of-Upstream: 1\r\nKeep-Alive: timeout=9\r\n\
         Proxy-Authenticate: Basic\r\nProxy-Connection: close\r\nUpgrade: h2c\r\nX-Kept: 1\r\n\
         Transfer-Encoding: chunked\r\n\r\n4\r\nfine\r\n0\r\n\r\n",
    )
    .await;
    let gateway = Gateway::before(upstream, &["a"], []).await;
    let answer = exchange(
        gateway.address(),
        "POST / HTTP/1.1\r\nHost: localhost\r\nConnection: close, X-Of-Caller, content-length\r\nX-Of-Caller: 1\r\n\
         Keep-Alive: 1\r\nProxy-Connection: close\r\nTE: trailers\r\nUpgrade: websocket\r\n\
         Expect: 100-continue\r\nAccept-Encoding: br\r\nX-Kept: 1\r\nContent-Length: 2\r\n\r\nhi",
    )
    .await;
    let (answer, request) = (answer.to_lowercase(), seen.lock().unwrap()[0].to_lowercase());
    for kept in [&answer, &request] {
        assert!(kept.contains("x-kept: 1"), "{kept}");
    }
    let ours = ["x-of-upstream", "timeout=9", "proxy-", "h2c"];
    assert!(!ours.iter().any(|gone| answer.contains(gone)), "{answer}");
    let theirs = ["x-of-caller", "keep-alive", "proxy-", "te:", "upgrade", "websocket", "expect", "gateway"];
    assert!(!theirs.iter().any(|gone| request.contains(gone)), "{request}");
    assert!(request.contains("accept-encoding: identity"), "{request}");
    assert!(request.contains("content-length: 2"), "{request}");
    assert!(answer.ends_with("4\r\nfine\r\n0\r\n\r\n"), "{answer}");
}

#[tokio::test]
async fn http_1_0_responses_become_http_1_1() {
    let (upstream, _) = raw_upstream("HTTP/1.0 200 OK\r\nContent-Length: 4\r\n\r\nfine").await;
    let gateway = Gateway::before(upstream, &["a"], []).await;
    let answer =
        exchange(gateway.address(), "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
}

#[tokio::test]
async fn the_callers_credentials_never_reach_the_upstream() {
    let (upstream, seen) =
        raw_upstream("HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").await;
    for (places, at) in [
        (&["--inject", "bearer"][..], "authorization: bearer sk-a"),
        (&["--inject", "header:x-own", "--inject", "query:key"], "get /v1?x=1&key=sk-a http/1.1"),
    ] {
        let keys = keys_file("a|sk-a");
        let upstream = format!("http://{upstream}");
        let arguments = ["--upstream", &upstream, "--keys", keys.path(), "--client-token", "the-canary"];
        let gateway = Gateway::start(command(arguments.iter().chain(places))).await;
        let query = if places.len() > 2 { "?x=1&key=the-canary" } else { "" };
        let request = format!(
            "GET /v1{query} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: Bearer the-canary\r\n\
             Authorization: Basic canary\r\nx-api-key: canary\r\nApi-Key: canary\r\nX-Goog-Api-Key: canary\r\n\
             OpenAI-Organization: org-canary\r\nOpenAI-Project: canary\r\nX-Goog-User-Project: canary\r\n\
             Proxy-Authorization: Basic canary\r\nx-own: canary\r\n\r\n"
        );
        let request = if places.len() > 2 { request } else { request.replace("x-own: canary\r\n", "") };
        assert!(exchange(gateway.address(), &request).await.starts_with("HTTP/1.1 200"));
        let arrived = seen.lock().unwrap().pop().unwrap().to_lowercase();
        assert!(arrived.contains(at), "{arrived}");
        assert!(!arrived.contains("canary"), "{arrived}");
        assert_eq!(arrived.matches("sk-a").count(), places.len() / 2, "{arrived}");
    }
}

#[tokio::test]
async fn redirects_are_passed_on_and_not_followed() {
    let elsewhere = Server::answering(|| answer(200, "a key was here")).await;
    let location = elsewhere.url();
    let upstream = Server::answering(move || answer_with(307, [("location", &*location)], "")).await;
    let gateway = Gateway::before(upstream.address(), &["a"], []).await;
    let client = reqwest::Client::builder().no_proxy().redirect(reqwest::redirect::Policy::none()).build();
    let response = client.unwrap().get(gateway.url("/")).send().await.unwrap();
    assert_eq!(response.status(), 307);
    assert_eq!(header(&response, "location"), Some(&*elsewhere.url()));
    assert_eq!(elsewhere.count(), 0);
}

#[tokio::test]
async fn upstream_path_redirects_lead_back_to_the_gateway() {
    let upstream = Server::start(async |request| match request.uri().path() {
        "/tenant/old" => {
            let host = request.headers()["host"].to_str().unwrap();
            answer_with(308, [("location", &*format!("http://{host}/tenant/new?page=2"))], "")
        }
        path => answer(200, path.to_owned()),
    })
    .await;
    let (keys, url) = (keys_file("a|sk-a"), format!("http://{}/tenant", upstream.address()));
    let gateway = Gateway::start(command(["--upstream", &url, "--keys", keys.path()])).await;
    let response = http().get(gateway.url("/old")).send().await.unwrap();
    assert_eq!(response.url().as_str(), gateway.url("/new?page=2"));
    assert_eq!(response.text().await.unwrap(), "/tenant/new");
}

#[tokio::test]
async fn headers_about_the_upstream_origin_are_removed() {
    let of_origin = [
        ("strict-transport-security", "max-age=9"),
        ("alt-svc", "h3=\":443\""),
        ("clear-site-data", "\"*\""),
        ("x-kept", "1"),
    ];
    let upstream = Server::answering(move || answer_with(200, of_origin, "")).await;
    let gateway = Gateway::before(upstream.address(), &["a"], []).await;
    let response = http().get(gateway.url("/")).send().await.unwrap();
    let passed = of_origin.map(|(name, _)| response.headers().contains_key(name));
    assert_eq!(passed, [false, false, false, true]);
}

#[tokio::test]
async fn only_callers_with_a_client_token_are_served() {
    let upstream = Server::answering(|| answer(200, "fine")).await;
    let tokens = ["--client-token", "token-one", "--client-token", "token-two"];
    let gateway = Gateway::before(upstream.address(), &["a"], tokens).await;
    for (name, value) in [
        ("authorization", "Bearer token-one"),
        ("authorization", "bearer token-two"),
        ("x-api-key", "token-two"),
        ("api-key", "token-one"),
        ("x-goog-api-key", "token-two"),
    ] {
        let response = http().get(gateway.url("/")).header(name, value).send().await.unwrap();
        assert_eq!(response.status(), 200, "{name}: {value}");
    }
    assert_eq!(upstream.count(), 5);
    for (name, value) in [
        ("authorization", "Bearer token-on"),
        ("authorization", "Bearer token-onetoken-one"),
        ("authorization", "Bearer "),
        ("x-api-key", "sk-a"),
        ("cookie", "token-one"),
    ] {
        let response = http().post(gateway.url("/v1")).header(name, value).body("hi").send().await.unwrap();
        assert_eq!(response.status(), 401, "{name}: {value}");
        assert_eq!(header(&response, "www-authenticate"), Some("Bearer"));
        assert_eq!(json_of(response).await["error"]["code"], "invalid_api_key");
    }
    let response = http().post(gateway.url("/v1/messages")).send().await.unwrap();
    let error = json_of(response).await;
    assert_eq!((&error["type"], &error["error"]["type"]), (&json!("error"), &json!("authentication_error")));
    assert_eq!(upstream.count(), 5);
    assert!(!gateway.log().contains("without a client token"));
}

#[tokio::test]
async fn guessed_tokens_are_counted_and_logged() {
    let upstream = Server::answering(|| answer(200, "fine")).await;
    let tokens = ["--client-token", "the-token", "--admin-token", "the-admin"];
    let gateway = Gateway::before(upstream.address(), &["a"], tokens).await;
    for (url, right) in [(gateway.url("/"), "the-token"), (gateway.admin_url("/metrics"), "the-admin")] {
        for number in 0..25 {
            let guess = http().get(&url).bearer_auth(format!("canary-{number}")).send().await.unwrap();
            assert_eq!(guess.status(), 401);
        }
        // This machine is not locked out: a proxy may run on it.
        let served = http().get(&url).bearer_auth(right).send().await.unwrap();
        assert_eq!(served.status(), 200);
    }
    let metrics = http().get(gateway.admin_url("/metrics")).bearer_auth("the-admin").send().await.unwrap();
    let metrics = metrics.text().await.unwrap();
    for of in ["client", "admin"] {
        let counted = format!("gateway_wrong_tokens_total{{of=\"{of}\"}} 25");
        assert!(metrics.contains(&counted), "{counted}: {metrics}");
        for line in [format!("wrong {of} token address=127.0.0.1"), format!("too many wrong {of} tokens")] {
            assert_eq!(gateway.log().matches(&line).count(), 1, "{line}: {}", gateway.log());
        }
    }
    assert!(!gateway.log().contains("canary") && !gateway.log().contains("the-admin"), "{}", gateway.log());
}

/// Returns the message for a wrong setting, which is one line.
fn one_line(output: &Output) -> String {
    let said = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.starts_with("key-rotation-gateway: ") && said.lines().count() == 1, "{said}");
    assert!(!said.contains("canary"), "{said}");
    said
}

#[tokio::test]
async fn without_client_token_the_gateway_stays_on_loopback() {
    let keys = keys_file("a|sk-a");
    let arguments = ["--upstream", "https://example.com", "--keys", keys.path(), "--listen", "0.0.0.0:0"];
    let said = one_line(&refusal(arguments).await);
    assert!(said.contains("without a client token it listens on loopback only"), "{said}");
    let arguments_of_admin =
        ["--upstream", "https://example.com", "--admin-listen", "0.0.0.0:0", "--keys", keys.path()];
    let said = one_line(&refusal(arguments_of_admin).await);
    assert!(said.contains("without an admin token it listens on loopback only"), "{said}");
    let with_token = arguments.iter().chain(&["--client-token", "token-one", "--admin-listen", "0.0.0.0:0"]);
    let gateway = Gateway::start_listening(command(with_token)).await;
    assert!(gateway.address().ip().is_unspecified());

    let upstream = Server::answering(|| answer(200, "fine")).await;
    let gateway = Gateway::before(upstream.address(), &["a"], []).await;
    assert!(gateway.log().contains("without a client token"), "{}", gateway.log());
}

#[tokio::test]
async fn cross_origin_and_proxied_requests_need_client_tokens() {
    let upstream = Server::answering(|| answer(200, "fine")).await;
    let open = Gateway::before(upstream.address(), &["a"], []).await;
    let status = async |gateway: &Gateway, name: &str, value: &str| {
        let request =
            http().post(gateway.url("/v1/models")).header("x-api-key", "token-one").header(name, value);
        request.send().await.unwrap().status()
    };
    for (name, value) in [
        ("host", "example.com"),
        ("sec-fetch-site", "cross-site"),
        ("sec-fetch-site", "same-site"),
        ("origin", "http://localhost:3000"),
        ("x-forwarded-for", "10.1.2.3"),
        ("via", "1.1 proxy"),
    ] {
        assert_eq!(status(&open, name, value).await, 403, "{name}: {value}");
    }
    assert_eq!(upstream.count(), 0);
    let origin = open.url("");
    for (name, value) in [("host", "localhost:8080"), ("sec-fetch-site", "same-origin"), ("origin", &origin)]
    {
        assert_eq!(status(&open, name, value).await, 200, "{name}: {value}");
    }
    // A page of another site does not know the token.
    let with_a_token = Gateway::before(upstream.address(), &["a"], ["--client-token", "token-one"]).await;
    assert_eq!(status(&with_a_token, "host", "example.com").await, 200);
}

#[tokio::test]
async fn invalid_settings_exit_2_with_one_line() {
    let keys = keys_file("a|sk-a");
    let unusable = keys_file("a|sk-canary \n");
    let not_json = file("json", r#"["sk-canary", ]"#);
    let data_keys = file("txt", "canary");
    let with = |name, value| vec!["--upstream", "https://example.com", "--keys", keys.path(), name, value];
    for (wrong, expected) in [
        (vec![], "--upstream"),
        (vec!["--keys", keys.path()], "--upstream"),
        (vec!["--upstream", "ftp://example.com"], "--upstream <URL>: it must be http://"),
        (vec!["--upstream", "example.com"], "--upstream <URL>: it must be http://"),
        (vec!["--upstream", "https://me:canary@example.com"], "it has a user or password"),
        (vec!["--upstream", "https://example.com?key=canary"], "it has a query"),
        (vec!["--upstream", "https://example.com"], "there are no keys"),
        (
            vec!["--upstream", "https://example.com", "--keys", "no/such/file"],
            "no/such/file could not be read",
        ),
        (
            vec!["--upstream", "https://example.com", "--keys", not_json.path()],
            "line 1, column 15: not valid JSON",
        ),
        (vec!["--upstream", "http://example.com", "--keys", keys.path()], "cleartext"),
        (with("--listen", "nowhere"), "--listen <ADDRESS>"),
        (with("--inject", "header:no header"), "it is bearer, header:NAME or query:NAME"),
        (with("--cooldown", "soon"), "--cooldown <SECONDS>: not a number"),
        (with("--response-timeout", "inf"), "--response-timeout <SECONDS>"),
        (with("--idle-timeout", "0"), "--idle-timeout: it must be more than 0 seconds"),
        (with("--attempts", "0"), "--attempts <N>"),
        (with("--keep-body", "1MiB"), "--keep-body <BYTES>"),
        (with("--client-token", "canary canary"), "--client-token <TOKEN>: a token is"),
        (with("--admin-token", ""), "--admin-token <TOKEN>"),
        (with("--data-keys", data_keys.path()), "--data-keys is for keys that are kept"),
        (with("--mongodb", "mongo://me:canary@localhost"), "--mongodb"),
        (with("--log", "gateway=loud"), "--log"),
        (with("--no-such-setting", "1"), "--no-such-setting"),
        ([with("--client-token", "the-token"), vec!["canary"]].concat(), "a value without a name"),
        (with("--config", "no/such/file.toml"), "no/such/file.toml"),
    ] {
        let said = one_line(&refusal(&wrong).await);
        assert!(said.contains(expected), "{wrong:?}: {said}");
    }
    let output = refusal(["--upstream", "https://example.com", "--keys", unusable.path()]).await;
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(said.lines().last().unwrap().contains("line 1: key a: the secret begins or ends with"), "{said}");
    assert!(!said.contains("canary"), "{said}");
    let mut wrong = command(with("--mongodb", "mongodb://localhost"));
    wrong.args(["--data-keys", data_keys.path()]);
    assert!(one_line(&ended(wrong).await).contains("data key"));
    let mut wrong = command(with("--log", "info"));
    wrong.env("GATEWAY_COOLDOWN", "canary");
    assert!(one_line(&ended(wrong).await).contains("--cooldown <SECONDS>: not a number of seconds"));
    let mut wrong = command(with("--log", "info"));
    wrong.env("GATEWAY_CLIENT_TOKEN", OsStr::from_bytes(b"canary\xff"));
    assert!(one_line(&ended(wrong).await).contains("GATEWAY_CLIENT_TOKEN: it is not UTF-8"));
    let mut wrong = command(with("--log", "info"));
    wrong.arg("--client-token").arg(OsStr::from_bytes(b"canary\xff"));
    assert!(one_line(&ended(wrong).await).contains("argument 8: it is not UTF-8"));
}

#[tokio::test]
async fn config_file_errors_name_the_file_and_setting() {
    for (text, expected) in [
        ("upstream = \"https://example.com\"\nclient-token = \"canary", "line 2: "),
        ("no-such = 1", "--no-such"),
        ("config = \"other.toml\"", "config: not allowed within a settings file"),
        ("cooldown = \"canary\"", "--cooldown <SECONDS>: not a number of seconds"),
        ("cooldown = [1, 2]", "--cooldown"),
        ("[client-token]\nme = \"canary\"", "client-token: it must be text"),
        ("sanitize-errors = \"canary\"", "--sanitize-errors"),
        ("client-token = [\"canary canary\"]", "--client-token <TOKEN>: a token is"),
        ("client-token = [\"canary,canary\"]", "client-token: a value can't contain a comma"),
    ] {
        let file = file("toml", text);
        let said = one_line(&refusal(["--config", file.path()]).await);
        assert!(said.contains(&format!("{}: ", file.path())) && said.contains(expected), "{text}: {said}");
    }
}

#[tokio::test]
async fn settings_prefer_command_line_then_environment_then_file() {
    let answering = |name: &'static str| Server::answering(move || answer(200, name));
    let (of_file, of_environment, of_line) =
        (answering("file").await, answering("environment").await, answering("line").await);
    let url = |server: &Server| format!("http://{}", server.address());
    let keys = keys_file("a|sk-a");
    let settings = format!(
        "upstream = {:?}\nkeys = {:?}\nclient-token = [\"token-one\", \"token-two\"]\nsanitize-errors = true\nwait = 0.5\n",
        url(&of_file),
        keys.path(),
    );
    let file = file("toml", &settings);
    let served_by = async |gateway: &Gateway, token: &str| {
        let response = http().get(gateway.url("/")).header("x-api-key", token).send().await.unwrap();
        if response.status() == 200 { response.text().await.unwrap() } else { "nobody".to_owned() }
    };

    let gateway = Gateway::start(command(["--config", file.path()])).await;
    assert_eq!(served_by(&gateway, "token-two").await, "file");
    assert_eq!(served_by(&gateway, "token-three").await, "nobody");

    let mut with_environment = command(["--config", file.path()]);
    with_environment
        .env("GATEWAY_UPSTREAM", url(&of_environment))
        .env("GATEWAY_CLIENT_TOKEN", "token-three,token-four");
    with_environment.env("GATEWAY_ADMIN_TOKEN", "");
    let gateway = Gateway::start(with_environment).await;
    assert_eq!(served_by(&gateway, "token-four").await, "environment");
    assert_eq!(served_by(&gateway, "token-two").await, "nobody");

    let mut with_line = command(["--upstream", &url(&of_line), "--client-token", "token-five"]);
    with_line.env("GATEWAY_CONFIG", file.path());
    with_line
        .env("GATEWAY_UPSTREAM", url(&of_environment))
        .env("GATEWAY_CLIENT_TOKEN", "token-three,token-four");
    let gateway = Gateway::start(with_line).await;
    assert_eq!(served_by(&gateway, "token-five").await, "line");
    assert_eq!(served_by(&gateway, "token-four").await, "nobody");
}

#[tokio::test]
async fn the_command_line_can_unset_a_file_flag() {
    let upstream = Server::answering(|| answer(400, "the upstream's own words")).await;
    let file = file("toml", "sanitize-errors = true");
    for (flag, shown) in [("--sanitize-errors", false), ("--sanitize-errors=false", true)] {
        let gateway = Gateway::before(upstream.address(), &["a"], ["--config", file.path(), flag]).await;
        let response = http().get(gateway.url("/")).send().await.unwrap().text().await.unwrap();
        assert_eq!(response.contains("own words"), shown, "{response}");
    }
}

#[tokio::test]
async fn help_names_settings_but_no_environment_values() {
    let mut help = command(["--help"]);
    help.env("GATEWAY_CLIENT_TOKEN", "canary").env("GATEWAY_MONGODB", "mongodb://me:canary@localhost");
    let output = ended(help).await;
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success());
    for setting in ["--upstream <URL>", "[env: GATEWAY_CLIENT_TOKEN]", "[default: 127.0.0.1:8080]"] {
        assert!(said.contains(setting), "{setting} is not in {said}");
    }
    assert!(!said.contains("canary"), "{said}");
}

#[tokio::test]
async fn a_taken_address_exits_1_and_is_named_last() {
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let keys = keys_file("a|sk-a");
    let address = taken.local_addr().unwrap().to_string();
    let output =
        refusal(["--upstream", "https://example.com", "--keys", keys.path(), "--listen", &address]).await;
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    let last = said.lines().last().unwrap_or_default();
    assert!(
        last.starts_with(&format!("key-rotation-gateway: --listen: {address}: "))
            && !said.contains("panicked"),
        "{said}"
    );
}

#[tokio::test]
async fn an_api_shaped_429_tells_when_keys_return() {
    let upstream = Server::start(async |request| {
        let wait = if key_of(&request) == Some("a") { "7" } else { "500" };
        answer_with(429, [("retry-after", wait)], "the upstream's own words")
    })
    .await;
    let gateway =
        Gateway::before(upstream.address(), &["a", "b"], ["--pace=false", "--wait", "0", "--cooldown", "1"])
            .await;
    let post = |path: &str| http().post(gateway.url(path)).body("hi").send();
    let assert_true = |response: &reqwest::Response| {
        let wait: u64 = header(response, "retry-after").unwrap().parse().unwrap();
        assert!((4..=7).contains(&wait), "{wait}");
    };

    // The response of the last attempt, but with the wait of a, which returns before b.
    let response = post("/v1/chat/completions").await.unwrap();
    assert_eq!(response.status(), 429);
    assert_true(&response);
    assert_eq!(response.text().await.unwrap(), "the upstream's own words");
    assert_eq!(upstream.keys(), ["a", "b"]);

    let response = post("/v1/chat/completions").await.unwrap();
    assert_eq!(response.status(), 429);
    assert_true(&response);
    let error = json_of(response).await;
    assert_eq!(error["error"]["type"], "rate_limit_error");
    assert_eq!(error["error"]["code"], "rate_limit_exceeded");
    assert_eq!(error["error"]["param"], Value::Null);
    let message = error["error"]["message"].as_str().unwrap();
    assert!(message.contains("all keys rest or have no room; the first is available in"), "{message}");

    let response = post("/v1/messages/count_tokens").await.unwrap();
    assert_true(&response);
    let error = json_of(response).await;
    assert_eq!((&error["type"], &error["error"]["type"]), (&json!("error"), &json!("rate_limit_error")));
    let versioned = http().get(gateway.url("/v1/models")).header("anthropic-version", "2023-06-01").send();
    assert_eq!(json_of(versioned.await.unwrap()).await["type"], "error");
    assert_eq!(upstream.count(), 2, "a resting key was used");
}

#[tokio::test]
async fn a_rewritten_retry_after_drops_the_millisecond_hints() {
    let hints = [("retry-after", "500"), ("retry-after-ms", "500000"), ("x-ms-retry-after-ms", "500000")];
    let upstream = Server::start(move |request| {
        let limited_longer = key_of(&request) != Some("a");
        let reply = if limited_longer { answer_with(429, hints, "") } else { answer(429, "") };
        std::future::ready(reply)
    })
    .await;
    let gateway =
        Gateway::before(upstream.address(), &["a", "b"], ["--pace=false", "--wait", "0", "--cooldown", "9"])
            .await;
    let response = http().get(gateway.url("/")).send().await.unwrap();
    assert_eq!((header(&response, "retry-after-ms"), header(&response, "x-ms-retry-after-ms")), (None, None));
    assert!(header(&response, "retry-after").unwrap().parse::<u64>().unwrap() <= 9);
}

#[tokio::test]
async fn refused_keys_alone_mean_429_until_a_trial() {
    let upstream = Server::answering(|| answer(401, r#"{"error":{"code":"invalid_api_key"}}"#)).await;
    let gateway = Gateway::before(upstream.address(), &["a", "b"], []).await;
    let ready = async || http().get(gateway.url("/readyz")).send().await.unwrap().status();
    assert_eq!(ready().await, 200);
    assert_eq!(http().get(gateway.url("/")).send().await.unwrap().status(), 401);
    let response = http().get(gateway.url("/")).send().await.unwrap();
    // The first key is revoked. The last one only rests, and is tried again.
    assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
    assert!((1..=60).contains(&header(&response, "retry-after").unwrap().parse::<u64>().unwrap()));
    assert_eq!(json_of(response).await["error"]["code"], "rate_limit_exceeded");
    assert_eq!(upstream.keys(), ["a", "b"]);
    assert_eq!(ready().await, 200);
    assert_eq!(http().get(gateway.url("/healthz")).send().await.unwrap().status(), 200);
}

#[tokio::test]
async fn health_checks_need_no_token_or_healthy_key() {
    let upstream = Server::limiting(["a"]).await;
    let gateway =
        Gateway::before(upstream.address(), &["a"], ["--client-token", "token-one", "--wait", "0"]).await;
    let limited = http().get(gateway.url("/")).header("x-api-key", "token-one").send().await.unwrap();
    assert_eq!(limited.status(), 429);
    for path in ["/healthz", "/readyz"] {
        assert_eq!(http().get(gateway.url(path)).send().await.unwrap().status(), 200);
        assert_eq!(http().head(gateway.url(path)).send().await.unwrap().status(), 200);
    }
    assert_eq!(upstream.count(), 1);
}

#[tokio::test]
async fn with_wait_a_request_waits_for_a_key() {
    let upstream = Server::limiting(["a"]).await;
    let gateway =
        Gateway::before(upstream.address(), &["a"], ["--pace=false", "--cooldown", "0.3", "--wait", "10"])
            .await;
    let response = tokio::spawn(http().post(gateway.url("/")).body("hi").send());
    eventually("it is limited", || upstream.count() == 1).await;
    upstream.lift("a");
    assert_eq!(in_time(response).await.unwrap().unwrap().status(), 200);
    assert!(upstream.requests().iter().all(|request| request.body() == "hi"));
}

#[tokio::test]
async fn an_unreachable_or_broken_upstream_gives_502() {
    let not_there = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let (breaks_off, _) = raw_upstream("HTTP/1.1 20").await;
    let (speaks_nonsense, _) = raw_upstream("nonsense\r\n\r\n").await;
    for (upstream, expected) in
        [(not_there, "can't be reached"), (breaks_off, "broke off"), (speaks_nonsense, "broke off")]
    {
        let gateway = Gateway::before(upstream, &["a"], []).await;
        let response = http().get(gateway.url("/v1/models?q=1")).send().await.unwrap();
        assert_eq!(response.status(), 502);
        let error = json_of(response).await;
        assert_eq!(error["error"]["code"], "bad_gateway");
        let message = error["error"]["message"].as_str().unwrap();
        assert!(message.contains(expected), "{message}");
        eventually("it is logged", || gateway.log().contains("no answer from the upstream")).await;
    }
}

#[tokio::test]
async fn connect_timeouts_give_502_and_response_timeouts_504() {
    // This upstream never starts its TLS handshake.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let keys = keys_file("a|sk-a");
    let url = format!("https://{}", silent.local_addr().unwrap());
    let arguments = ["--upstream", &url, "--keys", keys.path(), "--connect-timeout", "0.2"];
    let gateway = Gateway::start(command(arguments)).await;
    let response = in_time(http().get(gateway.url("/")).send()).await.unwrap();
    assert_eq!(response.status(), 502);

    let upstream = upstream(async |_| std::future::pending().await).await;
    let gateway = Gateway::before(upstream, &["a"], ["--response-timeout", "0.2"]).await;
    let response = in_time(http().post(gateway.url("/v1/messages")).send()).await.unwrap();
    assert_eq!(response.status(), 504);
    assert_eq!(json_of(response).await["error"]["type"], "timeout_error");
}

#[tokio::test]
async fn a_stalled_request_body_gets_408_not_504() {
    let upstream = upstream(async |request| {
        let is_whole = request.into_body().collect().await.is_ok();
        answer(200, is_whole.to_string())
    })
    .await;
    let mut gateway = Gateway::before(upstream, &["a"], ["--response-timeout", "0.2"]).await;
    let (mut chunks, body) = streaming();
    chunks.send_data("the first half".into()).await.unwrap();
    let response = in_time(http().post(gateway.url("/")).body(body).send()).await.unwrap();
    assert_eq!(response.status(), 408);
    let error = json_of(response).await;
    assert_eq!(error["error"]["message"], "the request's body did not arrive in time");
    gateway.terminate().await;
    gateway.ended().await;
    assert!(!gateway.log().contains("no answer from the upstream"), "{}", gateway.log());
}

#[tokio::test]
async fn the_idle_timeout_ends_only_stalled_responses() {
    let (mut chunks, body) = stream();
    let upstream = answering_once("text/event-stream", body).await;
    let gateway = Gateway::before(upstream.address(), &["a"], ["--idle-timeout", "0.4"]).await;
    let mut response = http().get(gateway.url("/")).send().await.unwrap();
    for _ in 0..6 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        chunks.send_data("more".into()).await.unwrap();
        assert_eq!(in_time(response.chunk()).await.unwrap().unwrap(), "more");
    }
    assert!(in_time(response.chunk()).await.is_err(), "the caller must not take the response for complete");
    eventually("it is logged", || gateway.log().contains("the upstream's response broke off")).await;
}

#[tokio::test]
async fn sanitized_errors_keep_only_status_and_retry_after() {
    let errors = |status: u16| {
        let headers = [
            ("retry-after", "3"),
            ("x-ratelimit-limit-tokens", "40000"),
            ("openai-organization", "org-canary"),
            ("anthropic-organization-id", "org-canary"),
            ("content-type", "application/json"),
        ];
        answer_with(status, headers, r#"{"error":{"message":"org-canary owes $40000"}}"#)
    };
    let status = Arc::new(Mutex::new(500));
    let set = status.clone();
    let upstream = Server::start(move |_| std::future::ready(errors(*set.lock().unwrap()))).await;
    let sanitizing = Gateway::before(upstream.address(), &["a", "b"], ["--sanitize-errors"]).await;
    for wrong in [500, 400, 429] {
        *status.lock().unwrap() = wrong;
        let response = http().post(sanitizing.url("/v1/messages")).send().await.unwrap();
        assert_eq!(response.status(), wrong);
        assert!(header(&response, "retry-after").is_some());
        let shown = format!("{:?}", response.headers());
        let body = response.text().await.unwrap();
        assert!(!shown.contains("canary") && !shown.contains("40000"), "{shown}");
        assert!(
            !body.contains("canary") && body.contains(&format!("the upstream answered {wrong}")),
            "{body}"
        );
    }
    for own in [
        "HTTP/1.1 404 org-canary owes\r\ncontent-length: 10\r\n\r\norg-canary",
        "HTTP/1.1 650 org-canary owes\r\ncontent-length: 10\r\n\r\norg-canary",
    ] {
        let (upstream, _) = raw_upstream(own).await;
        let gateway = Gateway::before(upstream, &["a"], ["--sanitize-errors"]).await;
        let request = "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
        let answer = exchange(gateway.address(), request).await;
        assert!(answer.contains("the upstream answered") && !answer.contains("canary"), "{answer}");
    }
    *status.lock().unwrap() = 200;
    let another = Gateway::before(upstream.address(), &["a"], ["--sanitize-errors"]).await;
    assert!(http().get(another.url("/")).send().await.unwrap().text().await.unwrap().contains("canary"));
}

#[tokio::test]
async fn unsanitized_errors_pass_through_unchanged() {
    let upstream =
        Server::answering(|| answer_with(418, [("openai-organization", "org-1")], "short and stout")).await;
    let gateway = Gateway::before(upstream.address(), &["a"], []).await;
    let response = http().get(gateway.url("/")).send().await.unwrap();
    assert_eq!((response.status().as_u16(), header(&response, "openai-organization")), (418, Some("org-1")));
    assert_eq!(response.text().await.unwrap(), "short and stout");
}

/// Returns a gateway and both ends of a stream through it, the upstream's and the caller's. The caller has the first
/// chunk.
async fn with_a_stream_under_way(limit: &str) -> (Gateway, Sender<Bytes, Infallible>, reqwest::Response) {
    let (mut chunks, body) = stream();
    let upstream = answering_once("text/plain", body).await;
    let gateway = Gateway::before(upstream.address(), &["a"], ["--shutdown-limit", limit]).await;
    chunks.send_data("one ".into()).await.unwrap();
    let mut response = http().get(gateway.url("/")).send().await.unwrap();
    assert_eq!(response.chunk().await.unwrap().unwrap(), "one ");
    (gateway, chunks, response)
}

#[tokio::test]
async fn shutdown_finishes_running_requests_and_accepts_no_more() {
    let (mut gateway, mut chunks, mut response) = with_a_stream_under_way("10").await;
    gateway.terminate().await;
    let address = gateway.address();
    mongo::eventually_within(10 * SECOND, "it takes no more connections", || async {
        TcpStream::connect(address).await.is_err()
    })
    .await;
    chunks.send_data("two".into()).await.unwrap();
    drop(chunks);
    assert_eq!(response.chunk().await.unwrap().unwrap(), "two");
    assert_eq!(response.chunk().await.unwrap(), None);
    assert_eq!(gateway.ended().await.code(), Some(0));
    assert!(!gateway.log().contains("broken off"), "{}", gateway.log());
}

#[tokio::test]
async fn shutdown_breaks_off_requests_after_its_limit() {
    let (mut gateway, _chunks, mut response) = with_a_stream_under_way("0.2").await;
    let told = Instant::now();
    gateway.terminate().await;
    assert_eq!(gateway.ended().await.code(), Some(0));
    assert!(told.elapsed() < Duration::from_secs(5));
    assert!(gateway.log().contains("broken off"), "{}", gateway.log());
    assert!(response.chunk().await.is_err());
}

/// Arguments of a gateway with these keys in MongoDB.
fn over(mongo: &Mongo, upstream: SocketAddr) -> Vec<String> {
    let upstream = format!("http://{upstream}");
    let database = mongo.database.name();
    ["--upstream", &upstream, "--mongodb", &mongo.uri, "--mongodb-database", database]
        .map(String::from)
        .to_vec()
}

/// Reads a number of any BSON type.
fn number(document: &Document, field: &str) -> i64 {
    let value = document.get(field).unwrap_or_else(|| panic!("no {field} in {document}"));
    value.as_i64().or(value.as_i32().map(i64::from)).or(value.as_f64().map(|value| value as i64)).unwrap()
}

#[tokio::test]
async fn shutdown_writes_marks_and_usage_to_mongodb() {
    let mongo = Mongo::standalone().await;
    mongo.insert_all(["a", "b"]).await;
    let upstream = Server::limiting(["a"]).await;
    let mut gateway = Gateway::start(command(
        over(&mongo, upstream.address()).into_iter().chain(["--pace=false".to_owned()]),
    ))
    .await;
    for _ in 0..3 {
        assert_eq!(http().get(gateway.url("/")).send().await.unwrap().status(), 200);
    }
    gateway.terminate().await;
    assert_eq!(gateway.ended().await.code(), Some(0));
    assert_eq!(mongo.status("a").await, "rate_limited");
    assert_eq!(mongo.status("b").await, "healthy");
    let requests = async |id| number(&mongo.document(id).await, "requestsCount");
    assert_eq!((requests("a").await, requests("b").await), (2 + 1, 2 + 3));
}

#[tokio::test]
async fn data_keys_encrypt_keys_in_the_configured_collection() {
    let mongo = Mongo::standalone().await;
    let upstream = Server::answering(|| answer(200, "fine")).await;
    let data_key = format!("2026a={}", BASE64_STANDARD.encode([7; 64]));
    let (keys, data_keys) = (keys_file("a|sk-a"), file("txt", &data_key));
    let arguments = ["--keys", keys.path(), "--data-keys", data_keys.path(), "--mongodb-collection", "mine"];
    let arguments = over(&mongo, upstream.address()).into_iter().chain(arguments.map(String::from));
    let gateway = Gateway::start(command(arguments)).await;
    assert_eq!(http().get(gateway.url("/")).send().await.unwrap().status(), 200);
    assert_eq!(upstream.keys(), ["a"]);
    let mine = mongo.database.collection::<Document>("mine");
    mongo::eventually_within(10 * SECOND, "the key of the file is in MongoDB", || async {
        mine.count_documents(doc! { "_id": "a" }).await.unwrap() == 1
    })
    .await;
    let document = mine.find_one(doc! { "_id": "a" }).await.unwrap().unwrap();
    assert!(document.get_str("apiKey").unwrap().starts_with("encrypted."), "{document}");
}

#[tokio::test]
async fn without_mongodb_the_gateway_starts_only_with_keys() {
    let upstream = Server::answering(|| answer(200, "fine")).await;
    let url = format!("http://{}", upstream.address());
    let arguments =
        ["--upstream", &url, "--mongodb", "mongodb://127.0.0.1:1/gateway?serverSelectionTimeoutMS=200"];
    let output = refusal(arguments).await;
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.lines().last().unwrap().starts_with("key-rotation-gateway: "), "{said}");

    let keys = keys_file("a|sk-a");
    let gateway = Gateway::start(command(arguments.iter().chain(&["--keys", keys.path()]))).await;
    assert_eq!(http().get(gateway.url("/")).send().await.unwrap().status(), 200);
}

const CHAT: &str = r#"{"object":"chat.completion","choices":[{"message":{"content":"hi"}}],
    "usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2,"prompt_tokens_details":{"cached_tokens":1}}}"#;
const CHAT_WITHOUT_TOTAL: &str =
    r#"{"choices":[],"usage":{"prompt_tokens":40000,"completion_tokens":60000}}"#;
const CHAT_STREAM: &str = "data: {\"choices\":[{\"delta\":{\"content\":\"hi\"}}],\"usage\":null}\n\n\
    data: {\"choices\":[],\"usage\":{\"prompt_tokens\":10,\"completion_tokens\":10,\"total_tokens\":20}}\n\n\
    data: [DONE]\n\n";
const RESPONSES_STREAM: &str = "event: response.created\ndata: {\"type\":\"response.created\",\"response\":{\"usage\":null}}\n\n\
    event: response.completed\ndata: {\"type\":\"response.completed\",\"response\":{\"usage\":{\"input_tokens\":100,\
    \"output_tokens\":100,\"total_tokens\":200}}}\n\n";
const MESSAGE: &str = r#"{"type":"message","usage":{"input_tokens":1000,"output_tokens":500,
    "cache_creation_input_tokens":300,"cache_read_input_tokens":200}}"#;
const MESSAGE_STREAM: &str = "event: message_start\r\ndata: {\"type\":\"message_start\",\"message\":{\"usage\":{\
    \"input_tokens\":10000,\"cache_creation_input_tokens\":0,\"cache_read_input_tokens\":5000,\"output_tokens\":1}}}\r\n\r\n\
    event: message_delta\r\ndata: {\"type\":\"message_delta\",\"usage\":{\"output_tokens\":2500}}\r\n\r\n\
    event: message_delta\r\ndata: {\"type\":\"message_delta\",\"usage\":{\"input_tokens\":0,\"output_tokens\":5000}}\r\n\r\n";

/// Splits a body into chunks with arbitrary boundaries.
fn in_pieces(text: &'static str) -> Body {
    let pieces = text.as_bytes().chunks(7).map(|piece| Ok::<_, Infallible>(Bytes::from_static(piece)));
    Body::from_stream(futures_util::stream::iter(pieces))
}

#[tokio::test]
async fn tokens_credit_the_serving_key_for_every_api() {
    let mongo = Mongo::standalone().await;
    mongo.insert_all(["limited", "serves"]).await;
    let upstream = Server::start(async |request| {
        if key_of(&request) == Some("limited") {
            let body = r#"{"error":{"message":"slow down"},"usage":{"total_tokens":7}}"#;
            return answer_with(429, [("content-type", "application/json")], body);
        }
        let (kind, body) = match request.uri().path() {
            "/chat" => ("application/json; charset=utf-8", CHAT),
            "/chat-without-total" => ("application/json", CHAT_WITHOUT_TOTAL),
            "/chat-stream" => ("text/event-stream; charset=utf-8", CHAT_STREAM),
            "/responses-stream" => ("text/event-stream", RESPONSES_STREAM),
            "/message" => ("application/json", MESSAGE),
            "/message-stream" => ("text/event-stream", MESSAGE_STREAM),
            "/text" => ("text/plain", CHAT),
            _ => ("application/json", r#"{"usage":"much","#),
        };
        answer_with(200, [("content-type", kind)], in_pieces(body))
    })
    .await;
    let mut gateway = Gateway::start(command(over(&mongo, upstream.address()))).await;
    for (path, body) in [
        ("/chat", CHAT),
        ("/chat-without-total", CHAT_WITHOUT_TOTAL),
        ("/chat-stream", CHAT_STREAM),
        ("/responses-stream", RESPONSES_STREAM),
        ("/message", MESSAGE),
        ("/message-stream", MESSAGE_STREAM),
        ("/text", CHAT),
        ("/cut", r#"{"usage":"much","#),
    ] {
        let response = http().post(gateway.url(path)).send().await.unwrap();
        assert_eq!(response.text().await.unwrap(), body, "the body passes unchanged");
    }
    gateway.terminate().await;
    assert_eq!(gateway.ended().await.code(), Some(0));
    let tokens = async |id| number(&mongo.document(id).await, "tokensUsed");
    assert_eq!(tokens("serves").await, 7 + 122_222, "each digit is an API's");
    assert_eq!(tokens("limited").await, 7);
}

/// Waits until tokens are credited and returns their total.
async fn tokens_at(gateway: &Gateway) -> u64 {
    let mut tokens = 0;
    for _ in 0..1_000 {
        let keys: Value =
            http().get(gateway.admin_url("/admin/api/keys")).send().await.unwrap().json().await.unwrap();
        tokens = keys["keys"][0]["tokens"].as_u64().unwrap();
        if tokens > 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    tokens
}

#[tokio::test]
async fn tokens_are_credited_for_post_but_not_get() {
    let upstream = Server::answering(|| answer_with(200, [("content-type", "application/json")], CHAT)).await;
    let gateway = Gateway::before(upstream.address(), &["a"], []).await;
    for method in [Method::GET, Method::GET, Method::POST] {
        let response = http().request(method, gateway.url("/v1/responses/1")).send().await.unwrap();
        assert_eq!(response.text().await.unwrap(), CHAT);
    }
    assert_eq!(tokens_at(&gateway).await, 2);
}

#[tokio::test]
async fn tokens_are_read_from_long_stream_lines() {
    let line = || {
        let text = "x".repeat(2 << 20);
        format!("data: {{\"response\":{{\"output\":\"{text}\",\"usage\":{{\"total_tokens\":2}}}}}}\n\n")
    };
    let upstream =
        Server::answering(move || answer_with(200, [("content-type", "text/event-stream")], line())).await;
    let gateway = Gateway::before(upstream.address(), &["a"], []).await;
    http().post(gateway.url("/v1/responses")).send().await.unwrap().bytes().await.unwrap();
    assert_eq!(tokens_at(&gateway).await, 2);
}

#[tokio::test]
async fn tokens_are_read_from_every_event_stream_form() {
    let used = r#"{"usage":{"total_tokens":2}}"#;
    let streams = [
        format!("data: {used}\n\ndata: [DONE]\n\n"),
        format!("data: {used}"),
        format!("event: x\r\ndata:{used}\r\n\r\n"),
        format!(": hello\rdata: {used}\r\r"),
        format!("\u{feff}data: {used}\n\n"),
        "data: {\"usage\":\ndata: {\"total_tokens\":2}}\n\n".to_owned(),
        "data: {\"usage\":\r\ndata: {\"total_tokens\":2}}\r\n\r\n".to_owned(),
        format!("data: {{\"choices\":[]}}\ndata: ping\ndata: {used}\ndata: [DONE]\n"),
    ];
    for stream in &streams {
        for step in [1, 1_000] {
            let body = stream.clone();
            let upstream = Server::answering(move || {
                let pieces = body.as_bytes().chunks(step).map(|piece| Ok::<_, Infallible>(piece.to_vec()));
                let body = Body::from_stream(futures_util::stream::iter(pieces.collect::<Vec<_>>()));
                answer_with(200, [("content-type", "Text/Event-Stream; charset=utf-8")], body)
            })
            .await;
            let gateway = Gateway::before(upstream.address(), &["a"], []).await;
            http().post(gateway.url("/v1")).send().await.unwrap().bytes().await.unwrap();
            assert_eq!(tokens_at(&gateway).await, 2, "{stream:?} by {step}");
        }
    }
}

#[tokio::test]
async fn callers_may_speak_http_2() {
    let upstream = Server::start(async |request| answer(200, request.into_body())).await;
    let gateway = Gateway::before(upstream.address(), &["a"], []).await;
    let client = Client::builder(TokioExecutor::new()).http2_only(true).build_http::<Full<Bytes>>();
    let request = Request::post(gateway.url("/v1")).body(Full::from("hello")).unwrap();
    let response = in_time(client.request(request)).await.unwrap();
    assert_eq!((response.status(), response.version()), (StatusCode::OK, Version::HTTP_2));
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "hello");
}

#[tokio::test]
async fn split_cookies_are_joined_for_http_1_upstreams() {
    let upstream = Server::answering(|| answer(200, "fine")).await;
    let gateway = Gateway::before(upstream.address(), &["a"], []).await;
    let client = Client::builder(TokioExecutor::new()).http2_only(true).build_http::<Full<Bytes>>();
    let request = Request::get(gateway.url("/")).header("cookie", "a=1").header("cookie", "b=2; c=3");
    in_time(client.request(request.body(Full::default()).unwrap())).await.unwrap();
    let arrived = upstream.requests();
    assert_eq!(arrived[0].headers().get_all("cookie").iter().collect::<Vec<_>>(), ["a=1; b=2; c=3"]);
}

/// Whether the next read finds the connection closed.
async fn is_closed(connection: &mut TcpStream) -> bool {
    match in_time(connection.read(&mut [0; 1024])).await {
        Ok(count) => count == 0,
        Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
    }
}

#[tokio::test]
async fn the_head_timeout_closes_silent_and_incomplete_connections() {
    let upstream = Server::answering(|| answer(200, "fine")).await;
    let gateway = Gateway::before(upstream.address(), &["a"], ["--head-timeout", "0.3"]).await;
    let http_2 = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    for said in ["", "P", "GET / HTTP/1.1\r\nHost: local", http_2] {
        let mut connection = TcpStream::connect(gateway.address()).await.unwrap();
        connection.write_all(said.as_bytes()).await.unwrap();
        let until_closed = async {
            // In HTTP/2 the gateway sends frames of its own.
            while !is_closed(&mut connection).await {}
        };
        in_time(until_closed).await;
    }
    assert_eq!(upstream.count(), 0);
}

#[tokio::test]
async fn an_idle_connection_is_kept_alive_until_timeout() {
    let upstream = Server::answering(|| answer(200, "fine")).await;
    let gateway = Gateway::before(upstream.address(), &["a"], ["--keep-alive", "0.3"]).await;
    let mut connection = TcpStream::connect(gateway.address()).await.unwrap();
    for _ in 0..2 {
        connection.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"fine") {
            assert_ne!(in_time(connection.read_buf(&mut answer)).await.unwrap(), 0);
        }
    }
    assert!(is_closed(&mut connection).await);
}

#[tokio::test]
async fn head_and_keep_alive_timeouts_spare_running_streams() {
    let (mut chunks, body) = stream();
    let upstream = answering_once("text/plain", body).await;
    let limits = ["--head-timeout", "0.2", "--keep-alive", "0.2"];
    let gateway = Gateway::before(upstream.address(), &["a"], limits).await;
    let mut response = http().get(gateway.url("/")).send().await.unwrap();
    for _ in 0..6 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        chunks.send_data("more".into()).await.unwrap();
        assert_eq!(in_time(response.chunk()).await.unwrap().unwrap(), "more");
    }
}

#[tokio::test]
async fn pings_detect_a_silently_lost_http_2_caller() {
    let (mut chunks, body) = stream();
    let upstream = answering_once("text/plain", body).await;
    let gateway = Gateway::before(upstream.address(), &["a"], ["--ping", "0.4"]).await;
    let between = Proxy::to(gateway.address()).await;
    let client = Client::builder(TokioExecutor::new()).http2_only(true).build_http::<Full<Bytes>>();
    let uri = format!("http://localhost:{}/", between.port());
    let response = client.request(Request::get(uri).body(Full::default()).unwrap());
    let mut response = in_time(response).await.unwrap();
    chunks.send_data("one".into()).await.unwrap();
    assert_eq!(in_time(response.frame()).await.unwrap().unwrap().into_data().unwrap(), "one");
    between.set(Fault::Silence);
    let until_noticed = async {
        while chunks.send_data("more".into()).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    in_time(until_noticed).await;
}

#[tokio::test]
async fn the_gateway_recovers_from_too_many_open_files() {
    let upstream = Server::answering(|| answer(200, "fine")).await;
    let (keys, url) = (keys_file("a|sk-a"), format!("http://{}", upstream.address()));
    let gateway = command(["--upstream", &url, "--keys", keys.path()]);
    let gateway = gateway.as_std();
    let mut with_few_files = Command::new("sh");
    with_few_files
        .args(["-c", "ulimit -n 40; exec \"$0\" \"$@\""])
        .env_clear()
        .env("GATEWAY_STATE", "none")
        .kill_on_drop(true);
    with_few_files.arg(gateway.get_program()).args(gateway.get_args());
    let gateway = Gateway::start(with_few_files).await;
    let connect = || TcpStream::connect(gateway.address());
    let connections = futures_util::future::join_all((0..50).map(|_| connect())).await;
    eventually("there are too many", || gateway.log().contains("can't accept connections")).await;
    drop(connections);
    assert_eq!(in_time(http().get(gateway.url("/")).send()).await.unwrap().status(), 200);
}

/// An HTTP/2 upstream that answers with the HTTP version of the request.
async fn upstream_with_tls() -> (SocketAddr, TestFile) {
    let (listener, address, trusted) = tls::listen().await;
    let version = async |request: Request<Body>| format!("{:?}", request.version());
    tokio::spawn(async move { axum::serve(listener, Router::new().fallback(version)).await });
    (address, trusted)
}

/// A frame: type, flags, stream and payload.
type Frame = (u8, u8, u32, Vec<u8>);

async fn read_frame(connection: &mut (impl AsyncRead + Unpin)) -> io::Result<Frame> {
    let head = connection.read_u64().await?;
    let (stream, length) = (connection.read_u8().await?, head >> 40);
    let mut payload = vec![0; length as usize];
    connection.read_exact(&mut payload).await?;
    Ok(((head >> 32) as u8, (head >> 24) as u8, (head as u32) << 8 | u32::from(stream), payload))
}

fn frame((kind, flags, stream, payload): Frame) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), &payload].concat()
}

const END: u8 = 0x1;

/// A `GOAWAY` frame with this last stream.
fn go_away(last: u32, code: u32) -> Frame {
    (7, 0, 0, [last.to_be_bytes(), code.to_be_bytes()].concat())
}

fn reset(stream: u32, code: u32) -> Frame {
    (3, 0, stream, code.to_be_bytes().to_vec())
}

/// A raw HTTP/2 upstream: it answers the first requests with these frames and all others with 204. It reports each
/// received body.
async fn upstream_in_frames(
    times: usize,
    refusal: impl Fn(u32) -> Vec<Frame> + Send + 'static,
) -> (SocketAddr, TestFile, Arc<Mutex<Vec<String>>>) {
    let (mut listener, address, trusted) = tls::listen().await;
    let arrived = Arc::new(Mutex::new(Vec::new()));
    let bodies = arrived.clone();
    tokio::spawn(async move {
        loop {
            let (mut connection, _) = listener.accept().await;
            connection.read_exact(&mut [0; "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".len()]).await.unwrap();
            connection.write_all(&frame((4, 0, 0, Vec::new()))).await.unwrap();
            let mut body = Vec::new();
            while let Ok((kind, flags, stream, payload)) = read_frame(&mut connection).await {
                match kind {
                    0 => body.extend(payload),
                    1 => {}
                    _ => continue,
                }
                if flags & END == 0 {
                    continue;
                }
                arrived.lock().unwrap().push(String::from_utf8(std::mem::take(&mut body)).unwrap());
                let is_refused = arrived.lock().unwrap().len() <= times;
                // ":status: 204" has an index of its own in the static table of RFC 7541.
                let fine = || vec![(1, END | 4, stream, vec![0x89])];
                let answer = if is_refused { refusal(stream) } else { fine() };
                connection.write_all(&answer.into_iter().flat_map(frame).collect::<Vec<_>>()).await.unwrap();
            }
        }
    });
    (address, trusted, bodies)
}

/// Posts this to a gateway in front of that upstream. Returns the status and the bodies that the upstream received.
async fn through_frames(
    times: usize,
    refusal: impl Fn(u32) -> Frame + Send + 'static,
    keep: &str,
    body: &'static str,
) -> (u16, Vec<String>) {
    let (upstream, trusted, bodies) = upstream_in_frames(times, move |stream| vec![refusal(stream)]).await;
    let gateway = tls::gateway(upstream.port(), &trusted, ["--keep-body", keep]).await;
    let response = in_time(http().post(gateway.url("/v1/messages")).body(body).send()).await.unwrap();
    let bodies = bodies.lock().unwrap().clone();
    (response.status().as_u16(), bodies)
}

/// A raw HTTP/2 upstream whose connections, by their number from 0, allow so many requests at once. It answers 204.
async fn upstream_allowing(
    requests: impl Fn(usize) -> u32 + Send + 'static,
) -> (SocketAddr, TestFile, Arc<AtomicUsize>) {
    let (mut listener, address, trusted) = tls::listen().await;
    let connections = Arc::new(AtomicUsize::new(0));
    let accepted = connections.clone();
    tokio::spawn(async move {
        loop {
            let (mut connection, _) = listener.accept().await;
            let most = requests(accepted.fetch_add(1, Relaxed));
            tokio::spawn(async move {
                const MAX_CONCURRENT_STREAMS: [u8; 2] = [0, 3];
                let setting = [&MAX_CONCURRENT_STREAMS[..], &most.to_be_bytes()].concat();
                connection.read_exact(&mut [0; "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".len()]).await?;
                connection.write_all(&frame((4, 0, 0, setting))).await?;
                while let Ok((kind, _, stream, _)) = read_frame(&mut connection).await {
                    if kind == 1 {
                        connection.write_all(&frame((1, END | 4, stream, vec![0x89]))).await?;
                    }
                }
                io::Result::Ok(())
            });
        }
    });
    (address, trusted, connections)
}

#[tokio::test]
async fn an_upstream_that_allows_no_request_gives_503_soon() {
    let (upstream, trusted, connections) = upstream_allowing(|_| 0).await;
    let gateway = tls::gateway(upstream.port(), &trusted, []).await;
    let response = in_time(http().post(gateway.url("/")).body("ask").send()).await.unwrap();
    assert_eq!((response.status().as_u16(), header(&response, "retry-after")), (503, Some("1")));
    let body = response.text().await.unwrap();
    assert!(body.contains("SETTINGS_MAX_CONCURRENT_STREAMS is 0"), "{body}");
    assert_eq!(connections.load(Relaxed), 2);
}

#[tokio::test]
async fn a_connection_that_allows_no_request_is_replaced() {
    let (upstream, trusted, connections) =
        upstream_allowing(|connection| if connection == 0 { 0 } else { 100 }).await;
    let gateway = tls::gateway(upstream.port(), &trusted, []).await;
    for _ in 0..3 {
        let response = in_time(http().post(gateway.url("/")).body("ask").send()).await.unwrap();
        assert_eq!(response.status(), 204);
    }
    assert_eq!(connections.load(Relaxed), 2);
}

#[tokio::test]
async fn s10_truncated_http_2_responses_break_off_for_callers() {
    let head = |stream| (1, 4, stream, vec![0x88]);
    let half = |stream| (0, 0, stream, b"half".to_vec());
    for cut in [|stream| reset(stream, 0), |stream| go_away(stream, 0)] {
        let answer = move |stream| vec![head(stream), half(stream), cut(stream)];
        let (upstream, trusted, _) = upstream_in_frames(1, answer).await;
        let gateway = tls::gateway(upstream.port(), &trusted, ["--idle-timeout", "2"]).await;
        let response = in_time(http().post(gateway.url("/")).body("ask").send()).await.unwrap();
        assert_eq!(response.status(), 200);
        assert!(in_time(response.bytes()).await.is_err());
    }
}

#[tokio::test]
async fn s10_truncated_http_2_requests_break_off_at_upstream() {
    let ended = Arc::new(Mutex::new(None));
    let seen = ended.clone();
    let upstream = upstream(move |request| {
        let seen = seen.clone();
        async move {
            let body = request.into_body().collect().await;
            *seen.lock().unwrap() = Some(body.is_ok());
            Response::default()
        }
    })
    .await;
    let gateway = Gateway::before(upstream, &["a"], []).await;
    let mut connection = TcpStream::connect(gateway.address()).await.unwrap();
    let authority = [&[0x41, 9], &b"localhost"[..]].concat();
    // POST, http and / have indices in the static table of RFC 7541.
    let head = [&[0x83, 0x86, 0x84], &authority[..]].concat();
    let frames = [(4, 0, 0, vec![]), (1, 4, 1, head), (0, 0, 1, b"half".to_vec()), reset(1, 0)];
    connection.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    for part in frames {
        connection.write_all(&frame(part)).await.unwrap();
        // So that the request is on its way before it is cut off.
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    eventually("the upstream's body ends", || ended.lock().unwrap().is_some()).await;
    assert_eq!(*ended.lock().unwrap(), Some(false));
}

#[tokio::test]
async fn s10_a_length_beside_chunks_is_dropped() {
    let both =
        "HTTP/1.1 200 OK\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n6\r\nabcdef\r\n0\r\n\r\n";
    let (upstream, _) = raw_upstream(both).await;
    let gateway = Gateway::before(upstream, &["a"], []).await;
    let response = in_time(http().get(gateway.url("/")).send()).await.unwrap();
    assert_eq!(header(&response, "content-length"), None);
    assert_eq!(response.text().await.unwrap(), "abcdef");
}

#[tokio::test]
async fn unprocessed_http_2_requests_are_resent_with_body() {
    const NO_ERROR: u32 = 0;
    const INTERNAL_ERROR: u32 = 2;
    const REFUSED_STREAM: u32 = 7;
    let closed = |_| go_away(0, NO_ERROR);
    assert_eq!(through_frames(1, closed, "4", "kept").await, (204, vec!["kept".to_owned(); 2]), "it closes");
    let refused = |stream| reset(stream, REFUSED_STREAM);
    assert_eq!(
        through_frames(3, refused, "4", "kept").await,
        (204, vec!["kept".to_owned(); 4]),
        "it refuses"
    );
    assert_eq!(
        through_frames(9, refused, "4", "kept").await,
        (502, vec!["kept".to_owned(); 6]),
        "and goes on so"
    );
    assert_eq!(
        through_frames(1, closed, "3", "kept").await,
        (502, vec!["kept".to_owned()]),
        "it is not kept"
    );
    let begun = |stream| reset(stream, INTERNAL_ERROR);
    assert_eq!(
        through_frames(1, begun, "4", "kept").await,
        (502, vec!["kept".to_owned()]),
        "it may have begun"
    );
    let broken = |_| go_away(0, INTERNAL_ERROR);
    assert_eq!(through_frames(1, broken, "4", "kept").await, (502, vec!["kept".to_owned()]), "it is broken");
    let cut_short = through_frames(1, closed, "4", "").await;
    assert_eq!(cut_short, (502, vec![String::new()]), "the upstream may have processed it");
}

#[tokio::test]
async fn upstream_connections_verify_tls_and_prefer_http_2() {
    let (upstream, trusted) = upstream_with_tls().await;
    let gateway = tls::gateway(upstream.port(), &trusted, []).await;
    let response = in_time(http().get(gateway.url("/")).send()).await.unwrap();
    assert_eq!(response.text().await.unwrap(), "HTTP/2.0");

    let (keys, url) = (keys_file("a|sk-a"), format!("https://localhost:{}", upstream.port()));
    let gateway = Gateway::start(command(["--upstream", &url, "--keys", keys.path()])).await;
    assert_eq!(in_time(http().get(gateway.url("/")).send()).await.unwrap().status(), 502);
}

#[tokio::test]
async fn pings_detect_a_silently_lost_upstream_before_timeout() {
    let (upstream, trusted) = upstream_with_tls().await;
    let between = Proxy::to(upstream).await;
    let gateway = tls::gateway(between.port(), &trusted, ["--ping", "0.4"]).await;
    let status = async || in_time(http().get(gateway.url("/")).send()).await.unwrap().status();
    assert_eq!(status().await, 200);
    between.set(Fault::Silence);
    assert_eq!(status().await, 502);
    // The next request uses a new connection.
    between.set(Fault::None);
    assert_eq!(status().await, 200);
    assert_eq!(between.connections(), 2);
}

#[tokio::test]
async fn request_paths_stay_under_the_upstream_path() {
    let upstream = Server::start(async |request| answer(200, request.uri().to_string())).await;
    let (keys, url) = (keys_file("a|sk-a"), format!("http://{}/tenant/", upstream.address()));
    let gateway = Gateway::start(command(["--upstream", &url, "--keys", keys.path()])).await;
    let get = async |target: &str| {
        let request = format!("GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        exchange(gateway.address(), &request).await
    };
    assert!(get("/v1/a..b?x=..").await.ends_with("/tenant/v1/a..b?x=.."));
    assert!(get("/").await.ends_with("/tenant/"));
    // A request in the form for a forward proxy: the caller must not choose its target.
    assert!(get("http://localhost/v1").await.ends_with("/tenant/v1"));
    for leads_out in ["/../other", "/v1/%2e%2E/other", "/v1/..%2fother", "/v1\\..\\other", "*"] {
        assert!(get(leads_out).await.starts_with("HTTP/1.1 400"), "{leads_out}");
    }
    assert_eq!(upstream.count(), 3);
}

#[tokio::test]
async fn trace_and_connect_never_reach_the_upstream() {
    let upstream = Server::answering(|| answer(200, "fine")).await;
    let gateway = Gateway::before(upstream.address(), &["a"], []).await;
    for line in ["TRACE /v1/messages", "TRACE *", "CONNECT localhost:443"] {
        let request = format!("{line} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        let answer = exchange(gateway.address(), &request).await.to_lowercase();
        assert!(answer.starts_with("http/1.1 501"), "{line}: {answer}");
        assert!(answer.contains("this gateway does not forward "), "{line}: {answer}");
    }
    assert_eq!(upstream.count(), 0);
}

#[tokio::test]
async fn a_disconnected_caller_ends_its_upstream_request() {
    let (chunks, body) = stream();
    let upstream = answering_once("text/plain", body).await;
    let gateway = Gateway::before(upstream.address(), &["a"], []).await;
    let mut chunks = chunks;
    chunks.send_data("one".into()).await.unwrap();
    let mut response = http().get(gateway.url("/")).send().await.unwrap();
    assert_eq!(response.chunk().await.unwrap().unwrap(), "one");
    drop(response);
    let mut went_on = 0;
    while chunks.send_data("more".into()).await.is_ok() {
        went_on += 1;
        assert!(went_on < 5_000, "the upstream goes on");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn logs_show_no_key_token_query_or_body() {
    let upstream = Server::limiting(["canary1"]).await;
    let arguments = ["--log", "trace", "--client-token", "token-canary", "--inject", "bearer,query:key"];
    let mut gateway = Gateway::before(upstream.address(), &["canary1", "canary2"], arguments).await;
    let http_2 = Client::builder(TokioExecutor::new()).http2_only(true).build_http::<Full<Bytes>>();
    let request =
        || Request::post(gateway.url("/v1/seen?q=query-canary")).header("x-api-key", "token-canary");
    let response = http_2.request(request().body(Full::from("body-canary")).unwrap()).await.unwrap();
    assert_eq!(response.status(), 200);
    let sent =
        http().post(gateway.url("/v1/seen?q=query-canary")).header("authorization", "Bearer token-canary");
    assert_eq!(sent.body("body-canary").send().await.unwrap().status(), 200);
    gateway.terminate().await;
    gateway.ended().await;
    let log = gateway.log();
    assert!(log.contains("path=\"/v1/seen\" status=200 key=\"canary2\""), "{log}");
    for secret in ["sk-canary", "token-canary", "query-canary", "body-canary"] {
        let shown = log.lines().find(|line| line.contains(secret));
        assert_eq!(shown, None, "{secret}");
    }
}
