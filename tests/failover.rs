//! A limited request is sent again with another key, or waits for one.

// A test may panic, and so may what it calls.

mod support;

use std::{
    collections::HashSet,
    future::ready,
    sync::{
        Arc, Mutex,
        atomic::{
            AtomicUsize,
            Ordering::{Relaxed, SeqCst},
        },
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::{FutureExt, future::join_all, stream::iter};
use http::{HeaderValue, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use support::*;
use tokio::{
    sync::{Barrier, Semaphore},
    task::JoinHandle,
};
use tower::{
    Layer, ServiceExt,
    retry::budget::{Budget, TpsBudget},
    service_fn,
};
use tower_key_rotation::{Failover, KeyRotationLayer, NoKeyAvailable, Status, clock::ManualClock};

#[tokio::test]
async fn a_limited_request_is_retried_with_another_key() {
    let pool = pool(["alpha", "beta"], &ManualClock::new());
    let server = Server::limiting(["alpha"]).await;
    let client = failing_over(failover(&pool));

    let mut request = reqwest::Request::new(reqwest::Method::POST, server.url().parse().unwrap());
    *request.body_mut() = Some("the same".into());
    assert_eq!(send(&client, request).await.unwrap().text().await.unwrap(), "fine");
    assert_eq!(server.keys(), ["alpha", "beta"]);
    assert!(
        server.requests().iter().all(|request| request.body() == "the same" && request.method() == "POST")
    );
    assert_eq!(stats_of(&pool, "alpha").status, Status::RateLimited);
}

#[tokio::test]
async fn f19_a_request_uses_at_most_3_different_keys() {
    const ALL: [&str; 5] = ["alpha", "beta", "gamma", "delta", "epsilon"];
    let pool = pool(ALL, &ManualClock::new());
    let server = Server::limiting(ALL).await;
    assert_eq!(status(&failing_over(failover(&pool)), &server.url()).await, 429);
    assert_eq!(server.keys(), ALL[..3]);
}

#[tokio::test]
async fn f19_attempts_are_configurable_and_at_least_one() {
    const ALL: [&str; 5] = ["alpha", "beta", "gamma", "delta", "epsilon"];
    for (attempts, sent) in [(0, 1), (1, 1), (4, 4), (9, 5)] {
        let pool = pool(ALL, &ManualClock::new());
        let server = Server::limiting(ALL).await;
        let client = failing_over(KeyRotationLayer::new(&pool).failover(Failover::attempts(attempts)));
        assert_eq!(status(&client, &server.url()).await, 429);
        assert_eq!(server.keys(), ALL[..sent]);
    }
}

const DETAIL: [(&str, &str); 2] = [("x-detail", "account"), ("retry-after", "7")];

/// Larger than what is read of a limited response before the next attempt.
fn long_body() -> String {
    "too many requests, ".repeat(10_000)
}

#[tokio::test]
async fn the_caller_gets_the_last_429_unchanged() {
    for keys in [&["alpha"][..], &["alpha", "beta"]] {
        let pool = builder(keys, &ManualClock::new()).build().unwrap();
        let server = Server::answering(|| answer_with(429, DETAIL, long_body())).await;
        let response = get(&failing_over(failover(&pool)), &server.url()).await.unwrap();
        assert_eq!(server.count(), keys.len());
        assert_eq!(response.status(), 429);
        assert_eq!(response.headers()["x-detail"], "account");
        assert_eq!(response.headers()["retry-after"], "7");
        assert_eq!(response.url().as_str(), server.url());
        assert_eq!(response.text().await.unwrap(), long_body());
    }
}

#[tokio::test]
async fn a_partly_read_429_arrives_whole_without_failover() {
    let pool = pool(["alpha", "beta"], &ManualClock::new());
    let bodies = Arc::new(Mutex::new(Vec::new()));
    let server = Server::start({
        let bodies = bodies.clone();
        move |_| {
            let (sender, body) = stream();
            bodies.lock().unwrap().push(sender);
            std::future::ready(answer_with(429, DETAIL, body))
        }
    })
    .await;
    let client = failing_over(failover(&pool));
    let url = server.url();
    let response = tokio::spawn(async move { get(&client, &url).await });
    eventually("the 429 is on its way", || bodies.lock().unwrap().len() == 1).await;
    let mut body = bodies.lock().unwrap().remove(0);
    body.send_data("begun, ".into()).await.unwrap();
    eventually("the key rests", || pool.stats().rate_limited == 1).await;
    pool.disable("beta").await.unwrap();
    body.send_data("ended".into()).await.unwrap();
    drop(body);

    let response = in_time(response).await.unwrap().unwrap();
    assert_eq!(
        (response.status().as_u16(), &response.headers()["x-detail"]),
        (429, &HeaderValue::from_static("account"))
    );
    assert_eq!(response.text().await.unwrap(), "begun, ended");
    assert_eq!(server.keys(), ["alpha"]);
}

#[tokio::test]
async fn over_hyper_the_last_429_arrives_whole() {
    let pool = pool(["alpha", "beta"], &ManualClock::new());
    let server = Server::answering(|| answer_with(429, DETAIL, long_body())).await;
    let client = Client::builder(TokioExecutor::new()).build_http::<Full<Bytes>>();
    let client = KeyRotationLayer::new(&pool).failover(Failover::attempts(3)).layer(client);

    let request = Request::post(server.url()).body(Full::from("prompt")).unwrap();
    let response = client.clone().oneshot(request).await.unwrap();
    assert_eq!(response.status(), 429);
    assert_eq!(response.headers()["x-detail"], "account");
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), long_body());
    assert_eq!(server.keys(), ["alpha", "beta"]);
    assert!(server.requests().iter().all(|request| request.body() == "prompt"));

    let request = Request::get(server.url()).body(Full::default()).unwrap();
    assert!(NoKeyAvailable::find(&client.oneshot(request).await.unwrap_err()).is_some());
}

#[tokio::test]
async fn over_hypers_client_too_the_other_key_answers() {
    let pool = pool(["alpha", "beta"], &ManualClock::new());
    let server = Server::limiting(["alpha"]).await;
    let client = Client::builder(TokioExecutor::new()).build_http::<Full<Bytes>>();
    let client = KeyRotationLayer::new(&pool).failover(Failover::attempts(3)).layer(client);
    let request = Request::get(server.url()).body(Full::default()).unwrap();
    let response = client.oneshot(request).await.unwrap();
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "fine");
    assert_eq!(server.keys(), ["alpha", "beta"]);
}

#[tokio::test]
async fn f19_the_budget_bounds_attempts_with_100_limited_keys() {
    const REQUESTS: usize = 50;
    const RESERVE: usize = 10;
    let pool = builder(0..100, &ManualClock::new()).build().unwrap();
    let server = Server::answering(|| answer(429, "the whole account")).await;
    let budget = TpsBudget::new(10 * SECOND, 1, 0.2);
    let client = failing_over(KeyRotationLayer::new(&pool).failover(Failover::attempts(3).budget(budget)));
    for _ in 0..REQUESTS {
        assert_eq!(status(&client, &server.url()).await, 429);
    }
    assert!(server.count() <= REQUESTS * 12 / 10 + RESERVE, "{} attempts", server.count());
    assert!(server.count() > REQUESTS, "there was no failover at all");
}

#[tokio::test]
async fn f19_the_default_retry_budget_reserves_100_attempts() {
    const REQUESTS: usize = 300;
    const RESERVE: usize = 100;
    let pool = builder(0..1_000, &ManualClock::new()).build().unwrap();
    let server = Server::answering(|| answer(429, "the whole account")).await;
    let client = failing_over(failover(&pool));
    for _ in 0..REQUESTS {
        assert_eq!(status(&client, &server.url()).await, 429);
    }
    // None of them went well, and no time passed: only the reserve was there to be spent.
    assert_eq!(server.count(), REQUESTS + RESERVE);
}

#[test]
fn f19_successes_and_time_refill_the_retry_budget() {
    let clock = ManualClock::new();
    let pool = builder(0..64, &clock).cooldown(Duration::ZERO).build().unwrap();
    let sent = Arc::new(AtomicUsize::new(0));
    // The body of a request says how it is answered.
    let service = service_fn({
        let sent = sent.clone();
        move |request: Request<String>| {
            sent.fetch_add(1, SeqCst);
            ready(Response::builder().status(&**request.body()).body(Full::<Bytes>::default()))
        }
    });
    let client = KeyRotationLayer::new(&pool).failover(Failover::attempts(2)).layer(service);
    let send = |status: &str| {
        let request = Request::post("https://api.example.com").body(status.to_owned()).unwrap();
        client.clone().oneshot(request).now_or_never().unwrap().unwrap();
    };
    let succeed = |times| (0..times).for_each(|_| send("200"));
    let retries = || {
        let is_sent_again = |_: &i32| {
            let before = sent.load(SeqCst);
            send("429");
            sent.load(SeqCst) == before + 2
        };
        (0..10_000).take_while(is_sent_again).count()
    };

    assert_eq!(retries(), 100);
    clock.advance(SECOND / 10 - INSTANT);
    assert_eq!(retries(), 0);
    clock.advance(SECOND);
    assert_eq!(retries(), 10);
    clock.advance(1_000 * SECOND);
    assert_eq!(retries(), 100);
    succeed(4);
    assert_eq!(retries(), 0);
    succeed(1);
    assert_eq!(retries(), 1);
    succeed(1_000);
    assert_eq!(retries(), 100);

    // Threads together spend no more than there is.
    clock.advance(1_000 * SECOND);
    succeed(50);
    let before = sent.load(SeqCst);
    std::thread::scope(|scope| {
        (0..4).for_each(|_| _ = scope.spawn(|| (0..100).for_each(|_| send("429"))));
    });
    assert_eq!(sent.load(SeqCst) - before, 400 + 110);
}

/// Allows every further attempt, and counts what is paid in.
#[derive(Clone, Default)]
struct Counting(Arc<AtomicUsize>);

impl Budget for Counting {
    fn deposit(&self) {
        self.0.fetch_add(1, Relaxed);
    }

    fn withdraw(&self) -> bool {
        true
    }
}

#[tokio::test]
async fn f19_only_successes_deposit_once_into_the_retry_budget() {
    let server = Server::start(|request| async move {
        answer(if key_of(&request) == Some("limited") { 429 } else { 200 }, "body")
    })
    .await;
    for (keys, expected) in
        [(&["healthy"][..], (200, 1)), (&["limited", "healthy"], (200, 1)), (&["limited"], (429, 0))]
    {
        let budget = Counting::default();
        let pool = builder(keys, &ManualClock::new()).build().unwrap();
        let client =
            failing_over(KeyRotationLayer::new(&pool).failover(Failover::attempts(3).budget(budget.clone())));
        let status = status(&client, &server.url()).await;
        assert_eq!((status, budget.0.load(Relaxed)), expected, "{keys:?}");
    }

    let budget = Counting::default();
    let pool = pool(["healthy"], &ManualClock::new());
    let client =
        failing_over(KeyRotationLayer::new(&pool).failover(Failover::attempts(3).budget(budget.clone())));
    let mut request = reqwest::Request::new(reqwest::Method::POST, server.url().parse().unwrap());
    *request.body_mut() = Some(reqwest::Body::wrap_stream(iter(["one"].map(Ok::<_, std::io::Error>))));
    assert_eq!(send(&client, request).await.unwrap().status(), 200);
    assert_eq!(budget.0.load(Relaxed), 0, "a request that can't be sent again needs no budget");
    assert!(send(&client, get_request("http://127.0.0.1:1/")).await.is_err());
    assert_eq!(budget.0.load(Relaxed), 0, "it got no answer");
}

#[tokio::test]
async fn f26_a_streaming_request_is_not_retried_after_429() {
    let pool = pool(["alpha", "beta"], &ManualClock::new());
    let server = Server::answering(|| answer_with(429, DETAIL, long_body())).await;
    let mut request = reqwest::Request::new(reqwest::Method::POST, server.url().parse().unwrap());
    let pieces = ["one ", "two ", "three"].map(Ok::<_, std::io::Error>);
    *request.body_mut() = Some(reqwest::Body::wrap_stream(iter(pieces)));

    let response = send(&failing_over(failover(&pool)), request).await.unwrap();
    assert_eq!(
        (response.status().as_u16(), &response.headers()["retry-after"]),
        (429, &HeaderValue::from_static("7"))
    );
    assert_eq!(response.text().await.unwrap(), long_body());
    assert_eq!(server.keys(), ["alpha"]);
    assert_eq!(server.requests()[0].body(), "one two three");
    assert_eq!(stats_of(&pool, "alpha").status, Status::RateLimited);
}

/// Clones every request, and says only when a clone would be sent whether it can be. Counts how often it is asked,
/// and is a budget that counts what is spent.
#[derive(Clone, Default)]
struct KeptWhileSent {
    can_be_sent: bool,
    asked: Arc<AtomicUsize>,
    spent: Arc<AtomicUsize>,
}

impl KeptWhileSent {
    fn clone_request(&self, request: &reqwest::Request) -> Option<reqwest::Request> {
        let mut clone = request.try_clone()?;
        if clone.headers_mut().insert("x-kept", HeaderValue::from_static("")).is_none() {
            return Some(clone);
        }
        self.asked.fetch_add(1, Relaxed);
        self.can_be_sent.then_some(clone)
    }
}

impl Budget for KeptWhileSent {
    fn deposit(&self) {}

    fn withdraw(&self) -> bool {
        self.spent.fetch_add(1, Relaxed);
        true
    }
}

/// What keys a request was sent with that is limited on `alpha`, the status it got, and how often it was asked
/// whether it can be sent again and paid for that.
async fn sent_while_kept(keys: &[&str], can_be_sent: bool) -> (Vec<String>, u16, usize, usize) {
    let pool = builder(keys, &ManualClock::new()).build().unwrap();
    let server = Server::limiting(["alpha"]).await;
    let kept = KeptWhileSent { can_be_sent, ..KeptWhileSent::default() };
    // To wait would be in vain, too; and it would never end, since nobody turns the clock.
    let asked = kept.clone();
    let failover = Failover::attempts(3)
        .budget(kept.clone())
        .clone_with(move |request: &reqwest::Request| asked.clone_request(request));
    let client = KeyRotationLayer::new(&pool).failover(failover).wait_up_to(10 * MINUTE).layer(http());
    let response = in_time(send(&client, get_request(&server.url()))).await.unwrap();
    let status = response.status().as_u16();
    let expected = if status == 429 { "too many requests" } else { "fine" };
    assert_eq!(response.text().await.unwrap(), expected);
    (server.keys(), status, kept.asked.load(Relaxed), kept.spent.load(Relaxed))
}

#[tokio::test]
async fn f26_an_unsendable_clone_is_neither_sent_nor_charged() {
    let sent = |keys: &[&str]| keys.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(sent_while_kept(&["alpha", "beta"], false).await, (sent(&["alpha"]), 429, 1, 0));
    assert_eq!(sent_while_kept(&["alpha"], false).await, (sent(&["alpha"]), 429, 1, 0));
    assert_eq!(sent_while_kept(&["alpha", "beta"], true).await, (sent(&["alpha", "beta"]), 200, 1, 1));
    assert_eq!(sent_while_kept(&["beta"], false).await, (sent(&["beta"]), 200, 0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_retries_reuse_no_key_and_counts_agree() {
    const KEYS: usize = 8;
    const REQUESTS: usize = 200;
    let pool = builder(0..KEYS, &ManualClock::new()).build().unwrap();
    // Every other key is limited.
    let server = Server::start(|request| async move {
        let key: usize = key_of(&request).unwrap().parse().unwrap();
        answer(if key.is_multiple_of(2) { 429 } else { 200 }, "body")
    })
    .await;
    let client = failing_over(KeyRotationLayer::new(&pool).failover(Failover::attempts(KEYS as u32)));
    let answered = in_time(join_all((0..REQUESTS).map(|number| {
        let (client, mut request) = (client.clone(), get_request(&server.url()));
        request.headers_mut().insert("x-number", number.into());
        async move { send(&client, request).await.unwrap().status().as_u16() }
    })))
    .await;

    let sent: HashSet<_> = server
        .requests()
        .iter()
        .map(|request| (request.headers()["x-number"].clone(), key_of(request).unwrap().to_owned()))
        .collect();
    assert_eq!(sent.len(), server.count(), "a request was sent twice with the same key");
    let stats = pool.stats();
    assert_eq!(stats.keys.iter().map(|key| key.requests).sum::<u64>(), server.count() as u64);
    // Each 429 was either made up for by another attempt or, the budget being used up, passed on.
    let limited: u64 = stats.keys.iter().map(|key| key.limited).sum();
    let passed_on = answered.iter().filter(|status| **status == 429).count() as u64;
    assert_eq!(limited - passed_on, (server.count() - REQUESTS) as u64);
    assert_eq!((stats.rate_limited, stats.healthy), (KEYS / 2, KEYS / 2));
}

#[tokio::test]
async fn no_retry_reuses_a_key_with_zero_cooldown() {
    let clock = ManualClock::new();
    clock.advance(MINUTE);
    let pool = builder(["alpha"], &clock).exact_hints().hint_limits(Duration::ZERO, MINUTE).build().unwrap();
    let server = Server::answering(|| answer_with(429, [("retry-after", "0")], "again")).await;
    assert_eq!(status(&failing_over(failover(&pool)), &server.url()).await, 429);
    assert_eq!(server.keys(), ["alpha"]);
}

#[tokio::test]
async fn no_retry_uses_a_key_returned_while_draining() {
    let clock = ManualClock::new();
    let pool = builder(["alpha", "beta"], &clock).exact_hints().build().unwrap();
    let bodies = Arc::new(Mutex::new(Vec::new()));
    let server = Server::start({
        let bodies = bodies.clone();
        move |_| {
            let (sender, body) = stream();
            bodies.lock().unwrap().push(sender);
            std::future::ready(answer_with(429, [("retry-after", "1")], body))
        }
    })
    .await;
    let client = failing_over(failover(&pool));
    let waiting = spawn_get(&client, &server.url());
    eventually("alpha rests", || pool.stats().rate_limited == 1).await;
    // The other key goes while the body of the 429, which does not end, is read for a second.
    pool.disable("beta").await.unwrap();
    clock.advance(SECOND);
    settle().await;
    assert_eq!(server.keys(), ["alpha"]);
    assert_eq!(in_time(waiting).await.unwrap().unwrap(), 429);
}

#[tokio::test]
async fn chunked_and_sized_429s_keep_the_connection() {
    for chunked in [false, true] {
        let pool = pool(["alpha", "beta", "gamma"], &ManualClock::new());
        let server = Server::start(move |request| async move {
            if key_of(&request) == Some("gamma") {
                return answer(200, "fine");
            }
            let text = "wait. ".repeat(1_000);
            let pieces: Vec<_> =
                text.split_inclusive(' ').map(|piece| Ok::<_, std::io::Error>(piece.to_owned())).collect();
            answer(429, if chunked { axum::body::Body::from_stream(iter(pieces)) } else { text.into() })
        })
        .await;
        assert_eq!(status(&failing_over(failover(&pool)), &server.url()).await, 200);
        assert_eq!(server.count(), 3);
        assert_eq!(server.connections(), 1, "chunked: {chunked}");
    }
}

#[tokio::test]
async fn an_undrained_429_body_costs_only_its_connection() {
    let pool = pool(["alpha", "beta"], &ManualClock::new());
    let server = Server::start(|request| async move {
        match key_of(&request) {
            Some("alpha") => answer(429, "x".repeat(50_000_000)),
            _ => answer(200, "fine"),
        }
    })
    .await;
    let client =
        failing_over(KeyRotationLayer::new(&pool).failover(Failover::attempts(3).drain_up_to(1_000)));
    assert_eq!(in_time(status(&client, &server.url())).await, 200);
    assert_eq!(server.connections(), 2);
}

#[tokio::test]
async fn an_endless_429_body_delays_failover_one_second() {
    let clock = ManualClock::new();
    let pool = pool(["alpha", "beta"], &clock);
    let bodies = Arc::new(Mutex::new(Vec::new()));
    let server = Server::start(move |request| {
        let reply = match key_of(&request) {
            Some("alpha") => {
                let (sender, body) = stream();
                bodies.lock().unwrap().push(sender);
                answer(429, body)
            }
            _ => answer(200, "fine"),
        };
        std::future::ready(reply)
    })
    .await;
    let client = failing_over(failover(&pool));
    let url = server.url();
    let response = tokio::spawn(async move { status(&client, &url).await });
    eventually("the key rests", || pool.stats().rate_limited == 1).await;
    clock.advance(SECOND - INSTANT);
    settle().await;
    assert_eq!(server.count(), 1);
    clock.advance(INSTANT);
    assert_eq!(in_time(response).await.unwrap(), 200);
    assert_eq!(server.keys(), ["alpha", "beta"]);
}

#[tokio::test]
async fn a_revoked_key_fails_over_as_well() {
    let pool = pool(["alpha", "beta"], &ManualClock::new());
    let server = Server::start(|request| async move {
        answer(if key_of(&request) == Some("alpha") { 401 } else { 200 }, "")
    })
    .await;
    let client = failover(&pool).classify(ByStatus).layer(http());
    assert_eq!(status(&client, &server.url()).await, 200);
    assert_eq!(server.keys(), ["alpha", "beta"]);
    assert_eq!(stats_of(&pool, "alpha").status, Status::Revoked);
}

#[tokio::test]
async fn errors_unrelated_to_the_key_are_not_retried() {
    let pool = pool(["alpha", "beta"], &ManualClock::new());
    let server = Server::answering(|| answer(500, "")).await;
    assert_eq!(status(&failing_over(failover(&pool)), &server.url()).await, 500);
    assert_eq!(server.count(), 1);
}

/// A request in the background.
fn spawn_get<S>(client: &S, url: &str) -> JoinHandle<Result<u16, ClientError>>
where
    S: tower::Service<reqwest::Request, Response = reqwest::Response, Error = ClientError, Future: Send>
        + Clone
        + Send
        + 'static,
{
    let (client, request) = (client.clone(), get_request(url));
    tokio::spawn(async move { Ok(client.oneshot(request).await?.status().as_u16()) })
}

#[tokio::test]
async fn f20_a_request_waits_for_the_first_returning_key() {
    let clock = ManualClock::new();
    let pool = pool(["alpha", "beta"], &clock);
    let server = Server::limiting(["alpha", "beta"]).await;
    let client = failing_over(failover(&pool).wait_up_to(2 * MINUTE));
    let rotating = rotating(&pool);
    assert_eq!(status(&rotating, &server.url()).await, 429);
    clock.advance(MINUTE);
    assert_eq!(status(&rotating, &server.url()).await, 429);
    server.lift("alpha");
    server.lift("beta");

    let waiting = spawn_get(&client, &server.url());
    settle().await;
    clock.advance(MINUTE - INSTANT);
    settle().await;
    assert!(!waiting.is_finished());
    assert_eq!(server.count(), 2, "a resting key was used");
    clock.advance(INSTANT);
    assert_eq!(in_time(waiting).await.unwrap().unwrap(), 200);
    assert_eq!(server.keys(), ["alpha", "beta", "alpha"]);
}

#[tokio::test]
async fn f20_a_request_fails_fast_beyond_its_wait_limit() {
    let clock = ManualClock::new();
    let pool = pool(["alpha"], &clock);
    let server = Server::limiting(["alpha"]).await;
    assert_eq!(status(&rotating(&pool), &server.url()).await, 429);
    let client = failing_over(failover(&pool).wait_up_to(2 * MINUTE - INSTANT));
    let error = in_time(spawn_get(&client, &server.url())).await.unwrap().unwrap_err();
    assert_eq!(NoKeyAvailable::find(&error).unwrap().retry_in(), Some(2 * MINUTE));
    clock.advance(INSTANT);
    let waiting = spawn_get(&client, &server.url());
    settle().await;
    assert!(!waiting.is_finished(), "now it is within the limit");
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn f20_a_cooldown_extended_beyond_the_limit_fails_waiters() {
    let clock = ManualClock::new();
    let pool = pool(["alpha"], &clock);
    let release = Arc::new(Semaphore::new(0));
    let server = Server::start({
        let release = release.clone();
        move |request| {
            let release = release.clone();
            async move {
                if request.uri().path() == "/v1/held" {
                    release.acquire().await.unwrap().forget();
                    return answer_with(429, [("retry-after", "1200")], "");
                }
                answer(429, "")
            }
        }
    })
    .await;
    let client = failing_over(failover(&pool).wait_up_to(3 * MINUTE));
    let held = spawn_get(&rotating(&pool), &format!("{}/held", server.url()));
    eventually("the held request is at the server", || server.count() == 1).await;
    assert_eq!(status(&rotating(&pool), &server.url()).await, 429);
    let waiting = spawn_get(&client, &server.url());
    settle().await;
    release.add_permits(1);
    assert_eq!(held.await.unwrap().unwrap(), 429);
    clock.advance(3 * MINUTE);
    let error = in_time(waiting).await.unwrap().unwrap_err();
    assert_eq!(NoKeyAvailable::find(&error).unwrap().retry_in(), Some(17 * MINUTE));
    assert_eq!(server.count(), 2);
}

#[tokio::test]
async fn requests_wait_for_the_only_key_and_retry() {
    let clock = ManualClock::new();
    let pool = pool(["alpha"], &clock);
    let server = Server::limiting(["alpha"]).await;
    let client = failing_over(failover(&pool).wait_up_to(5 * MINUTE));
    let waiting = spawn_get(&client, &server.url());
    eventually("the key rests", || pool.stats().rate_limited == 1).await;
    settle().await;
    assert!(!waiting.is_finished());
    server.lift("alpha");
    clock.advance(2 * MINUTE);
    assert_eq!(in_time(waiting).await.unwrap().unwrap(), 200);
    assert_eq!(server.keys(), ["alpha", "alpha"]);
}

#[tokio::test]
async fn a_wait_beyond_the_limit_returns_the_429() {
    let clock = ManualClock::new();
    let pool = pool(["alpha"], &clock);
    let server = Server::limiting(["alpha"]).await;
    // The first wait uses up so much of the limit that there is not enough for the second.
    let client = failing_over(failover(&pool).wait_up_to(3 * MINUTE));
    let waiting = spawn_get(&client, &server.url());
    eventually("the key rests", || pool.stats().rate_limited == 1).await;
    settle().await;
    clock.advance(2 * MINUTE);
    assert_eq!(in_time(waiting).await.unwrap().unwrap(), 429);
    assert_eq!(server.keys(), ["alpha", "alpha"]);
}

#[tokio::test]
async fn a_reset_or_insert_wakes_a_waiting_request() {
    for adds in [false, true] {
        let clock = ManualClock::new();
        let pool = pool(["alpha"], &clock);
        let server = Server::limiting(["alpha"]).await;
        let client = failing_over(failover(&pool).wait_up_to(5 * MINUTE));
        assert_eq!(status(&rotating(&pool), &server.url()).await, 429);
        server.lift("alpha");
        let waiting = spawn_get(&client, &server.url());
        settle().await;
        assert!(!waiting.is_finished());
        if adds {
            pool.insert("beta", "sk-beta").await.unwrap();
        } else {
            pool.reset("alpha").await.unwrap();
        }
        assert_eq!(in_time(waiting).await.unwrap().unwrap(), 200);
    }
}

/// A server that holds every answer until there is a permit for it, and knows how many it holds.
async fn holding(permits: Arc<Semaphore>, held: Arc<AtomicUsize>) -> Server {
    Server::start(move |request| {
        let (permits, held) = (permits.clone(), held.clone());
        async move {
            if request.uri().path() == "/v1/limited" {
                return answer(429, "");
            }
            held.fetch_add(1, SeqCst);
            permits.acquire().await.unwrap().forget();
            held.fetch_sub(1, SeqCst);
            answer(200, "")
        }
    })
    .await
}

#[tokio::test]
async fn f22_1_000_waiting_callers_proceed_in_doubling_batches() {
    const CALLERS: usize = 1_000;
    let clock = ManualClock::new();
    let pool = pool(["alpha"], &clock);
    let (permits, held) = (Arc::new(Semaphore::new(0)), Arc::new(AtomicUsize::new(0)));
    let server = holding(permits.clone(), held.clone()).await;
    let client = failing_over(failover(&pool).wait_up_to(5 * MINUTE));
    assert_eq!(status(&rotating(&pool), &format!("{}/limited", server.url())).await, 429);

    let callers: Vec<_> = (0..CALLERS).map(|_| spawn_get(&client, &server.url())).collect();
    settle().await;
    assert_eq!(server.count(), 1);
    clock.advance(2 * MINUTE);
    for at_once in [1, 2, 4, 8, 16, 32] {
        eventually("a round is at the server", || held.load(SeqCst) == at_once).await;
        settle().await;
        assert_eq!(held.load(SeqCst), at_once);
        permits.add_permits(at_once);
    }
    permits.add_permits(CALLERS);
    for caller in in_time(join_all(callers)).await {
        assert_eq!(caller.unwrap().unwrap(), 200);
    }
    assert_eq!(server.count(), 1 + CALLERS);
}

#[tokio::test]
async fn f22_each_of_several_returning_keys_gets_one_request() {
    let clock = ManualClock::new();
    let pool = pool(["alpha", "beta", "gamma"], &clock);
    let (permits, held) = (Arc::new(Semaphore::new(0)), Arc::new(AtomicUsize::new(0)));
    let server = holding(permits.clone(), held.clone()).await;
    let client = failing_over(failover(&pool).wait_up_to(5 * MINUTE));
    for _ in 0..3 {
        assert_eq!(status(&rotating(&pool), &format!("{}/limited", server.url())).await, 429);
    }
    let callers: Vec<_> = (0..5).map(|_| spawn_get(&client, &server.url())).collect();
    settle().await;
    clock.advance(2 * MINUTE);
    eventually("one request for each key is at the server", || held.load(SeqCst) == 3).await;
    settle().await;
    assert_eq!(held.load(SeqCst), 3);
    permits.add_permits(5);
    for caller in in_time(join_all(callers)).await {
        assert_eq!(caller.unwrap().unwrap(), 200);
    }
}

#[tokio::test]
async fn f22_limited_callers_also_retry_in_doubling_batches() {
    const CALLERS: usize = 1 + 2 + 4;
    let clock = ManualClock::new();
    let pool = pool(["alpha"], &clock);
    let (permits, held) = (Arc::new(Semaphore::new(0)), Arc::new(AtomicUsize::new(0)));
    let (together, arrived) = (Arc::new(Barrier::new(CALLERS)), Arc::new(AtomicUsize::new(0)));
    let server = Server::start({
        let (permits, held) = (permits.clone(), held.clone());
        move |_| {
            let (permits, held, together) = (permits.clone(), held.clone(), together.clone());
            let is_first = arrived.fetch_add(1, SeqCst) < CALLERS;
            async move {
                if is_first {
                    together.wait().await;
                    return answer(429, "");
                }
                held.fetch_add(1, SeqCst);
                permits.acquire().await.unwrap().forget();
                held.fetch_sub(1, SeqCst);
                answer(200, "")
            }
        }
    })
    .await;
    let client = failing_over(failover(&pool).wait_up_to(5 * MINUTE));
    let callers: Vec<_> = (0..CALLERS).map(|_| spawn_get(&client, &server.url())).collect();
    eventually("the key rests", || pool.stats().keys[0].limited == CALLERS as u64).await;
    settle().await;
    clock.advance(2 * MINUTE);
    for at_once in [1, 2, 4] {
        eventually("a round is at the server", || held.load(SeqCst) == at_once).await;
        settle().await;
        assert_eq!(held.load(SeqCst), at_once);
        permits.add_permits(at_once);
    }
    for caller in in_time(join_all(callers)).await {
        assert_eq!(caller.unwrap().unwrap(), 200);
    }
}

#[tokio::test]
async fn f22_a_limited_key_costs_one_request_per_return() {
    let clock = ManualClock::new();
    let pool = pool(["alpha"], &clock);
    let server = Server::limiting(["alpha"]).await;
    let client = failing_over(failover(&pool).wait_up_to(60 * MINUTE));
    let callers: Vec<_> = (0..100).map(|_| spawn_get(&client, &server.url())).collect();
    eventually("the key rests", || pool.stats().rate_limited == 1).await;
    settle().await;
    let begun = server.count();
    for returns in 1..=5 {
        clock.advance(2 * MINUTE);
        settle().await;
        assert_eq!(server.count() - begun, returns);
    }
    server.lift("alpha");
    clock.advance(2 * MINUTE);
    let served =
        in_time(join_all(callers)).await.into_iter().filter(|caller| matches!(caller, Ok(Ok(200)))).count();
    assert!(served >= 95, "{served} of 100 were served");
}

#[tokio::test]
async fn a_cancelled_wait_blocks_no_later_request() {
    let clock = ManualClock::new();
    let pool = pool(["alpha"], &clock);
    let (permits, held) = (Arc::new(Semaphore::new(0)), Arc::new(AtomicUsize::new(0)));
    let server = holding(permits.clone(), held.clone()).await;
    let client = failing_over(failover(&pool).wait_up_to(5 * MINUTE));
    assert_eq!(status(&rotating(&pool), &format!("{}/limited", server.url())).await, 429);

    let mut callers: Vec<_> = (0..10).map(|_| spawn_get(&client, &server.url())).collect();
    settle().await;
    // The first in the queue, and some behind it.
    callers.drain(..5).for_each(|caller| caller.abort());
    settle().await;
    clock.advance(2 * MINUTE);
    eventually("one is at the server", || held.load(SeqCst) == 1).await;
    // The one that is on its way goes away too: its place is the next one's.
    callers.remove(0).abort();
    eventually("the next is at the server", || server.count() == 3).await;
    permits.add_permits(100);
    for caller in in_time(join_all(callers)).await {
        assert_eq!(caller.unwrap().unwrap(), 200);
    }
    assert_eq!(in_time(status(&client, &server.url())).await, 200);
    assert_eq!(server.count(), 1 + 1 + 4 + 1);
}

#[tokio::test]
async fn waiting_requests_proceed_in_arrival_order() {
    let clock = ManualClock::new();
    let pool = pool(["alpha"], &clock);
    let (permits, held) = (Arc::new(Semaphore::new(0)), Arc::new(AtomicUsize::new(0)));
    let server = holding(permits.clone(), held.clone()).await;
    let client = failing_over(failover(&pool).wait_up_to(5 * MINUTE));
    assert_eq!(status(&rotating(&pool), &format!("{}/limited", server.url())).await, 429);

    let mut callers = Vec::new();
    for number in 0..3 {
        callers.push(spawn_get(&client, &format!("{}/{number}", server.url())));
        settle().await;
    }
    clock.advance(2 * MINUTE);
    eventually("the first is at the server", || held.load(SeqCst) == 1).await;
    callers.push(spawn_get(&client, &format!("{}/3", server.url())));
    settle().await;
    assert_eq!(held.load(SeqCst), 1, "a later request overtook those that wait");
    for _ in 0..4 {
        permits.add_permits(1);
        settle().await;
    }
    for caller in in_time(join_all(callers)).await {
        assert_eq!(caller.unwrap().unwrap(), 200);
    }
    assert_eq!(server.requests()[1].uri().path(), "/v1/0");
    assert_eq!(server.requests().last().unwrap().uri().path(), "/v1/3");
}
