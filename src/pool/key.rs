//! One key: what is sent for it, and what is known about it.

use std::sync::{Arc, Weak};

use super::{Inner, KeyPool};
use crate::{
    key::inject::{Inject, Rendered, UnusableSecret},
    key::{KeyId, Secret},
    limit::{AtomicState, State},
    sync::atomic::{
        AtomicU16, AtomicU32, AtomicU64,
        Ordering::{Relaxed, SeqCst},
    },
};

/// A name, and what requests carry for it.
#[derive(Debug)]
pub(crate) struct UsableKey {
    pub(crate) id: KeyId,
    credentials: Rendered,
}

impl UsableKey {
    /// # Errors
    ///
    /// Where no request could carry the secret.
    pub(crate) fn new(id: KeyId, secret: &Secret, inject: &Inject) -> Result<Self, UnusableSecret> {
        Ok(Self { id, credentials: inject.render(secret)? })
    }

    pub(crate) fn secret(&self) -> Secret {
        self.credentials.secret()
    }

    /// It is to be one of that pool's.
    pub(crate) fn healthy_in(self, pool: Weak<Inner>) -> Arc<Key> {
        self.with_state(State::HEALTHY, pool)
    }

    pub(crate) fn with_state(self, state: State, pool: Weak<Inner>) -> Arc<Key> {
        Arc::new(Key {
            state: AtomicState::new(state),
            counts: Counts::default(),
            last_status: AtomicU16::new(0),
            slot: AtomicU32::new(0),
            unwritten: Unwritten::default(),
            resets: AtomicU32::new(0),
            switches: AtomicU32::new(0),
            pool,
            id: self.id,
            credentials: self.credentials,
        })
    }
}

/// Each request writes to it, and reads other parts of it: what is written stands together, so that processors pass
/// as few cache lines to each other as may be, and what is read stands behind that, so that few have to be fetched.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Key {
    pub(crate) state: AtomicState,
    pub(crate) counts: Counts,
    pub(crate) credentials: Rendered,
    /// The last HTTP status that spoke against the key; 0 for none.
    last_status: AtomicU16,
    /// Where the newest snapshot holds it. A hint: the reader checks who is there.
    slot: AtomicU32,
    pub(crate) unwritten: Unwritten,
    /// How many of an operator's changes to it are on their way to the store: resets, and disables and enables.
    resets: AtomicU32,
    switches: AtomicU32,
    /// A request under way holds no more than its key, and marks it through this.
    pool: Weak<Inner>,
    pub(crate) id: KeyId,
}

impl Key {
    /// The same under another id, with all that is known of it.
    pub(crate) fn renamed(&self, id: KeyId) -> Arc<Self> {
        let same = UsableKey { id, credentials: self.credentials.clone() };
        let same = same.with_state(self.state.load(), self.pool.clone());
        same.set_last_status(self.last_status.load(Relaxed));
        same.counts.take_over(&self.counts);
        same.unwritten.extend(self.unwritten.rest());
        same.unwritten.set_marked_at(self.unwritten.marked_at());
        same
    }

    /// Until the guard is dropped, what the store says of the key's rest may be old.
    pub(crate) fn reset_on_its_way(self: Arc<Self>) -> OnItsWay {
        OnItsWay::of(self, |key| &key.resets)
    }

    /// Until the guard is dropped, what the store says of the key being disabled may be old.
    pub(crate) fn switch_on_its_way(self: Arc<Self>) -> OnItsWay {
        OnItsWay::of(self, |key| &key.switches)
    }

    pub(crate) fn is_being_reset(&self) -> bool {
        self.resets.load(SeqCst) != 0
    }

    pub(crate) fn is_being_switched(&self) -> bool {
        self.switches.load(SeqCst) != 0
    }

    pub(crate) fn slot(&self) -> usize {
        self.slot.load(Relaxed) as usize
    }

    pub(crate) fn set_slot(&self, slot: usize) {
        self.slot.store(slot as u32, Relaxed);
    }

    pub(crate) fn secret(&self) -> Secret {
        self.credentials.secret()
    }

    /// An ellipsis and the end of the secret: see [`KeyPool::masked_secret`].
    pub(crate) fn masked_secret(&self) -> String {
        let secret = self.secret();
        // ASCII, or it would not have been loaded: a byte is a character.
        let secret = secret.expose();
        let shown = (secret.len() / 4).min(4);
        format!("…{}", secret.get(secret.len() - shown..).unwrap_or(""))
    }

    pub(crate) fn last_status(&self) -> Option<u16> {
        Some(self.last_status.load(Relaxed)).filter(|status| *status != 0)
    }

    pub(crate) fn set_last_status(&self, status: u16) {
        self.last_status.store(status, Relaxed);
    }
}

/// An operator's change that the store does not have yet.
pub(crate) struct OnItsWay {
    key: Arc<Key>,
    count: fn(&Key) -> &AtomicU32,
}

impl OnItsWay {
    fn of(key: Arc<Key>, count: fn(&Key) -> &AtomicU32) -> Self {
        count(&key).fetch_add(1, SeqCst);
        Self { key, count }
    }
}

impl Drop for OnItsWay {
    fn drop(&mut self) {
        (self.count)(&self.key).fetch_sub(1, SeqCst);
    }
}

/// What responses said of a key that the store is still to be told.
///
/// The key itself may rest longer, by what was read from the store or told to it before. That is not told again: it may
/// have been reset there meanwhile.
#[derive(Debug, Default)]
pub(crate) struct Unwritten {
    /// Healthy where nothing waits.
    rest: AtomicState,
    marked_at: AtomicU64,
    /// The newest reload that had begun to read when the store was last told something.
    reload_when_told: AtomicU64,
}

impl Unwritten {
    pub(crate) fn rest(&self) -> State {
        self.rest.load()
    }

    pub(crate) fn waits(&self) -> bool {
        self.rest() != State::HEALTHY
    }

    /// Whether that rest is longer than what waits.
    pub(crate) fn lacks(&self, rest: State) -> bool {
        let waiting = self.rest();
        waiting.later(rest) != waiting
    }

    /// Returns what waits then.
    pub(crate) fn extend(&self, rest: State) -> State {
        self.rest.extend(rest.disabled(false))
    }

    pub(crate) fn update(&self, next: impl Fn(State) -> State) {
        self.rest.update(next);
    }

    pub(crate) fn marked_at(&self) -> u64 {
        self.marked_at.load(Relaxed)
    }

    pub(crate) fn set_marked_at(&self, now: u64) {
        self.marked_at.fetch_max(now, Relaxed);
    }

    /// The store has that one; `reload` is the newest that has begun to read.
    pub(crate) fn acknowledge(&self, written: State, reload: u64) {
        self.reload_when_told.fetch_max(reload, SeqCst);
        self.rest.update(|waiting| if waiting == written { State::HEALTHY } else { waiting });
    }

    /// Whether the store had all that it is to be told before that reload began to read.
    pub(crate) fn was_read_by(&self, reload: u64) -> bool {
        !self.waits() && self.reload_when_told.load(SeqCst) < reload
    }
}

#[derive(Debug, Default)]
#[repr(C)]
pub(crate) struct Counts {
    pub(crate) requests: Count,
    pub(crate) limited: AtomicU64,
    pub(crate) recovered: AtomicU64,
    pub(crate) tokens: Count,
}

impl Counts {
    fn take_over(&self, other: &Self) {
        self.requests.add(other.requests.take());
        self.tokens.add(other.tokens.take());
        self.limited.store(other.limited.load(Relaxed), Relaxed);
        self.recovered.store(other.recovered.load(Relaxed), Relaxed);
    }
}

/// A sum that only grows, and how much of it has been taken for the store.
#[derive(Debug, Default)]
pub(crate) struct Count {
    sum: AtomicU64,
    taken: AtomicU64,
}

impl Count {
    #[inline]
    pub(crate) fn add(&self, more: u64) {
        self.sum.fetch_add(more, Relaxed);
    }

    pub(crate) fn sum(&self) -> u64 {
        self.sum.load(Relaxed)
    }

    /// What has been added since this was called before.
    pub(crate) fn take(&self) -> u64 {
        let sum = self.sum();
        sum.wrapping_sub(self.taken.swap(sum, Relaxed))
    }
}

/// The key that one request goes out with.
#[derive(Clone, Debug)]
pub(crate) struct Lease(pub(crate) Arc<Key>);

impl PartialEq for Lease {
    /// The same key with the same secret.
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Lease {
    pub(crate) fn id(&self) -> &KeyId {
        &self.0.id
    }

    pub(crate) fn credentials(&self) -> &Rendered {
        &self.0.credentials
    }

    /// None where the pool is gone, and with it whoever would want to know of a mark.
    pub(crate) fn pool(&self) -> Option<KeyPool> {
        self.0.pool.upgrade().map(|inner| KeyPool { inner })
    }
}
