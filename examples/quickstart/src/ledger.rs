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
//! - A pick that honours the rest has p >= m + rest, and since s <= m and p <= a, also a >= s + rest.
//!
//! So a request is a hit exactly if there is a 429 of its key with r <= k and a < s + rest. All four times are
//! read from one monotonic clock. With a real service, s is when the head of the 429 is here, and a when the
//! request leaves.
//!
//! With rotation alone the rest is the cooldown, and a rest that the service asked to be longer only makes the
//! judgement milder. In a paced pool it is the wait that the 429 itself names, or nothing where it names none.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tower_key_rotation::KeyId;

/// All 429s and all arrivals of a run. Times are counted from its start.
pub(crate) struct Ledger {
    start: Instant,
    rests: Rests,
    pages: Mutex<HashMap<KeyId, Page>>,
}

/// How long keys rest after a 429.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Rests {
    /// That long.
    For(Duration),
    /// For as long as the 429 asks.
    AsAsked,
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
    rest: Duration,
}

/// A request, as the service sees it.
struct Arrival {
    /// k: a moment before the key was picked.
    before_pick: Duration,
    /// a: when it arrived.
    arrived_at: Duration,
}

impl Ledger {
    pub(crate) fn start(rests: Rests) -> Self {
        Self { start: Instant::now(), rests, pages: Mutex::default() }
    }

    pub(crate) fn now(&self) -> Duration {
        self.start.elapsed()
    }

    pub(crate) fn limited(
        &self,
        key: &KeyId,
        answered_at: Duration,
        marked_by: Duration,
        asked: Option<Duration>,
    ) {
        let rest = match self.rests {
            Rests::For(cooldown) => cooldown,
            Rests::AsAsked => asked.unwrap_or_default(),
        };
        self.pages().entry(key.clone()).or_default().limits.push(Limit { answered_at, marked_by, rest });
    }

    pub(crate) fn arrived(&self, key: &KeyId, before_pick: Duration, arrived_at: Duration) {
        self.pages().entry(key.clone()).or_default().arrivals.push(Arrival { before_pick, arrived_at });
    }

    /// How many requests came on a key that should have rested.
    pub(crate) fn hits_while_resting(&self) -> usize {
        self.pages().values().map(Page::hits).sum()
    }

    fn pages(&self) -> MutexGuard<'_, HashMap<KeyId, Page>> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Page {
    fn hits(&self) -> usize {
        let binds = |limit: &Limit, arrival: &Arrival| {
            limit.marked_by <= arrival.before_pick
                && arrival.arrived_at < limit.answered_at.saturating_add(limit.rest)
        };
        self.arrivals.iter().filter(|arrival| self.limits.iter().any(|limit| binds(limit, arrival))).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COOLDOWN: Rests = Rests::For(Duration::from_secs(2));

    /// The hits of one 429, sent at 100 ms and known from 110 ms on, which asks for 50 ms, and one request on the
    /// same key.
    fn hits_with(rests: Rests, before_pick_ms: u64, arrived_at_ms: u64) -> usize {
        let (ledger, key) = (Ledger::start(rests), KeyId::new("a").unwrap());
        let millis = Duration::from_millis;
        ledger.limited(&key, millis(100), millis(110), Some(millis(50)));
        ledger.arrived(&key, millis(before_pick_ms), millis(arrived_at_ms));
        ledger.hits_while_resting()
    }

    fn hits(before_pick_ms: u64, arrived_at_ms: u64) -> usize {
        hits_with(COOLDOWN, before_pick_ms, arrived_at_ms)
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
    fn paced_keys_rest_for_as_long_as_asked() {
        let hits = |before_pick_ms, arrived_at_ms| hits_with(Rests::AsAsked, before_pick_ms, arrived_at_ms);
        assert_eq!([hits(120, 149), hits(120, 150), hits(109, 120)], [1, 0, 0]);
        let (ledger, key) = (Ledger::start(Rests::AsAsked), KeyId::new("a").unwrap());
        ledger.limited(&key, Duration::ZERO, Duration::ZERO, None);
        ledger.arrived(&key, Duration::ZERO, Duration::ZERO);
        assert_eq!(ledger.hits_while_resting(), 0);
    }

    #[test]
    fn each_request_counts_once_against_its_keys_429s() {
        let (ledger, [a, b]) = (Ledger::start(COOLDOWN), ["a", "b"].map(|id| KeyId::new(id).unwrap()));
        let millis = Duration::from_millis;
        ledger.limited(&a, millis(100), millis(110), None);
        ledger.limited(&a, millis(1_000), millis(1_010), None);
        ledger.arrived(&a, millis(1_500), millis(1_501));
        ledger.arrived(&a, millis(2_500), millis(2_501));
        ledger.arrived(&b, millis(1_500), millis(1_501));
        assert_eq!(ledger.hits_while_resting(), 2);
    }
}
