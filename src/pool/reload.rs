//! From the store into the pool.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, PoisonError},
    time::Duration,
};

use tokio::{runtime::Handle, sync::OwnedMutexGuard};

use super::{
    KeyPool,
    key::{Key, UsableKey},
    snapshot::Snapshot,
};
use crate::{
    key::KeyId,
    limit::{State, nanos},
    store::{Changed, KeyRecord, Loaded, StoreError, Unreadable},
    sync::Mutex,
};

/// A reload that finds a cooldown shorter than memory has it believes the store only where it differs by
/// more than this. The two never agree to the nanosecond: the store is read a little after it was written.
const NEGLIGIBLE: Duration = Duration::from_millis(100);

/// That many keys take about a millisecond to apply.
const MANY: usize = 1_000;

/// What was read, and when.
struct Reading {
    loaded: Loaded,
    /// The keys that were asked for, where it was not all.
    only: Option<Vec<KeyId>>,
    number: u64,
}

impl KeyPool {
    /// Brings the store's keys, and what it knows of them, into the pool: all of it or, on an error, nothing.
    ///
    /// A [`RecoveryHandle`](crate::RecoveryHandle) does this every 30 seconds, and where the store says that
    /// something has changed. A pool that was built without a store has nothing to load.
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
        self.load(None).await
    }

    /// Brings in what has changed.
    pub(crate) async fn follow(&self, changed: Changed) -> Result<(), StoreError> {
        match changed {
            Changed::Keys(ids) => self.load(Some(ids)).await,
            Changed::Anything => self.load(None).await,
        }
    }

    async fn load(&self, only: Option<Vec<KeyId>>) -> Result<(), StoreError> {
        let persistence = &self.inner.persistence;
        let Some(store) = &persistence.store else { return Ok(()) };
        let turn = persistence.turn.clone().lock_owned().await;
        self.plant_seeds_in_turn().await?;
        let number = persistence.begin_reload();
        let loaded = match &only {
            Some(ids) => store.load_some(ids).await?,
            None => store.load().await?,
        };
        self.clone().apply_aside(turn, Reading { loaded, only, number }).await?;
        persistence.opened();
        Ok(())
    }

    /// Applies many keys beside the runtime's own threads, which have no time for as long as it takes.
    async fn apply_aside(self, turn: OwnedMutexGuard<()>, reading: Reading) -> Result<(), StoreError> {
        let many = reading.loaded.records.len() >= MANY;
        let apply = move || {
            let _turn = turn;
            self.apply(reading);
        };
        match Handle::try_current() {
            Ok(runtime) if many => {
                let applied = runtime.spawn_blocking(apply).await;
                applied.map_err(|_| StoreError::new("the reload was broken off"))
            }
            _ => {
                apply();
                Ok(())
            }
        }
    }

    fn apply(&self, reading: Reading) {
        let now = self.now();
        let Reading { loaded, only, number } = reading;
        let mut unreadable = loaded.unreadable;
        let mut gone: Vec<Arc<Key>> = Vec::new();
        self.edit(|before| {
            let leaving = self.inner.persistence.leaving();
            let mut changes = Changes::default();
            for record in loaded.records {
                let slot = before.slot(&record.id);
                let known = slot.map(|slot| &before.keys()[slot]);
                if !changes.found.insert(record.id.clone()) {
                    continue;
                }
                if known.is_none() && leaving.contains(&record.id) {
                    continue;
                }
                let state = record.state(now);
                if let Some(key) = known.filter(|key| key.credentials.is_of(&record.secret)) {
                    self.reconcile(key, state, number, now);
                    continue;
                }
                match UsableKey::new(record.id.clone(), &record.secret, &self.inner.inject) {
                    Ok(key) => {
                        let key = key.with_state(state, Arc::downgrade(&self.inner));
                        changes.put(slot, Some(key));
                    }
                    Err(reason) => {
                        unreadable.push(Unreadable::new(record.id.as_str(), reason.to_string()));
                        changes.put(slot, None);
                    }
                }
            }
            changes.take_out_the_others(before, only.as_deref());
            gone = changes.replaced.keys().map(|slot| before.keys()[*slot].clone()).collect();
            self.inner.persistence.predecessors().add(gone.clone());
            changes.applied_to(before)
        });
        // Not before they are gone, or a scrape would count their picks twice.
        gone.iter().for_each(|key| self.count_out(key));
        self.inner.persistence.complaints.update(only.as_deref(), unreadable);
    }

    /// Takes the store's word for a key: at once where it says "longer", and otherwise where the store
    /// already had this process's last mark when it was read.
    fn reconcile(&self, key: &Arc<Key>, stored: State, reload: u64, now: u64) {
        let changed = key.state.update(|state| {
            let stored = if key.is_being_switched() { stored.disabled(state.is_disabled()) } else { stored };
            if key.is_being_reset() {
                // It may be what the reset is about to end.
                state.disabled(stored.is_disabled())
            } else if !key.unwritten.was_read_by(reload) {
                // What an operator did is not overruled by a mark.
                state.later(stored).disabled(stored.is_disabled())
            } else if stored.is_disabled() == state.is_disabled()
                && (1..nanos(NEGLIGIBLE)).contains(&stored.earlier_by(state))
            {
                state
            } else {
                stored
            }
        });
        if changed.is_some() {
            // A mark that comes just now, for less than what was known, has left no trace in the state.
            let waiting = key.unwritten.extend(State::HEALTHY);
            key.state.update(|state| if waiting.is_over(now) { state } else { state.later(waiting) });
            self.refresh(key);
            self.inner.returned.notify_waiters();
        }
    }
}

/// What a reading makes of the set of keys.
#[derive(Default)]
struct Changes {
    found: HashSet<KeyId>,
    /// By place: another key, or none.
    replaced: HashMap<usize, Option<Arc<Key>>>,
    added: Vec<Arc<Key>>,
}

impl Changes {
    fn put(&mut self, slot: Option<usize>, key: Option<Arc<Key>>) {
        match slot {
            Some(slot) => _ = self.replaced.insert(slot, key),
            None => self.added.extend(key),
        }
    }

    fn take_out_the_others(&mut self, before: &Snapshot, only: Option<&[KeyId]>) {
        match only {
            Some(ids) => {
                let gone = ids.iter().filter(|id| !self.found.contains(*id));
                self.replaced.extend(gone.filter_map(|id| before.slot(id)).map(|slot| (slot, None)));
            }
            None => {
                let slots = before.keys().iter().enumerate();
                let gone = slots.filter(|(_, key)| !self.found.contains(&key.id));
                self.replaced.extend(gone.map(|(slot, _)| (slot, None)));
            }
        }
    }

    /// Keys that stay keep their place in the turn; new ones come behind them.
    fn applied_to(mut self, before: &Snapshot) -> Option<Vec<Arc<Key>>> {
        if self.replaced.is_empty() && self.added.is_empty() {
            return None;
        }
        let places = before.keys().iter().enumerate();
        let stay = places.filter_map(|(slot, key)| match self.replaced.remove(&slot) {
            Some(other) => other,
            None => Some(key.clone()),
        });
        let mut keys: Vec<_> = stay.collect();
        keys.extend(self.added);
        Some(keys)
    }
}

/// What the store holds that can't be used as a key, and how often: ids may look alike. It is told once, and not
/// at every reload.
#[derive(Debug, Default)]
pub(super) struct Complaints(Mutex<BTreeMap<(String, String), usize>>);

impl Complaints {
    fn update(&self, only: Option<&[KeyId]>, unreadable: Vec<Unreadable>) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut found = BTreeMap::new();
        for Unreadable { id, reason } in unreadable {
            *found.entry((id, reason)).or_default() += 1;
        }
        for ((id, reason), count) in &found {
            for _ in known.get(&(id.clone(), reason.clone())).copied().unwrap_or_default()..*count {
                tracing::warn!(key = %id, %reason, "not used as a key");
            }
        }
        match only {
            None => *known = found,
            Some(ids) => {
                known.retain(|(id, _), _| ids.iter().all(|read| read.as_str() != id));
                known.extend(found);
            }
        }
    }

    pub(super) fn count(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).values().sum()
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
