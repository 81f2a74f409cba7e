//! How many requests may be in flight with a key.

use std::num::NonZeroU32;

use crate::sync::atomic::{AtomicU32, Ordering::SeqCst};

/// The limit of a key, and how many requests count against it.
#[derive(Debug)]
pub(crate) struct Cap {
    most: NonZeroU32,
    in_flight: AtomicU32,
}

impl Cap {
    pub(crate) fn new(most: NonZeroU32) -> Self {
        Self { most, in_flight: AtomicU32::new(0) }
    }

    pub(crate) fn most(&self) -> NonZeroU32 {
        self.most
    }

    pub(crate) fn in_flight(&self) -> u32 {
        self.in_flight.load(SeqCst)
    }

    pub(crate) fn is_full(&self) -> bool {
        self.in_flight.load(SeqCst) >= self.most.get()
    }

    /// Counts a request in, if there is room for it.
    pub(crate) fn enter(&self) -> bool {
        // Not added first and taken back: others would find the key full.
        let next = |in_flight| (in_flight < self.most.get()).then_some(in_flight + 1);
        self.in_flight.fetch_update(SeqCst, SeqCst, next).is_ok()
    }

    /// Counts a request out. Returns whether there was no room until now.
    pub(crate) fn leave(&self) -> bool {
        self.in_flight.fetch_sub(1, SeqCst) == self.most.get()
    }
}

impl PartialEq for Cap {
    fn eq(&self, other: &Self) -> bool {
        self.most == other.most
    }
}

impl Eq for Cap {}
