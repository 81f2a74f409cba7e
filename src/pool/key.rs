//! One key: what is sent for it, and what is known about it.

use std::sync::{
    Arc,
    atomic::{
        AtomicU16, AtomicU32, AtomicU64,
        Ordering::{Relaxed, SeqCst},
    },
};

use super::state::{AtomicState, State};
use crate::{
    inject::{Inject, Rendered, UnusableSecret},
    secret::{KeyId, Secret},
};

#[derive(Debug)]
pub(crate) struct Key {
    pub(crate) id: KeyId,
    pub(crate) credentials: Rendered,
    pub(crate) state: AtomicState,
    /// Where the newest snapshot holds it. A hint: the reader checks who is there.
    slot: AtomicU32,
    pub(crate) written: Written,
    pub(crate) counts: Counts,
}

impl Key {
    /// # Errors
    ///
    /// Where no request could carry the secret.
    pub(crate) fn new(
        id: KeyId,
        secret: &Secret,
        state: State,
        inject: &Inject,
    ) -> Result<Self, UnusableSecret> {
        Ok(Self {
            credentials: inject.render(secret)?,
            id,
            state: AtomicState::new(state),
            slot: AtomicU32::new(0),
            written: Written::default(),
            counts: Counts::default(),
        })
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
}

/// How much of what this process knows of a key has reached the store.
#[derive(Debug, Default)]
pub(crate) struct Written {
    changes: AtomicU64,
    acknowledged: AtomicU64,
    in_reload: AtomicU64,
    marked_at: AtomicU64,
}

impl Written {
    /// To be said before and after a change, so that a write that begins in between is not taken for one
    /// that carried it.
    pub(crate) fn changing(&self) {
        self.changes.fetch_add(1, SeqCst);
    }

    pub(crate) fn marked_at(&self) -> u64 {
        self.marked_at.load(Relaxed)
    }

    pub(crate) fn set_marked_at(&self, now: u64) {
        self.marked_at.fetch_max(now, Relaxed);
    }

    pub(crate) fn waits(&self) -> bool {
        self.acknowledged.load(SeqCst) != self.changes.load(SeqCst)
    }

    /// What an [`acknowledge`](Self::acknowledge) of a write that begins now has to name.
    pub(crate) fn changes(&self) -> u64 {
        self.changes.load(SeqCst)
    }

    /// The store has all up to `changes`; `reload` is the newest one that has begun to read.
    pub(crate) fn acknowledge(&self, changes: u64, reload: u64) {
        self.in_reload.fetch_max(reload, SeqCst);
        self.acknowledged.fetch_max(changes, SeqCst);
    }

    /// Whether all that this process knows was in the store before that reload began to read.
    pub(crate) fn was_read_by(&self, reload: u64) -> bool {
        !self.waits() && self.in_reload.load(SeqCst) < reload
    }
}

#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) requests: Count,
    pub(crate) limited: AtomicU64,
    pub(crate) recovered: AtomicU64,
    pub(crate) tokens: Count,
    /// The last HTTP status that spoke against the key; 0 for none.
    pub(crate) last_status: AtomicU16,
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

impl Counts {
    pub(crate) fn last_status(&self) -> Option<u16> {
        Some(self.last_status.load(Relaxed)).filter(|status| *status != 0)
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
}
