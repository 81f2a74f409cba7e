//! How much keys are used, on its way to the store.
//!
//! Requests only add to their key's counters. What has come together since the last batch is taken from them
//! and written. A batch of which it isn't known whether it arrived stays as it is, and is written again under
//! its number, so that the store can tell that it has it already.

use std::{
    sync::{
        Arc,
        atomic::{Ordering::Acquire, fence},
    },
    time::Duration,
};

use super::{KeyPool, key::Key};
use crate::store::{StoreError, Usage, UsageBatch};

#[derive(Debug)]
pub(super) struct Account {
    writer: String,
    batches: u64,
    /// A batch that may have arrived or not, and when it was put together.
    unsettled: Option<(UsageBatch, u64)>,
}

impl Default for Account {
    fn default() -> Self {
        Self { writer: format!("{:032x}", fastrand::u128(..)), batches: 0, unsettled: None }
    }
}

impl KeyPool {
    /// Writes what keys were used since the last time.
    pub(crate) async fn write_usage(&self) -> Result<(), StoreError> {
        self.plant_seeds().await?;
        let mut account = self.inner.persistence.usage.lock().await;
        self.settle(&mut account).await?;
        let usage = self.take_usage();
        if usage.is_empty() {
            return Ok(());
        }
        account.batches += 1;
        let batch = UsageBatch {
            writer: account.writer.clone(),
            number: account.batches,
            age: Duration::ZERO,
            usage,
        };
        account.unsettled = Some((batch, self.now()));
        self.settle(&mut account).await
    }

    async fn settle(&self, account: &mut Account) -> Result<(), StoreError> {
        if let Some((batch, taken_at)) = &mut account.unsettled {
            batch.age = Duration::from_nanos(self.now().saturating_sub(*taken_at));
            self.inner.persistence.store.add_usage(batch).await?;
            account.unsettled = None;
        }
        Ok(())
    }

    fn take_usage(&self) -> Vec<Usage> {
        let snapshot = self.inner.snapshot.load();
        let mut used: Vec<_> = snapshot.keys().iter().filter_map(taken).collect();
        self.inner.persistence.predecessors().retain(|key| {
            // To be asked first: a request that still holds the key may count itself until it lets go of it.
            let is_held = Arc::strong_count(key) > 1;
            fence(Acquire);
            if let Some(usage) = taken(key) {
                add(&mut used, usage);
            }
            is_held
        });
        used
    }
}

fn add(used: &mut Vec<Usage>, usage: Usage) {
    match used.iter_mut().find(|same| same.id == usage.id) {
        Some(same) => {
            same.requests += usage.requests;
            same.tokens += usage.tokens;
        }
        None => used.push(usage),
    }
}

fn taken(key: &Arc<Key>) -> Option<Usage> {
    let (requests, tokens) = (key.counts.requests.take(), key.counts.tokens.take());
    (requests != 0 || tokens != 0).then(|| Usage { id: key.id.clone(), requests, tokens })
}
