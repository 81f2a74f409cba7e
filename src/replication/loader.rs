//! From the store into the pool.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use tokio::{runtime::Handle, sync::OwnedMutexGuard};

use super::{
    link::{Link, Seeds},
    seeds,
};
use crate::{
    key::{KeyId, KeySpec},
    meter::Counted,
    pool::{Key, Snapshot, UsableKey},
    store::{KeyRecord, Loaded, Standing, StoreError, Unreadable},
    sync::atomic::Ordering::SeqCst,
};

/// That many keys take about a millisecond to apply.
const MANY: usize = 1_000;

/// The right to change the set of keys, in the store and here. No load is applied that was read before a change made with
/// it.
pub(crate) type Turn = OwnedMutexGuard<Seeds>;

impl Link {
    pub(crate) fn is_open(&self) -> bool {
        self.open.load(SeqCst)
    }

    pub(crate) fn unreadable(&self) -> usize {
        self.complaints.count()
    }

    /// Waits for the turn, and reads the store if that has not been done yet.
    pub(crate) async fn turn(self: &Arc<Self>) -> Result<Turn, StoreError> {
        let turn = self.turn.clone().lock_owned().await;
        if self.is_open() { Ok(turn) } else { self.load_in(turn, None).await }
    }

    /// Reads the store if that has not been done yet.
    pub(crate) async fn open(self: &Arc<Self>) -> Result<(), StoreError> {
        if self.is_open() { Ok(()) } else { self.turn().await.map(drop) }
    }

    /// Loads all keys, or these alone.
    pub(crate) async fn load(self: &Arc<Self>, only: Option<Vec<KeyId>>) -> Result<(), StoreError> {
        let turn = self.turn.clone().lock_owned().await;
        self.load_in(turn, only).await.map(drop)
    }

    pub(crate) async fn load_in(
        self: &Arc<Self>,
        mut turn: Turn,
        only: Option<Vec<KeyId>>,
    ) -> Result<Turn, StoreError> {
        let only = only.filter(|_| self.is_open());
        let loading = async {
            seeds::plant(&mut turn, &*self.store, &self.engine).await?;
            if !self.is_open()
                && self.engine.has_windows()
                && let Some(kept) = self.store.quotas().await?
            {
                self.engine.restore_windows(&kept);
            }
            self.store.load(only.as_deref()).await
        };
        let loaded = loading.await.inspect_err(|_| self.engine.store_failed(Counted::Load))?;
        let (link, many) = (self.clone(), loaded.records.len() >= MANY);
        let apply = move || {
            link.apply(loaded, only.as_deref());
            turn
        };
        let turn = match Handle::try_current() {
            // On another thread: many keys would keep this one from requests.
            Ok(runtime) if many => {
                let applied = runtime.spawn_blocking(apply).await;
                applied.map_err(|_| StoreError::new("the load was interrupted"))?
            }
            _ => apply(),
        };
        self.open.store(true, SeqCst);
        Ok(turn)
    }

    fn apply(&self, loaded: Loaded, only: Option<&[KeyId]>) {
        let mut unreadable = loaded.unreadable;
        let (mut gone, mut new) = (Vec::new(), Vec::new());
        self.engine.edit(|before| {
            let expiring = self.engine.expiring();
            let mut changes = Changes::default();
            for KeyRecord { mut spec, standing } in loaded.records {
                match expiring.get(&spec.id) {
                    Some(Some(secret)) => spec.secret = secret.clone(),
                    Some(None) => continue,
                    None => {}
                }
                if !changes.found.insert(spec.id.clone()) {
                    continue;
                }
                let slot = before.slot(&spec.id);
                let known = slot.map(|slot| &before.keys()[slot]).filter(|_| spec.unsupported().is_none());
                if let Some(key) = known.filter(|key| key.is(&spec, standing.born)) {
                    self.engine.apply(key, &standing);
                    continue;
                }
                match self.new_key(&spec, &standing) {
                    Ok(key) => {
                        new.push((key.clone(), standing));
                        changes.put(slot, Some(key));
                    }
                    Err(reason) => {
                        unreadable.push(Unreadable::new(spec.id.as_str(), reason));
                        changes.put(slot, None);
                    }
                }
            }
            changes.take_out_the_others(before, only);
            gone = changes.replaced.keys().map(|slot| before.keys()[*slot].clone()).collect();
            changes.applied_to(before)
        });
        // The rests of scopes are kept for keys of the pool alone.
        new.iter().for_each(|(key, standing)| self.engine.apply(key, standing));
        gone.iter().for_each(|key| self.keep_usage(key));
        self.engine.count_out(gone);
        self.complaints.update(only, unreadable);
    }

    fn new_key(&self, spec: &KeySpec, standing: &Standing) -> Result<Arc<Key>, String> {
        if let Some(field) = spec.unsupported() {
            return Err(format!("the field `{field}` is not supported yet"));
        }
        let usable = UsableKey::new(spec, &self.engine.config.inject);
        let key = self.engine.new_key(usable.map_err(|reason| reason.to_string())?);
        key.is(spec, standing.born);
        self.engine.apply(&key, standing);
        Ok(key)
    }
}

/// What a load makes of the set of keys.
#[derive(Default)]
struct Changes {
    found: HashSet<KeyId>,
    /// By slot: another key, or none.
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
        let read: Vec<_> = match only {
            Some(ids) => ids.iter().filter_map(|id| before.slot(id)).collect(),
            None => (0..before.keys().len()).collect(),
        };
        let gone = read.into_iter().filter(|slot| !self.found.contains(&before.keys()[*slot].id));
        self.replaced.extend(gone.map(|slot| (slot, None)));
    }

    /// Keys that stay keep their place in the turn; new ones come behind them.
    fn applied_to(mut self, before: &Snapshot) -> Option<Vec<Arc<Key>>> {
        if self.replaced.is_empty() && self.added.is_empty() {
            return None;
        }
        let slots = before.keys().iter().enumerate();
        let stay = slots.filter_map(|(slot, key)| match self.replaced.remove(&slot) {
            Some(other) => other,
            None => Some(key.clone()),
        });
        let mut keys: Vec<_> = stay.collect();
        keys.extend(self.added);
        Some(keys)
    }
}
