//! Pools with limits, and leases of many requests at once.

use std::{
    hint::black_box,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use http::{HeaderMap, HeaderValue, StatusCode, header::DATE};
use tower_key_rotation::{
    KeyLease, KeyPool, KeyPoolBuilder, Traits,
    classify::{ResponseHead, Verdict},
    clock::{Clock, Sleep},
};

use crate::support;

/// Leases that are held at once: each batch of picks is followed by the batch of their ends.
const HELD: u64 = 64;

pub(crate) fn builder(keys: usize) -> KeyPoolBuilder {
    KeyPool::builder().keys(support::keys(keys))
}

pub(crate) fn lease(pool: &KeyPool, traits: &Traits) -> KeyLease {
    pool.lease(traits).expect("a key with room")
}

/// A pool in which each key has learned a budget that is never used up.
pub(crate) fn paced(keys: usize, traits: &[Traits]) -> KeyPool {
    let pool = builder(keys).paced().build().unwrap();
    let headers = of_requests();
    for traits in traits {
        learn(&pool, keys, traits, &headers);
    }
    pool
}

/// Each key learns from a response.
pub(crate) fn learn(pool: &KeyPool, keys: usize, traits: &Traits, headers: &HeaderMap) {
    for _ in 0..keys {
        let _ = lease(pool, traits).answered(&ResponseHead::new(StatusCode::OK, headers));
    }
}

/// A pool without limits, in which the first key rests.
pub(crate) fn one_rests(keys: usize) -> KeyPool {
    let pool = builder(keys.max(2)).build().unwrap();
    let _ = limit(&pool, &Traits::new(), &HeaderMap::new());
    pool
}

pub(crate) fn limit(pool: &KeyPool, traits: &Traits, headers: &HeaderMap) -> Verdict {
    lease(pool, traits).answered(&ResponseHead::new(StatusCode::TOO_MANY_REQUESTS, headers))
}

/// One budget: a bucket of 1,000,000,000 requests, of which 1,000 are used and come back within a millisecond.
pub(crate) fn of_requests() -> HeaderMap {
    headers(&[
        ("content-type", "application/json"),
        ("x-ratelimit-limit-requests", "1000000000"),
        ("x-ratelimit-remaining-requests", "999999000"),
        ("x-ratelimit-reset-requests", "1ms"),
    ])
}

/// The same, and a budget of tokens. Without the organisation: all keys would be one quota group, of which each answer looks
/// at every member.
pub(crate) fn open_ai() -> HeaderMap {
    headers(&[
        ("content-type", "application/json"),
        ("openai-processing-ms", "341"),
        ("x-ratelimit-limit-requests", "1000000000"),
        ("x-ratelimit-limit-tokens", "200000000"),
        ("x-ratelimit-remaining-requests", "999999000"),
        ("x-ratelimit-remaining-tokens", "199998000"),
        ("x-ratelimit-reset-requests", "1ms"),
        ("x-ratelimit-reset-tokens", "17ms"),
    ])
}

pub(crate) fn anthropic() -> HeaderMap {
    headers(&[
        ("content-type", "application/json"),
        ("anthropic-ratelimit-requests-limit", "1000000000"),
        ("anthropic-ratelimit-requests-remaining", "900000000"),
        ("anthropic-ratelimit-requests-reset", "2026-11-23T20:41:02Z"),
        ("anthropic-ratelimit-input-tokens-limit", "400000000"),
        ("anthropic-ratelimit-input-tokens-remaining", "220000000"),
        ("anthropic-ratelimit-input-tokens-reset", "2026-11-23T20:41:27Z"),
        ("anthropic-ratelimit-output-tokens-limit", "80000000"),
        ("anthropic-ratelimit-output-tokens-remaining", "80000000"),
        ("anthropic-ratelimit-output-tokens-reset", "2026-11-23T20:41:00Z"),
        ("anthropic-ratelimit-tokens-limit", "480000000"),
        ("anthropic-ratelimit-tokens-remaining", "300000000"),
        ("anthropic-ratelimit-tokens-reset", "2026-11-23T20:41:23Z"),
    ])
}

fn headers(lines: &[(&'static str, &'static str)]) -> HeaderMap {
    let date = (DATE, HeaderValue::from_static("Mon, 23 Nov 2026 20:41:00 GMT"));
    let line = |(name, value): &(&'static str, &'static str)| {
        (http::HeaderName::from_static(name), HeaderValue::from_static(value))
    };
    [date].into_iter().chain(lines.iter().map(line)).collect()
}

/// Times picks, without their ends.
pub(crate) fn picks(pick: impl FnMut() -> KeyLease) -> impl FnMut(u64) -> Duration {
    in_batches(pick, drop, true)
}

/// Times the ends of picks, without the picks.
pub(crate) fn ends(pick: impl FnMut() -> KeyLease, end: impl FnMut(KeyLease)) -> impl FnMut(u64) -> Duration {
    in_batches(pick, end, false)
}

fn in_batches(
    mut pick: impl FnMut() -> KeyLease,
    mut end: impl FnMut(KeyLease),
    times_picks: bool,
) -> impl FnMut(u64) -> Duration {
    let mut held = Vec::with_capacity(HELD as usize);
    move |times| {
        let mut time = Duration::ZERO;
        let mut left = times;
        while left > 0 {
            let batch = left.min(HELD);
            let started = Instant::now();
            for _ in 0..batch {
                held.push(black_box(pick()));
            }
            let picked = Instant::now();
            for lease in held.drain(..) {
                end(lease);
            }
            time += if times_picks { picked - started } else { picked.elapsed() };
            left -= batch;
        }
        time
    }
}

/// A clock that moves only when it is told to. To read it takes as long as to read the machine's clock.
#[derive(Clone, Debug)]
pub(crate) struct VirtualClock {
    nanos: Arc<AtomicU64>,
    reads_real_time: bool,
}

impl VirtualClock {
    pub(crate) fn new() -> Self {
        Self { nanos: Arc::new(AtomicU64::new(1)), reads_real_time: true }
    }

    /// For simulations, of which nobody measures the real time.
    pub(crate) fn fast() -> Self {
        Self { reads_real_time: false, ..Self::new() }
    }

    pub(crate) fn advance(&self, nanos: u64) {
        self.nanos.store(self.nanos.load(Relaxed) + nanos, Relaxed);
    }
}

impl Clock for VirtualClock {
    fn now(&self) -> Duration {
        if self.reads_real_time {
            black_box(tokio::time::Instant::now());
        }
        Duration::from_nanos(self.nanos.load(Relaxed))
    }

    fn sleep_until(&self, _: Duration) -> Sleep {
        Box::pin(std::future::pending())
    }
}
