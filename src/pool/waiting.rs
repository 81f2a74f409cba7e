//! The queue of the requests of one scope that wait for a key.
//!
//! The first of them sleeps until the next key has room, and no other one watches the pool. The locks are fair, so requests
//! go in the order in which they came, and a request that is dropped leaves its place. A refused request goes before all
//! that have not been sent yet.

use std::sync::atomic::{
    AtomicU64, AtomicUsize,
    Ordering::{Relaxed, SeqCst},
};

use tokio::sync::{Mutex, MutexGuard, Notify, futures::Notified};

#[derive(Debug, Default)]
pub(crate) struct Waiting {
    line: Mutex<()>,
    /// Taken by the first of the line, and by refused requests: each waits behind one request of the line at most.
    front: Mutex<()>,
    /// Requests in the queue.
    queued: AtomicUsize,
    /// Requests that wait, those included that wait beside the queue.
    count: AtomicUsize,
    /// When the first request of the line joined it, in ns.
    first_since: AtomicU64,
    changed: Notify,
}

/// A place in the queue, or beside it.
pub(crate) struct Place<'a> {
    waiting: &'a Waiting,
    is_beside: bool,
    since: u64,
}

/// The first place.
pub(crate) struct First<'a> {
    _line: Option<MutexGuard<'a, ()>>,
    _front: MutexGuard<'a, ()>,
}

impl Waiting {
    /// Whether a new request has to queue.
    #[inline]
    pub(crate) fn has_any(&self) -> bool {
        self.queued() > 0
    }

    /// The number of requests in the queue.
    pub(crate) fn queued(&self) -> usize {
        self.queued.load(SeqCst)
    }

    /// How many requests wait, those included that wait beside the queue.
    pub(crate) fn count(&self) -> usize {
        self.count.load(SeqCst)
    }

    /// For how long the first request has been waiting, in ns.
    pub(crate) fn oldest(&self, now: u64) -> u64 {
        if self.has_any() { now.saturating_sub(self.first_since.load(Relaxed)) } else { 0 }
    }

    /// Joins the queue, or those beside it, unless that many wait already.
    pub(crate) fn join(&self, most: usize, beside: bool, now: u64) -> Option<Place<'_>> {
        let joined = self.count.fetch_update(SeqCst, SeqCst, |count| (count < most).then_some(count + 1));
        joined.ok()?;
        self.queued.fetch_add(usize::from(!beside), SeqCst);
        Some(Place { waiting: self, is_beside: beside, since: now })
    }

    /// Something may have room earlier than the first request knows.
    pub(crate) fn look_again(&self) {
        if self.count.load(SeqCst) > 0 {
            self.changed.notify_waiters();
        }
    }

    /// Completes after a [`look_again`](Self::look_again) since this call.
    pub(crate) fn changed(&self) -> Notified<'_> {
        self.changed.notified()
    }
}

impl<'a> Place<'a> {
    /// Waits for the turn.
    pub(crate) async fn first(&self, was_refused: bool) -> First<'a> {
        let line = if was_refused { None } else { Some(self.waiting.line.lock().await) };
        if line.is_some() {
            self.waiting.first_since.store(self.since, Relaxed);
        }
        First { _line: line, _front: self.waiting.front.lock().await }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.waiting.queued.fetch_sub(usize::from(!self.is_beside), SeqCst);
        self.waiting.count.fetch_sub(1, SeqCst);
    }
}
