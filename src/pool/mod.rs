//! The keys of one service and the state of each, shared by every clone.

mod bitset;
mod builder;
mod deadlines;
#[cfg(all(test, schedules = "loom"))]
mod every_schedule;
mod insert;
mod key;
mod marks;
#[cfg(feature = "metrics")]
mod metrics;
mod no_key;
mod operate;
mod persist;
#[cfg(all(test, schedules = "shuttle"))]
mod random_schedules;
mod reload;
mod snapshot;
mod stats;
mod usage;

use std::{
    fmt,
    sync::{Arc, PoisonError, Weak},
    time::Duration,
};

use arc_swap::ArcSwap;
use tokio::sync::Notify;

pub(crate) use self::key::Lease;
pub use self::{
    builder::{BuildError, KeyPoolBuilder},
    no_key::NoKeyAvailable,
    operate::OperateError,
    stats::{KeyStats, PoolStats},
};
use self::{
    key::{Key, UsableKey},
    persist::Persistence,
    snapshot::Snapshot,
};
use crate::{
    clock::Clock,
    key::hosts::Hosts,
    key::inject::Inject,
    key::{KeyId, Rejected},
    limit::{Cooldowns, NEVER, Rest, State, nanos},
    meter::Meter,
    store::Recovered,
    sync::{Mutex, atomic::Ordering::Relaxed},
};

/// The keys of one service, and what is known about each of them.
///
/// Cheap to clone; every clone is the same pool. Layers pick from it, and nothing else has to be told: a key
/// that rests is skipped, and is picked again from the moment its cooldown ends.
///
/// ```
/// use tower_key_rotation::KeyPool;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let pool = KeyPool::builder()
///     .key("alpha", "sk-1")
///     .key("beta", "sk-2")
///     .build()?;
///
/// assert_eq!(pool.stats().healthy, 2);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct KeyPool {
    inner: Arc<Inner>,
}

pub(crate) struct Inner {
    snapshot: ArcSwap<Snapshot>,
    editing: Mutex<()>,
    clock: Arc<dyn Clock>,
    inject: Inject,
    hosts: Hosts,
    cooldowns: Cooldowns,
    rejected: Vec<Rejected>,
    /// Wakes who waits for a key, where one comes back otherwise than by the end of its cooldown.
    returned: Notify,
    persistence: Persistence,
    meter: Arc<Meter>,
    /// How often keys were picked that are in the pool no more.
    #[cfg(feature = "metrics")]
    gone_picks: crate::sync::atomic::AtomicU64,
}

impl KeyPool {
    /// A pool to be given keys.
    pub fn builder() -> KeyPoolBuilder {
        KeyPoolBuilder::default()
    }

    fn new(
        keys: Vec<UsableKey>,
        rejected: Vec<Rejected>,
        config: builder::Config,
        persistence: Persistence,
    ) -> Self {
        let keys = |pool: &Weak<Inner>| keys.into_iter().map(|key| key.healthy_in(pool.clone())).collect();
        let inner = Arc::new_cyclic(|pool| Inner {
            snapshot: ArcSwap::from_pointee(Snapshot::new(keys(pool), None)),
            editing: Mutex::new(()),
            clock: config.clock,
            inject: config.inject,
            hosts: config.hosts,
            cooldowns: config.cooldowns,
            rejected,
            returned: Notify::new(),
            persistence,
            meter: config.meter,
            #[cfg(feature = "metrics")]
            gone_picks: Default::default(),
        });
        Self { inner }
    }

    /// What was given to the builder and could not be used: each entry names its place, never its secret.
    #[must_use]
    pub fn rejected(&self) -> &[Rejected] {
        &self.inner.rejected
    }

    /// The clock that all of the pool's times are read from.
    #[must_use]
    pub fn clock(&self) -> &Arc<dyn Clock> {
        &self.inner.clock
    }

    /// How long until a key can be picked: zero where one can be now, `None` where no key comes back by
    /// itself.
    ///
    /// ```
    /// use std::time::Duration;
    /// use tower_key_rotation::KeyPool;
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let pool = KeyPool::builder().key("alpha", "sk-1").build()?;
    /// assert_eq!(pool.next_return(), Some(Duration::ZERO));
    /// assert_eq!(KeyPool::builder().build()?.next_return(), None);
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn next_return(&self) -> Option<Duration> {
        if self.has_available() {
            return Some(Duration::ZERO);
        }
        self.time_until(self.inner.snapshot.load().earliest_for_certain())
    }

    /// How long until the next resting key is back, whether others are available or not.
    #[cfg(feature = "failover")]
    pub(crate) fn next_end_of_a_rest(&self) -> Option<Duration> {
        self.time_until(self.inner.snapshot.load().next_deadline())
    }

    fn time_until(&self, deadline: u64) -> Option<Duration> {
        (deadline != NEVER).then(|| Duration::from_nanos(deadline.saturating_sub(self.now())))
    }

    pub(crate) fn hosts(&self) -> &Hosts {
        &self.inner.hosts
    }

    pub(crate) fn meter(&self) -> &Meter {
        &self.inner.meter
    }

    pub(crate) fn len(&self) -> usize {
        self.inner.snapshot.load().keys().len()
    }

    /// The next key in turn.
    #[inline(always)]
    pub(crate) fn pick(&self) -> Option<Lease> {
        let lease = self.take_turn()?;
        lease.0.counts.requests.add(1);
        Some(lease)
    }

    /// The next key in turn that is none of these. They lose their turn.
    #[cfg(feature = "failover")]
    pub(crate) fn pick_besides(&self, tried: &[Lease]) -> Option<Lease> {
        // Each of them can be in the way once, and more often only where others pick at the same time.
        for _ in 0..=2 * tried.len() {
            let lease = self.take_turn()?;
            if !tried.contains(&lease) {
                lease.0.counts.requests.add(1);
                return Some(lease);
            }
        }
        None
    }

    #[inline(always)]
    fn take_turn(&self) -> Option<Lease> {
        let snapshot = self.inner.snapshot.load();
        loop {
            self.return_expired(&snapshot);
            if let Some(key) = snapshot.pick() {
                return Some(Lease(key.clone()));
            }
            if snapshot.earliest_for_certain() > self.now() {
                return None;
            }
        }
    }

    pub(crate) fn has_available(&self) -> bool {
        let snapshot = self.inner.snapshot.load();
        self.return_expired(&snapshot);
        snapshot.has_available()
    }

    #[cfg(feature = "failover")]
    pub(crate) fn count_available(&self) -> usize {
        self.inner.snapshot.load().count_available()
    }

    #[cfg(feature = "failover")]
    /// Completes when a key comes back otherwise than by the end of its cooldown, from now on.
    pub(crate) fn returned(&self) -> tokio::sync::futures::Notified<'_> {
        self.inner.returned.notified()
    }

    #[cold]
    pub(crate) fn no_key(&self) -> NoKeyAvailable {
        NoKeyAvailable { keys: self.len(), retry_in: self.next_return() }
    }

    /// Notes what a response said of the key that it was sent with.
    pub(crate) fn mark(&self, lease: &Lease, rest: Rest, hint: Option<Duration>, status: u16) {
        let key = &lease.0;
        let now = self.inner.clock.now();
        let cooldown = self.inner.cooldowns.how_long(rest, hint);
        let state = State::resting(rest, cooldown.map(|cooldown| now.saturating_add(cooldown)));

        key.counts.limited.fetch_add(1, Relaxed);
        key.set_last_status(status);
        let before = key.state.load();
        let rests_longer = before.later(state) != before;
        // What is known here may have been reset in the store since.
        let is_to_be_told = self.inner.persistence.store.is_some() && key.unwritten.lacks(state);
        if rests_longer || is_to_be_told {
            self.extend_rest(key, state, nanos(now));
        }
        if !rests_longer {
            return;
        }
        self.meter().marked(rest);
        let cooldown_ms = cooldown.map(|cooldown| cooldown.as_millis() as u64);
        if before == State::HEALTHY {
            tracing::info!(key = %key.id, cooldown_ms, reason = ?rest, http_status = status, "key rests");
        } else {
            tracing::debug!(key = %key.id, cooldown_ms, reason = ?rest, http_status = status, "key rests longer");
        }
    }

    fn extend_rest(&self, key: &Arc<Key>, state: State, now: u64) {
        key.unwritten.set_marked_at(now);
        let tell = || {
            if self.inner.persistence.store.is_some() {
                key.unwritten.extend(state);
            }
        };
        // Before the change, or a reload takes the state for one that the store had, and replaces it. And after it: the mark
        // may have been written and then reset in between, and the reset tells again what it finds in the state.
        tell();
        key.state.update(|before| before.later(state));
        tell();
        self.refresh(key);
        self.inner.persistence.mark_waits();
    }

    /// Credits tokens, or whatever else the service counts, to a key. An unknown id is ignored: the key may
    /// have been removed while its request was under way.
    ///
    /// Which key served a request is said by [`ServedBy`](crate::ServedBy).
    ///
    /// ```
    /// use tower_key_rotation::{KeyId, KeyPool};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let pool = KeyPool::builder().key("alpha", "sk-1").build()?;
    /// pool.record_usage(&KeyId::new("alpha")?, 1_200);
    /// assert_eq!(pool.stats().keys[0].tokens, 1_200);
    /// # Ok(())
    /// # }
    /// ```
    pub fn record_usage(&self, id: &KeyId, tokens: u64) {
        if let Some(key) = self.inner.snapshot.load().get(id.as_str()) {
            key.counts.tokens.add(tokens);
        }
    }

    /// How a key's secret may be shown to people who have to tell keys apart: an ellipsis and its last 4
    /// characters, or fewer, so that it is never more than a quarter of the secret. `None` where there is no
    /// such key.
    ///
    /// ```
    /// use tower_key_rotation::KeyPool;
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let pool = KeyPool::builder()
    ///     .key("alpha", "sk-proj-2f81c9d07b3e64a5")
    ///     .key("beta", "sk-2")
    ///     .build()?;
    /// assert_eq!(pool.masked_secret("alpha").as_deref(), Some("…64a5"));
    /// assert_eq!(pool.masked_secret("beta").as_deref(), Some("…2"));
    /// assert_eq!(pool.masked_secret("gamma"), None);
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn masked_secret(&self, id: impl AsRef<str>) -> Option<String> {
        self.inner.snapshot.load().get(id.as_ref()).map(|key| key.masked_secret())
    }

    fn now(&self) -> u64 {
        nanos(self.inner.clock.now())
    }

    #[inline]
    fn return_expired(&self, snapshot: &Snapshot) {
        // No clock is read while nothing is cooling.
        let earliest = snapshot.earliest();
        if earliest == NEVER {
            return;
        }
        let now = self.now();
        if earliest <= now {
            snapshot.return_expired(now, |key| self.has_returned(key, snapshot));
        }
    }

    /// Returns every key whose rest has ended, and says which.
    fn return_all_expired(&self, snapshot: &Snapshot, now: u64) -> Recovered {
        let (mut count, mut ids) = (0, Vec::new());
        for _ in 0..=snapshot.keys().len() {
            if snapshot.earliest() > now {
                break;
            }
            snapshot.return_expired(now, |key| {
                self.has_returned(key, snapshot);
                count += 1;
                if ids.len() <= Recovered::NAMED_AT_MOST {
                    ids.push(key.id.clone());
                }
            });
        }
        Recovered::new(count, ids)
    }

    /// Brings the indexes in line with the state of a key, in the snapshot that is in use when this returns.
    fn refresh(&self, key: &Arc<Key>) {
        loop {
            let snapshot = self.inner.snapshot.load();
            snapshot.refresh(key);
            if Arc::ptr_eq(&snapshot, &self.inner.snapshot.load()) {
                return;
            }
        }
    }

    fn has_returned(&self, key: &Arc<Key>, snapshot: &Snapshot) {
        key.counts.recovered.fetch_add(1, Relaxed);
        tracing::debug!(key = %key.id, "cooldown over");
        if !std::ptr::eq(snapshot, Arc::as_ptr(&self.inner.snapshot.load())) {
            self.refresh(key);
        }
    }

    /// Replaces the keys by what `next` makes of them, if anything. Keys that stay are the same objects, so
    /// that requests under way still mark them.
    fn edit(&self, next: impl FnOnce(&Snapshot) -> Option<Vec<Arc<Key>>>) {
        let _one_at_a_time = self.inner.editing.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.inner.snapshot.load_full();
        let Some(keys) = next(&before) else { return };
        let after = Arc::new(Snapshot::new(keys, Some(&before)));
        self.inner.snapshot.store(after.clone());
        // What changed while the snapshot was being built went into the indexes of the one before.
        after.refresh_all();
        self.inner.returned.notify_waiters();
    }
}

impl fmt::Debug for KeyPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyPool").field("keys", &self.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_secret_no_more_than_a_quarter_is_shown_and_no_more_than_4_characters() {
        let shown = |secret: &str| {
            let pool = KeyPool::builder().key("alpha", secret).build().unwrap();
            pool.masked_secret("alpha").unwrap()
        };
        assert_eq!(shown("abc"), "…");
        assert_eq!(shown("abcd"), "…d");
        assert_eq!(shown("abcdefg"), "…g");
        assert_eq!(shown("abcdefgh"), "…gh");
        assert_eq!(shown("abcdefghijklmno"), "…mno");
        assert_eq!(shown("abcdefghijklmnop"), "…mnop");
        assert_eq!(shown("abcdefghijklmnopqrstuvwxyz"), "…wxyz");
    }

    #[test]
    fn a_secret_is_masked_wherever_in_a_request_it_goes() {
        let reversed = Inject::custom(|secret, credentials| {
            let reversed: String = secret.chars().rev().collect();
            credentials.header(http::header::AUTHORIZATION, &reversed)
        });
        for inject in [Inject::bearer(), Inject::header("x-api-key"), Inject::query("key"), reversed] {
            let pool = KeyPool::builder().key("alpha", "abcdefghijklmnop").inject(inject).build().unwrap();
            assert_eq!(pool.masked_secret("alpha").as_deref(), Some("…mnop"));
            assert_eq!(pool.masked_secret("beta"), None);
        }
    }

    #[cfg(feature = "failover")]
    #[test]
    fn the_one_key_that_was_not_tried_is_found_behind_all_that_were() {
        let keys = ["alpha", "beta", "gamma", "delta"].map(|id| (id, format!("sk-{id}")));
        let pool = KeyPool::builder().keys(keys).build().unwrap();
        let turn: Vec<_> = std::iter::repeat_with(|| pool.pick().unwrap()).take(4).collect();
        let found = pool.pick_besides(&turn[..3]).unwrap();
        assert_eq!(found.id().as_str(), "delta");
        assert_eq!(pool.pick_besides(&turn), None);
    }
}
