//! Between the pool and its store. Nothing here runs on the way of a request, but the flag that a mark waits.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use tokio::{
    sync::{Mutex, Notify},
    task::JoinSet,
};

use super::{KeyPool, key::Key, state::State};
use crate::store::{KeyRecord, KeyStore, Mark, Recovered, StoreError};

/// The most writes under way at once.
const WRITES_AT_ONCE: usize = 8;

/// A reload that finds a cooldown shorter than memory has it believes the store only where it differs by
/// more than this. The two never agree to the nanosecond: the store is read a little after it was written.
const NEGLIGIBLE: u64 = nanos_const(Duration::from_millis(100));

const fn nanos_const(duration: Duration) -> u64 {
    duration.as_nanos() as u64
}

pub(super) struct Persistence {
    pub(super) store: Arc<dyn KeyStore>,
    /// Held by whoever changes the set of keys or tells the store about it, so that a reload never applies
    /// what it read before somebody else's change.
    pub(super) turn: Mutex<()>,
    /// Held while marks are written: at most one write per key is under way.
    pub(super) writing: Mutex<()>,
    waiting: Notify,
    reloads: AtomicU64,
}

impl Persistence {
    pub(super) fn new(store: Arc<dyn KeyStore>) -> Self {
        Self {
            store,
            turn: Mutex::new(()),
            writing: Mutex::new(()),
            waiting: Notify::new(),
            reloads: AtomicU64::new(0),
        }
    }

    pub(super) fn mark_waits(&self) {
        self.waiting.notify_one();
    }
}

impl KeyPool {
    /// Brings the store's keys, and what it knows of them, into the pool: all of it or, on an error, nothing.
    ///
    /// A [`RecoveryHandle`](crate::RecoveryHandle) does this every 30 seconds.
    ///
    /// ```
    /// use tower_key_rotation::{KeyPool, store::MemoryStore};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let store = MemoryStore::new();
    /// let here = KeyPool::builder().open(store.clone()).await?;
    /// let there = KeyPool::builder().open(store).await?;
    ///
    /// there.insert("alpha", "sk-1").await?;
    /// here.reload().await?;
    /// assert_eq!(here.stats().healthy, 1);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// Where the store can't be read. The pool goes on with what it has.
    pub async fn reload(&self) -> Result<(), StoreError> {
        let persistence = &self.inner.persistence;
        let _turn = persistence.turn.lock().await;
        let reload = persistence.reloads.fetch_add(1, SeqCst) + 1;
        let records = persistence.store.load().await?;
        self.apply(records, reload);
        Ok(())
    }

    fn apply(&self, records: Vec<KeyRecord>, reload: u64) {
        let now = self.now();
        self.edit(|known| {
            // Keys that stay keep their place in the turn; new ones come behind them.
            let mut places: HashMap<&str, usize> =
                (0..).zip(known).map(|(place, key)| (key.id.as_str(), place)).collect();
            let mut keys = vec![None; known.len()];
            let mut kept = 0;
            for record in records {
                let state = record.state(now);
                let place = places.remove(record.id.as_str());
                let key = match place.map(|place| &known[place]) {
                    Some(key) if key.secret == record.secret => {
                        self.reconcile(key, state, reload);
                        kept += 1;
                        Ok(key.clone())
                    }
                    _ => Key::new(record.id.clone(), record.secret, state, &self.inner.inject).map(Arc::new),
                };
                match (key, place) {
                    (Ok(key), Some(place)) => keys[place] = Some(key),
                    (Ok(key), None) => keys.push(Some(key)),
                    (Err(error), _) => tracing::warn!(key = %record.id, %error, "key is not used"),
                }
            }
            let changed = kept != known.len() || keys.len() != known.len();
            changed.then(|| keys.into_iter().flatten().collect())
        });
    }

    /// Takes the store's word for a key: at once where it says "longer", and otherwise where the store
    /// already had this process's last mark when it was read.
    fn reconcile(&self, key: &Arc<Key>, stored: State, reload: u64) {
        let changed = key.state.update(|state| {
            if !key.written.was_read_by(reload) {
                // What an operator did is not overruled by a mark.
                state.later(stored).disabled(stored.is_disabled())
            } else if stored.is_disabled() == state.is_disabled()
                && (1..NEGLIGIBLE).contains(&stored.earlier_by(state))
            {
                state
            } else {
                stored
            }
        });
        if changed.is_some() {
            self.refresh(key);
            self.inner.returned.notify_waiters();
        }
    }

    /// Resets what has expired in the store.
    pub(crate) async fn sweep(&self) -> Result<Recovered, StoreError> {
        self.inner.persistence.store.recover().await
    }

    /// Completes once a mark waits to be written.
    pub(crate) async fn mark_waiting(&self) {
        self.inner.persistence.waiting.notified().await;
    }

    /// Wakes who writes marks once more: there are some left.
    pub(crate) fn keep_waiting(&self) {
        self.inner.persistence.mark_waits();
    }

    pub(crate) fn marks_waiting(&self) -> usize {
        self.inner.snapshot.load().count_unwritten()
    }

    /// Writes every mark that waits. What could not be written goes on waiting.
    pub(crate) async fn write_marks(&self) -> Result<(), StoreError> {
        let _writing = self.inner.persistence.writing.lock().await;
        let snapshot = self.inner.snapshot.load_full();
        let mut writes = JoinSet::new();
        let mut result = Ok(());
        let mut from = 0;
        while let Some((slot, key)) = snapshot.take_unwritten(from) {
            from = slot + 1;
            if writes.len() == WRITES_AT_ONCE {
                result = result.and(finished(writes.join_next().await));
            }
            writes.spawn(self.clone().write_mark(key.clone()));
        }
        while let Some(write) = writes.join_next().await {
            result = result.and(finished(Some(write)));
        }
        result
    }

    async fn write_mark(self, key: Arc<Key>) -> Result<(), StoreError> {
        if !key.written.waits() {
            return Ok(());
        }
        let persistence = &self.inner.persistence;
        let changes = key.written.changes();
        let now = self.now();
        // A key that doesn't rest any more has nothing to say: its cooldown ended before it was written.
        if let Some((rest, left)) = key.state.load().rest(now) {
            let mark = Mark {
                id: key.id.clone(),
                secret: key.secret.clone(),
                rest,
                left,
                age: Duration::from_nanos(now.saturating_sub(key.written.marked_at())),
                http_status: key.counts.last_status(),
            };
            let returns = PutBack { pool: &self, key: &key };
            persistence.store.write(mark).await?;
            std::mem::forget(returns);
        }
        key.written.acknowledge(changes, persistence.reloads.load(SeqCst));
        Ok(())
    }
}

/// Marks a key as unwritten again, unless it is forgotten: the write failed, panicked or was dropped.
struct PutBack<'a> {
    pool: &'a KeyPool,
    key: &'a Arc<Key>,
}

impl Drop for PutBack<'_> {
    fn drop(&mut self) {
        self.pool.refresh(self.key);
    }
}

fn finished(write: Option<Result<Result<(), StoreError>, tokio::task::JoinError>>) -> Result<(), StoreError> {
    match write {
        None => Ok(()),
        Some(Ok(result)) => result,
        // What a panic says might hold anything.
        Some(Err(_)) => Err(StoreError::new("a write panicked")),
    }
}

impl KeyRecord {
    fn state(&self, now: u64) -> State {
        let resting = match self.rest {
            None => State::HEALTHY,
            Some((_, Some(left))) if left.is_zero() => State::HEALTHY,
            Some((rest, left)) => {
                State::resting(rest, left.map(|left| Duration::from_nanos(now).saturating_add(left)))
            }
        };
        resting.disabled(self.disabled)
    }
}
