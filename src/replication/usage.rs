//! How much keys are used, on its way to the store.
//!
//! Requests only add to their key's counters. A pass takes what was added since the last one, and adds it to the store's
//! sums, once: usage is a statistic, and a write whose outcome is unknown is not repeated.

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError},
};

use crate::{
    key::KeyId,
    pool::{Engine, Key},
    store::{KeyStore, StoreError, Usage},
    sync::Mutex,
};

pub(crate) struct Account {
    engine: Arc<Engine>,
    store: Arc<dyn KeyStore>,
    /// The usage of keys that were taken out of the pool since the last write.
    gone: Mutex<Used>,
}

/// Requests and tokens of each key.
type Used = BTreeMap<KeyId, (u64, u64)>;

impl Account {
    pub(super) fn new(engine: Arc<Engine>, store: Arc<dyn KeyStore>) -> Self {
        Self { engine, store, gone: Mutex::default() }
    }

    /// Adds to the store how much keys were used since the last call.
    pub(crate) async fn write(&self) -> Result<(), StoreError> {
        // Also without usage: a store may have kept some that it could not send.
        self.store.add_usage(self.take()).await
    }

    /// Keeps the usage of a key that is taken out of the pool.
    pub(super) fn keep(&self, key: &Key) {
        add(&mut self.gone.lock().unwrap_or_else(PoisonError::into_inner), key);
    }

    fn take(&self) -> Vec<Usage> {
        let mut used = std::mem::take(&mut *self.gone.lock().unwrap_or_else(PoisonError::into_inner));
        self.engine.snapshot().keys().iter().for_each(|key| add(&mut used, key));
        used.into_iter().map(|(id, (requests, tokens))| Usage::new(id, requests, tokens)).collect()
    }
}

fn add(used: &mut Used, key: &Key) {
    let (requests, tokens) = (key.counts.requests.take(), key.counts.tokens.take());
    if requests != 0 || tokens != 0 {
        let sum = used.entry(key.id.clone()).or_default();
        *sum = (sum.0 + requests, sum.1 + tokens);
    }
}
