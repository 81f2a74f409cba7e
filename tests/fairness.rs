//! Each key in its turn: how evenly requests are shared, whatever rests, and from however many threads.

use std::{
    collections::BTreeSet,
    convert::Infallible,
    future::{Ready, ready},
    sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    thread,
    time::{Duration, Instant},
};

use futures_util::FutureExt;
use http::{Request, Response};
use proptest::prelude::*;
use tower::{Layer, Service, service_fn};
use tower_key_rotation::{
    KeyId, KeyPool, KeyRotation, KeyRotationLayer, KeySpec, NoKeyAvailable, Status,
    clock::ManualClock,
    store::{KeyStore, MemoryStore, Operation},
};

const COOLDOWN: Duration = Duration::from_secs(120);

/// Answers at once with the status in the request's body, and says in the response's which key it saw.
fn answer(request: Request<u16>) -> Ready<Result<Response<usize>, Infallible>> {
    let key = request.headers()["authorization"].as_bytes();
    let number = std::str::from_utf8(&key["Bearer sk-".len()..]).expect("text").parse();
    let response = Response::builder().status(*request.body()).body(number.expect("one of our secrets"));
    ready(Ok(response.expect("a response")))
}

type Answer = fn(Request<u16>) -> Ready<Result<Response<usize>, Infallible>>;

type Client = KeyRotation<tower::util::ServiceFn<Answer>>;

fn client(pool: &KeyPool) -> Client {
    KeyRotationLayer::new(pool).layer(service_fn(answer as Answer))
}

/// Sends a request, which is answered with that status; says with which key it was sent.
fn send(client: &mut Client, status: u16) -> usize {
    let request = Request::get("https://api.example.com/v1").body(status).expect("a request");
    let response = client.call(request).now_or_never().expect("an answer at once");
    *response.expect("a key is available").body()
}

fn id(number: usize) -> String {
    format!("key-{number}")
}

fn pool(keys: usize, clock: &ManualClock) -> KeyPool {
    let keys = (0..keys).map(|number| (id(number), format!("sk-{number}")));
    KeyPool::builder().keys(keys).clock(clock.clone()).build().expect("a pool")
}

fn operate(change: impl Future<Output = Result<(), tower_key_rotation::OperateError>>) {
    change.now_or_never().expect("a store in memory").expect("a known key");
}

/// A pool in which the keys that `rests` names rest.
fn pool_with_resting(keys: usize, rests: impl Fn(usize) -> bool) -> (KeyPool, ManualClock) {
    let clock = ManualClock::new();
    let pool = pool(keys, &clock);
    let mut client = client(&pool);
    for expected in 0..keys {
        assert_eq!(send(&mut client, if rests(expected) { 429 } else { 200 }), expected);
    }
    assert_eq!(pool.stats().rate_limited, (0..keys).filter(|number| rests(*number)).count());
    (pool, clock)
}

/// How often each key is picked, by so many threads at once.
fn picks(pool: &KeyPool, keys: usize, threads: usize, picks_each: usize) -> Vec<usize> {
    let counts: Vec<Vec<usize>> = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| {
                    let mut client = client(pool);
                    let mut counts = vec![0; keys];
                    (0..picks_each).for_each(|_| counts[send(&mut client, 200)] += 1);
                    counts
                })
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().expect("no panic")).collect()
    });
    (0..keys).map(|key| counts.iter().map(|own| own[key]).sum()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn each_available_key_is_picked_once_per_round(
        rests in prop::collection::vec(any::<bool>(), 1..300),
        rounds in 1usize..5,
    ) {
        let available = rests.iter().filter(|rests| !**rests).count();
        let (pool, _clock) = pool_with_resting(rests.len(), |number| rests[number]);
        for (number, picked) in picks(&pool, rests.len(), 1, rounds * available).into_iter().enumerate() {
            prop_assert_eq!(picked, if rests[number] { 0 } else { rounds }, "key {}", number);
        }
    }
}

/// Most picked over mean, of the keys that don't rest.
fn unevenness(counts: &[usize]) -> f64 {
    let most = *counts.iter().max().expect("some keys");
    most as f64 * counts.len() as f64 / counts.iter().sum::<usize>() as f64
}

fn threads_share_evenly(threads: usize) {
    const KEYS: usize = 100;
    const ROUNDS: usize = 800;
    let clock = ManualClock::new();
    let counts = picks(&pool(KEYS, &clock), KEYS, threads, KEYS * ROUNDS / threads);
    assert!(unevenness(&counts) <= 1.01, "{counts:?}");
    // The turn passes from thread to thread without a gap, so it is even exact.
    assert_eq!(counts, [ROUNDS; KEYS]);
}

#[test]
fn two_threads_share_the_keys_evenly() {
    threads_share_evenly(2);
}

#[test]
fn eight_threads_share_the_keys_evenly() {
    threads_share_evenly(8);
}

fn a_resting_block_gives_nobody_its_share(threads: usize) {
    const KEYS: usize = 2_000;
    const RESTING: usize = 1_980;
    const ROUNDS: usize = 2_000;
    let (pool, _clock) = pool_with_resting(KEYS, |number| number < RESTING);
    let counts = picks(&pool, KEYS, threads, (KEYS - RESTING) * ROUNDS / threads);
    assert_eq!(counts[..RESTING], [0; RESTING]);
    assert!(unevenness(&counts[RESTING..]) <= 1.01, "{:?}", &counts[RESTING..]);
    assert_eq!(counts[RESTING..], [ROUNDS; KEYS - RESTING]);
}

#[test]
fn keys_behind_a_resting_block_get_equal_shares() {
    a_resting_block_gives_nobody_its_share(1);
}

#[test]
fn two_threads_share_equally_behind_a_resting_block() {
    a_resting_block_gives_nobody_its_share(2);
}

#[test]
fn eight_threads_share_equally_behind_a_resting_block() {
    a_resting_block_gives_nobody_its_share(8);
}

/// Where each key stands, for whoever picks: odd while it is certainly disabled.
struct Board(Vec<AtomicU64>);

impl Board {
    fn read(&self) -> Vec<u64> {
        self.0.iter().map(|entry| entry.load(SeqCst)).collect()
    }
}

#[test]
fn concurrent_picks_skip_disabled_keys_and_lose_none() {
    const KEYS: usize = 130;
    const TOGGLED: usize = 8;
    const RUN: Duration = Duration::from_millis(1_200);

    let clock = ManualClock::new();
    let pool = pool(KEYS, &clock);
    // Some are out for good, some go in and out, all others rest now and then.
    let is_out = |key: usize| key % 13 == 5;
    let toggled: Vec<usize> = (0..KEYS).filter(|key| key % 13 == 7).take(TOGGLED).collect();
    (0..KEYS).filter(|key| is_out(*key)).for_each(|key| operate(pool.disable(id(key))));
    let board = Board((0..KEYS).map(|_| AtomicU64::new(0)).collect());
    let stop = AtomicBool::new(false);
    let picked = AtomicU64::new(0);

    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(SeqCst) {
                clock.advance(Duration::from_secs(7));
                thread::yield_now();
            }
        });
        scope.spawn(|| {
            while !stop.load(SeqCst) {
                for key in &toggled {
                    operate(pool.disable(id(*key)));
                    board.0[*key].fetch_add(1, SeqCst);
                    thread::yield_now();
                    board.0[*key].fetch_add(1, SeqCst);
                    operate(pool.enable(id(*key)));
                }
            }
        });
        for _ in 0..4 {
            scope.spawn(|| {
                let mut client = client(&pool);
                while !stop.load(SeqCst) {
                    let before = board.read();
                    let limited = picked.load(SeqCst).is_multiple_of(3);
                    let request = Request::get("https://api.example.com");
                    let request = request.body(if limited { 429 } else { 200 }).expect("a request");
                    let Ok(response) = client.call(request).now_or_never().expect("at once") else {
                        continue;
                    };
                    let key = *response.body();
                    picked.fetch_add(1, SeqCst);
                    assert!(!is_out(key), "key {key} is disabled for good");
                    let after = board.0[key].load(SeqCst);
                    let was_disabled_throughout = before[key] == after && after % 2 == 1;
                    assert!(!was_disabled_throughout, "key {key} was disabled, and was picked");
                }
            });
        }
        thread::sleep(RUN);
        // On a machine that has much else to do, it takes longer.
        let began = Instant::now();
        while picked.load(SeqCst) < 1_000 && began.elapsed() < Duration::from_secs(60) {
            thread::yield_now();
        }
        stop.store(true, SeqCst);
    });
    assert!(picked.into_inner() >= 1_000, "requests are sent");

    // All is quiet now: every key is back in its turn, and has exactly its share.
    clock.advance(COOLDOWN);
    let mut client = client(&pool);
    for _ in 0..KEYS {
        send(&mut client, 200);
    }
    let stats = pool.stats();
    for (number, key) in stats.keys.iter().enumerate() {
        assert_eq!(key.status, if is_out(number) { Status::Disabled } else { Status::Healthy });
    }
    let in_service = stats.healthy;
    for (number, picked) in picks(&pool, KEYS, 1, 3 * in_service).into_iter().enumerate() {
        assert_eq!(picked, if is_out(number) { 0 } else { 3 }, "key {number}");
    }
}

#[test]
fn f29_one_healthy_key_in_100000_is_found_fast() {
    const KEYS: usize = 100_000;
    let few = quickest_requests(10, 9);
    for awake in [0, 77_777, KEYS - 1] {
        let took = quickest_requests(KEYS, awake);
        assert!(took < 2 * few, "{took:?} among {KEYS} keys, {few:?} among 10");
    }
}

/// How long 100 requests take where all keys rest but that one: on a machine that has nothing else to do.
fn quickest_requests(keys: usize, awake: usize) -> Duration {
    let (pool, _clock) = pool_with_resting(keys, |number| number != awake);
    let mut client = client(&pool);
    let batch = |_| {
        let start = Instant::now();
        for _ in 0..100 {
            assert_eq!(send(&mut client, 200), awake);
        }
        start.elapsed()
    };
    (0..100).map(batch).min().expect("some batches")
}

#[test]
fn f29_next_return_is_known_fast_with_100000_keys() {
    const KEYS: usize = 100_000;
    let (pool, clock) = pool_with_resting(KEYS, |_| true);
    clock.advance(Duration::from_secs(20));
    let mut client = client(&pool);
    let mut quickest = Duration::MAX;
    for _ in 0..1_000 {
        let start = Instant::now();
        let request = Request::get("https://api.example.com").body(200).expect("a request");
        let error = client.call(request).now_or_never().expect("at once").expect_err("no key");
        let no_key = NoKeyAvailable::find(&error).expect("an error about keys");
        assert_eq!(no_key.retry_in(), Some(Duration::from_secs(100)));
        quickest = quickest.min(start.elapsed());
    }
    assert!(quickest < Duration::from_millis(3), "took {quickest:?}");

    // And when all of them come back at once, no single request pays for it.
    clock.advance(Duration::from_secs(100));
    let mut longest = Duration::ZERO;
    for _ in 0..20 {
        let start = Instant::now();
        send(&mut client, 200);
        longest = longest.max(start.elapsed());
    }
    assert!(longest < Duration::from_millis(100), "one request took {longest:?}");
}

#[tokio::test]
async fn f29_large_reloads_are_atomic_and_block_no_request() {
    const KEYS: usize = 100_000;
    let store = MemoryStore::new();
    let name = |number| KeyId::new(id(number)).expect("an id");
    let insert = async |number: usize| {
        let spec = KeySpec::new(name(number), format!("sk-{number}"));
        store.operate(name(number), Operation::Insert(spec)).await.expect("memory").expect("a free id");
    };
    for number in 0..KEYS {
        insert(number).await;
    }
    let pool = KeyPool::builder().open(store.clone()).await.expect("a store in memory");
    // Every second one goes, and as many come.
    for number in (0..KEYS).step_by(2) {
        store.operate(name(number), Operation::Remove).await.expect("memory").expect("a key");
        insert(KEYS + number).await;
    }

    let start = Instant::now();
    let reload = tokio::spawn({
        let pool = pool.clone();
        async move { pool.reload().await }
    });
    let (mut client, mut longest) = (client(&pool), Duration::ZERO);
    let (mut found, mut sizes) = (Vec::new(), BTreeSet::new());
    while !reload.is_finished() {
        let start = Instant::now();
        found.push(send(&mut client, 200));
        sizes.insert(format!("{pool:?}"));
        tokio::task::yield_now().await;
        longest = longest.max(start.elapsed());
    }
    let took = start.elapsed();
    reload.await.expect("no panic").expect("a store in memory");

    // On the runtime's only thread, and never for as long as the keys take to be put in place.
    assert!(longest < took / 3, "a request took {longest:?} of {took:?}");
    assert!(found.len() > 1_000, "{} requests in {took:?}", found.len());
    assert!(sizes.len() == 1 && sizes.first().is_some_and(|size| size.contains("100000")), "{sizes:?}");
    let is_new = |key: &usize| *key >= KEYS;
    let is_old = |key: &usize| *key < KEYS && key.is_multiple_of(2);
    let swap = found.iter().position(is_new).unwrap_or(found.len());
    assert!(!found[swap..].iter().any(is_old), "a key that is gone was used after one that had come");
    let of_the_new = (0..KEYS / 10).map(|_| send(&mut client, 200));
    assert!(!of_the_new.into_iter().any(|key| is_old(&key)));
    assert_eq!(pool.stats().healthy, KEYS);
}
