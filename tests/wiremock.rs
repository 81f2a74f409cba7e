//! The promises of the README, against a `wiremock` server, one scenario after the other.

mod support;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::future::join_all;
use http::header::AUTHORIZATION;
use support::{
    INSTANT, MINUTE, SECOND, builder, failing_over, failover, get, http, in_time, pool, rotating, status,
    time_left,
};
use tower::{Layer, retry::budget::TpsBudget};
use tower_key_rotation::{
    Error, Failover, KeyPool, KeyRotationLayer, RecoveryConfig, RecoveryHandle, clock::ManualClock,
    store::MemoryStore,
};
use wiremock::{Mock, MockServer, Request, Respond, ResponseTemplate, matchers::any};

/// Answers a key with 200 as often as it may, and then with 429.
#[derive(Clone, Default)]
struct Quotas {
    left: Arc<Mutex<HashMap<String, usize>>>,
    retry_after: Option<&'static str>,
}

impl Quotas {
    fn of<const N: usize>(quotas: [(&str, usize); N]) -> Self {
        let quotas = quotas.into_iter().map(|(key, left)| (key.to_owned(), left)).collect();
        Self { left: Arc::new(Mutex::new(quotas)), retry_after: None }
    }

    fn retry_after(self, retry_after: &'static str) -> Self {
        Self { retry_after: Some(retry_after), ..self }
    }

    fn refill(&self, key: &str) {
        self.left.lock().unwrap().insert(key.to_owned(), usize::MAX);
    }

    async fn serve(&self) -> MockServer {
        let server = MockServer::start().await;
        Mock::given(any()).respond_with(self.clone()).mount(&server).await;
        server
    }
}

impl Respond for Quotas {
    fn respond(&self, request: &Request) -> ResponseTemplate {
        let mut left = self.left.lock().unwrap();
        let left = left.entry(key_of(request)).or_insert(usize::MAX);
        if *left > 0 {
            *left -= 1;
            return ResponseTemplate::new(200);
        }
        let limited = ResponseTemplate::new(429).set_body_string("slow down");
        self.retry_after
            .into_iter()
            .fold(limited, |response, time| response.insert_header("retry-after", time))
    }
}

fn key_of(request: &Request) -> String {
    request.headers[AUTHORIZATION].to_str().unwrap().replace("Bearer sk-", "")
}

/// The keys that the server has seen, in order.
async fn seen(server: &MockServer) -> Vec<String> {
    server.received_requests().await.unwrap().iter().map(key_of).collect()
}

fn sweep_at_once() -> RecoveryConfig {
    RecoveryConfig::new().start_jitter(Duration::ZERO)
}

#[tokio::test]
async fn a_429_starts_a_two_minute_cooldown() {
    let clock = ManualClock::new();
    let pool = pool(["alpha", "beta"], &clock);
    let quotas = Quotas::of([("alpha", 0)]);
    let server = quotas.serve().await;
    let client = rotating(&pool);

    assert_eq!(status(&client, &server.uri()).await, 429);
    quotas.refill("alpha");
    clock.advance(2 * MINUTE - INSTANT);
    assert_eq!(status(&client, &server.uri()).await, 200);
    assert_eq!(status(&client, &server.uri()).await, 200);
    clock.advance(INSTANT);
    assert_eq!(status(&client, &server.uri()).await, 200);
    assert_eq!(seen(&server).await, ["alpha", "beta", "beta", "alpha"]);
}

#[tokio::test]
async fn only_a_longer_retry_after_is_honoured() {
    for (retry_after, rest) in [("300", 5 * MINUTE), ("30", 2 * MINUTE)] {
        let clock = ManualClock::new();
        let pool = pool(["alpha"], &clock);
        let server = Quotas::of([("alpha", 0)]).retry_after(retry_after).serve().await;
        assert_eq!(status(&rotating(&pool), &server.uri()).await, 429);
        assert_eq!(time_left(&pool, "alpha"), Some(rest), "Retry-After: {retry_after}");
    }
}

#[tokio::test]
async fn exact_hints_honour_a_shorter_retry_after() {
    let clock = ManualClock::new();
    let pool = builder(["alpha"], &clock).exact_hints().build().unwrap();
    let server = Quotas::of([("alpha", 0)]).retry_after("30").serve().await;
    assert_eq!(status(&rotating(&pool), &server.uri()).await, 429);
    assert_eq!(time_left(&pool, "alpha"), Some(30 * SECOND));
}

#[tokio::test]
async fn nothing_is_sent_while_all_keys_cool_down() {
    let clock = ManualClock::new();
    let pool = pool(["alpha", "beta"], &clock);
    let server = Quotas::of([("alpha", 0), ("beta", 0)]).serve().await;
    let client = rotating(&pool);
    assert_eq!(status(&client, &server.uri()).await, 429);
    clock.advance(30 * SECOND);
    assert_eq!(status(&client, &server.uri()).await, 429);

    let error = get(&client, &server.uri()).await.unwrap_err();
    assert!(
        matches!(&error, Error::NoKeyAvailable(no_key) if no_key.retry_in() == Some(90 * SECOND)),
        "{error}"
    );
    assert_eq!(seen(&server).await, ["alpha", "beta"]);
}

#[tokio::test]
async fn a_cooldown_ends_without_a_sweep() {
    let clock = ManualClock::new();
    let pool = pool(["alpha"], &clock);
    let quotas = Quotas::of([("alpha", 0)]);
    let server = quotas.serve().await;
    assert_eq!(status(&rotating(&pool), &server.uri()).await, 429);
    quotas.refill("alpha");
    clock.advance(2 * MINUTE);
    assert_eq!(status(&rotating(&pool), &server.uri()).await, 200);
    assert_eq!(pool.stats().keys[0].recovered, 1);
}

#[tokio::test]
async fn one_sweep_recovers_a_key_for_every_pool() {
    let clock = ManualClock::new();
    let store = MemoryStore::with_clock(Arc::new(clock.clone()));
    let here = builder(["alpha"], &clock).open(store.clone()).await.unwrap();
    let there = KeyPool::builder().clock(clock.clone()).open(store).await.unwrap();
    let quotas = Quotas::of([("alpha", 0)]);
    let server = quotas.serve().await;
    let recovery = (
        RecoveryHandle::spawn_with(&here, sweep_at_once()),
        RecoveryHandle::spawn_with(&there, sweep_at_once()),
    );

    assert_eq!(status(&rotating(&here), &server.uri()).await, 429);
    recovery.0.sweep_now().await.outcome.unwrap();
    recovery.1.sweep_now().await.outcome.unwrap();
    assert!(get(&rotating(&there), &server.uri()).await.is_err(), "the other pool has not heard of the mark");

    quotas.refill("alpha");
    clock.advance(2 * MINUTE);
    let reset = recovery.1.sweep_now().await.outcome.unwrap().count
        + recovery.0.sweep_now().await.outcome.unwrap().count;
    // The interval passed as well, so a pass of its own may have been first.
    assert!(reset <= 1);
    assert_eq!((here.stats().healthy, there.stats().healthy), (1, 1));
    assert_eq!(status(&rotating(&there), &server.uri()).await, 200);
    assert_eq!(status(&rotating(&here), &server.uri()).await, 200);
}

#[tokio::test]
async fn a_limited_request_succeeds_with_another_key() {
    let clock = ManualClock::new();
    let pool = pool(["alpha", "beta", "gamma"], &clock);
    let server = Quotas::of([("alpha", 0), ("beta", 0)]).serve().await;
    let client = failing_over(failover(&pool));
    assert_eq!(status(&client, &server.uri()).await, 200);
    assert_eq!(seen(&server).await, ["alpha", "beta", "gamma"]);
    assert_eq!(status(&client, &server.uri()).await, 200);
    assert_eq!(seen(&server).await[3..], ["gamma"]);
}

#[tokio::test]
async fn remaining_keys_carry_a_burst_of_requests() {
    const REQUESTS: usize = 120;
    let clock = ManualClock::new();
    let pool = pool(["alpha", "beta", "gamma", "delta", "epsilon"], &clock);
    let quotas = Quotas::of([("alpha", 2), ("beta", 5)]);
    let server = quotas.serve().await;
    let budget = TpsBudget::new(10 * SECOND, 1000, 1.0);
    let client = failing_over(KeyRotationLayer::new(&pool).failover(Failover::attempts(3).budget(budget)));

    let url = server.uri();
    let storm = join_all((0..REQUESTS).map(|_| status(&client, &url)));
    assert_eq!(in_time(storm).await, [200; REQUESTS]);
    let stats = pool.stats();
    assert_eq!((stats.rate_limited, stats.healthy), (2, 3));

    // What the server saw is what the pool counted: each limited request once more, and no other.
    let keys = seen(&server).await;
    let limited: u64 = stats.keys.iter().map(|key| key.limited).sum();
    assert_eq!(keys.len() as u64, REQUESTS as u64 + limited);
    for key in &stats.keys {
        assert_eq!(keys.iter().filter(|seen| **seen == key.id.as_str()).count() as u64, key.requests);
    }

    // Whoever rests is left alone, and is back in its turn.
    for _ in 0..6 {
        assert_eq!(status(&client, &server.uri()).await, 200);
    }
    assert!(seen(&server).await[keys.len()..].iter().all(|key| key != "alpha" && key != "beta"));
    quotas.refill("alpha");
    quotas.refill("beta");
    clock.advance(2 * MINUTE);
    let before = seen(&server).await.len();
    for _ in 0..5 {
        assert_eq!(status(&client, &server.uri()).await, 200);
    }
    let mut round = seen(&server).await[before..].to_vec();
    round.sort();
    assert_eq!(round, ["alpha", "beta", "delta", "epsilon", "gamma"]);
}

#[tokio::test]
async fn the_same_holds_through_reqwest_middleware() {
    let clock = ManualClock::new();
    let pool = pool(["alpha", "beta"], &clock);
    let quotas = Quotas::of([("alpha", 0)]);
    let server = quotas.serve().await;
    let client = reqwest_middleware::ClientBuilder::new(http()).with(failover(&pool)).build();
    assert_eq!(client.get(server.uri()).send().await.unwrap().status(), 200);
    assert_eq!(seen(&server).await, ["alpha", "beta"]);
    quotas.refill("alpha");
    clock.advance(2 * MINUTE);
    for _ in 0..2 {
        assert_eq!(client.get(server.uri()).send().await.unwrap().status(), 200);
    }
    assert_eq!(seen(&server).await[2..], ["alpha", "beta"]);
}

#[tokio::test]
async fn layers_work_over_a_reqwest_middleware_client() {
    let clock = ManualClock::new();
    let pool = pool(["alpha", "beta"], &clock);
    let server = Quotas::of([("alpha", 0)]).serve().await;
    let client = reqwest_middleware::ClientBuilder::new(http()).build();
    let client = KeyRotationLayer::new(&pool).failover(Failover::attempts(3)).layer(client);
    let response = get(&client, &server.uri()).await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(seen(&server).await, ["alpha", "beta"]);
}
