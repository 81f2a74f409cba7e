//! A pool's store, and the parts of the pool that deal with it.

use std::{collections::BTreeMap, sync::Arc};

use super::{complaints::Complaints, log::Chain};
use crate::{
    key::{KeyId, KeySpec},
    meter::Counted,
    pool::Engine,
    store::{KeyStore, Operation, Recovered, Standing, StoreError},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize},
    },
};

pub(crate) struct Link {
    pub(crate) engine: Arc<Engine>,
    pub(super) store: Arc<dyn KeyStore>,
    /// Held for changes of the set of keys, in the store and here.
    pub(super) turn: Arc<tokio::sync::Mutex<Seeds>>,
    /// Whether the store has been read once.
    pub(super) open: AtomicBool,
    pub(super) complaints: Complaints,
    /// Held while a round of marks is written: each key has at most one write in flight. The slot to continue with.
    pub(super) round: tokio::sync::Mutex<usize>,
    /// Held by the task that shares limits with other processes.
    pub(super) sharing: tokio::sync::Mutex<()>,
    /// Whether the store has a mark that a standby key may answer.
    pub(super) key_failed: AtomicBool,
    /// The usage of keys that were taken out of the pool since the last write.
    pub(super) gone: Mutex<Used>,
    /// The keys whose usage was sent since a write of usage last succeeded.
    pub(super) unconfirmed: AtomicUsize,
}

/// The keys that the store is to have before anything else is done with it.
pub(super) type Seeds = Vec<KeySpec>;

/// Requests and tokens of each key.
pub(super) type Used = BTreeMap<KeyId, (u64, u64)>;

impl Link {
    /// To a store that is still to be read, and to be given these keys if it does not have them.
    pub(crate) fn new(engine: Arc<Engine>, store: Arc<dyn KeyStore>, seeds: Seeds) -> Self {
        let turn = Arc::new(tokio::sync::Mutex::new(seeds));
        let (open, complaints, round, sharing, key_failed, gone) = Default::default();
        let unconfirmed = AtomicUsize::new(0);
        Self { engine, store, turn, open, complaints, round, sharing, key_failed, gone, unconfirmed }
    }

    /// The most writes to the store in flight.
    pub(crate) fn at_once(&self) -> usize {
        self.store.writes().at_once.max(1)
    }

    /// Does in the store what an operator asks for.
    pub(crate) async fn operate(
        &self,
        id: &KeyId,
        operation: Operation,
    ) -> Result<Option<Standing>, StoreError> {
        let done = self.store.operate(id.clone(), operation).await;
        done.inspect_err(|_| self.engine.store_failed(Counted::Operate))
    }

    /// Has the store know that these keys came from a source.
    pub(crate) async fn note_sourced(&self, keys: &[KeySpec]) {
        if let Err(error) = self.store.note_sourced(keys).await {
            tracing::debug!(error = %Chain(&error), "the store does not know that keys came from a source");
        }
    }

    /// Resets ended rests in the store.
    pub(super) async fn sweep(&self) -> Result<Recovered, StoreError> {
        self.store.sweep().await.inspect_err(|_| self.engine.store_failed(Counted::Recover))
    }

    /// Puts standby keys in the place of keys that failed. Returns how many.
    pub(crate) async fn replace_failed(&self) -> Result<usize, StoreError> {
        let replaced = self.store.replace_failed().await;
        let replaced = replaced.inspect_err(|_| self.engine.store_failed(Counted::Replace))?;
        for replaced in &replaced {
            tracing::info!(key = %replaced.failed, by = %replaced.by, "key replaced by a standby key");
        }
        Ok(replaced.len())
    }
}
