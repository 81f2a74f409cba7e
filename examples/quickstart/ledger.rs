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
