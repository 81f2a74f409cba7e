//! Between the pool and its store. Nothing here runs on the way of a request, but the flag that a mark waits.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, PoisonError},
};

use tokio::sync::{Notify, mpsc};

use super::{
    KeyPool,
    reload::Complaints,
    usage::{Account, Predecessors},
};
use crate::{
    key::{KeyId, Secret},
    store::{Changed, KeyStore, Recovered, StoreError},
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
};

pub(super) struct Persistence {
    /// None where the pool's memory is all there is: nothing then waits to be written, and nothing is loaded.
    pub(super) store: Option<Arc<dyn KeyStore>>,
    /// Held by whoever changes the set of keys or tells the store about it, so that a reload never applies
    /// what it read before somebody else's change.
    pub(super) turn: Arc<tokio::sync::Mutex<()>>,
    /// Held while marks are written: at most one write per key is under way. The place of the key to go on with.
    pub(super) writing: tokio::sync::Mutex<usize>,
    pub(super) usage: tokio::sync::Mutex<Account>,
    predecessors: Mutex<Predecessors>,
    /// Keys whose removal is on its way to the store, which may still have them.
    leaving: Mutex<HashSet<KeyId>>,
    pub(super) complaints: Complaints,
    /// Keys that the store is to have before anything else is done with it.
    seeds: Mutex<Vec<(KeyId, Secret)>>,
    /// Whether the store has been read once.
    open: AtomicBool,
    waiting: Notify,
    reloads: AtomicU64,
    failed_keys: AtomicBool,
}

impl Persistence {
    pub(super) fn none() -> Self {
        Self { open: AtomicBool::new(true), ..Self::new(None, Vec::new()) }
    }

    /// A store that is still to be read, and to be given these keys where it doesn't have them.
    pub(super) fn over(store: Arc<dyn KeyStore>, seeds: Vec<(KeyId, Secret)>) -> Self {
        Self::new(Some(store), seeds)
    }

    fn new(store: Option<Arc<dyn KeyStore>>, seeds: Vec<(KeyId, Secret)>) -> Self {
        Self {
            store,
            turn: Arc::default(),
            writing: tokio::sync::Mutex::default(),
            usage: tokio::sync::Mutex::default(),
            predecessors: Mutex::default(),
            leaving: Mutex::default(),
            complaints: Complaints::default(),
            seeds: Mutex::new(seeds),
            open: AtomicBool::new(false),
            waiting: Notify::new(),
            reloads: AtomicU64::new(0),
            failed_keys: AtomicBool::new(false),
        }
    }

    pub(super) fn mark_waits(&self) {
        if self.store.is_some() {
            self.waiting.notify_one();
        }
    }

    /// The number of a reload that begins to read now.
    pub(super) fn begin_reload(&self) -> u64 {
        self.reloads.fetch_add(1, SeqCst) + 1
    }

    /// The newest reload that has begun to read.
    pub(super) fn newest_reload(&self) -> u64 {
        self.reloads.load(SeqCst)
    }

    /// The store has a mark that a standby key may answer.
    pub(super) fn key_failed(&self) {
        self.failed_keys.store(true, SeqCst);
    }

    pub(super) fn predecessors(&self) -> MutexGuard<'_, Predecessors> {
        self.predecessors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn leaving(&self) -> MutexGuard<'_, HashSet<KeyId>> {
        self.leaving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn opened(&self) {
        self.open.store(true, SeqCst);
    }

    fn seeds(&self) -> MutexGuard<'_, Vec<(KeyId, Secret)>> {
        self.seeds.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl KeyPool {
    /// Whether the store has been read since the pool was made.
    pub(crate) fn is_open(&self) -> bool {
        self.inner.persistence.open.load(SeqCst)
    }

    /// To be done before marks and usage are written: of keys that the store doesn't have they would be lost.
    pub(super) async fn plant_seeds(&self) -> Result<(), StoreError> {
        let persistence = &self.inner.persistence;
        if persistence.seeds().is_empty() {
            return Ok(());
        }
        let _turn = persistence.turn.lock().await;
        self.plant_seeds_in_turn().await
    }

    /// Gives the store the keys that it is to begin with, if it has not been done yet. Called with the turn.
    pub(super) async fn plant_seeds_in_turn(&self) -> Result<(), StoreError> {
        let persistence = &self.inner.persistence;
        let seeds = persistence.seeds().clone();
        let Some(store) = persistence.store.as_ref().filter(|_| !seeds.is_empty()) else {
            return Ok(());
        };
        let records = store.load().await?.records;
        let ids: HashSet<_> = records.iter().map(|key| &key.id).collect();
        let by_secret: HashMap<_, _> = records.iter().map(|key| (&key.secret, &key.id)).collect();
        for (id, secret) in seeds {
            match by_secret.get(&secret) {
                _ if ids.contains(&id) => {}
                Some(same) => {
                    tracing::info!(key = %same, given_as = %id, "the store has this key under its own id");
                    self.rename(&id, same);
                }
                None => _ = store.insert(id, secret).await?,
            }
        }
        persistence.seeds().clear();
        Ok(())
    }

    /// What is known of a key goes on to be known of it, under the id that the store has for it.
    fn rename(&self, id: &KeyId, to: &KeyId) {
        self.edit(|before| {
            let slot = before.slot(id).filter(|_| before.slot(to).is_none())?;
            let mut keys = before.keys().to_vec();
            keys[slot] = keys[slot].renamed(to.clone());
            Some(keys)
        });
    }

    /// Resets what has expired in the store; without one, what has expired and no request has taken back yet.
    pub(crate) async fn sweep(&self) -> Result<Recovered, StoreError> {
        match &self.inner.persistence.store {
            Some(store) => store.recover().await,
            None => Ok(self.return_all_expired(&self.inner.snapshot.load(), self.now())),
        }
    }

    /// Has standby keys take the place of those that failed, and says how many did.
    pub(crate) async fn replace_failed(&self) -> Result<usize, StoreError> {
        let Some(store) = &self.inner.persistence.store else { return Ok(0) };
        let replaced = store.replace_failed().await?;
        for replaced in &replaced {
            tracing::info!(key = %replaced.failed, by = %replaced.by, "key replaced by a standby key");
        }
        Ok(replaced.len())
    }

    /// Whether a key was marked in the store as exhausted or revoked since this was asked before.
    pub(crate) fn a_key_has_failed(&self) -> bool {
        self.inner.persistence.failed_keys.swap(false, SeqCst)
    }

    /// What changes in the store, where it tells.
    pub(crate) fn watch(&self) -> Option<mpsc::Receiver<Changed>> {
        self.inner.persistence.store.as_ref()?.watch()
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
}
