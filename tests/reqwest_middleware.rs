//! The same behaviour for clients of `reqwest-middleware`.

// A test may panic, and so may what it calls.

mod support;

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicUsize, Ordering::SeqCst},
};

use futures_util::stream::iter;
use http::{Extensions, header::AUTHORIZATION};
use reqwest_middleware::{ClientBuilder, ClientWithMiddleware, Error, Middleware, Next};
use support::*;
use tower_key_rotation::{
    Inject, InjectError, KeyPool, KeyRotationLayer, NoKeyAvailable, ServedBy, Status, clock::ManualClock,
};

fn client(middleware: impl Middleware) -> ClientWithMiddleware {
    ClientBuilder::new(http()).with(middleware).build()
}

fn rotation(pool: &KeyPool) -> KeyRotationLayer {
    KeyRotationLayer::new(pool)
}

fn rotating(pool: &KeyPool) -> ClientWithMiddleware {
    client(rotation(pool))
}

fn failing_over(layer: FailoverLayer) -> ClientWithMiddleware {
    client(layer)
}

async fn status(client: &ClientWithMiddleware, server: &Server) -> u16 {
    client.get(server.url()).send().await.unwrap().status().as_u16()
}

fn no_key(error: &Error) -> Option<&NoKeyAvailable> {
    NoKeyAvailable::find(error)
}

#[tokio::test]
async fn keys_rotate_and_cool_down_after_a_429() {
    let clock = ManualClock::new();
    let pool = pool(["alpha", "beta"], &clock);
    let server = Server::limiting(["alpha"]).await;
    let client = rotating(&pool);
    assert_eq!(status(&client, &server).await, 429);
    server.lift("alpha");
    clock.advance(2 * MINUTE - INSTANT);
    for _ in 0..2 {
        assert_eq!(status(&client, &server).await, 200);
    }
    clock.advance(INSTANT);
    for _ in 0..2 {
        assert_eq!(status(&client, &server).await, 200);
    }
    assert_eq!(server.keys(), ["alpha", "beta", "beta", "alpha", "beta"]);
}

#[tokio::test]
async fn a_limited_request_tries_at_most_three_keys() {
    let pool = pool(["alpha", "beta", "gamma", "delta"], &ManualClock::new());
    let server = Server::limiting(["alpha", "beta", "gamma"]).await;
    let client = failing_over(failover(&pool));
    let response = client.post(server.url()).body("the same").send().await.unwrap();
    assert_eq!(response.status(), 429);
    assert_eq!(response.text().await.unwrap(), "too many requests");
    assert_eq!(server.keys(), ["alpha", "beta", "gamma"]);
    assert!(server.requests().iter().all(|request| request.body() == "the same"));
    assert_eq!(status(&client, &server).await, 200);
}

#[tokio::test]
async fn without_failover_the_caller_gets_the_original_429() {
    let body = || "too many requests, ".repeat(10_000);
    let server = Server::answering(move || answer_with(429, [("x-detail", "account")], body())).await;
    let both = pool(["alpha", "beta"], &ManualClock::new());
    let one = pool(["alpha"], &ManualClock::new());
    for client in [rotating(&both), failing_over(failover(&one))] {
        let before = server.count();
        let response = client.get(server.url()).send().await.unwrap();
        assert_eq!(
            (response.status().as_u16(), response.headers()["x-detail"].as_bytes()),
            (429, &b"account"[..])
        );
        assert_eq!(response.text().await.unwrap(), body());
        assert_eq!(server.count() - before, 1);
    }
}

#[tokio::test]
async fn f26_middleware_sends_a_streaming_body_only_once() {
    let pool = pool(["alpha", "beta"], &ManualClock::new());
    let server = Server::limiting(["alpha"]).await;
    let client = failing_over(failover(&pool));
    let pieces = ["one ", "two"].map(Ok::<_, std::io::Error>);
    let body = reqwest::Body::wrap_stream(iter(pieces));
    let response = client.post(server.url()).body(body).send().await.unwrap();
    assert_eq!(response.status(), 429);
    assert_eq!(response.text().await.unwrap(), "too many requests");
    assert_eq!(server.keys(), ["alpha"]);
    assert_eq!(server.requests()[0].body(), "one two");
    assert_eq!(stats_of(&pool, "alpha").status, Status::RateLimited);
}

#[tokio::test]
async fn f20_no_key_available_is_downcastable_and_sends_nothing() {
    let clock = ManualClock::new();
    let pool = pool(["alpha"], &clock);
    let server = Server::limiting(["alpha"]).await;
    for client in [rotating(&pool), failing_over(failover(&pool))] {
        if server.count() == 0 {
            assert_eq!(status(&client, &server).await, 429);
        }
        let error = in_time(client.get(server.url()).send()).await.unwrap_err();
        assert_eq!(no_key(&error).expect("it can be downcast").retry_in(), Some(2 * MINUTE));
        assert!(all_that_it_says(&error).contains("the first is back in 120.0 s"));
    }
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn s03_refused_cleartext_is_a_downcastable_error() {
    let pool = pool(["alpha"], &ManualClock::new());
    let error = rotating(&pool).get("http://api.example.com").send().await.unwrap_err();
    let Error::Middleware(error) = error else { panic!("{error:?}") };
    let error = error.downcast_ref::<InjectError>().expect("it can be downcast");
    assert!(error.is_cleartext() && error.to_string().contains("api.example.com"), "{error}");
}

#[tokio::test]
async fn another_host_gets_no_key() {
    let pool = builder(["alpha"], &ManualClock::new()).allowed_hosts(["api.example.com"]).build().unwrap();
    let server = Server::answering(|| answer(429, "")).await;
    let client = failing_over(failover(&pool));
    assert_eq!(status(&client, &server).await, 429);
    assert!(server.requests()[0].headers().get(AUTHORIZATION).is_none());
    assert_eq!((server.count(), pool.stats().healthy), (1, 1));
}

#[tokio::test]
async fn a_request_waits_for_the_first_returning_key() {
    let clock = ManualClock::new();
    let pool = pool(["alpha"], &clock);
    let server = Server::limiting(["alpha"]).await;
    let client = failing_over(failover(&pool).wait_up_to(3 * MINUTE));
    let waiting: Vec<_> = (0..2)
        .map(|_| {
            let (client, server) = (client.clone(), server.clone());
            tokio::spawn(async move { status(&client, &server).await })
        })
        .collect();
    eventually("the key rests", || pool.stats().rate_limited == 1).await;
    settle().await;
    let begun = server.count();
    assert!(waiting.iter().all(|waiting| !waiting.is_finished()));
    server.lift("alpha");
    clock.advance(2 * MINUTE);
    for waiting in waiting {
        assert_eq!(in_time(waiting).await.unwrap(), 200);
    }
    assert_eq!(server.count(), begun + 2);
}

#[tokio::test]
async fn a_request_fails_immediately_beyond_its_wait_limit() {
    let pool = pool(["alpha"], &ManualClock::new());
    let server = Server::limiting(["alpha"]).await;
    let client = failing_over(failover(&pool).wait_up_to(MINUTE));
    assert_eq!(in_time(status(&client, &server)).await, 429);
    let error = in_time(client.get(server.url()).send()).await.unwrap_err();
    assert_eq!(no_key(&error).unwrap().retry_in(), Some(2 * MINUTE));
}

const RETRY_INFO: &str = r#"{"error":{"code":429,"details":[{"@type":"type.googleapis.com/google.rpc.RetryInfo","retryDelay":"300s"}]}}"#;

#[tokio::test]
async fn error_body_hints_require_read_error_bodies() {
    for (read, rests) in [(true, 5 * MINUTE), (false, 2 * MINUTE)] {
        let pool = pool(["alpha"], &ManualClock::new());
        let server = Server::answering(|| answer(429, RETRY_INFO)).await;
        let layer = KeyRotationLayer::new(&pool);
        let client = if read { client(layer.read_error_bodies(1024)) } else { client(layer) };
        let response = client.get(server.url()).send().await.unwrap();
        assert_eq!(time_left(&pool, "alpha"), Some(rests));
        assert_eq!(response.text().await.unwrap(), RETRY_INFO);
    }
}

#[tokio::test]
async fn expose_key_adds_served_by_to_the_response() {
    let pool = pool(["alpha", "beta"], &ManualClock::new());
    let server = Server::limiting(["alpha"]).await;
    let client = failing_over(failover(&pool).expose_key());
    let response = client.get(server.url()).send().await.unwrap();
    assert_eq!(response.extensions().get::<ServedBy>().unwrap().0.as_str(), "beta");
}

#[tokio::test]
async fn responses_and_errors_omit_the_query_key() {
    let pool = KeyPool::builder().key("alpha", "sk-c4n4ry+/").inject(Inject::query("key")).build().unwrap();
    let server = Server::answering(|| answer(500, "no json")).await;
    let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    for client in [rotating(&pool), failing_over(failover(&pool))] {
        let response = client.get(format!("{}?key=mine&a=1", server.url())).send().await.unwrap();
        assert_eq!(server.requests().last().unwrap().uri().query(), Some("a=1&key=sk-c4n4ry%2B%2F"));
        assert_eq!(response.url().query(), Some("a=1"));
        let mut shown =
            format!("{response:?}") + &all_that_it_says(&response.error_for_status().unwrap_err());
        let error = client.get(format!("http://{closed}/?a=1")).send().await.unwrap_err();
        assert!(
            matches!(&error, Error::Reqwest(error) if error.url().unwrap().query() == Some("a=1")),
            "{error}"
        );
        shown += &all_that_it_says(&error);
        assert!(!shown.contains("c4n4ry"), "{shown}");
    }
}

/// Counts what passes, and notes the `Authorization` that it sees.
#[derive(Clone, Default)]
struct Witness {
    passed: Arc<AtomicUsize>,
    seen: Arc<Mutex<Vec<bool>>>,
}

#[async_trait::async_trait]
impl Middleware for Witness {
    async fn handle(
        &self,
        request: reqwest::Request,
        extensions: &mut Extensions,
        next: Next<'_>,
    ) -> reqwest_middleware::Result<reqwest::Response> {
        self.passed.fetch_add(1, SeqCst);
        self.seen.lock().unwrap().push(request.headers().contains_key(AUTHORIZATION));
        next.run(request, extensions).await
    }
}

#[tokio::test]
async fn outer_middleware_sees_one_request_inner_every_attempt() {
    let pool = pool(["alpha", "beta"], &ManualClock::new());
    let server = Server::limiting(["alpha"]).await;
    let (before, behind) = (Witness::default(), Witness::default());
    let client =
        ClientBuilder::new(http()).with(before.clone()).with(failover(&pool)).with(behind.clone()).build();
    assert_eq!(status(&client, &server).await, 200);
    assert_eq!(*before.seen.lock().unwrap(), [false]);
    assert_eq!(*behind.seen.lock().unwrap(), [true, true]);
    assert_eq!((before.passed.load(SeqCst), behind.passed.load(SeqCst)), (1, 2));
}

#[tokio::test]
async fn a_cancelled_wait_blocks_no_later_request() {
    let clock = ManualClock::new();
    let pool = pool(["alpha"], &clock);
    let server = Server::limiting(["alpha"]).await;
    assert_eq!(status(&rotating(&pool), &server).await, 429);
    server.lift("alpha");
    let client = failing_over(failover(&pool).wait_up_to(2 * MINUTE));
    let waiting = tokio::spawn({
        let (client, server) = (client.clone(), server.clone());
        async move { status(&client, &server).await }
    });
    settle().await;
    waiting.abort();
    settle().await;
    clock.advance(2 * MINUTE);
    assert_eq!(in_time(status(&client, &server)).await, 200);
    assert_eq!(server.count(), 2);
}
