//! Usage that waits for a server.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use crate::{key::KeyId, store::Usage};

/// Usage that certainly did not reach the server: the next batch takes it along.
#[derive(Debug, Default)]
pub(super) struct Unsent(Mutex<BTreeMap<KeyId, Usage>>);

impl Unsent {
    pub(super) fn keep(&self, usage: impl IntoIterator<Item = Usage>) {
        let mut unsent = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for usage in usage {
            let kept = unsent.entry(usage.id.clone()).or_insert_with(|| Usage::new(usage.id, 0, 0));
            kept.requests = kept.requests.saturating_add(usage.requests);
            kept.tokens = kept.tokens.saturating_add(usage.tokens);
        }
    }

    pub(super) fn take(&self) -> Vec<Usage> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner)).into_values().collect()
    }
}
