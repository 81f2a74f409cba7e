//! What a 429 does to its key, and what becomes of requests meanwhile.

// A test may panic, and so may what it calls.

mod support;

use std::{
    collections::HashMap,
    future::ready,
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use futures_util::{FutureExt, future::join_all};
use http::{HeaderName, HeaderValue, Request, Response, Uri, header::AUTHORIZATION};
use proptest::prelude::*;
use support::*;
use tokio::sync::{Semaphore, oneshot};
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_key_rotation::{
    Error, Inject, KeyId, KeyPool, KeyRotationLayer, NoKeyAvailable, RecoveryConfig, RecoveryHandle,
    ServedBy, Status,
    classify::{LlmGateway, ResponseHead, Verdict},
    clock::{Clock, ManualClock, Sleep},
    store::{MemoryStore, Until},
};

const HOUR: Duration = Duration::from_secs(60 * 60);

#[tokio::test]
async fn a_429_starts_an_exact_two_minute_cooldown() {
    let clock = ManualClock::new();
    let pool = pool(["alpha", "beta", "gamma"], &clock);
    let server = Server::limiting(["alpha"]).await;
    let client = rotating(&pool);

    assert_eq!(status(&client, &server.url()).await, 429);
    server.lift("alpha");
    clock.advance(2 * MINUTE - INSTANT);
    for _ in 0..4 {
        assert_eq!(status(&client, &server.url()).await, 200);
    }
    assert_eq!(server.keys(), ["alpha", "beta", "gamma", "beta", "gamma"]);

    clock.advance(INSTANT);
    for _ in 0..3 {
        assert_eq!(status(&client, &server.url()).await, 200);
    }
    assert_eq!(server.keys()[5..], ["alpha", "beta", "gamma"]);
}

/// A clock that counts how often it is read.
#[derive(Clone, Debug, Default)]
struct CountedClock {
    clock: ManualClock,
    reads: Arc<AtomicUsize>,
}

impl Clock for CountedClock {
    fn now(&self) -> Duration {
        self.reads.fetch_add(1, SeqCst);
        self.clock.now()
    }

    fn sleep_until(&self, deadline: Duration) -> Sleep {
        self.clock.sleep_until(deadline)
    }
}

#[tokio::test]
async fn no_request_reads_the_clock_without_cooldowns() {
    let clock = CountedClock::default();
    let pool = KeyPool::builder().keys([("alpha", "sk-1"), ("beta", "sk-2")]).clock(clock.clone());
    let pool = pool.build().unwrap();
    let answer = |request: Request<u16>| {
        ready(Ok::<_, io::Error>(Response::builder().status(*request.body()).body(()).unwrap()))
    };
    let mut client = KeyRotationLayer::new(&pool).layer(service_fn(answer));
    let mut send = |status| {
        let request = Request::get("https://api.example.com").body(status).unwrap();
        let response = client.call(request).now_or_never().unwrap();
        assert_eq!(response.unwrap().status(), status);
        clock.reads.swap(0, SeqCst)
    };
    send(200);
    assert_eq!((send(200), send(200)), (0, 0));
    assert_ne!(send(429), 0);
    assert_ne!(send(200), 0);
    clock.clock.advance(2 * MINUTE);
    send(200);
    assert_eq!(send(200), 0);
}

#[tokio::test]
async fn a_cooldown_ends_by_itself_without_any_sweep() {
    let clock = ManualClock::new();
    let pool = pool(["alpha"], &clock);
    let server = Server::limiting(["alpha"]).await;
    let client = rotating(&pool);

    assert_eq!(status(&client, &server.url()).await, 429);
    server.lift("alpha");
    assert_eq!(stats_of(&pool, "alpha").status, Status::RateLimited);
    clock.advance(2 * MINUTE);
    assert_eq!(status(&client, &server.url()).await, 200);
    let key = stats_of(&pool, "alpha");
    assert_eq!((key.status, key.recovered, key.requests, key.limited), (Status::Healthy, 1, 2, 1));
    assert_eq!(key.last_reason, Some(429));
}

/// How long a key rests that was answered with a status and these headers.
async fn rest_after<const N: usize>(
    status: u16,
    headers: [(&'static str, &'static str); N],
    exact: bool,
) -> Duration {
    let clock = ManualClock::new();
    let builder = builder(["alpha"], &clock);
    let pool = if exact { builder.exact_hints() } else { builder }.build().unwrap();
    let server = Server::answering(move || answer_with(status, headers, "")).await;
    let response = get(&rotating(&pool), &server.url()).await.unwrap();
    assert_eq!(response.status(), status);
    time_left(&pool, "alpha").unwrap_or_default()
}

#[tokio::test]
async fn a_retry_after_above_two_minutes_is_honoured() {
    assert_eq!(rest_after(429, [("retry-after", "300")], false).await, 5 * MINUTE);
    assert_eq!(rest_after(429, [("retry-after", "300")], true).await, 5 * MINUTE);
}

#[tokio::test]
async fn a_shorter_retry_after_needs_exact_hints() {
    assert_eq!(rest_after(429, [("retry-after", "30")], false).await, 2 * MINUTE);
    assert_eq!(rest_after(429, [("retry-after", "30")], true).await, 30 * SECOND);
    assert_eq!(rest_after(429, [("retry-after", "0")], true).await, SECOND);
}

#[tokio::test]
async fn f28_a_retry_after_is_capped_at_an_hour() {
    assert_eq!(rest_after(429, [("retry-after", "86400")], false).await, HOUR);
    assert_eq!(rest_after(429, [("retry-after", "18446744073709551615")], true).await, HOUR);
}

#[test]
fn the_reset_of_a_quota_is_exact() {
    let pool = pool(["alpha"], &ManualClock::new());
    let used_up =
        |_: Request<()>| ready(Response::builder().status(429).header("retry-after", "600").body(()));
    let request = Request::get("https://api.example.com").body(()).unwrap();
    let client = KeyRotationLayer::new(&pool).classify(exhausts).layer(service_fn(used_up));
    client.oneshot(request).now_or_never().unwrap().unwrap();
    let key = stats_of(&pool, "alpha");
    assert_eq!((key.status, key.time_left), (Status::Exhausted, Some(10 * MINUTE)));
}

/// A classifier for which each response exhausts the key.
fn exhausts(response: &ResponseHead<'_>) -> Verdict {
    Verdict::Exhausted { wait: response.wait() }
}

#[test]
fn hint_limits_cap_all_hints_but_those_of_quotas() {
    let rest = |least, most, retry_after: &'static str| {
        let pool = builder(["alpha"], &ManualClock::new()).exact_hints().hint_limits(least, most);
        let pool = pool.cooldown(MINUTE).build().unwrap();
        let limited = move |_: Request<()>| {
            ready(Response::builder().status(429).header("retry-after", retry_after).body(()))
        };
        let send = || Request::get("https://api.example.com").body(()).unwrap();
        let layer = KeyRotationLayer::new(&pool);
        layer.clone().layer(service_fn(limited)).oneshot(send()).now_or_never().unwrap().unwrap();
        let rate_limited = time_left(&pool, "alpha").unwrap();
        pool.reset("alpha").now_or_never().unwrap().unwrap();
        layer.classify(exhausts).layer(service_fn(limited)).oneshot(send()).now_or_never().unwrap().unwrap();
        (rate_limited, time_left(&pool, "alpha").unwrap())
    };
    assert_eq!(rest(SECOND, MINUTE, "36000"), (MINUTE, 10 * HOUR));
    // The cap wins over a higher floor.
    assert_eq!(rest(2 * MINUTE, MINUTE, "0").0, MINUTE);
}

#[tokio::test]
async fn f28_an_invalid_retry_after_means_two_minutes() {
    for nonsense in ["-5", "NaN", "soon", "", "99999999999999999999999", "Sat, 01 Jan 2000 00:00:00 GMT"] {
        assert_eq!(rest_after(429, [("retry-after", nonsense)], true).await, 2 * MINUTE, "{nonsense}");
    }
}

/// How a service asks for a wait, and values that it may or may not have meant.
fn asked() -> impl Strategy<Value = (&'static str, Vec<u8>)> {
    let names =
        ["retry-after", "retry-after-ms", "x-ratelimit-reset", "ratelimit-reset", "ratelimit", "date"];
    let value = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..40),
        "-?[0-9]{0,40}[.]?[0-9]{0,20}".prop_map(String::into_bytes),
        "(Mon|Sat), [0-9]{2} (Jan|Nov) [0-9]{4} [0-9]{2}:[0-9]{2}:[0-9]{2} GMT".prop_map(String::into_bytes),
        "\"a\";r=0;t=-?[0-9]{1,17}".prop_map(String::into_bytes),
    ];
    (prop::sample::select(names.to_vec()), value)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn f28_cooldowns_stay_between_two_minutes_and_an_hour(
        asked in prop::collection::vec(asked(), 0..4),
    ) {
        let pool = pool(["alpha"], &ManualClock::new());
        let mut limited = Response::builder().status(429).body(()).unwrap();
        for (name, value) in asked {
            // Not every byte can be in a header.
            let Ok(value) = HeaderValue::from_bytes(&value) else { continue };
            limited.headers_mut().append(HeaderName::from_static(name), value);
        }
        let service = service_fn(move |_: Request<()>| ready(Ok::<_, io::Error>(limited.clone())));
        let mut client = KeyRotationLayer::new(&pool).layer(service);
        let sent = client.call(Request::get("https://api.example.com").body(()).unwrap());
        prop_assert_eq!(sent.now_or_never().unwrap().unwrap().status(), 429);
        let left = time_left(&pool, "alpha").unwrap();
        prop_assert!((2 * MINUTE..=HOUR).contains(&left), "{:?}", left);
    }
}

#[tokio::test]
async fn f28_a_retry_after_date_counts_from_response_date() {
    let headers =
        [("date", "Tue, 04 Mar 2031 10:00:00 GMT"), ("retry-after", "Tue, 04 Mar 2031 10:07:30 GMT")];
    assert_eq!(rest_after(429, headers, false).await, Duration::from_secs(450));
}

#[tokio::test]
async fn each_vendors_rate_limit_reset_header_is_honoured() {
    let openai = [
        ("x-ratelimit-remaining-requests", "0"),
        ("x-ratelimit-reset-requests", "6m0s"),
        ("x-ratelimit-remaining-tokens", "1000"),
        ("x-ratelimit-reset-tokens", "30m0s"),
    ];
    assert_eq!(rest_after(429, openai, false).await, 6 * MINUTE);
    let anthropic = [
        ("date", "Tue, 04 Mar 2031 10:00:00 GMT"),
        ("anthropic-ratelimit-input-tokens-remaining", "0"),
        ("anthropic-ratelimit-input-tokens-reset", "2031-03-04T10:08:00Z"),
    ];
    assert_eq!(rest_after(429, anthropic, false).await, 8 * MINUTE);
    let ietf = [("ratelimit", r#""burst";r=10;t=1800, "day";r=0;t=600"#)];
    assert_eq!(rest_after(429, ietf, false).await, 10 * MINUTE);
    let github = [("x-ratelimit-reset", "420"), ("x-ratelimit-remaining", "0")];
    assert_eq!(rest_after(429, github, false).await, 7 * MINUTE);
    assert_eq!(rest_after(429, [("retry-after-ms", "1250")], true).await, Duration::from_millis(1250));
}

#[tokio::test]
async fn only_a_429_rests_a_key_by_default() {
    for status in [200, 301, 401, 402, 403, 500, 503] {
        assert_eq!(rest_after(status, [("retry-after", "300")], false).await, Duration::ZERO, "{status}");
    }
}

#[tokio::test]
async fn f20_no_available_key_fails_immediately_with_retry_time() {
    let clock = ManualClock::new();
    let pool = pool(["alpha", "beta"], &clock);
    let server = Server::limiting(["alpha", "beta"]).await;
    let client = rotating(&pool);

    assert_eq!(status(&client, &server.url()).await, 429);
    clock.advance(30 * SECOND);
    assert_eq!(status(&client, &server.url()).await, 429);
    clock.advance(50 * SECOND);

    let error = get(&client, &server.url()).await.unwrap_err();
    let no_key = NoKeyAvailable::find(&error).expect("it says that there is no key");
    assert_eq!(no_key.retry_in(), Some(40 * SECOND));
    assert!(!no_key.is_empty_pool());
    assert_eq!(server.count(), 2, "a resting key was used");

    clock.advance(40 * SECOND - INSTANT);
    let error = get(&client, &server.url()).await.unwrap_err();
    assert_eq!(NoKeyAvailable::find(&error).unwrap().retry_in(), Some(INSTANT));
    clock.advance(INSTANT);
    assert_eq!(status(&client, &server.url()).await, 429);
    assert_eq!(server.keys(), ["alpha", "beta", "alpha"]);
}

#[tokio::test]
async fn f21_an_empty_pool_errors_until_the_first_insert() {
    let clock = ManualClock::new();
    let pool = pool([], &clock);
    let server = Server::limiting([]).await;
    let client = failing_over(failover(&pool).wait_up_to(MINUTE));

    let error = in_time(get(&client, &server.url())).await.unwrap_err();
    let no_key = NoKeyAvailable::find(&error).unwrap();
    assert!(no_key.is_empty_pool() && no_key.retry_in().is_none());
    assert!(no_key.to_string().contains("the pool is empty"), "{no_key}");
    assert_eq!(error.to_string(), "the request was not sent");
    assert_eq!(server.count(), 0);

    pool.insert("alpha", "sk-alpha").await.unwrap();
    assert_eq!(status(&client, &server.url()).await, 200);
    assert_eq!(server.keys(), ["alpha"]);
}

#[tokio::test]
async fn f21_an_empty_pool_serves_after_reload_finds_keys() {
    let clock = ManualClock::new();
    let store = MemoryStore::with_clock(Arc::new(clock.clone()));
    let empty = KeyPool::builder().clock(clock.clone()).open(store.clone()).await.unwrap();
    let server = Server::limiting([]).await;
    let client = rotating(&empty);
    assert!(get(&client, &server.url()).await.is_err());

    builder(["alpha"], &clock).open(store).await.unwrap();
    empty.reload().await.unwrap();
    assert_eq!(status(&client, &server.url()).await, 200);
}

/// A server that holds back its answers to `/held`, each of which is named by the query, until it is told.
async fn holding(release: Arc<Semaphore>) -> Server {
    Server::start(move |request| {
        let release = release.clone();
        async move {
            if request.uri().path().ends_with("/held") {
                release.acquire().await.unwrap().forget();
            }
            match request.uri().query() {
                Some("ok") => answer(200, ""),
                Some(wait) => answer_with(429, [("retry-after", wait)], ""),
                None => answer(429, ""),
            }
        }
    })
    .await
}

#[tokio::test]
async fn f10_a_later_shorter_cooldown_changes_nothing() {
    let clock = ManualClock::new();
    let pool = pool(["alpha"], &clock);
    let release = Arc::new(Semaphore::new(0));
    let server = holding(release.clone()).await;
    let client = rotating(&pool);

    let held = tokio::spawn({
        let (client, url) = (client.clone(), format!("{}/held?130", server.url()));
        async move { status(&client, &url).await }
    });
    eventually("the held request is at the server", || server.count() == 1).await;
    assert_eq!(status(&client, &format!("{}?600", server.url())).await, 429);
    clock.advance(SECOND);
    release.add_permits(1);
    assert_eq!(held.await.unwrap(), 429);
    assert_eq!(time_left(&pool, "alpha"), Some(10 * MINUTE - SECOND));
    assert_eq!(stats_of(&pool, "alpha").limited, 2);
}

#[tokio::test]
async fn f10_a_later_longer_cooldown_extends_a_shorter_one() {
    let clock = ManualClock::new();
    let pool = pool(["alpha"], &clock);
    let release = Arc::new(Semaphore::new(0));
    let server = holding(release.clone()).await;
    let client = rotating(&pool);

    let held = tokio::spawn({
        let (client, url) = (client.clone(), format!("{}/held?600", server.url()));
        async move { status(&client, &url).await }
    });
    eventually("the held request is at the server", || server.count() == 1).await;
    assert_eq!(status(&client, &server.url()).await, 429);
    release.add_permits(1);
    assert_eq!(held.await.unwrap(), 429);
    assert_eq!(time_left(&pool, "alpha"), Some(10 * MINUTE));
}

#[tokio::test]
async fn f11_a_late_200_clears_no_cooldown() {
    let clock = ManualClock::new();
    let pool = pool(["alpha"], &clock);
    let release = Arc::new(Semaphore::new(0));
    let server = holding(release.clone()).await;
    let client = rotating(&pool);

    let held = tokio::spawn({
        let (client, url) = (client.clone(), format!("{}/held?ok", server.url()));
        async move { status(&client, &url).await }
    });
    eventually("the held request is at the server", || server.count() == 1).await;
    assert_eq!(status(&client, &server.url()).await, 429);
    clock.advance(MINUTE);
    release.add_permits(1);
    assert_eq!(held.await.unwrap(), 200);
    assert_eq!(time_left(&pool, "alpha"), Some(MINUTE));
    let error = get(&client, &server.url()).await.unwrap_err();
    assert!(NoKeyAvailable::find(&error).is_some());

    // Its end does, and so does an operator.
    let fine = format!("{}?ok", server.url());
    clock.advance(MINUTE - INSTANT);
    assert!(get(&client, &fine).await.is_err());
    clock.advance(INSTANT);
    assert_eq!(status(&client, &fine).await, 200);
    assert_eq!(status(&client, &server.url()).await, 429);
    pool.reset("alpha").await.unwrap();
    assert_eq!(status(&client, &fine).await, 200);
}

#[tokio::test]
async fn f18_ten_thousand_429s_cause_two_store_writes() {
    const REQUESTS: usize = 10_000;
    let clock = ManualClock::new();
    let store = FaultyStore::new(&clock);
    let pool = builder(["alpha"], &clock).open(store.clone()).await.unwrap();
    let recovery = RecoveryHandle::spawn_with(&pool, RecoveryConfig::new().start_jitter(Duration::ZERO));
    eventually("the first pass", || recovery.last_report().is_some()).await;

    // Each request is answered when the test says so, over no socket: there are not 10,000 of them.
    let answers = Arc::new(Mutex::new(Vec::new()));
    let held = answers.clone();
    let mut client = KeyRotationLayer::new(&pool).layer(service_fn(move |_: Request<()>| {
        let (answer, answered) = oneshot::channel::<Response<()>>();
        held.lock().unwrap().push(answer);
        async { answered.await.map_err(io::Error::other) }
    }));
    let request = || Request::get("https://api.example.com").body(()).unwrap();
    let mut in_flight = Vec::new();
    for _ in 0..REQUESTS {
        in_flight.push(client.ready().await.unwrap().call(request()));
    }
    assert_eq!(stats_of(&pool, "alpha").requests, REQUESTS as u64);

    let answers = std::mem::take(&mut *answers.lock().unwrap());
    let mut latest = Duration::ZERO;
    for (number, (answer, response)) in (0u64..).zip(answers.into_iter().zip(in_flight)) {
        clock.advance(Duration::from_micros(20));
        // Some ask for more than all before them, and most for less.
        let wait = 150 + number * 7_919 % 1_000 + number / 100;
        let limited = Response::builder().status(429).header("retry-after", wait);
        answer.send(limited.body(()).unwrap()).unwrap();
        assert_eq!(response.await.unwrap().status(), 429);
        latest = latest.max(model::to_the_millisecond(clock.now() + SECOND * wait as u32));
        assert_eq!(time_left(&pool, "alpha"), Some(latest - clock.now()), "after {number}");
        tokio::task::yield_now().await;
    }
    assert_eq!(store.writes.begun(), 1, "the rest waits for the next write");
    assert_eq!(pool.stats().marks_waiting, 1);

    clock.advance(SECOND);
    eventually("nothing waits for the store", || pool.stats().marks_waiting == 0).await;
    assert_eq!(store.writes.begun(), 2);
    let left = Some(Until::After(latest - clock.now()));
    assert_eq!(store.marks()[1].words.key.map(|resting| resting.until), left);
    assert_eq!(store.rest("alpha").await.map(|resting| resting.until), left);
    assert_eq!(stats_of(&pool, "alpha").limited, REQUESTS as u64);
    recovery.shutdown().await.unwrap();
    assert_eq!(store.writes.begun(), 2);
}

#[tokio::test]
async fn f17_a_reinserted_id_starts_healthy_despite_late_429s() {
    let clock = ManualClock::new();
    let store = FaultyStore::new(&clock);
    let pool = builder(["alpha"], &clock).open(store.clone()).await.unwrap();
    let release = Arc::new(Semaphore::new(0));
    let server = holding(release.clone()).await;
    let client = rotating(&pool);

    let held = tokio::spawn({
        let (client, url) = (client.clone(), format!("{}/held?600", server.url()));
        async move { status(&client, &url).await }
    });
    eventually("the held request is at the server", || server.count() == 1).await;
    assert_eq!(status(&client, &server.url()).await, 429);
    pool.remove("alpha").await.unwrap();
    pool.insert("alpha", "sk-alpha-2").await.unwrap();
    assert_eq!(stats_of(&pool, "alpha").status, Status::Healthy);

    release.add_permits(1);
    assert_eq!(held.await.unwrap(), 429);
    assert_eq!(stats_of(&pool, "alpha").status, Status::Healthy);
    assert_eq!(status(&client, &format!("{}?ok", server.url())).await, 200);
    assert_eq!(server.keys(), ["alpha", "alpha", "alpha-2"]);

    let recovery = RecoveryHandle::spawn(&pool);
    recovery.sweep_now().await.outcome.unwrap();
    assert_eq!(store.rest("alpha").await, None);
    assert_eq!(stats_of(&pool, "alpha").status, Status::Healthy);
}

#[tokio::test]
async fn f17_a_secret_replaced_by_reload_starts_healthy() {
    let clock = ManualClock::new();
    let store = MemoryStore::with_clock(Arc::new(clock.clone()));
    let ours = builder(["alpha"], &clock).open(store.clone()).await.unwrap();
    let theirs = KeyPool::builder().clock(clock.clone()).open(store).await.unwrap();
    let server = Server::limiting(["alpha"]).await;
    let client = rotating(&ours);
    assert_eq!(status(&client, &server.url()).await, 429);

    theirs.remove("alpha").await.unwrap();
    theirs.insert("alpha", "sk-alpha-2").await.unwrap();
    // Its mark still waits, for a secret that nobody has any more.
    let recovery = RecoveryHandle::spawn(&ours);
    recovery.sweep_now().await.outcome.unwrap();
    assert_eq!(status(&client, &server.url()).await, 200);
    assert_eq!(server.keys(), ["alpha", "alpha-2"]);
    theirs.reload().await.unwrap();
    assert_eq!(stats_of(&theirs, "alpha").status, Status::Healthy);
}

#[tokio::test]
async fn f16_removed_keys_finish_requests_and_stay_removed() {
    let clock = ManualClock::new();
    let store = FaultyStore::new(&clock);
    let pool = builder(["alpha", "beta"], &clock).open(store.clone()).await.unwrap();
    let release = Arc::new(Semaphore::new(0));
    let server = holding(release.clone()).await;
    let client = rotating(&pool);

    let held = tokio::spawn({
        let (client, url) = (client.clone(), format!("{}/held?600", server.url()));
        async move { status(&client, &url).await }
    });
    eventually("the held request is at the server", || server.count() == 1).await;
    pool.remove("alpha").await.unwrap();
    release.add_permits(1);
    assert_eq!(held.await.unwrap(), 429);

    let recovery = RecoveryHandle::spawn(&pool);
    recovery.sweep_now().await.outcome.unwrap();
    let ids: Vec<_> = pool.stats().keys.into_iter().map(|key| key.id.to_string()).collect();
    assert_eq!(ids, ["beta"]);
    pool.record_usage(&KeyId::new("alpha").unwrap(), 5);
    assert_eq!(status(&client, &format!("{}?ok", server.url())).await, 200);
    assert_eq!(server.keys(), ["alpha", "beta"]);
}

#[tokio::test]
async fn other_hosts_get_no_key_and_mark_none() {
    let clock = ManualClock::new();
    let ours = Server::limiting([]).await;
    let theirs = Server::answering(|| answer(429, "not yours")).await;
    let pool = builder(["alpha"], &clock).allowed_hosts([ours.address().to_string()]).build().unwrap();
    let client = KeyRotationLayer::new(&pool).expose_key().layer(http());

    let response = get(&client, &theirs.url()).await.unwrap();
    assert_eq!(response.status(), 429);
    assert!(response.extensions().get::<ServedBy>().is_none());
    assert!(theirs.requests()[0].headers().get(AUTHORIZATION).is_none());
    assert_eq!((stats_of(&pool, "alpha").requests, stats_of(&pool, "alpha").status), (0, Status::Healthy));

    assert_eq!(status(&client, &ours.url()).await, 200);
    assert_eq!(ours.keys(), ["alpha"]);
}

#[tokio::test]
async fn s03_cleartext_keys_need_an_explicitly_allowed_host() {
    let clock = ManualClock::new();
    let pool = pool(["alpha"], &clock);
    let server = Server::limiting([]).await;
    let address = server.address();
    let http = reqwest::Client::builder().no_proxy().resolve("api.example.com", address).build().unwrap();
    let url = format!("http://api.example.com:{}/v1", address.port());

    let error = get(&KeyRotationLayer::new(&pool).layer(http.clone()), &url).await.unwrap_err();
    let Error::Inject(error) = error else { panic!("{error}") };
    assert!(error.is_cleartext() && error.to_string().contains("api.example.com"), "{error}");
    assert_eq!((server.count(), stats_of(&pool, "alpha").requests), (0, 0));

    // That a host may have keys does not mean in cleartext.
    let pool = builder(["alpha"], &clock).allowed_hosts(["api.example.com"]).build().unwrap();
    assert!(get(&KeyRotationLayer::new(&pool).layer(http.clone()), &url).await.is_err());
    assert_eq!(server.count(), 0);

    let pool = builder(["alpha"], &clock).allow_cleartext_to(["api.example.com"]).build().unwrap();
    assert_eq!(status(&KeyRotationLayer::new(&pool).layer(http), &url).await, 200);
    assert_eq!(server.keys(), ["alpha"]);
}

#[tokio::test]
async fn f33_the_key_replaces_every_caller_set_header_value() {
    let clock = ManualClock::new();
    let inject = Inject::bearer().and(Inject::header("x-api-key"));
    let pool = builder(["alpha"], &clock).inject(inject).build().unwrap();
    let server = Server::limiting([]).await;

    let mut request = get_request(&server.url());
    for name in [AUTHORIZATION, HeaderName::from_static("x-api-key")] {
        request.headers_mut().append(&name, HeaderValue::from_static("mine"));
        request.headers_mut().append(&name, HeaderValue::from_static("also mine"));
    }
    assert_eq!(send(&rotating(&pool), request).await.unwrap().status(), 200);
    let headers = server.requests()[0].headers().clone();
    assert_eq!(headers.get_all(AUTHORIZATION).iter().collect::<Vec<_>>(), ["Bearer sk-alpha"]);
    assert_eq!(headers.get_all("x-api-key").iter().collect::<Vec<_>>(), ["sk-alpha"]);
}

/// A secret with characters that a URL has to escape.
const SECRET: &str = "sk-c4n4ry+7/Zq=Xw&9";

/// What shows that the secret has leaked: a part of it, however it is written.
const TRACES: [&str; 5] = [
    "sk-c4n4ry",
    "sk%2Dc4n4ry",
    // base64, by where in it the secret begins
    "c2stYzRuNHJ5KzcvWnE9",
    "LWM0bjRyeSs3L1pxPVh3",
    "NG40cnkrNy9acT1Y",
];

#[track_caller]
fn assert_no_secret(shown: &str) {
    for trace in TRACES {
        assert!(!shown.contains(trace), "{trace} is in:\n{shown}");
    }
    assert!(!shown.contains("Zq%3DXw"), "the escaped secret is in:\n{shown}");
}

fn pool_with_query(clock: &ManualClock) -> KeyPool {
    KeyPool::builder().key("alpha", SECRET).inject(Inject::query("key")).clock(clock.clone()).build().unwrap()
}

#[tokio::test]
async fn query_keys_are_escaped_and_replace_existing_values() {
    let pool = pool_with_query(&ManualClock::new());
    let server = Server::limiting([]).await;
    let client = rotating(&pool);
    assert_eq!(status(&client, &format!("{}?key=mine&a=1&k%65y=too&b=x%20y", server.url())).await, 200);
    assert_eq!(status(&client, &server.url()).await, 200);
    let queries: Vec<_> =
        server.requests().iter().map(|request| request.uri().query().unwrap().to_owned()).collect();
    assert_eq!(queries, ["a=1&b=x%20y&key=sk-c4n4ry%2B7%2FZq%3DXw%269", "key=sk-c4n4ry%2B7%2FZq%3DXw%269"]);
    assert!(server.requests()[0].headers().get(AUTHORIZATION).is_none());
}

#[tokio::test]
async fn responses_and_their_errors_omit_the_query_key() {
    let pool = pool_with_query(&ManualClock::new());
    let server = Server::answering(|| answer(500, "no json")).await;
    let client = rotating(&pool);

    let response = get(&client, &format!("{}?a=1", server.url())).await.unwrap();
    assert_eq!(response.url().as_str(), format!("{}?a=1", server.url()));
    assert_eq!(response.remote_addr(), Some(server.address()));
    assert_eq!(response.content_length(), Some(7));
    assert_no_secret(&format!("{response:?} {:?}", response.extensions()));
    assert_no_secret(&all_that_it_says(&response.error_for_status_ref().unwrap_err()));
    assert_no_secret(&all_that_it_says(&response.json::<u32>().await.unwrap_err()));
    let response = get(&client, &server.url()).await.unwrap();
    let error = response.error_for_status().unwrap_err();
    assert_eq!(error.url().unwrap().as_str(), server.url());
    assert_no_secret(&all_that_it_says(&error));
}

#[tokio::test]
async fn a_failover_429_response_omits_the_query_key() {
    let pool = pool_with_query(&ManualClock::new());
    let server = Server::answering(|| answer(429, "wait")).await;
    let client = failing_over(failover(&pool));
    let response = get(&client, &format!("{}?a=1", server.url())).await.unwrap();
    assert_eq!(response.url().query(), Some("a=1"));
    assert_no_secret(&all_that_it_says(&response.error_for_status().unwrap_err()));
}

#[tokio::test]
async fn connect_redirect_and_timeout_errors_omit_query_keys() {
    let pool = pool_with_query(&ManualClock::new());
    let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let error = get(&rotating(&pool), &format!("http://{closed}/v1?a=1")).await.unwrap_err();
    let Error::Inner(inner) = &error else { panic!("{error:?}") };
    assert!(inner.is_connect());
    assert_eq!(inner.url().unwrap().query(), Some("a=1"), "the rest of the URL is still there");
    assert_no_secret(&all_that_it_says(&error));

    let server = Server::start(|request| async move {
        let to = request.uri().to_string();
        answer_with(302, [("location", to.as_str())], "")
    })
    .await;
    let error = get(&rotating(&pool), &server.url()).await.unwrap_err();
    assert!(matches!(&error, Error::Inner(error) if error.is_redirect()), "{error}");
    assert_no_secret(&all_that_it_says(&error));

    let never = Server::start(|_| std::future::pending()).await;
    let impatient = reqwest::Client::builder().no_proxy().timeout(Duration::from_millis(50)).build().unwrap();
    let error = get(&KeyRotationLayer::new(&pool).layer(impatient), &never.url()).await.unwrap_err();
    assert!(matches!(&error, Error::Inner(error) if error.is_timeout()), "{error}");
    assert_no_secret(&all_that_it_says(&error));
}

#[tokio::test]
async fn http_crate_requests_carry_a_query_key() {
    let pool = pool_with_query(&ManualClock::new());
    let client = KeyRotationLayer::new(&pool).layer(service_fn(|request: Request<()>| async move {
        Ok::<_, io::Error>(Response::new(request.into_parts().0.uri))
    }));
    for (asked, sent) in [
        ("https://api.example.com", "https://api.example.com/?key=sk-c4n4ry%2B7%2FZq%3DXw%269"),
        ("https://api.example.com/v1?a", "https://api.example.com/v1?a&key=sk-c4n4ry%2B7%2FZq%3DXw%269"),
    ] {
        let request = Request::get(asked).body(()).unwrap();
        let uri: Uri = client.clone().oneshot(request).await.unwrap().into_body();
        assert_eq!(uri.to_string(), sent);
    }
}

/// How a key stands after an answer that [`LlmGateway`] has looked at.
async fn llm_gateway(status: u16, body: &'static str, read_bodies: bool) -> (Status, Option<Duration>) {
    let clock = ManualClock::new();
    // The last key is not revoked.
    let pool = pool(["alpha", "beta"], &clock);
    let server = Server::answering(move || answer(status, body)).await;
    let layer = KeyRotationLayer::new(&pool).classify(LlmGateway::new());
    let response = if read_bodies {
        get(&layer.read_error_bodies(1024).layer(http()), &server.url()).await
    } else {
        get(&layer.layer(http()), &server.url()).await
    };
    assert_eq!(response.unwrap().text().await.unwrap(), body);
    let key = stats_of(&pool, "alpha");
    (key.status, key.time_left)
}

#[tokio::test]
async fn llm_gateway_preset_takes_no_key_out_without_bodies() {
    assert_eq!(llm_gateway(200, "", false).await, (Status::Healthy, None));
    assert_eq!(llm_gateway(429, "insufficient_quota", false).await, (Status::RateLimited, Some(2 * MINUTE)));
    assert_eq!(llm_gateway(400, "Budget has been exceeded!", false).await, (Status::Healthy, None));
    assert_eq!(llm_gateway(500, "suspended", false).await, (Status::Healthy, None));
}

#[tokio::test]
async fn llm_gateway_preset_refines_verdicts_from_bodies() {
    let day = Some(24 * HOUR);
    let quota = r#"{"error":{"code":"insufficient_quota"}}"#;
    assert_eq!(llm_gateway(429, quota, true).await, (Status::Exhausted, day));
    let invalid = r#"{"error":{"code":"invalid_api_key"}}"#;
    assert_eq!(llm_gateway(401, invalid, true).await, (Status::Revoked, None));
    assert_eq!(
        llm_gateway(402, r#"{"error":{"message":"Insufficient Balance"}}"#, true).await,
        (Status::Exhausted, day)
    );
    let model = r#"{"error":{"code":"model_not_found"}}"#;
    assert_eq!(llm_gateway(403, model, true).await, (Status::Healthy, None));
    assert_eq!(llm_gateway(429, "slow down", true).await, (Status::RateLimited, Some(2 * MINUTE)));
    assert_eq!(llm_gateway(400, "Budget has been exceeded!", true).await, (Status::Exhausted, day));
    assert_eq!(llm_gateway(400, "bad request", true).await, (Status::Healthy, None));
    assert_eq!(llm_gateway(200, "suspended", true).await, (Status::Healthy, None));
}

#[tokio::test]
async fn a_revoked_key_stays_unavailable_until_reset() {
    let clock = ManualClock::new();
    let pool = pool(["alpha", "beta"], &clock);
    let revoked = Arc::new(AtomicBool::new(true));
    let server = Server::start({
        let revoked = revoked.clone();
        move |_| std::future::ready(answer(if revoked.load(SeqCst) { 401 } else { 200 }, ""))
    })
    .await;
    let client = KeyRotationLayer::new(&pool).classify(ByStatus).layer(http());
    assert_eq!(status(&client, &server.url()).await, 401);
    pool.disable("beta").await.unwrap();
    revoked.store(false, SeqCst);
    clock.advance(1_000 * HOUR);
    let error = get(&client, &server.url()).await.unwrap_err();
    assert_eq!(NoKeyAvailable::find(&error).unwrap().retry_in(), None);
    pool.reset("alpha").await.unwrap();
    assert_eq!(status(&client, &server.url()).await, 200);
}

#[tokio::test]
async fn responses_name_their_key_only_with_expose_key() {
    let clock = ManualClock::new();
    let pool = pool(["alpha", "beta"], &clock);
    let server = Server::limiting(["alpha"]).await;
    let silent = rotating(&pool);
    assert!(get(&silent, &server.url()).await.unwrap().extensions().get::<ServedBy>().is_none());

    pool.reset("alpha").await.unwrap();
    let client = KeyRotationLayer::new(&pool).expose_key().layer(http());
    for id in ["beta", "alpha", "beta"] {
        let response = get(&client, &server.url()).await.unwrap();
        let ServedBy(key) = response.extensions().get().expect("it says which key");
        assert_eq!(key.as_str(), id);
        pool.record_usage(key, 100);
    }
    assert_eq!((stats_of(&pool, "alpha").tokens, stats_of(&pool, "beta").tokens), (100, 200));
}

/// A storm, judged exactly. `moment` orders all that happens: it is taken before a request asks for its key,
/// and after a caller has its 429 in hand. A request that asked later than that, and got the same key, was
/// sent on a key that was known to rest.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_requests_never_use_a_key_after_429() {
    const KEYS: usize = 5;
    const TASKS: usize = 200;
    const EACH_KEY: usize = 60;

    let clock = ManualClock::new();
    let pool = builder((0..KEYS).map(|key| format!("key-{key}")), &clock).build().unwrap();
    let served: Arc<Mutex<HashMap<String, usize>>> = Arc::default();
    let server = Server::start({
        let served = served.clone();
        move |request| {
            let mut served = served.lock().unwrap();
            let count = served.entry(key_of(&request).unwrap().to_owned()).or_default();
            *count += 1;
            std::future::ready(answer(if *count <= EACH_KEY { 200 } else { 429 }, "body"))
        }
    })
    .await;

    let client = KeyRotationLayer::new(&pool).expose_key().layer(http());
    let moment = Arc::new(AtomicUsize::new(0));
    let tasks = (0..TASKS).map(|_| {
        let (mut client, url, moment) = (client.clone(), server.url(), moment.clone());
        tokio::spawn(async move {
            let mut seen = Vec::new();
            loop {
                let asked = moment.fetch_add(1, SeqCst);
                let response = client.ready().await.unwrap().call(get_request(&url)).await;
                let received = moment.fetch_add(1, SeqCst);
                match response {
                    Ok(response) => {
                        let ServedBy(key) = response.extensions().get().unwrap();
                        seen.push((key.to_string(), response.status().as_u16(), asked, received));
                        response.bytes().await.unwrap();
                    }
                    Err(error) => {
                        NoKeyAvailable::find(&error).expect("nothing else goes wrong");
                        return seen;
                    }
                }
            }
        })
    });
    let seen: Vec<_> = in_time(join_all(tasks)).await.into_iter().flat_map(|task| task.unwrap()).collect();

    let with = |key: &str, status| seen.iter().filter(|seen| seen.0 == key && seen.1 == status).count();
    for key in pool.stats().keys {
        let id = key.id.as_str();
        assert_eq!(key.status, Status::RateLimited);
        let known =
            seen.iter().filter(|seen| seen.0 == id && seen.1 == 429).map(|seen| seen.3).min().unwrap();
        let late = seen.iter().filter(|seen| seen.0 == id && seen.2 > known).count();
        assert_eq!(late, 0, "requests sent on {id} after its 429 was received");
        assert_eq!(with(id, 200), EACH_KEY, "{id}");
        assert_eq!(with(id, 429), key.limited as usize, "{id}");
        assert_eq!(with(id, 200) + with(id, 429), key.requests as usize, "{id}");
        assert_eq!(served.lock().unwrap()[id], key.requests as usize, "{id}");
    }
    assert_eq!(server.count(), seen.len());
}
