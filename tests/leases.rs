//! Keys for clients that take a key and no layer: SDKs, and clients without a runtime.

mod support;

use std::{
    error::Error as StdError,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use http::{HeaderMap, StatusCode};
use support::{MINUTE, SECOND};
use tokio::runtime::Builder;
use tower_key_rotation::{
    Error, Failover, KeyLease, KeyLeases, KeyPool, KeyPoolBuilder, NoKeyAvailable, Quota, Status, Traits,
    classify::{ResponseHead, Verdict},
    clock::{Clock, ManualClock, Sleep},
};
use wiremock::{Mock, MockServer, Request, ResponseTemplate, matchers::any};

const MS: Duration = Duration::from_millis(1);

fn keys(count: usize) -> KeyPoolBuilder {
    KeyPool::builder().keys((0..count).map(|key| (format!("k{key}"), format!("sk-k{key}"))))
}

fn scope(name: &str) -> Traits {
    Traits::new().scope(name)
}

/// A server that limits these keys, and answers others with their names.
async fn limiting(limited: &'static [&str]) -> MockServer {
    let server = MockServer::start().await;
    let answer = |request: &Request| {
        let key = request.headers["authorization"].to_str().unwrap()["Bearer sk-".len()..].to_owned();
        let limited = limited.contains(&&*key);
        ResponseTemplate::new(if limited { 429 } else { 200 }).set_body_string(key)
    };
    Mock::given(any()).respond_with(answer).mount(&server).await;
    server
}

/// An SDK: it takes a key, and its errors say little.
struct Sdk {
    url: String,
    http: reqwest::Client,
}

#[derive(Debug, PartialEq, thiserror::Error)]
enum SdkError {
    #[error("rate limited")]
    RateLimited,
    #[error("not sent")]
    NotSent,
}

impl Sdk {
    fn of(server: &MockServer) -> Self {
        Self { url: server.uri(), http: reqwest::Client::new() }
    }

    async fn ask(&self, key: &str) -> Result<String, SdkError> {
        let response = self.http.get(&self.url).bearer_auth(key).send().await;
        let response = response.map_err(|_| SdkError::NotSent)?;
        if response.status() == StatusCode::TOO_MANY_REQUESTS {
            return Err(SdkError::RateLimited);
        }
        response.text().await.map_err(|_| SdkError::NotSent)
    }
}

/// What a program that uses the SDK writes.
async fn ask(keys: &KeyLeases, sdk: &Sdk) -> Result<String, Error<SdkError>> {
    keys.with_key(&scope("gpt-5-mini"), async |key| {
        let reply = sdk.ask(key.secret().expose()).await;
        if reply == Err(SdkError::RateLimited) {
            key.answered_with(Verdict::RateLimited { wait: None });
        }
        reply
    })
    .await
}

async fn asked(server: &MockServer) -> Vec<String> {
    let requests = server.received_requests().await.unwrap();
    requests.iter().map(key_of_received).collect()
}

fn key_of_received(request: &Request) -> String {
    request.headers["authorization"].to_str().unwrap()["Bearer sk-".len()..].to_owned()
}

#[tokio::test]
async fn with_key_goes_on_with_another_key() {
    for pool in [keys(3).build().unwrap(), keys(3).paced().build().unwrap()] {
        let server = limiting(&["k0", "k1"]).await;
        let (keys, sdk) = (KeyLeases::new(&pool), Sdk::of(&server));
        assert_eq!(ask(&keys, &sdk).await.unwrap(), "k2");
        assert_eq!(asked(&server).await, ["k0", "k1", "k2"]);
        assert_eq!(pool.stats().keys[0].limited, 1);
        // Those that were refused rest.
        assert_eq!(ask(&keys, &sdk).await.unwrap(), "k2");
        assert_eq!(asked(&server).await.len(), 4);
    }
}

#[tokio::test]
async fn with_key_futures_can_be_spawned() {
    let server = limiting(&["k0"]).await;
    let keys = Arc::new((KeyLeases::new(&keys(2).build().unwrap()), Sdk::of(&server)));
    let spawned = (0..8).map(|_| {
        let keys = keys.clone();
        tokio::spawn(async move { ask(&keys.0, &keys.1).await })
    });
    for reply in join_all(spawned).await {
        assert_eq!(reply.unwrap().unwrap(), "k1");
    }
}

#[tokio::test]
async fn the_last_refusal_is_the_callers() {
    let server = limiting(&["k0", "k1", "k2"]).await;
    let (pool, sdk) = (keys(3).build().unwrap(), Sdk::of(&server));
    let keys = KeyLeases::new(&pool).failover(Failover::attempts(2));
    assert!(matches!(ask(&keys, &sdk).await, Err(Error::Inner(SdkError::RateLimited))));
    assert_eq!(asked(&server).await, ["k0", "k1"]);
    assert!(matches!(ask(&keys, &sdk).await, Err(Error::Inner(SdkError::RateLimited))));
    // Now all of them rest.
    let error: Box<dyn StdError> = ask(&keys, &sdk).await.unwrap_err().into();
    assert!(NoKeyAvailable::find(&*error).unwrap().retry_in().is_some());
    assert_eq!(asked(&server).await.len(), 3);
}

#[test]
fn only_refused_requests_are_made_again() {
    let pool = keys(3).build().unwrap();
    let keys = KeyLeases::new(&pool);
    let headers = HeaderMap::new();
    let answer = |status| ResponseHead::new(StatusCode::from_u16(status).unwrap(), &headers);
    let mut made = 0;
    let mut count = |answers: fn(&KeyLease, &ResponseHead<'_>), status| {
        made = 0;
        let _ = keys.with_key_blocking(&Traits::new(), |key| {
            made += 1;
            answers(&key, &answer(status));
            Err::<(), _>("an error of the client")
        });
        made
    };
    let says = |key: &KeyLease, head: &ResponseHead<'_>| {
        key.answered(head);
    };
    assert_eq!(count(|_, _| {}, 200), 1);
    assert_eq!(count(says, 500), 1);
    // The service has carried it out, whatever it says of the key.
    let rests = |key: &KeyLease, head: &ResponseHead<'_>| {
        let rest = |_: &ResponseHead<'_>| Verdict::RateLimited { wait: None };
        key.answered_by(&rest, head);
    };
    assert_eq!(count(rests, 201), 1);
    assert_eq!(count(says, 429), 2);
    assert_eq!(pool.stats().rate_limited, 3);
}

#[test]
fn a_retry_budget_bounds_all_requests_together() {
    let clock = ManualClock::new();
    let pool = keys(1_000).clock(clock).build().unwrap();
    let keys = KeyLeases::new(&pool);
    let mut made = 0;
    for _ in 0..300 {
        // A clone has the same budget.
        let refused = keys.clone().with_key_blocking(&Traits::new(), |key| {
            made += 1;
            key.answered_with(Verdict::RateLimited { wait: None });
            Err::<(), _>(())
        });
        refused.unwrap_err();
    }
    // 300, and what is saved up at most: 100 for time, 100 for successes.
    assert!((301..=500).contains(&made), "{made}");
}

#[tokio::test(start_paused = true)]
async fn refused_requests_wait_for_their_key() {
    let pool = keys(1).paced().build().unwrap();
    let keys = KeyLeases::new(&pool).wait_up_to(10 * SECOND);
    let began = tokio::time::Instant::now();
    let made = AtomicUsize::new(0);
    let traits = scope("a");
    let done = keys.with_key(&traits, async |key| {
        if made.fetch_add(1, SeqCst) == 0 {
            key.answered_with(Verdict::RateLimited { wait: Some(3 * SECOND) });
            return Err("refused");
        }
        Ok(key.id().to_string())
    });
    assert_eq!(done.await.unwrap(), "k0");
    assert_eq!(made.into_inner(), 2);
    assert!((3 * SECOND..4 * SECOND).contains(&began.elapsed()), "{:?}", began.elapsed());
    assert_eq!(pool.stats().waited, 1);
}

#[test]
fn a_revoked_key_is_not_leased_again() {
    let pool = keys(2).build().unwrap();
    let done = KeyLeases::new(&pool).with_key_blocking(&Traits::new(), |key| {
        if key.id().as_str() == "k0" {
            key.answered_with(Verdict::Revoked);
            return Err("an invalid key");
        }
        Ok(())
    });
    done.unwrap();
    assert_eq!(pool.stats().keys[0].status, Status::Revoked);
}

// ---- without a runtime ----

/// A clock that says how many sleeps have begun.
#[derive(Clone, Debug, Default)]
struct Watched {
    clock: ManualClock,
    sleeps: Arc<AtomicUsize>,
}

impl Watched {
    /// Until a thread sleeps that did not before.
    fn wait_for_sleepers(&self, before: usize, do_something: impl FnOnce()) {
        let had = self.sleeps.load(SeqCst);
        do_something();
        let began = Instant::now();
        while self.sleeps.load(SeqCst) < had + before {
            assert!(began.elapsed() < MINUTE, "nobody sleeps");
            thread::yield_now();
        }
    }
}

impl Clock for Watched {
    fn now(&self) -> Duration {
        self.clock.now()
    }

    fn sleep_until(&self, _: Duration) -> Sleep {
        panic!("there is no runtime")
    }

    fn sleep_without_runtime(&self, deadline: Duration) -> Option<Sleep> {
        self.sleeps.fetch_add(1, SeqCst);
        self.clock.sleep_without_runtime(deadline)
    }
}

#[test]
fn f40_blocked_threads_go_in_order_on_time() {
    let clock = Watched::default();
    let pool = keys(1).quota(Quota::per_second(1)).clock(clock.clone()).build().unwrap();
    drop(pool.lease(&Traits::new()).unwrap());
    let (sender, leased) = mpsc::channel();
    let threads: Vec<_> = (0..5)
        .map(|number| {
            let (pool, sender) = (pool.clone(), sender.clone());
            let mut thread = None;
            // The first one sleeps for its limit and for the key, the others for their limits.
            clock.wait_for_sleepers(if number == 0 { 2 } else { 1 }, || {
                thread = Some(thread::spawn(move || {
                    let lease = pool.lease_blocking(&Traits::new(), MINUTE);
                    sender.send((number, lease.is_ok(), pool.clock().now())).unwrap();
                }));
            });
            thread.unwrap()
        })
        .collect();
    for number in 0..5 {
        clock.clock.advance(SECOND - Duration::from_nanos(1));
        // Nobody goes too early, however often they look.
        assert!(leased.try_recv().is_err());
        assert!(pool.lease(&Traits::new()).is_err());
        let next = if number < 4 { 1 } else { 0 };
        clock.wait_for_sleepers(next, || clock.clock.advance(Duration::from_nanos(1)));
        assert_eq!(leased.recv_timeout(MINUTE).unwrap(), (number, true, (number + 1) * SECOND));
    }
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

#[test]
fn threads_and_tasks_wait_in_one_queue() {
    let pool = keys(1).quota(Quota::per_second(20).burst(1)).build().unwrap();
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_time().build().unwrap();
    let leased = Arc::new(AtomicUsize::new(0));
    let waiters = 12;
    let began = Instant::now();
    let mut threads = Vec::new();
    let mut tasks = Vec::new();
    for number in 0..waiters {
        let (pool, leased) = (pool.clone(), leased.clone());
        if number % 2 == 0 {
            threads.push(thread::spawn(move || {
                let lease = pool.lease_blocking(&Traits::new(), MINUTE).unwrap();
                leased.fetch_add(1, SeqCst);
                drop(lease);
            }));
        } else {
            tasks.push(runtime.spawn(async move {
                let lease = pool.lease_within(&Traits::new(), MINUTE).await.unwrap();
                leased.fetch_add(1, SeqCst);
                drop(lease);
            }));
        }
    }
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    runtime.block_on(join_all(tasks)).into_iter().for_each(|task| task.unwrap());
    assert_eq!(leased.load(SeqCst), waiters);
    // All but the first wait for 50 ms each, and nobody starves beside the others.
    assert!((540 * MS..30 * SECOND).contains(&began.elapsed()), "{:?}", began.elapsed());
}

/// Sleeps by the machine's clock: there is no runtime, and the pool's clock is tokio's.
#[test]
fn threads_wait_without_a_runtime() {
    let pool = keys(1).quota(Quota::per_second(20).burst(1)).build().unwrap();
    let began = Instant::now();
    drop(pool.lease(&Traits::new()).unwrap());
    drop(pool.lease_blocking(&Traits::new(), MINUTE).unwrap());
    assert!(began.elapsed() >= 49 * MS, "{:?}", began.elapsed());
    let pool = keys(1).quota(Quota::per_hour(1)).build().unwrap();
    drop(pool.lease(&Traits::new()).unwrap());
    // Of a pool that learns nothing, it is known that the wait would be in vain.
    let error = pool.lease_blocking(&Traits::new(), MINUTE).unwrap_err();
    assert!(error.retry_in().is_some_and(|time| time > 50 * MINUTE));
}

#[test]
fn a_blocked_task_gives_up_at_its_limit() {
    let blocks = |paused: bool| {
        let runtime = Builder::new_current_thread().enable_time().start_paused(paused).build().unwrap();
        runtime.block_on(async {
            let pool = keys(1).paced().build().unwrap();
            // Of a service that says nothing, four requests a key are in flight at most.
            let leases: Vec<_> = (0..4).map(|_| pool.lease(&Traits::new()).unwrap()).collect();
            let began = Instant::now();
            // No other task of this runtime could give a key back, and a paused clock would stand still for ever.
            let error = pool.lease_blocking(&Traits::new(), 50 * MS).unwrap_err();
            assert_eq!(error.retry_in(), None);
            assert!(began.elapsed() >= 50 * MS);
            drop(leases);
            assert!(pool.lease_blocking(&Traits::new(), Duration::ZERO).is_ok());
        });
    };
    blocks(false);
    blocks(true);
}

#[test]
fn a_lease_that_ends_wakes_a_blocked_thread() {
    let clock = Watched::default();
    let pool = keys(1).paced().clock(clock.clone()).build().unwrap();
    let mut leases: Vec<_> = (0..4).map(|_| pool.lease(&Traits::new()).unwrap()).collect();
    let mut waits = None;
    clock.wait_for_sleepers(2, || {
        let pool = pool.clone();
        waits = Some(thread::spawn(move || pool.lease_blocking(&Traits::new(), MINUTE).is_ok()));
    });
    leases.pop();
    assert!(waits.unwrap().join().unwrap());
}

#[test]
fn with_key_blocking_goes_on_with_another_key() {
    let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let server = runtime.block_on(limiting(&["k0"]));
    let pool = keys(2).build().unwrap();
    let response = KeyLeases::new(&pool).with_key_blocking(&Traits::new(), |key| {
        let (status, body) = get(&server, key.secret().expose());
        let headers = HeaderMap::new();
        key.answered(&ResponseHead::new(status, &headers));
        Ok::<_, ()>((status, body))
    });
    assert_eq!(response.unwrap(), (StatusCode::OK, "k1".to_owned()));
    assert_eq!(pool.stats().keys[0].status, Status::RateLimited);
}

/// The smallest blocking client.
fn get(server: &MockServer, key: &str) -> (StatusCode, String) {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(server.address()).unwrap();
    write!(stream, "GET / HTTP/1.0\r\nauthorization: Bearer {key}\r\n\r\n").unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).unwrap();
    let (head, body) = response.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

#[test]
fn f41_panics_and_errors_leave_nothing_in_flight() {
    let pool = keys(1).paced().build().unwrap();
    let keys = KeyLeases::new(&pool);
    for round in 0..50 {
        let panics = || keys.with_key_blocking(&Traits::new(), |_| -> Result<(), ()> { panic!("as asked") });
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(panics));
        assert!(panicked.is_err(), "round {round}");
        assert!(keys.with_key_blocking(&Traits::new(), |_| Err::<(), _>(())).is_err());
        drop(pool.lease(&Traits::new()).unwrap());
    }
    let leases: Vec<_> = (0..5).map_while(|_| pool.lease(&Traits::new()).ok()).collect();
    assert_eq!(leases.len(), 4);
}
