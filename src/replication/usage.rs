//! How much keys are used, on its way to the store.
//!
//! Requests only add to their key's counters. A pass takes what was added since the last one, and adds it to the store's
//! sums, once: usage is a statistic, and a write whose outcome is unknown is not repeated.

use std::sync::{Arc, PoisonError};

use super::link::{Link, Used};
use crate::{
    meter::Counted,
    pool::Key,
    store::{StoreError, Usage},
    sync::atomic::Ordering::SeqCst,
};

impl Link {
    /// Adds to the store how much keys were used since the last call.
    pub(super) async fn write_usage(&self) -> Result<(), StoreError> {
        // Also without usage: a store may have kept some that it could not send.
        let usage = self.take_usage();
        self.unconfirmed.fetch_add(usage.len(), SeqCst);
        self.store.add_usage(usage).await.inspect_err(|_| self.engine.store_failed(Counted::Usage))?;
        self.unconfirmed.store(0, SeqCst);
        Ok(())
    }

    /// The keys with usage that was not written, or of which nobody knows whether it was.
    pub(super) fn count_unconfirmed_usage(&self) -> usize {
        let gone = self.gone.lock().unwrap_or_else(PoisonError::into_inner).len();
        let counts = |key: &&Arc<Key>| key.counts.requests.has_untaken() || key.counts.tokens.has_untaken();
        let here = self.engine.snapshot().keys().iter().filter(counts).count();
        gone + here + self.unconfirmed.load(SeqCst)
    }

    /// Keeps the usage of a key that is taken out of the pool.
    pub(super) fn keep_usage(&self, key: &Key) {
        add(&mut self.gone.lock().unwrap_or_else(PoisonError::into_inner), key);
    }

    fn take_usage(&self) -> Vec<Usage> {
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
