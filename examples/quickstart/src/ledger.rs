//! Whether the service saw a request on a key that was resting: judged by cause, without a margin.
//!
//! A request that was under way when its key's 429 came is no offence, however late it arrives. What counts
//! is what was known when its key was picked. For a 429 and a request on the same key:
//!
//! ```text
//! service   s: it answers 429                                                   a: the request arrives
//! client        m: the layer marks the key   r: noted here   k: noted here   p: the layer picks the key
//! ```
//!
//! - Where r <= k, the mark was made before the pick began, and binds it. Otherwise the request was under way.
//! - A pick that honours the rest has p >= m + cooldown, and since s <= m and p <= a, also a >= s + cooldown.
//!
//! So a request is a hit exactly if there is a 429 of its key with r <= k and a < s + cooldown. All four times
//! are read from one monotonic clock, and a rest that the service asked to be longer only makes the judgement
//! milder. With a real service, s is when the head of the 429 is here, and a when the request leaves.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tower_key_rotation::KeyId;

/// All 429s and all arrivals of a run. Times are counted from its start.
pub(crate) struct Ledger {
    start: Instant,
    pages: Mutex<HashMap<KeyId, Page>>,
}

/// What happened to one key.
#[derive(Default)]
struct Page {
    limits: Vec<Limit>,
    arrivals: Vec<Arrival>,
}

/// A 429.
struct Limit {
    /// s: when the service answered.
    answered_at: Duration,
    /// r: from when on it is certain that the layer had marked the key.
    marked_by: Duration,
}

/// A request, as the service sees it.
struct Arrival {
    /// k: a moment before the key was picked.
    before_pick: Duration,
    /// a: when it arrived.
    arrived_at: Duration,
}

impl Ledger {
    pub(crate) fn start() -> Self {
        Self { start: Instant::now(), pages: Mutex::default() }
    }

    pub(crate) fn now(&self) -> Duration {
        self.start.elapsed()
    }

    pub(crate) fn limited(&self, key: &KeyId, answered_at: Duration, marked_by: Duration) {
        self.pages().entry(key.clone()).or_default().limits.push(Limit { answered_at, marked_by });
    }

    pub(crate) fn arrived(&self, key: &KeyId, before_pick: Duration, arrived_at: Duration) {
        self.pages().entry(key.clone()).or_default().arrivals.push(Arrival { before_pick, arrived_at });
    }

    /// How many requests came on a key that should have rested.
    pub(crate) fn hits_while_resting(&self, cooldown: Duration) -> usize {
        self.pages().values().map(|page| page.hits(cooldown)).sum()
    }

    fn pages(&self) -> MutexGuard<'_, HashMap<KeyId, Page>> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Page {
    fn hits(&self, cooldown: Duration) -> usize {
        let binds = |limit: &Limit, arrival: &Arrival| {
            limit.marked_by <= arrival.before_pick
                && arrival.arrived_at < limit.answered_at.saturating_add(cooldown)
        };
        self.arrivals.iter().filter(|arrival| self.limits.iter().any(|limit| binds(limit, arrival))).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COOLDOWN: Duration = Duration::from_secs(2);

    /// The hits of one 429, sent at 100 ms and known from 110 ms on, and one request on the same key.
    fn hits(before_pick_ms: u64, arrived_at_ms: u64) -> usize {
        let (ledger, key) = (Ledger::start(), KeyId::new("a").unwrap());
        let millis = Duration::from_millis;
        ledger.limited(&key, millis(100), millis(110));
        ledger.arrived(&key, millis(before_pick_ms), millis(arrived_at_ms));
        ledger.hits_while_resting(COOLDOWN)
    }

    #[test]
    fn picks_during_a_cooldown_count_as_hits() {
        assert_eq!(hits(110, 111), 1);
        assert_eq!(hits(2_000, 2_099), 1);
        assert_eq!(hits(2_000, 2_100), 0);
    }

    #[test]
    fn in_flight_requests_never_count_as_hits() {
        assert_eq!(hits(50, 60), 0);
        assert_eq!(hits(109, 1_500), 0);
    }

    #[test]
    fn each_request_counts_once_against_its_keys_429s() {
        let (ledger, [a, b]) = (Ledger::start(), ["a", "b"].map(|id| KeyId::new(id).unwrap()));
        let millis = Duration::from_millis;
        ledger.limited(&a, millis(100), millis(110));
        ledger.limited(&a, millis(1_000), millis(1_010));
        ledger.arrived(&a, millis(1_500), millis(1_501));
        ledger.arrived(&a, millis(2_500), millis(2_501));
        ledger.arrived(&b, millis(1_500), millis(1_501));
        assert_eq!(ledger.hits_while_resting(COOLDOWN), 2);
    }
}
