//! A refusal may be about the key or about the request. Which, is found out by experiment, and keys that were taken out
//! by a guess are tried again.

mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::future::join_all;
use http::{Request, Response};
use proptest::prelude::*;
use support::{MINUTE, SECOND, builder, stats_of};
use tokio::task::yield_now;
use tower::{Layer, ServiceExt, service_fn};
use tower_key_rotation::{
    Error, Failover, KeyId, KeyLeases, KeyPool, KeyPoolBuilder, KeyRotationLayer, NoKeyAvailable, PassedOver,
    Quota, RecoveryHandle, RestCause, Status, Traits,
    classify::{ResponseHead, Verdict},
    clock::{Clock, ManualClock},
    store::MemoryStore,
};

/// What a service says of its key that names no reason, and what it says in plain words.
const REFUSALS: [u16; 4] = [401, 402, 403, 407];
const REVOKED: u16 = 410;
const EXHAUSTED: u16 = 412;

fn verdict(head: &ResponseHead<'_>) -> Verdict {
    match (head.status().as_u16(), head.wait()) {
        (EXHAUSTED, wait) => Verdict::Exhausted { wait },
        (REVOKED, _) => Verdict::Revoked,
        (401 | 402 | 403 | 407 | 429, Some(wait)) => Verdict::RateLimited { wait: Some(wait) },
        (429, None) => Verdict::RateLimited { wait: None },
        (401 | 402 | 403 | 407, None) => Verdict::Refused,
        _ => Verdict::Nothing,
    }
}

/// A status, and the wait that the service asks for.
type Answer = (u16, Option<u64>);

/// By the key and the request's body.
type Service = Arc<dyn Fn(&str, &str) -> Answer + Send + Sync>;

/// A pool, and a service.
#[derive(Clone)]
struct World {
    pool: KeyPool,
    clock: ManualClock,
    answer: Service,
    /// The keys that were sent, and when.
    sent: Arc<Mutex<Vec<(String, Duration)>>>,
}

impl World {
    fn new(keys: usize, answer: impl Fn(&str, &str) -> Answer + Send + Sync + 'static) -> Self {
        Self::of(|builder| builder.build().unwrap(), keys, answer)
    }

    fn of(
        build: impl FnOnce(KeyPoolBuilder) -> KeyPool,
        keys: usize,
        answer: impl Fn(&str, &str) -> Answer + Send + Sync + 'static,
    ) -> Self {
        let clock = ManualClock::new();
        let pool = build(builder((0..keys).map(|key| format!("key-{key}")), &clock));
        Self { pool, clock, answer: Arc::new(answer), sent: Arc::default() }
    }

    /// The client, which answers a little later than it is asked.
    async fn serve(self, request: Request<String>) -> Result<Response<String>, Infallible> {
        let header = request.headers()["authorization"].to_str().unwrap().to_owned();
        let key = header.strip_prefix("Bearer sk-").unwrap();
        self.sent.lock().unwrap().push((key.to_owned(), self.clock.now()));
        for _ in 0..3 {
            yield_now().await;
        }
        let (status, wait) = (self.answer)(key, request.body());
        let response = wait
            .into_iter()
            .fold(Response::builder().status(status), |response, wait| response.header("retry-after", wait));
        Ok(response.body(String::new()).unwrap())
    }

    fn layer(&self) -> KeyRotationLayer<fn(&ResponseHead<'_>) -> Verdict> {
        KeyRotationLayer::new(&self.pool).classify(verdict as fn(&ResponseHead<'_>) -> Verdict)
    }

    /// Sends a request once.
    async fn once(&self, body: &str) -> Result<u16, NoKeyAvailable> {
        let world = self.clone();
        let client = self.layer().layer(service_fn(move |request| world.clone().serve(request)));
        status(client.oneshot(request(body)).await)
    }

    /// Sends a request, and again with another key.
    async fn send(&self, body: &str) -> Result<u16, NoKeyAvailable> {
        let world = self.clone();
        let layer = self.layer().failover(Failover::attempts(3));
        let client = layer.layer(service_fn(move |request| world.clone().serve(request)));
        status(client.oneshot(request(body)).await)
    }

    /// The same with a lease.
    async fn send_by_lease(&self, body: &str) -> Result<u16, NoKeyAvailable> {
        let keys = KeyLeases::new(&self.pool);
        let answer: Result<_, Error<Infallible>> = keys
            .with_key(&Traits::new(), async |key| {
                let mut request = request(body);
                let value = format!("Bearer {}", key.secret().expose());
                request.headers_mut().insert("authorization", value.parse().unwrap());
                let response = self.clone().serve(request).await?;
                let head = ResponseHead::new(response.status(), response.headers());
                key.answered_by(&verdict, &head);
                Ok(response)
            })
            .await;
        status(answer)
    }

    /// The keys that were sent since the last call.
    fn sent(&self) -> Vec<String> {
        self.sent.lock().unwrap().drain(..).map(|(key, _)| key).collect()
    }

    fn statuses(&self) -> BTreeMap<String, Status> {
        self.pool.stats().keys.into_iter().map(|key| (key.id.to_string(), key.status)).collect()
    }

    /// How many keys do not serve.
    fn out(&self) -> usize {
        self.statuses().into_values().filter(|status| *status != Status::Healthy).count()
    }

    /// Sends a request each second, and returns when that key went out.
    async fn load(&self, key: &str, time: Duration) -> Vec<u64> {
        let until = self.clock.now() + time;
        let mut tried = Vec::new();
        while self.clock.now() < until {
            self.clock.advance(SECOND);
            assert_eq!(self.send("fine").await, Ok(200), "after {:?}", self.clock.now());
            tried.extend(self.sent().iter().filter(|sent| *sent == key).map(|_| self.clock.now().as_secs()));
        }
        tried
    }
}

fn request(body: &str) -> Request<String> {
    Request::post("https://api.example.com/v1").body(body.to_owned()).unwrap()
}

fn status<B, E: std::fmt::Debug>(answer: Result<Response<B>, Error<E>>) -> Result<u16, NoKeyAvailable> {
    match answer {
        Ok(response) => Ok(response.status().as_u16()),
        Err(Error::NoKeyAvailable(error)) => Err(error),
        Err(error) => panic!("{error:?}"),
    }
}

/// Requests of that body are refused with that status, whatever their key.
fn refusing(own: u16) -> impl Fn(&str, &str) -> Answer + Send + Sync {
    move |_, body| if body == "refused" { (own, None) } else { (200, None) }
}

/// One key is refused with that status, whatever the request.
fn revoked(bad: &'static str, with: u16) -> impl Fn(&str, &str) -> Answer + Send + Sync {
    move |key, _| if key == bad { (with, None) } else { (200, None) }
}

// ---- requests that are refused for themselves ----

#[tokio::test]
async fn f37_a_refused_request_costs_no_key() {
    for refusal in REFUSALS {
        let world = World::new(5, refusing(refusal));
        assert_eq!(world.send("refused").await, Ok(refusal));
        assert_eq!(world.sent(), ["key-0", "key-1"], "{refusal}");
        assert_eq!(world.out(), 0, "{refusal}");
        assert_eq!(world.send("fine").await, Ok(200));
    }
}

#[tokio::test]
async fn f37_a_hundred_refused_requests_cost_no_key() {
    for refusal in REFUSALS {
        let world = World::new(5, refusing(refusal));
        for number in 0..100 {
            assert_eq!(world.send("refused").await, Ok(refusal));
            assert_eq!((world.sent().len(), world.out()), (2, 0), "{refusal}, request {number}");
            world.clock.advance(SECOND);
        }
    }
}

#[tokio::test]
async fn f37_a_hundred_concurrent_refusals_cost_no_key() {
    let world = World::new(5, refusing(403));
    let answers = join_all((0..100).map(|_| world.send("refused"))).await;
    assert!(answers.iter().all(|answer| *answer == Ok(403)));
    assert!(world.sent().len() <= 200);
    assert!(world.out() <= 1, "{:?}", world.statuses());
    assert_eq!(world.pool.stats().revoked, 0);
}

#[tokio::test]
async fn f37_unrepeatable_refusals_suspect_half_of_the_keys_at_most() {
    for keys in 1..7 {
        let world = World::new(keys, refusing(401));
        for number in 0..100 {
            assert_eq!(world.once("refused").await, Ok(401));
            assert!(world.out() <= keys / 2, "{:?}, request {number}", world.statuses());
            assert_eq!(world.sent().len(), 1);
            world.clock.advance(SECOND);
        }
        let answers = join_all((0..100).map(|_| world.once("refused"))).await;
        assert!(answers.iter().all(|answer| *answer == Ok(401)));
        assert!(world.out() <= keys / 2);
        assert_eq!(world.pool.stats().revoked, 0);
    }
}

#[tokio::test]
async fn f37_a_suspected_key_is_back_after_10_seconds() {
    let world = World::new(3, refusing(401));
    assert_eq!(world.once("refused").await, Ok(401));
    let key = stats_of(&world.pool, "key-0");
    assert_eq!(
        (key.status, key.cause, key.time_left, key.last_reason),
        (Status::Suspected, Some(RestCause::Suspected), Some(10 * SECOND), Some(401))
    );
    let passed_over = world.pool.explain(&Traits::new()).keys.remove(2);
    assert_eq!(
        (passed_over.passed_over, passed_over.opens_in),
        (Some(PassedOver::Suspected), Some(10 * SECOND))
    );
    world.sent();
    for _ in 0..4 {
        assert_eq!(world.once("fine").await, Ok(200));
    }
    assert_eq!(world.sent(), ["key-1", "key-2", "key-1", "key-2"]);
    world.clock.advance(10 * SECOND);
    assert_eq!(world.pool.explain(&Traits::new()).next.unwrap().as_str(), "key-0");
    assert_eq!(world.once("fine").await, Ok(200));
    assert_eq!((world.sent(), world.out()), (vec!["key-0".to_owned()], 0));
}

#[tokio::test]
async fn f37_keys_that_serve_others_are_not_suspected() {
    let world = World::new(10, refusing(403));
    for _ in 0..20 {
        assert_eq!(world.once("refused").await, Ok(403));
        for _ in 0..99 {
            assert_eq!(world.once("fine").await, Ok(200));
        }
        world.clock.advance(SECOND);
    }
    world.clock.advance(MINUTE);
    for _ in 0..10 {
        assert_eq!(world.once("fine").await, Ok(200));
    }
    for _ in 0..20 {
        for _ in 0..99 {
            assert_eq!(world.once("fine").await, Ok(200));
        }
        assert_eq!((world.once("refused").await, world.out()), (Ok(403), 0));
    }
}

/// No other key is available: then requests do not pass over it.
#[tokio::test]
async fn f37_suspicion_ends_when_no_other_key_is_available() {
    let world = World::new(2, refusing(401));
    assert_eq!(world.once("refused").await, Ok(401));
    assert_eq!(world.out(), 1);
    world.pool.disable("key-1").await.unwrap();
    for _ in 0..3 {
        assert_eq!(world.once("fine").await, Ok(200));
    }
    assert_eq!(world.once("refused").await, Ok(401));
    assert_eq!(stats_of(&world.pool, "key-0").status, Status::Healthy);
    assert_eq!(world.once("fine").await, Ok(200));
}

#[tokio::test]
async fn f37_an_empty_budget_or_stream_sends_once() {
    let world = World::new(5, refusing(401));
    let never = tower::retry::budget::TpsBudget::new(10 * SECOND, 0, 0.0);
    for failover in [Failover::attempts(3).budget(never), Failover::attempts(1)] {
        let serving = world.clone();
        let layer = world.layer().failover(failover);
        let client = layer.layer(service_fn(move |request| serving.clone().serve(request)));
        assert_eq!(status(client.oneshot(request("refused")).await), Ok(401));
        assert_eq!(world.sent().len(), 1);
    }
    let serving = world.clone();
    let layer = world.layer().failover(Failover::attempts(3).clone_with(|_: &Request<String>| None));
    let client = layer.layer(service_fn(move |request| serving.clone().serve(request)));
    assert_eq!(status(client.oneshot(request("refused")).await), Ok(401));
    assert_eq!(world.sent().len(), 1);
    assert!(world.out() <= 2);
}

/// With one key there is nothing to compare, and no reason to wait for the same one.
#[tokio::test]
async fn f37_the_only_key_is_sent_once_and_stays() {
    let world = World::new(1, refusing(401));
    for _ in 0..3 {
        let serving = world.clone();
        let layer = world.layer().failover(Failover::attempts(3)).wait_up_to(MINUTE);
        let client = layer.layer(service_fn(move |request| serving.clone().serve(request)));
        assert_eq!(status(client.oneshot(request("refused")).await), Ok(401));
        assert_eq!((world.sent().len(), world.out()), (1, 0));
    }
    assert_eq!(world.send_by_lease("refused").await, Ok(401));
    assert_eq!((world.sent().len(), world.out()), (1, 0));
}

#[tokio::test]
async fn f37_leases_compare_two_keys_too() {
    let world = World::new(5, refusing(401));
    assert_eq!(world.send_by_lease("refused").await, Ok(401));
    assert_eq!((world.sent().len(), world.out()), (2, 0));
    let world = World::new(5, revoked("key-0", 401));
    assert_eq!(world.send_by_lease("fine").await, Ok(200));
    assert_eq!(stats_of(&world.pool, "key-0").cause, Some(RestCause::Confirmed));
    let lease = world.pool.lease(&Traits::new()).unwrap();
    let id = lease.id().to_string();
    lease.answered_with(Verdict::Refused);
    assert_eq!(stats_of(&world.pool, &id).status, Status::Suspected);
}

#[tokio::test]
async fn f37_a_success_that_rests_its_key_confirms_nothing() {
    let world = World::new(2, |key, _| if key == "key-0" { (401, None) } else { (200, Some(600)) });
    let limited_by_a_success = |head: &ResponseHead<'_>| match head.status().as_u16() {
        200 => Verdict::RateLimited { wait: head.wait() },
        _ => verdict(head),
    };
    let by_lease = world.clone();
    let keys = KeyLeases::new(&world.pool);
    let answer: Result<_, Error<Infallible>> = keys
        .with_key(&Traits::new(), async |key| {
            let mut request = request("");
            let value = format!("Bearer {}", key.secret().expose());
            request.headers_mut().insert("authorization", value.parse().unwrap());
            let response = by_lease.clone().serve(request).await?;
            key.answered_by(&limited_by_a_success, &ResponseHead::new(response.status(), response.headers()));
            Ok(response)
        })
        .await;
    assert_eq!(status(answer), Ok(200));
    assert_eq!(world.sent(), ["key-0", "key-1"]);
    assert_eq!(stats_of(&world.pool, "key-0").cause, Some(RestCause::Suspected));
}

#[tokio::test]
async fn f37_a_firewalls_page_confirms_no_refusal() {
    let firewall = World::new(2, |key, _| (if key == "key-0" { 401 } else { 403 }, None));
    let layer = KeyRotationLayer::new(&firewall.pool).failover(Failover::attempts(3)).classify(
        |head: &ResponseHead<'_>| match head.status().as_u16() {
            401 => Verdict::Refused,
            _ => Verdict::Nothing,
        },
    );
    let client = firewall.clone();
    let client = layer.layer(service_fn(move |request| client.clone().serve(request)));
    assert_eq!(status(client.oneshot(request("")).await), Ok(403));
    assert_eq!(firewall.sent(), ["key-0", "key-1"]);
    assert!(!firewall.statuses().values().any(|status| *status == Status::RateLimited));
}

#[tokio::test]
async fn f37_scoped_and_paced_pools_compare_two_keys() {
    let world = World::of(|builder| builder.paced().build().unwrap(), 5, refusing(401));
    for _ in 0..20 {
        assert_eq!(world.send("refused").await, Ok(401));
        assert_eq!((world.sent().len(), world.out()), (2, 0));
    }
    let world = World::of(|builder| builder.paced().build().unwrap(), 10, revoked("key-3", 401));
    for _ in 0..10 {
        assert_eq!(world.send("fine").await, Ok(200));
    }
    assert_eq!(stats_of(&world.pool, "key-3").cause, Some(RestCause::Confirmed));
    world.sent();
    let tried = world.load("key-3", 10 * MINUTE).await;
    assert_eq!(tried, [60, 180, 420]);
}

// ---- keys that are refused ----

#[tokio::test]
async fn f43_a_revoked_key_is_found_within_a_round() {
    for refusal in REFUSALS {
        let world = World::new(10, revoked("key-4", refusal));
        for _ in 0..10 {
            assert_eq!(world.send("fine").await, Ok(200));
        }
        let key = stats_of(&world.pool, "key-4");
        assert_eq!((key.status, key.cause), (Status::RateLimited, Some(RestCause::Confirmed)), "{refusal}");
        assert_eq!((key.last_reason, world.out()), (Some(refusal), 1));
        assert_eq!(world.sent().iter().filter(|sent| *sent == "key-4").count(), 1);
    }
}

#[tokio::test]
async fn f43_adjacent_revoked_keys_are_told_apart() {
    let bad = |key: &str| matches!(key, "key-3" | "key-4");
    let world = World::new(10, move |key, _| if bad(key) { (401, None) } else { (200, None) });
    let mut failed = 0;
    for _ in 0..30 {
        failed += usize::from(world.send("fine").await != Ok(200));
        world.clock.advance(SECOND);
    }
    assert!(failed <= 1, "{failed} failed");
    for key in ["key-3", "key-4"] {
        assert_eq!(stats_of(&world.pool, key).cause, Some(RestCause::Confirmed), "{key}");
    }
    assert_eq!(world.out(), 2);
}

#[tokio::test]
async fn f43_trials_come_at_growing_intervals_and_heal() {
    let is_mended = Arc::new(Mutex::new(false));
    let mended = is_mended.clone();
    let world =
        World::new(
            10,
            move |key, _| {
                if key == "key-0" && !*mended.lock().unwrap() { (401, None) } else { (200, None) }
            },
        );
    let tried = world.load("key-0", 61 * MINUTE).await;
    // After 1, 2, 4, 8 minutes, and then every 10 minutes.
    let first = tried[0];
    let minutes: Vec<_> = tried.iter().map(|at| (at - first) / 60).collect();
    assert_eq!(minutes, [0, 1, 3, 7, 15, 25, 35, 45, 55]);
    *is_mended.lock().unwrap() = true;
    let tried = world.load("key-0", 10 * MINUTE).await;
    assert!(tried.len() > 5, "it does not serve again: {tried:?}");
    assert_eq!(world.out(), 0);
    assert_eq!(stats_of(&world.pool, "key-0").cause, None);
}

#[tokio::test]
async fn f43_one_request_at_a_time_tries_a_key() {
    let world = World::new(10, revoked("key-0", 401));
    assert_eq!(world.send("fine").await, Ok(200));
    for minutes in [1, 2, 4, 8, 10, 10] {
        world.sent();
        world.clock.advance(minutes * MINUTE);
        let answers = join_all((0..50).map(|_| world.send("fine"))).await;
        assert!(answers.iter().all(|answer| *answer == Ok(200)));
        assert_eq!(world.sent().iter().filter(|sent| *sent == "key-0").count(), 1);
    }
}

#[tokio::test]
async fn f43_unrepeatable_requests_try_no_resting_key() {
    let world = World::new(3, |key, body| match (key, body) {
        ("key-0", "exhausted") => (EXHAUSTED, None),
        _ => (200, None),
    });
    assert_eq!(world.send("exhausted").await, Ok(200));
    let key = stats_of(&world.pool, "key-0");
    assert_eq!((key.status, key.cause), (Status::Exhausted, Some(RestCause::Guessed)));
    world.clock.advance(5 * MINUTE);
    world.sent();
    for _ in 0..10 {
        assert_eq!(world.once("fine").await, Ok(200));
    }
    assert!(!world.sent().contains(&"key-0".to_owned()));
    assert_eq!(world.send("fine").await, Ok(200));
    assert_eq!((world.sent(), world.out()), (vec!["key-0".to_owned()], 0));
}

/// No key is left, so there is nothing to fail over to.
#[tokio::test]
async fn f43_an_exhausted_pool_is_tried_by_any_request() {
    let world = World::new(2, |_, body| if body == "exhausted" { (EXHAUSTED, None) } else { (200, None) });
    assert_eq!(world.send("exhausted").await, Ok(EXHAUSTED));
    let error = world.once("fine").await.unwrap_err();
    assert_eq!(error.retry_in(), Some(MINUTE));
    world.clock.advance(MINUTE);
    assert_eq!(world.once("exhausted").await, Ok(EXHAUSTED));
    assert_eq!(world.once("fine").await, Ok(200));
    assert_eq!(world.pool.stats().healthy, 1);
}

#[tokio::test]
async fn f38_a_refusal_that_names_a_wait_rests_its_key() {
    for refusal in REFUSALS {
        let world =
            World::new(2, move |key, _| if key == "key-0" { (refusal, Some(600)) } else { (200, None) });
        assert_eq!(world.send("fine").await, Ok(200));
        let key = stats_of(&world.pool, "key-0");
        assert_eq!((key.status, key.time_left), (Status::RateLimited, Some(10 * MINUTE)));
        assert_eq!(key.cause, Some(RestCause::Service));
        // Nobody tries it before.
        world.sent();
        assert_eq!(world.load("key-0", 10 * MINUTE - SECOND).await, [0_u64; 0]);
        assert_eq!(world.load("key-0", 3 * SECOND).await.len(), 1);
    }
}

#[tokio::test]
async fn f43_a_named_time_is_never_tried_before() {
    // A guess first, and then half a day that the service names at the trial.
    let world = World::new(2, |key, body| match (key, body) {
        ("key-0", "guess") => (EXHAUSTED, None),
        ("key-0", _) => (EXHAUSTED, Some(12 * 3_600)),
        _ => (200, None),
    });
    assert_eq!(world.send("guess").await, Ok(200));
    world.sent();
    let tried = world.load("key-0", 3 * MINUTE).await;
    assert_eq!(tried.len(), 1);
    for _ in 0..2 {
        assert_eq!(world.load("key-0", 10 * MINUTE).await, [0_u64; 0]);
        world.clock.advance(5 * 60 * MINUTE);
    }
    world.clock.advance(2 * 60 * MINUTE);
    assert_eq!(world.load("key-0", MINUTE).await.len(), 1);
}

#[tokio::test]
async fn f43_a_failed_trial_lengthens_no_named_rest() {
    let build = |builder: KeyPoolBuilder| builder.cooldown(SECOND).build().unwrap();
    let world = World::of(build, 3, revoked("key-0", 401));
    // Under way while the key is limited.
    let (first, second) = tokio::join!(world.send("fine"), async {
        let lease = world.pool.lease(&Traits::new().key(KeyId::new("key-0").unwrap())).unwrap();
        lease.answered_with(Verdict::RateLimited { wait: Some(90 * SECOND) });
    });
    assert_eq!((first, second), (Ok(200), ()));
    let key = stats_of(&world.pool, "key-0");
    assert_eq!((key.cause, key.time_left), (Some(RestCause::Service), Some(90 * SECOND)));
    world.sent();
    assert_eq!(world.load("key-0", 89 * SECOND).await, [0_u64; 0]);
    assert_eq!(world.load("key-0", 3 * SECOND).await.len(), 1);
}

#[tokio::test]
async fn f37_the_last_key_is_not_revoked_for_good() {
    let world = World::new(2, |_, body| if body == "revoked" { (REVOKED, None) } else { (200, None) });
    assert_eq!(world.send("revoked").await, Ok(REVOKED));
    let [first, last] = ["key-0", "key-1"].map(|key| stats_of(&world.pool, key));
    assert_eq!((first.status, first.cause), (Status::Revoked, Some(RestCause::Service)));
    assert_eq!((last.status, last.cause), (Status::Exhausted, Some(RestCause::Confirmed)));
    assert_eq!(world.once("fine").await.unwrap_err().retry_in(), Some(MINUTE));
    world.clock.advance(MINUTE);
    assert_eq!(world.once("revoked").await, Ok(REVOKED));
    assert_eq!(world.once("fine").await.unwrap_err().retry_in(), Some(2 * MINUTE));
    world.clock.advance(2 * MINUTE);
    assert_eq!(world.once("fine").await, Ok(200));
    assert_eq!(world.once("fine").await, Ok(200));
    assert_eq!(stats_of(&world.pool, "key-1").status, Status::Healthy);
}

#[tokio::test]
async fn f43_a_reset_ends_doubts_and_trials() {
    let world = World::new(3, revoked("key-0", 401));
    assert_eq!(world.send("fine").await, Ok(200));
    world.pool.reset("key-0").await.unwrap();
    assert_eq!((world.out(), stats_of(&world.pool, "key-0").cause), (0, None));
    let world = World::new(3, refusing(401));
    assert_eq!(world.once("refused").await, Ok(401));
    assert_eq!(world.out(), 1);
    world.pool.reset("key-0").await.unwrap();
    assert_eq!(world.out(), 0);
}

/// An operator's word outranks a trial.
#[tokio::test]
async fn f43_disabled_keys_are_not_tried() {
    let world = World::new(3, revoked("key-0", 401));
    assert_eq!(world.send("fine").await, Ok(200));
    world.pool.disable("key-0").await.unwrap();
    world.sent();
    assert_eq!(world.load("key-0", 5 * MINUTE).await, [0_u64; 0]);
    world.pool.enable("key-0").await.unwrap();
    assert!(!world.load("key-0", 20 * MINUTE).await.is_empty());
}

/// Those that had no answer, too.
#[tokio::test]
async fn f43_a_dropped_trial_holds_up_no_later_one() {
    let world =
        World::new(3, |key, body| if key == "key-0" && body == "bad" { (401, None) } else { (200, None) });
    assert_eq!(world.send("bad").await, Ok(200));
    world.clock.advance(MINUTE);
    world.sent();
    let serving = world.clone();
    let mut trial = Box::pin(serving.send("fine"));
    assert!(futures_util::poll!(trial.as_mut()).is_pending());
    drop(trial);
    assert_eq!(world.sent(), ["key-0"]);
    assert_eq!(world.load("key-0", 3 * MINUTE).await.first(), Some(&180));
    assert_eq!(world.out(), 0);
}

// ---- at random ----

#[derive(Clone, Debug)]
enum Step {
    /// With failover or without, of which the service may refuse every one.
    Send {
        is_refused: bool,
        has_failover: bool,
    },
    /// Several at once.
    SendAll(usize),
    /// The service refuses the key from now on, or no longer.
    Break(usize),
    Mend(usize),
    Advance(u64),
    Disable(usize),
    Enable(usize),
    Reset(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let send = (any::<bool>(), any::<bool>());
    prop_oneof![
        10 => send.prop_map(|(is_refused, has_failover)| Step::Send { is_refused, has_failover }),
        2 => (1_usize..20).prop_map(Step::SendAll),
        2 => (0_usize..6).prop_map(Step::Break),
        1 => (0_usize..6).prop_map(Step::Mend),
        6 => (0_u64..200).prop_map(Step::Advance),
        1 => (0_usize..6).prop_map(Step::Disable),
        1 => (0_usize..6).prop_map(Step::Enable),
        1 => (0_usize..6).prop_map(Step::Reset),
    ]
}

async fn play(keys: usize, steps: Vec<Step>) {
    let broken: Arc<Mutex<BTreeSet<String>>> = Arc::default();
    let refused = broken.clone();
    let world = World::new(keys, move |key, body| {
        let is_refused = body == "refused" || refused.lock().unwrap().contains(key);
        (if is_refused { 401 } else { 200 }, None)
    });
    let id = |key: usize| format!("key-{}", key % keys);
    for step in steps {
        let has_healthy = world.pool.stats().healthy > 0;
        match &step {
            Step::Send { is_refused, has_failover } => {
                let body = if *is_refused { "refused" } else { "fine" };
                let answer = if *has_failover { world.send(body).await } else { world.once(body).await };
                assert!(answer.is_ok() || !has_healthy, "{step:?}: {answer:?}");
                assert!(world.sent().len() <= if *has_failover { 2 } else { 1 }, "{step:?}");
            }
            Step::SendAll(count) => {
                let answers = join_all((0..*count).map(|_| world.send("fine"))).await;
                assert!(answers.iter().all(|answer| answer.is_ok() || !has_healthy));
                world.sent();
            }
            Step::Break(key) => _ = broken.lock().unwrap().insert(id(*key)),
            Step::Mend(key) => _ = broken.lock().unwrap().remove(&id(*key)),
            Step::Advance(seconds) => world.clock.advance(Duration::from_secs(*seconds)),
            Step::Disable(key) => world.pool.disable(id(*key)).await.unwrap(),
            Step::Enable(key) => world.pool.enable(id(*key)).await.unwrap(),
            Step::Reset(key) => world.pool.reset(id(*key)).await.unwrap(),
        }
        let stats = world.pool.stats();
        assert_eq!(stats.revoked, 0, "{step:?}");
        assert!(stats.keys.iter().all(|key| key.time_left <= Some(20 * MINUTE)), "{step:?}: {stats:?}");
        assert!(stats.keys.len() == stats.disabled || world.pool.next_return() <= Some(20 * MINUTE));
    }
    // All is well again.
    broken.lock().unwrap().clear();
    for key in 0..keys {
        world.pool.enable(id(key)).await.unwrap();
    }
    for _ in 0..90 {
        world.clock.advance(MINUTE);
        let _ = world.send("fine").await;
    }
    assert_eq!(world.out(), 0, "{:?}", world.pool.stats());
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn f43_keys_come_back_after_any_refusals(keys in 1_usize..6, steps in prop::collection::vec(step(), 1..60)) {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(play(keys, steps));
    }
}

// ---- load ----

/// How many requests of a minute were served, and how many were refused. Ten keys serve 10 requests a second each, which 200
/// callers use up. One request in a hundred is of the other kind.
async fn goodput(each_hundredth: &'static str) -> (usize, usize) {
    let keys = (0..10).map(|key| (format!("key-{key}"), format!("sk-key-{key}")));
    let pool = KeyPool::builder().keys(keys).quota(Quota::per_second(10).burst(10)).build().unwrap();
    let layer = KeyRotationLayer::new(&pool)
        .classify(verdict as fn(&ResponseHead<'_>) -> Verdict)
        .failover(Failover::attempts(3))
        .wait_up_to(MINUTE);
    let client = layer.layer(service_fn(async |request: Request<String>| {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let status: u16 = request.body().parse().unwrap();
        Ok::<_, Infallible>(Response::builder().status(status).body(String::new()).unwrap())
    }));
    let end = tokio::time::Instant::now() + MINUTE;
    let next = Arc::new(Mutex::new(0));
    let callers = (0..200).map(|_| async {
        let (mut served, mut refused) = (0, 0);
        while tokio::time::Instant::now() < end {
            let number = {
                let mut next = next.lock().unwrap();
                *next += 1;
                *next
            };
            let kind = if number % 100 == 0 { each_hundredth } else { "200" };
            let answer = status(client.clone().oneshot(request(kind)).await).unwrap();
            *(if answer == 200 { &mut served } else { &mut refused }) += 1;
        }
        (served, refused)
    });
    let counts = join_all(callers).await;
    (counts.iter().map(|count| count.0).sum(), counts.iter().map(|count| count.1).sum())
}

/// Each is sent twice, and nothing else is lost: its key is missed for one round trip only.
#[tokio::test(start_paused = true)]
async fn f37_refused_requests_cost_less_than_2_percent() {
    let (without, _) = goodput("200").await;
    for refusal in ["401", "403"] {
        let (served, refused) = goodput(refusal).await;
        assert!(refused >= 50, "{refused} were refused");
        assert!(served + refused >= without * 985 / 1_000, "{served} and {refused} of {without}");
        assert!(served >= without * 98 / 100, "{served} of {without}");
    }
}

// ---- over a store ----

#[tokio::test]
async fn f43_a_key_that_serves_again_serves_all_processes() {
    let clock = ManualClock::new();
    let store = MemoryStore::with_clock(Arc::new(clock.clone()));
    let is_mended = Arc::new(Mutex::new(false));
    let mended = is_mended.clone();
    let keys = || builder((0..3).map(|key| format!("key-{key}")), &clock);
    let [one, other] = [keys().open(store.clone()).await.unwrap(), keys().open(store.clone()).await.unwrap()];
    // Its passes come when they are called for.
    let recovery = RecoveryHandle::spawn(&one);
    let answer = move |key: &str, _: &str| -> Answer {
        if key == "key-0" && !*mended.lock().unwrap() { (401, None) } else { (200, None) }
    };
    let world =
        World { pool: one.clone(), clock: clock.clone(), answer: Arc::new(answer), sent: Arc::default() };

    // A suspicion is nobody else's.
    assert_eq!(world.once("fine").await, Ok(401));
    assert_eq!(one.stats().marks_waiting, 0);
    one.reset("key-0").await.unwrap();
    assert_eq!(world.once("fine").await, Ok(200));
    assert_eq!(world.once("fine").await, Ok(200));
    // A confirmed one is.
    assert_eq!(world.send("fine").await, Ok(200));
    assert_eq!(one.stats().marks_waiting, 1);
    recovery.sweep_now().await.outcome.unwrap();
    other.reload().await.unwrap();
    let there = stats_of(&other, "key-0");
    assert_eq!((there.status, there.cause), (Status::RateLimited, Some(RestCause::Store)));

    *is_mended.lock().unwrap() = true;
    clock.advance(MINUTE);
    assert_eq!(world.send("fine").await, Ok(200));
    assert_eq!(stats_of(&one, "key-0").status, Status::Healthy);
    recovery.sweep_now().await.outcome.unwrap();
    other.reload().await.unwrap();
    assert_eq!(stats_of(&other, "key-0").status, Status::Healthy);
    one.reload().await.unwrap();
    assert_eq!(stats_of(&one, "key-0").status, Status::Healthy);
}
