//! Time of a request that is answered 429, and of a request just after many cooldowns have ended at once.
//!
//! ```text
//! cargo bench --all-features --bench marks
//! ```

mod support;

use std::time::{Duration, Instant};

use http::StatusCode;
use support::{
    GivesBack, Turns,
    compare::{Bar, is_benchmark},
    times::Times,
};
use tower::Layer;
use tower_key_rotation::{KeyPool, KeyRotation, KeyRotationLayer, clock::ManualClock, store::MemoryStore};

const SIZES: [usize; 4] = [1, 100, 10_000, 100_000];
/// The number of marks timed for each size.
const MARKS: usize = 20_000;

fn main() {
    // `cargo test --benches` only checks that the benchmark runs.
    let (marks, crowd, times) = if is_benchmark() { (MARKS, 100_000, 7) } else { (10, 100, 1) };
    marking(marks);
    a_crowd_returns(crowd, times);
}

fn client(pool: &KeyPool) -> KeyRotation<GivesBack> {
    KeyRotationLayer::new(pool).layer(GivesBack)
}

fn nanoseconds(client: &mut KeyRotation<GivesBack>, turns: &mut Turns, status: StatusCode) -> u64 {
    let started = Instant::now();
    turns.take(client, status);
    started.elapsed().as_nanos() as u64
}

fn marking(marks: usize) {
    Times::print_head("a request");
    let mut dearest: f64 = 0.0;
    for keys in SIZES {
        for (kept, pool) in [("", built as fn(usize) -> KeyPool), (", over a store", opened)] {
            let (usual, limited) = mark(keys, pool, marks);
            usual.print(&format!("{keys} keys{kept}, answered 200"));
            limited.print(&format!("{keys} keys{kept}, answered 429"));
            dearest = dearest.max(limited.at(0.5) - usual.at(0.5));
        }
    }
    Bar::AtMost(1_000.0).print("marking a key, at any pool size", dearest, " ns");
}

fn built(keys: usize) -> KeyPool {
    support::pool(keys)
}

fn opened(keys: usize) -> KeyPool {
    let builder = KeyPool::builder().keys(support::keys(keys));
    // Outside a runtime, `open` completes at the first poll.
    futures_util::FutureExt::now_or_never(builder.open(MemoryStore::new())).unwrap().unwrap()
}

/// Times requests on healthy keys, then requests that each mark a key.
fn mark(keys: usize, new_pool: fn(usize) -> KeyPool, marks: usize) -> (Times, Times) {
    let (mut usual, mut limited) = (Vec::new(), Vec::new());
    while limited.len() < marks {
        let pool = new_pool(keys);
        let (mut client, mut turns) = (client(&pool), Turns::new());
        for _ in 0..keys.clamp(100, 10_000) {
            usual.push(nanoseconds(&mut client, &mut turns, StatusCode::OK));
        }
        for _ in 0..keys.min(10_000) {
            limited.push(nanoseconds(&mut client, &mut turns, StatusCode::TOO_MANY_REQUESTS));
        }
    }
    (usual.into(), limited.into())
}

/// Times requests after all cooldowns of a pool have ended at once.
///
/// The operating system interrupts a thread at random for milliseconds. So the run is repeated, and each request counts
/// with its median over all runs.
fn a_crowd_returns(keys: usize, times: usize) {
    let requests = keys / 8;
    let runs: Vec<Vec<u64>> = (0..times).map(|_| after_a_crowd_returned(keys, requests)).collect();
    let median_of = |request: usize| {
        let mut times: Vec<_> = runs.iter().map(|run| run[request]).collect();
        times.sort_unstable();
        times[times.len() / 2]
    };
    let medians: Vec<_> = (0..requests).map(median_of).collect();
    let usual = medians[requests - requests / 10..].to_vec();
    let medians = Times::from(medians);
    Times::print_head("a request");
    medians.print(&format!("after {keys} cooldowns have ended, medians of {times} runs"));
    Times::from(runs.concat()).print("after they have ended, all runs");
    Times::from(usual).print("after all keys are back, medians");
    Bar::AtMost(50_000.0).print("the longest request, by medians", medians.at(1.0), " ns");
}

fn after_a_crowd_returned(keys: usize, requests: usize) -> Vec<u64> {
    let clock = ManualClock::new();
    let pool = KeyPool::builder().keys(support::keys(keys)).clock(clock.clone()).build().unwrap();
    let (mut client, mut turns) = (client(&pool), Turns::new());
    (0..keys).for_each(|_| turns.take(&mut client, StatusCode::TOO_MANY_REQUESTS));
    assert_eq!(pool.stats().rate_limited, keys);
    clock.advance(Duration::from_secs(120));
    (0..requests).map(|_| nanoseconds(&mut client, &mut turns, StatusCode::OK)).collect()
}
