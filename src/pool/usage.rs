//! How much keys are used, on its way to the store.
//!
//! Requests only add to their key's counters. What has come together since the last batch is taken from them
//! and written. A batch of which it isn't known whether it arrived stays as it is, and is written again under
//! its number, so that the store can tell that it has it already.

use std::{
    hash::{BuildHasher, Hasher, RandomState},
    mem,
    sync::Arc,
    time::Duration,
};

use super::{KeyPool, key::Key};
#[cfg(feature = "metrics")]
use crate::sync::atomic::Ordering::Relaxed;
use crate::{
    store::{KeyStore, StoreError, Usage, UsageBatch},
    sync::atomic::{Ordering::Acquire, fence},
};

#[derive(Debug)]
pub(super) struct Account {
    writer: String,
    batches: u64,
    /// A batch that may have arrived or not, and when it was put together.
    unsettled: Option<(UsageBatch, u64)>,
}

impl Default for Account {
    fn default() -> Self {
        // The standard library's hashers are keyed by the operating system, `fastrand` by the time and the thread.
        let random = RandomState::new().build_hasher().finish();
        let writer = format!("{random:016x}{:016x}", fastrand::u64(..));
        Self { writer, batches: 0, unsettled: None }
    }
}

impl KeyPool {
    /// Writes what keys were used since the last time.
    pub(crate) async fn write_usage(&self) -> Result<(), StoreError> {
        let Some(store) = &self.inner.persistence.store else { return Ok(()) };
        self.plant_seeds().await?;
        let mut account = self.inner.persistence.usage.lock().await;
        self.settle(&mut account, &**store).await?;
        let usage = self.take_usage();
        if usage.is_empty() {
            return Ok(());
        }
        account.batches += 1;
        let batch = UsageBatch::new(account.writer.clone(), account.batches, usage);
        account.unsettled = Some((batch, self.now()));
        self.settle(&mut account, &**store).await
    }

    async fn settle(&self, account: &mut Account, store: &dyn KeyStore) -> Result<(), StoreError> {
        if let Some((batch, taken_at)) = &mut account.unsettled {
            batch.age = Duration::from_nanos(self.now().saturating_sub(*taken_at));
            store.add_usage(batch).await?;
            account.unsettled = None;
        }
        Ok(())
    }

    /// How often keys were picked, those among them that are in the pool no more.
    #[cfg(feature = "metrics")]
    pub(crate) fn picks(&self) -> u64 {
        let snapshot = self.inner.snapshot.load();
        let here: u64 = snapshot.keys().iter().map(|key| key.counts.requests.sum()).sum();
        here.wrapping_add(self.inner.gone_picks.load(Relaxed))
    }

    /// A key has left the pool.
    pub(super) fn count_out(&self, key: &Key) {
        #[cfg(feature = "metrics")]
        self.inner.gone_picks.fetch_add(key.counts.requests.sum(), Relaxed);
        let _ = key;
    }

    /// It is there again.
    pub(super) fn count_in(&self, key: &Key) {
        #[cfg(feature = "metrics")]
        self.inner.gone_picks.fetch_sub(key.counts.requests.sum(), Relaxed);
        let _ = key;
    }

    fn take_usage(&self) -> Vec<Usage> {
        let snapshot = self.inner.snapshot.load();
        let mut used: Vec<_> = snapshot.keys().iter().filter_map(taken).collect();
        let of_predecessors = self.inner.persistence.predecessors().take_used();
        if of_predecessors.is_empty() {
            return used;
        }
        used.extend(of_predecessors);
        add_up(used)
    }
}

/// Keys that a reload took out, and how much they were used since the last batch.
#[derive(Default)]
pub(super) struct Predecessors {
    /// Those that requests may still hold.
    keys: Vec<Arc<Key>>,
    used: Vec<Usage>,
}

impl Predecessors {
    /// Nobody may ever take what they were used: then no more is kept of them than that, and no secret.
    pub(super) fn add(&mut self, gone: Vec<Arc<Key>>) {
        self.let_go();
        self.used = add_up(mem::take(&mut self.used));
        self.keys.extend(gone);
    }

    fn take_used(&mut self) -> Vec<Usage> {
        self.let_go();
        mem::take(&mut self.used)
    }

    fn let_go(&mut self) {
        self.keys.retain(|key| {
            // To be asked first: a request that still holds the key may count itself until it lets go of it.
            let is_held = Arc::strong_count(key) > 1;
            fence(Acquire);
            self.used.extend(taken(key));
            is_held
        });
    }
}

/// Each key once.
fn add_up(mut used: Vec<Usage>) -> Vec<Usage> {
    used.sort_by(|one, other| one.id.cmp(&other.id));
    used.dedup_by(|more, same| {
        let is_same = more.id == same.id;
        if is_same {
            same.requests += more.requests;
            same.tokens += more.tokens;
        }
        is_same
    });
    used
}

fn taken(key: &Arc<Key>) -> Option<Usage> {
    let (requests, tokens) = (key.counts.requests.take(), key.counts.tokens.take());
    (requests != 0 || tokens != 0).then(|| Usage::new(key.id.clone(), requests, tokens))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::MemoryStore;

    #[tokio::test]
    async fn a_request_that_counts_itself_after_its_key_was_replaced_is_counted() {
        let store = MemoryStore::new();
        let pool = KeyPool::builder().key("alpha", "sk-1").open(store.clone()).await.unwrap();
        let picked = pool.inner.snapshot.load().keys()[0].clone();
        let id = picked.id.clone();
        assert!(store.remove(&id).await.unwrap() && store.insert(id.clone(), "sk-2".into()).await.unwrap());
        pool.reload().await.unwrap();
        assert_eq!(pool.take_usage(), []);

        picked.counts.requests.add(1);
        pool.record_usage(&id, 5);
        drop(picked);
        assert_eq!(pool.take_usage(), [Usage::new(id, 1, 5)]);
        assert!(pool.inner.persistence.predecessors().keys.is_empty());
    }

    #[tokio::test]
    async fn of_a_key_that_was_replaced_no_secret_stays_where_nobody_writes_usage() {
        let store = MemoryStore::new();
        let pool = KeyPool::builder().key("alpha", "sk-0").open(store.clone()).await.unwrap();
        let id = crate::KeyId::new("alpha").unwrap();
        for secret in ["sk-1", "sk-2", "sk-3"] {
            drop(pool.pick().unwrap());
            assert!(
                store.remove(&id).await.unwrap() && store.insert(id.clone(), secret.into()).await.unwrap()
            );
            pool.reload().await.unwrap();
        }
        assert_eq!(pool.inner.persistence.predecessors().keys.len(), 1);
        assert_eq!(pool.take_usage(), [Usage::new(id, 3, 0)]);
    }

    #[test]
    fn what_a_key_and_its_predecessor_were_used_is_told_as_one() {
        let used = |name, requests, tokens| Usage::new(crate::KeyId::new(name).unwrap(), requests, tokens);
        let used_up = add_up(vec![used("beta", 1, 4), used("alpha", 2, 5), used("beta", 3, 6)]);
        assert_eq!(used_up, [used("alpha", 2, 5), used("beta", 4, 10)]);
    }
}
