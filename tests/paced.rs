//! Pools with limits: budgets, scopes, sessions, tiers, quota groups, and the queue of each scope.

mod support;

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use futures_util::future::join_all;
use http::{HeaderMap, Request, Response, StatusCode};
use support::{MINUTE, SECOND};
use tokio::{
    task::JoinHandle,
    time::{Instant, sleep},
};
use tower::{BoxError, Service, ServiceExt, service_fn};
use tower_key_rotation::{
    Error, Failover, KeyId, KeyPool, KeyPoolBuilder, KeyRotationLayer, KeySpec, NoKeyAvailable, Quota,
    Traits,
    classify::{ResponseHead, Verdict},
};

/// A service with a token bucket for each key and path, whose responses have OpenAI's headers.
#[derive(Clone)]
struct Upstream {
    rate: f64,
    burst: f64,
    /// A key with ten times the rate and the burst.
    large: Option<&'static str>,
    headers: Headers,
    log: Arc<Mutex<Log>>,
}

/// What the headers say.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Headers {
    None,
    True,
    /// Nothing is ever left.
    NothingLeft,
    /// Everything is always left.
    AllLeft,
    /// The bucket takes ten times as long to fill as it does.
    SlowReset,
}

#[derive(Default)]
struct Log {
    buckets: BTreeMap<(String, String), (f64, Seconds)>,
    /// Key, path, whether refused, seconds since the start.
    seen: Vec<(String, String, bool, f64)>,
    start: Option<Instant>,
}

type Seconds = f64;

impl Upstream {
    fn new(rate: f64, burst: f64) -> Self {
        Self { rate, burst, large: None, headers: Headers::True, log: Arc::default() }
    }

    fn silent(self) -> Self {
        self.with(Headers::None)
    }

    fn with(self, headers: Headers) -> Self {
        Self { headers, ..self }
    }

    fn call(&self, key: &str, path: &str) -> Response<String> {
        let mut log = self.log.lock().unwrap();
        let now = log.start.get_or_insert_with(Instant::now).elapsed().as_secs_f64();
        let factor = if self.large == Some(key) { 10.0 } else { 1.0 };
        let (rate, burst) = (self.rate * factor, self.burst * factor);
        let (level, at) = log.buckets.entry((key.to_owned(), path.to_owned())).or_insert((burst, now));
        *level = (*level + (now - *at) * rate).min(burst);
        *at = now;
        let is_refused = *level < 1.0;
        if !is_refused {
            *level -= 1.0;
        }
        let (level, wait) = (*level, (1.0 - *level) / rate);
        log.seen.push((key.to_owned(), path.to_owned(), is_refused, now));
        let mut response = Response::builder().status(if is_refused { 429 } else { 200 });
        let fills_in = (burst - level) / rate;
        let said = match self.headers {
            Headers::None => None,
            Headers::True => Some((level, fills_in)),
            Headers::NothingLeft => Some((0.0, burst / rate)),
            Headers::AllLeft => Some((burst, 0.0)),
            Headers::SlowReset => Some((level, fills_in * 10.0)),
        };
        if let Some((left, reset)) = said {
            response = response
                .header("x-ratelimit-limit-requests", burst as u64)
                .header("x-ratelimit-remaining-requests", left as u64)
                .header("x-ratelimit-reset-requests", format!("{reset:.3}s"));
            if is_refused && self.headers == Headers::True {
                response = response.header("retry-after-ms", (wait * 1_000.0).ceil() as u64);
            }
        }
        response.body(String::new()).unwrap()
    }

    fn refused(&self) -> usize {
        self.log.lock().unwrap().seen.iter().filter(|(_, _, is_refused, _)| *is_refused).count()
    }

    /// Forgets the requests so far.
    fn forget(&self) {
        self.log.lock().unwrap().seen.clear();
    }

    /// How many requests each key served.
    fn served(&self) -> BTreeMap<String, usize> {
        let mut served = BTreeMap::new();
        for (key, ..) in self.log.lock().unwrap().seen.iter().filter(|(_, _, is_refused, _)| !is_refused) {
            *served.entry(key.clone()).or_default() += 1;
        }
        served
    }

    fn paths(&self) -> Vec<String> {
        self.log.lock().unwrap().seen.iter().map(|(_, path, ..)| path.clone()).collect()
    }
}

fn keys(count: usize) -> KeyPoolBuilder {
    KeyPool::builder().keys((0..count).map(|key| (format!("k{key}"), format!("sk-{key}"))))
}

type Client = tower::util::BoxCloneService<Request<String>, u16, BoxError>;

/// A client of that service, which waits up to a limit.
fn client(pool: &KeyPool, service: &Upstream, wait: Duration) -> Client {
    client_over(pool, service, wait, |_| Duration::from_millis(20))
}

/// The same, with the time from sending a request to its arrival.
fn client_over(
    pool: &KeyPool,
    service: &Upstream,
    wait: Duration,
    transit: impl Fn(usize) -> Duration + Send + Sync + 'static,
) -> Client {
    let (service, sent, transit) = (service.clone(), Arc::new(AtomicUsize::new(0)), Arc::new(transit));
    let inner = service_fn(move |request: Request<String>| {
        let (service, transit) = (service.clone(), transit(sent.fetch_add(1, Relaxed)));
        async move {
            sleep(transit).await;
            let key = request.headers()["authorization"].to_str().unwrap()["Bearer sk-".len()..].to_owned();
            let response = service.call(&key, request.uri().path());
            sleep(Duration::from_millis(100)).await;
            Ok::<_, std::io::Error>(response)
        }
    });
    let layer = KeyRotationLayer::new(pool).failover(Failover::attempts(8)).wait_up_to(wait);
    let client = tower::ServiceBuilder::new().layer(layer).service(inner);
    tower::util::BoxCloneService::new(
        client.map_response(|response| response.status().as_u16()).map_err(Error::into_inner),
    )
}

fn request(path: &str, traits: Traits) -> Request<String> {
    Request::post(format!("https://api.example.com{path}")).extension(traits).body("body".to_owned()).unwrap()
}

fn scoped(path: &str) -> Request<String> {
    request(path, Traits::new().scope(path))
}

async fn send(client: &Client, request: Request<String>) -> Result<u16, BoxError> {
    client.clone().oneshot(request).await
}

/// Sends a request in a task of its own.
fn spawn(client: &Client, request: Request<String>) -> JoinHandle<Result<u16, BoxError>> {
    tokio::spawn(client.clone().oneshot(request))
}

/// Sends requests evenly, that many a second, and returns the results.
async fn offer(
    client: &Client,
    per_second: f64,
    seconds: f64,
    request: impl Fn(usize) -> Request<String>,
) -> Vec<Result<u16, BoxError>> {
    let count = (per_second * seconds) as usize;
    join_all((0..count).map(|number| {
        let (client, request) = (client.clone(), request(number));
        async move {
            sleep(Duration::from_secs_f64(number as f64 / per_second)).await;
            send(&client, request).await
        }
    }))
    .await
}

fn succeeded(results: &[Result<u16, BoxError>]) -> usize {
    results.iter().filter(|result| result.as_ref().is_ok_and(|status| *status == 200)).count()
}

#[tokio::test(start_paused = true)]
async fn near_the_quota_nothing_fails_and_little_is_refused() {
    let service = Upstream::new(1.0, 10.0);
    let client = client(&keys(4).paced().build().unwrap(), &service, MINUTE);
    let results = offer(&client, 3.8, 120.0, |_| scoped("/a")).await;
    assert_eq!(succeeded(&results), results.len());
    assert!(service.refused() <= 4, "{} of {}", service.refused(), results.len());
}

#[tokio::test(start_paused = true)]
async fn requests_that_overtake_others_hide_none_of_them() {
    let service = Upstream::new(1.0, 20.0);
    // Of the first four, the last one arrives first: its answer does not count the others.
    let transit = |sent: usize| Duration::from_millis(20 + 10 * 3_u64.saturating_sub(sent as u64));
    let client = client_over(&keys(1).paced().build().unwrap(), &service, MINUTE, transit);
    let results = join_all((0..30).map(|_| send(&client, scoped("/a")))).await;
    assert_eq!(succeeded(&results), 30);
    assert!(service.refused() <= 1, "{}", service.refused());
}

#[tokio::test(start_paused = true)]
async fn large_limits_serve_more_and_small_ones_stay_full() {
    let service = Upstream { large: Some("0"), ..Upstream::new(1.0, 10.0) };
    let client = client(&keys(4).paced().build().unwrap(), &service, MINUTE);
    // In strict turn, the small keys would serve 1.5 requests a second each, and be empty.
    let results = offer(&client, 6.0, 60.0, |_| scoped("/a")).await;
    assert_eq!(succeeded(&results), results.len());
    let began = Instant::now();
    let results = join_all((0..115).map(|_| send(&client, scoped("/a")))).await;
    assert_eq!(succeeded(&results), 115);
    assert!(began.elapsed() < Duration::from_millis(600), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn processes_do_not_send_a_burst_each() {
    let service = Upstream::new(1.0, 10.0);
    let clients: Vec<_> =
        (0..3).map(|_| client(&keys(4).paced().build().unwrap(), &service, MINUTE)).collect();
    for burst in 0..5 {
        // Of 150 requests, the keys serve 40 at once. Then their buckets fill again.
        let results = join_all((0..150).map(|number| send(&clients[number % 3], scoped("/a")))).await;
        sleep(Duration::from_secs(20)).await;
        // At first, no process knows of the others.
        if burst == 0 {
            service.forget();
        } else {
            assert_eq!(succeeded(&results), 150);
        }
    }
    assert!(service.refused() <= 100, "{} of 600", service.refused());
}

#[tokio::test(start_paused = true)]
async fn steady_resets_of_busy_keys_are_believed() {
    let service = Upstream::new(10.0, 20.0);
    let client = client(&keys(5).paced().build().unwrap(), &service, MINUTE);
    let began = Instant::now();
    let results = join_all((0..300).map(|_| send(&client, scoped("/a")))).await;
    assert_eq!(succeeded(&results), 300);
    // A key that always waits for the next unit always says the same of the time until it is full.
    assert!(service.refused() <= 5, "{}", service.refused());
    assert!(began.elapsed() < Duration::from_millis(4_500), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn paced_rests_keep_the_limits_of_hints() {
    let pool = keys(1).paced().hint_limits(SECOND, MINUTE).build().unwrap();
    let inner = service_fn(async |_: Request<String>| {
        let response = Response::builder().status(429).header("retry-after", "31536000");
        Ok::<_, std::io::Error>(response.body(String::new()).unwrap())
    });
    let client = tower::ServiceBuilder::new().layer(KeyRotationLayer::new(&pool)).service(inner);
    assert_eq!(client.clone().oneshot(scoped("/a")).await.unwrap().status(), 429);
    let error = client.oneshot(scoped("/a")).await.unwrap_err();
    let retry_in = NoKeyAvailable::find(&error).and_then(NoKeyAvailable::retry_in);
    assert!(retry_in.is_some_and(|time| time <= MINUTE), "{retry_in:?}");
}

#[tokio::test(start_paused = true)]
async fn a_key_limited_in_one_scope_serves_others() {
    for builder in [keys(1), keys(1).paced()] {
        let service = Upstream::new(0.01, 1.0);
        let client = client(&builder.build().unwrap(), &service, Duration::ZERO);
        assert_eq!(send(&client, scoped("/a")).await.unwrap(), 200);
        let refused = send(&client, scoped("/a")).await;
        assert!(!matches!(refused, Ok(200)));
        assert_eq!(send(&client, scoped("/b")).await.unwrap(), 200);
        let error = send(&client, scoped("/a")).await.unwrap_err();
        let no_key = NoKeyAvailable::find(&*error).expect("no key has room");
        assert!(no_key.retry_in().is_some_and(|time| time > 50 * SECOND), "{no_key:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn quotas_hold_without_learning() {
    let service = Upstream::new(1_000.0, 1_000.0).silent();
    let pool = keys(2).quota(Quota::per_minute(60).burst(5)).build().unwrap();
    let results = offer(&client(&pool, &service, 5 * MINUTE), 4.0, 60.0, |_| scoped("/a")).await;
    assert_eq!(succeeded(&results), 240);
    let log = service.log.lock().unwrap();
    for key in ["0", "1"] {
        let times: Vec<f64> =
            log.seen.iter().filter(|(served, ..)| served == key).map(|(.., at)| *at).collect();
        assert_eq!(times.len(), 120);
        // Any six of them take a second at least: five at once, then one a second.
        assert!(times.windows(6).all(|six| six[5] - six[0] > 0.95), "{times:?}");
        assert!(times[119] < 116.0, "no second is lost: {}", times[119]);
    }
}

#[tokio::test(start_paused = true)]
async fn f40_requests_of_a_scope_go_in_order() {
    let service = Upstream::new(1.0, 1.0);
    let pool = keys(1).quota(Quota::per_second(1)).build().unwrap();
    let client = client(&pool, &service, 10 * MINUTE);
    let order = Arc::new(Mutex::new(Vec::new()));
    join_all((0..60).map(|number| {
        let (client, order) = (client.clone(), order.clone());
        async move {
            sleep(Duration::from_millis(number)).await;
            assert_eq!(send(&client, scoped("/a")).await.unwrap(), 200);
            order.lock().unwrap().push(number);
        }
    }))
    .await;
    assert!(order.lock().unwrap().is_sorted());
    assert_eq!(service.refused(), 0);
    let log = service.log.lock().unwrap();
    assert!((log.seen[59].3 - 59.0).abs() < 0.1, "{:?}", log.seen[59]);
}

#[tokio::test(start_paused = true)]
async fn f40_a_closed_scope_holds_up_no_other() {
    let service = Upstream::new(0.1, 1.0);
    let pool = keys(1).quota(Quota::per_minute(6)).build().unwrap();
    let client = client(&pool, &service, 10 * MINUTE);
    let slow = join_all((0..5).map(|_| send(&client, scoped("/a"))));
    let began = Instant::now();
    let fast = async {
        sleep(SECOND).await;
        send(&client, scoped("/b")).await.unwrap();
        began.elapsed()
    };
    let (slow, fast) = tokio::join!(slow, fast);
    assert_eq!(succeeded(&slow), 5);
    assert!(fast < 2 * SECOND, "{fast:?}");
    assert!(began.elapsed() > 39 * SECOND);
}

#[tokio::test(start_paused = true)]
async fn f40_a_dropped_waiter_frees_its_place() {
    let service = Upstream::new(1_000.0, 1_000.0);
    let pool = keys(1).quota(Quota::per_minute(1)).build().unwrap();
    let client = client(&pool, &service, 10 * MINUTE);
    send(&client, scoped("/a")).await.unwrap();
    let dropped: Vec<_> = (0..5).map(|_| spawn(&client, scoped("/a"))).collect();
    sleep(SECOND).await;
    let last = spawn(&client, scoped("/a"));
    sleep(SECOND).await;
    dropped.iter().for_each(JoinHandle::abort);
    let began = Instant::now();
    assert_eq!(last.await.unwrap().unwrap(), 200);
    assert!(began.elapsed() < 61 * SECOND, "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn f41_dropped_requests_leave_nothing_in_flight() {
    // Of a silent service, four requests a key go at once.
    let service = Upstream::new(1_000.0, 1_000.0).silent();
    let pool = keys(1).paced().build().unwrap();
    let client = client(&pool, &service, Duration::ZERO);
    for round in 0..50 {
        let requests: Vec<_> = (0..4).map(|_| spawn(&client, scoped("/a"))).collect();
        sleep(Duration::from_millis(round * 2 % 119)).await;
        requests.iter().for_each(JoinHandle::abort);
        join_all(requests).await;
    }
    let results = join_all((0..4).map(|_| send(&client, scoped("/a")))).await;
    assert_eq!(succeeded(&results), 4);
}

#[tokio::test(start_paused = true)]
async fn sessions_keep_their_key_while_it_has_room() {
    let service = Upstream::new(1_000.0, 1_000.0);
    let pool = keys(10).paced().build().unwrap();
    let client = client(&pool, &service, MINUTE);
    let mut key_of = BTreeMap::new();
    for round in 0..20 {
        for session in 0..50 {
            send(&client, request(&format!("/{session}"), Traits::new().session(session))).await.unwrap();
        }
        for (key, path, ..) in &service.log.lock().unwrap().seen {
            assert_eq!(key_of.entry(path.clone()).or_insert_with(|| key.clone()), key, "round {round}");
        }
    }
    let keys: std::collections::BTreeSet<_> = key_of.values().collect();
    assert!(keys.len() >= 8, "{keys:?}");
}

#[tokio::test(start_paused = true)]
async fn tiers_serve_in_order_and_the_first_returns() {
    let spec = |id: &str, secret: &str, tier| {
        let mut spec = KeySpec::new(KeyId::new(id).unwrap(), secret);
        spec.tier = Some(tier);
        spec
    };
    let service = Upstream::new(1_000.0, 1_000.0).silent();
    let pool = KeyPool::builder()
        .key_spec(spec("spare", "sk-spare", 1))
        .key_spec(spec("first", "sk-first", 0))
        .quota(Quota::per_minute(2).burst(2))
        .build()
        .unwrap();
    let client = client(&pool, &service, Duration::ZERO);
    let keys_of = |from: usize| -> Vec<String> {
        service.log.lock().unwrap().seen[from..].iter().map(|(key, ..)| key.clone()).collect()
    };
    for _ in 0..3 {
        send(&client, scoped("/a")).await.unwrap();
    }
    assert_eq!(keys_of(0), ["first", "first", "spare"]);
    sleep(31 * SECOND).await;
    send(&client, scoped("/a")).await.unwrap();
    assert_eq!(keys_of(3), ["first"]);
}

#[tokio::test(start_paused = true)]
async fn keys_of_a_quota_group_share_its_budget_evenly() {
    let spec = |key: usize| {
        let mut spec = KeySpec::new(KeyId::new(format!("k{key}")).unwrap(), format!("sk-{key}"));
        spec.group = Some(format!("org-{}", key / 2));
        spec
    };
    let pool = (0..4)
        .map(spec)
        .fold(KeyPool::builder(), KeyPoolBuilder::key_spec)
        .quota(Quota::per_minute(60).burst(4))
        .build()
        .unwrap();
    let service = Upstream::new(1_000.0, 1_000.0).silent();
    let results = offer(&client(&pool, &service, 5 * MINUTE), 10.0, 10.0, |_| scoped("/a")).await;
    assert_eq!(succeeded(&results), 100);
    // Two groups of one a second, and eight at once: 100 take 46 seconds.
    let log = service.log.lock().unwrap();
    assert!((45.0..47.0).contains(&log.seen[99].3), "{:?}", log.seen[99]);
    drop(log);
    assert!(service.served().values().all(|served| (23..=27).contains(served)), "{:?}", service.served());
}

#[tokio::test(start_paused = true)]
async fn a_request_gets_its_own_key_or_avoids_some() {
    let service = Upstream::new(1_000.0, 1_000.0);
    let client = client(&keys(3).build().unwrap(), &service, Duration::ZERO);
    let id = |key: usize| KeyId::new(format!("k{key}")).unwrap();
    for _ in 0..5 {
        send(&client, request("/", Traits::new().key(id(2)))).await.unwrap();
    }
    assert_eq!(service.served(), BTreeMap::from([("2".to_owned(), 5)]));
    for _ in 0..6 {
        send(&client, request("/", Traits::new().avoid(id(0)).avoid(id(2)))).await.unwrap();
    }
    assert_eq!(service.served(), BTreeMap::from([("1".to_owned(), 6), ("2".to_owned(), 5)]));
    let error =
        send(&client, request("/", Traits::new().key(KeyId::new("other").unwrap()))).await.unwrap_err();
    assert!(NoKeyAvailable::find(&*error).is_some());
}

#[tokio::test(start_paused = true)]
async fn a_reset_ends_the_rests_of_scopes() {
    let service = Upstream::new(0.001, 1.0);
    let pool = keys(1).build().unwrap();
    let client = client(&pool, &service, Duration::ZERO);
    send(&client, scoped("/a")).await.unwrap();
    assert_eq!(send(&client, scoped("/a")).await.unwrap(), 429);
    assert!(send(&client, scoped("/a")).await.is_err());
    pool.reset("k0").await.unwrap();
    assert_eq!(send(&client, scoped("/a")).await.unwrap(), 429);
}

#[tokio::test(start_paused = true)]
async fn what_is_known_of_keys_outlives_changes_of_their_set() {
    let service = Upstream::new(1.0, 10.0).silent();
    let pool = keys(2).quota(Quota::per_minute(1).burst(3)).build().unwrap();
    let client = client(&pool, &service, Duration::ZERO);
    assert_eq!(succeeded(&join_all((0..6).map(|_| send(&client, scoped("/a")))).await), 6);
    pool.remove("k0").await.unwrap();
    pool.insert("k2", "sk-2").await.unwrap();
    let results = join_all((0..6).map(|_| send(&client, scoped("/a")))).await;
    assert_eq!(succeeded(&results), 3);
    assert_eq!(service.served()["2"], 3);
}

#[tokio::test(start_paused = true)]
async fn a_closure_describes_requests() {
    let pool = keys(1).quota(Quota::per_minute(1)).build().unwrap();
    let layer = KeyRotationLayer::new(&pool)
        .describe(|request: &Request<String>| Traits::new().scope(request.uri().path()));
    let inner = service_fn(async |_: Request<String>| Ok::<_, std::io::Error>(Response::new(String::new())));
    let mut client = tower::ServiceBuilder::new().layer(layer).service(inner);
    let mut send = async |path: &str| {
        let request = Request::get(format!("https://api.example.com{path}")).body(String::new()).unwrap();
        client.ready().await.unwrap().call(request).await.is_ok()
    };
    assert_eq!([send("/a").await, send("/a").await, send("/b").await], [true, false, true]);
}

#[tokio::test(start_paused = true)]
async fn leases_learn_wait_and_give_back() {
    let pool = keys(1).quota(Quota::per_minute(60)).build().unwrap();
    let traits = Traits::new().scope("/a");
    let headers = HeaderMap::new();
    let answer = |status| ResponseHead::new(StatusCode::from_u16(status).unwrap(), &headers);
    assert_eq!(pool.lease(&traits).unwrap().answered(&answer(200)), Verdict::Nothing);
    assert!(pool.lease(&traits).unwrap_err().retry_in().is_some_and(|time| time <= SECOND));

    let began = Instant::now();
    let lease = pool.lease_within(&traits, 2 * SECOND).await.unwrap();
    assert!(began.elapsed() < 2 * SECOND);
    // A refused request was not counted, and the scope rests.
    lease.answered(&answer(429));
    assert!(pool.lease(&traits).unwrap_err().retry_in().is_some_and(|time| time > 100 * SECOND));
    assert_eq!(pool.lease(&Traits::new().scope("/b")).unwrap().id().as_str(), "k0");
}

#[tokio::test(start_paused = true)]
async fn names_of_scopes_are_bounded_data() {
    let pool = keys(1).quota(Quota::per_minute(1)).build().unwrap();
    let service = Upstream::new(1_000.0, 1_000.0);
    let client = client(&pool, &service, Duration::ZERO);
    let long = "m".repeat(128);
    let mut sent = Vec::new();
    for name in [format!("{long}1"), format!("{long}2"), "a\nb".to_owned(), "ü".repeat(200), String::new()] {
        sent.push(send(&client, request("/", Traits::new().scope(&name))).await.is_ok());
    }
    assert_eq!(sent, [true, false, true, true, true]);
    assert_eq!(service.paths().len(), 4);
}

#[tokio::test(start_paused = true)]
async fn without_scopes_a_429_rests_the_whole_key() {
    let mut spare = KeySpec::new(KeyId::new("spare").unwrap(), "sk-spare");
    spare.tier = Some(1);
    let pool = keys(1).key_spec(spare).build().unwrap();
    let service = Upstream::new(0.001, 1.0);
    let client = client(&pool, &service, Duration::ZERO);
    for _ in 0..2 {
        assert_eq!(send(&client, request("/", Traits::new())).await.unwrap(), 200);
    }
    let stats = pool.stats();
    assert_eq!((stats.healthy, stats.rate_limited), (1, 1), "{stats:?}");
    assert!(stats.keys[0].time_left.is_some_and(|time| time > 100 * SECOND));
}

#[tokio::test(start_paused = true)]
async fn a_429_rests_the_whole_quota_group() {
    let spec = |key: usize| {
        let mut spec = KeySpec::new(KeyId::new(format!("k{key}")).unwrap(), format!("sk-{key}"));
        spec.group = Some(format!("org-{}", key / 2));
        spec
    };
    for path in ["/", "/a"] {
        let pool = (0..4).map(spec).fold(KeyPool::builder(), KeyPoolBuilder::key_spec).build().unwrap();
        let service = Upstream::new(0.001, 0.0);
        let client = client(&pool, &service, Duration::ZERO);
        let traits = || if path == "/" { Traits::new() } else { Traits::new().scope(path) };
        // Failover skips the sibling of a limited key: two attempts for four keys.
        assert_eq!(send(&client, request(path, traits())).await.unwrap(), 429);
        assert_eq!(service.refused(), 2);
        assert!(send(&client, request(path, traits())).await.is_err());
        pool.reset("k0").await.unwrap();
        assert_eq!(send(&client, request(path, traits())).await.unwrap(), 429);
    }
}

/// Up to three processes share the keys of a service whose headers lie: near what it allows, and above.
#[tokio::test(start_paused = true)]
async fn f39_lying_headers_fail_no_request() {
    for (headers, per_second) in
        [(Headers::NothingLeft, 4.4), (Headers::AllLeft, 4.4), (Headers::SlowReset, 3.8)]
    {
        for processes in 1..=3 {
            let service = Upstream::new(1.0, 10.0).with(headers);
            let client = |_| client(&keys(4).paced().build().unwrap(), &service, 2 * MINUTE);
            let clients: Vec<_> = (0..processes).map(client).collect();
            let each = per_second / f64::from(processes);
            let all = clients.iter().map(|client| offer(client, each, 300.0, |_| scoped("/a")));
            let results: Vec<_> = join_all(all).await.into_iter().flatten().collect();
            let (served, refused) = (succeeded(&results), service.refused());
            assert_eq!(served, results.len(), "{headers:?}, {processes} processes");
            assert!(refused < served / 10, "{headers:?}, {processes} processes: {refused} of {served}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn nobody_waits_while_no_key_returns_in_time() {
    let pool = keys(2).paced().build().unwrap();
    let traits = Traits::new().scope("a");
    let key = pool.lease(&traits).unwrap();
    key.answered_with(Verdict::Revoked);
    let key = pool.lease(&traits).unwrap();
    key.answered_with(Verdict::Exhausted { wait: Some(24 * 60 * MINUTE) });
    let began = Instant::now();
    let error = pool.lease_within(&traits, MINUTE).await.unwrap_err();
    assert_eq!((error.retry_in(), began.elapsed()), (Some(24 * 60 * MINUTE), Duration::ZERO));
}

#[tokio::test(start_paused = true)]
async fn f40_ten_thousand_waiters_go_in_order_on_time() {
    let service = Upstream::new(1_000.0, 1_000.0).silent();
    let pool = keys(1).quota(Quota::per_second(100).burst(1)).build().unwrap();
    let client = client(&pool, &service, 10 * MINUTE);
    let number = |number| request(&format!("/{number}"), Traits::new().scope("a"));
    let waiting: Vec<_> = (0..=10_000).map(|waiter| spawn(&client, number(waiter))).collect();
    sleep(Duration::from_millis(1)).await;
    let began = Instant::now();
    let error = send(&client, number(10_001)).await.unwrap_err();
    assert_eq!(
        (error.to_string(), began.elapsed()),
        ("no key available: too many requests wait already".to_owned(), Duration::ZERO)
    );
    for waiter in waiting {
        assert_eq!(waiter.await.unwrap().unwrap(), 200);
    }
    let log = service.log.lock().unwrap();
    for (number, (_, path, _, at)) in log.seen.iter().enumerate() {
        assert_eq!(*path, format!("/{number}"));
        // Timers have a resolution of a millisecond.
        assert!((at - number as f64 / 100.0).abs() < 0.002, "{number} went at {at}");
    }
}

/// Whether a request waits, is in flight, or is sent again: nothing of it stays behind.
#[tokio::test(start_paused = true)]
async fn f41_random_drops_leave_nothing_in_flight() {
    for seed in 0..200 {
        let mut random = fastrand::Rng::with_seed(seed);
        // The first key is refused at once, and the requests go on to the second.
        let service = Upstream::new(1_000.0, 1_000.0).silent();
        let refuses = service_fn({
            let service = service.clone();
            move |request: Request<String>| {
                let service = service.clone();
                async move {
                    sleep(Duration::from_millis(20)).await;
                    match request.headers()["authorization"].to_str().unwrap() {
                        "Bearer sk-0" => {
                            return Ok(Response::builder().status(429).body(String::new()).unwrap());
                        }
                        _ if request.uri().path() == "/fails" => {
                            return Err(std::io::ErrorKind::BrokenPipe.into());
                        }
                        _ if request.uri().path() == "/panics" => {
                            std::panic::resume_unwind(Box::new("as asked"))
                        }
                        _ => {}
                    }
                    sleep(Duration::from_millis(100)).await;
                    Ok::<_, std::io::Error>(service.call("1", request.uri().path()))
                }
            }
        });
        let pool = keys(2).paced().build().unwrap();
        let client = |wait| {
            let layer = KeyRotationLayer::new(&pool).failover(Failover::attempts(4)).wait_up_to(wait);
            let client = tower::ServiceBuilder::new().layer(layer).service(refuses.clone());
            let client =
                client.map_response(|response| response.status().as_u16()).map_err(Error::into_inner);
            tower::util::BoxCloneService::new(client)
        };
        let mut served = 0;
        for _ in 0..5 {
            let requests: Vec<_> = (0..random.usize(1..12))
                .map(|_| {
                    let path = random.choice(["/a", "/a", "/a", "/fails", "/panics"]).unwrap();
                    spawn(&client(MINUTE), request(path, Traits::new().scope("a")))
                })
                .collect();
            let mut after: Vec<_> = requests.iter().map(|_| random.u64(0..400)).collect();
            after.sort_unstable();
            let began = Instant::now();
            for (request, after) in requests.iter().zip(after) {
                tokio::time::sleep_until(began + Duration::from_millis(after)).await;
                request.abort();
            }
            served +=
                join_all(requests).await.into_iter().filter(|result| matches!(result, Ok(Ok(200)))).count();
        }
        pool.disable("k0").await.unwrap();
        // Each success raises the number of requests that a key carries by one.
        let most = 4 + served;
        let client = client(Duration::ZERO);
        let results =
            join_all((0..=most).map(|_| send(&client, request("/a", Traits::new().scope("a"))))).await;
        assert_eq!(succeeded(&results), most, "seed {seed}");
    }
}

/// Twice as many requests as the keys' buckets hold come at once, every 25 seconds: 80 % of what the service allows.
#[tokio::test(start_paused = true)]
async fn bursts_fail_no_request_and_little_is_refused() {
    let service = Upstream::new(1.0, 10.0);
    let client = client(&keys(4).paced().build().unwrap(), &service, MINUTE);
    let results = join_all((0..800).map(|number| {
        let client = &client;
        async move {
            sleep(number / 80 * 25 * SECOND).await;
            send(client, scoped("/a")).await
        }
    }))
    .await;
    assert_eq!(succeeded(&results), results.len());
    assert!(service.refused() < 80, "{} of {}", service.refused(), results.len());
}

#[tokio::test(start_paused = true)]
async fn f40_requests_for_one_key_hold_up_no_other() {
    let service = Upstream::new(1_000.0, 1_000.0);
    let pool = keys(2).quota(Quota::per_minute(60).burst(2)).build().unwrap();
    let client = client(&pool, &service, MINUTE);
    let alpha = || Traits::new().scope("/a").key(KeyId::new("k0").unwrap());
    for _ in 0..2 {
        send(&client, request("/a", alpha())).await.unwrap();
    }
    let picky: Vec<_> = (0..30).map(|_| spawn(&client, request("/a", alpha()))).collect();
    sleep(Duration::from_millis(10)).await;
    let began = Instant::now();
    assert_eq!(send(&client, scoped("/a")).await.unwrap(), 200);
    assert!(began.elapsed() < SECOND, "{:?}", began.elapsed());
    for picky in picky {
        assert_eq!(picky.await.unwrap().unwrap(), 200);
    }
}

/// A client of a service that sends these headers with each response.
fn client_of_headers(pool: &KeyPool, headers: &'static [(&str, &str)]) -> Client {
    let inner = service_fn(move |_: Request<String>| {
        let response = Response::builder().header("date", "Mon, 23 Nov 2026 20:41:00 GMT");
        let response =
            headers.iter().fold(response, |response, (name, value)| response.header(*name, *value));
        async move { Ok::<_, std::io::Error>(response.body(String::new()).unwrap()) }
    });
    let client = tower::ServiceBuilder::new().layer(KeyRotationLayer::new(pool)).service(inner);
    tower::util::BoxCloneService::new(
        client.map_response(|response| response.status().as_u16()).map_err(Error::into_inner),
    )
}

#[tokio::test(start_paused = true)]
async fn f39_hostile_limits_neither_panic_nor_close_keys() {
    const HOSTILE: [&[(&str, &str)]; 6] = [
        &[
            ("ratelimit-limit", "100"),
            ("ratelimit-remaining", "50"),
            ("ratelimit-reset", "5124095576030431h"),
        ],
        &[
            ("x-ratelimit-limit-requests", "60"),
            ("x-ratelimit-remaining-requests", "59"),
            ("x-ratelimit-reset-requests", "99999999999999s"),
        ],
        &[("ratelimit", "limit=100, remaining=50, reset=999999999999999")],
        &[("ratelimit-limit", "100"), ("ratelimit-remaining", "99"), ("ratelimit-reset", "999999999")],
        &[
            ("x-ratelimit-limit-requests", "18446744073709551615"),
            ("x-ratelimit-remaining-requests", "1"),
            ("x-ratelimit-reset-requests", "1ms"),
        ],
        &[
            ("x-ratelimit-limit-requests", "0.000001"),
            ("x-ratelimit-remaining-requests", "0"),
            ("x-ratelimit-reset-requests", "9999999s"),
        ],
    ];
    for headers in HOSTILE {
        let client = client_of_headers(&keys(1).paced().build().unwrap(), headers);
        for number in 0..20 {
            let sent = send(&client, request("/", Traits::new().tokens(u64::MAX))).await;
            assert!(sent.is_ok(), "{headers:?}, request {number}: {sent:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn f39_a_misread_header_blocks_no_request_that_never_waits() {
    // Milliseconds, read as seconds.
    const MISREAD: &[(&str, &str)] =
        &[("x-ratelimit-limit", "10"), ("x-ratelimit-remaining", "0"), ("x-ratelimit-reset", "60000")];
    let client = client_of_headers(&keys(3).paced().build().unwrap(), MISREAD);
    let mut served = 0;
    for _ in 0..600 {
        served += usize::from(send(&client, scoped("/a")).await.is_ok());
        sleep(Duration::from_millis(100)).await;
    }
    assert!(served > 400, "{served} of 600");
}
