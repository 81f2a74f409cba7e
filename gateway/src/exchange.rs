//! Exchanges the keys of a pool when the files that name them have changed.

use std::collections::{HashMap, HashSet};

use tower_key_rotation::{KeyId, KeyPool, KeySpec, OperateError};

use crate::{audit::AUDIT, with_sources};

/// How many keys came and went.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Taken {
    pub(crate) added: usize,
    pub(crate) replaced: usize,
    pub(crate) removed: usize,
    pub(crate) failed: usize,
}

/// What has changed between two readings of the files.
struct Changes {
    new: Vec<KeySpec>,
    /// With another secret or other settings than before.
    different: Vec<KeySpec>,
    gone: Vec<KeyId>,
}

impl Changes {
    fn between(before: &[KeySpec], now: &[KeySpec]) -> Self {
        let old: HashMap<_, _> = before.iter().map(|key| (&key.id, key)).collect();
        let ids: HashSet<_> = now.iter().map(|key| &key.id).collect();
        let changed = now.iter().filter(|key| old.get(&key.id) != Some(key)).cloned();
        let (different, new) = changed.partition(|key| old.contains_key(&key.id));
        let gone = before.iter().map(|key| &key.id).filter(|id| !ids.contains(id)).cloned().collect();
        Self { new, different, gone }
    }

    /// Leaves out what the pool has already: another gateway may have made the same changes in a store that both share.
    fn without(mut self, pool: &KeyPool) -> Self {
        let there: HashMap<_, _> = pool.specs().into_iter().map(|key| (key.id.clone(), key)).collect();
        let is_there = |key: &KeySpec| there.get(&key.id) == Some(key);
        self.new.retain(|key| !is_there(key));
        self.different.retain(|key| !is_there(key));
        self
    }
}

/// Makes the pool's keys those that the files name now. Keys that stay keep their rests, and keys that an operator has
/// added stay.
pub(crate) async fn exchange(pool: &KeyPool, upstream: &str, before: &[KeySpec], now: &[KeySpec]) -> Taken {
    if let Err(error) = pool.reload().await {
        tracing::warn!(upstream, error = with_sources(&error), "the key store can't be read");
    }
    let Changes { new, different, gone } = Changes::between(before, now).without(pool);
    let mut exchange = Exchange { pool, upstream, taken: Taken::default() };
    // The new keys come first, so that the pool is never without any. The secret of a key that goes may be that of a new
    // one, which then has to wait.
    let late = exchange.insert(new).await;
    for id in gone {
        match pool.remove(&id).await {
            Err(error) if !error.is_unknown_key() => exchange.fails(&id, &error),
            _ => exchange.taken.removed += 1,
        }
    }
    for key in different {
        match pool.replace(key.clone()).await {
            Ok(()) => exchange.taken.replaced += 1,
            // An operator has removed it, but the file has changed since.
            Err(error) if error.is_unknown_key() => exchange.insert_or_fail(vec![key]).await,
            Err(error) => exchange.fails(&key.id, &error),
        }
    }
    exchange.insert_or_fail(late.into_iter().map(|(key, _)| key).collect()).await;
    exchange.taken
}

struct Exchange<'a> {
    pool: &'a KeyPool,
    upstream: &'a str,
    taken: Taken,
}

impl Exchange<'_> {
    /// Inserts keys, and returns those that could not be.
    async fn insert(&mut self, keys: Vec<KeySpec>) -> Vec<(KeySpec, OperateError)> {
        let outcomes = self.pool.insert_all(keys.clone()).await;
        self.taken.added += outcomes.iter().filter(|outcome| outcome.is_ok()).count();
        keys.into_iter().zip(outcomes).filter_map(|(key, outcome)| Some((key, outcome.err()?))).collect()
    }

    async fn insert_or_fail(&mut self, keys: Vec<KeySpec>) {
        for (key, error) in self.insert(keys).await {
            self.fails(&key.id, &error);
        }
    }

    fn fails(&mut self, key: &KeyId, error: &OperateError) {
        self.taken.failed += 1;
        let (key, upstream, error) = (key.as_str(), self.upstream, with_sources(error));
        tracing::warn!(target: AUDIT, key, upstream, error, "key of the file not taken over");
    }
}

#[cfg(test)]
mod tests {
    use tower_key_rotation::store::MemoryStore;

    use super::*;

    fn keys(keys: &[(&str, &str)]) -> Vec<KeySpec> {
        keys.iter().map(|(id, secret)| KeySpec::new(KeyId::new(id).unwrap(), *secret)).collect()
    }

    fn taken(added: usize, replaced: usize, removed: usize, failed: usize) -> Taken {
        Taken { added, replaced, removed, failed }
    }

    async fn pool(store: &MemoryStore, given: &[KeySpec]) -> KeyPool {
        let builder = given.iter().cloned().fold(KeyPool::builder(), |builder, key| builder.key_spec(key));
        builder.open(store.clone()).await.unwrap()
    }

    #[tokio::test]
    async fn a_key_may_get_the_secret_of_one_that_goes() {
        let (before, now) = (keys(&[("a", "sk-1"), ("b", "sk-2")]), keys(&[("c", "sk-1"), ("b", "sk-3")]));
        let pool = pool(&MemoryStore::new(), &before).await;
        assert_eq!(exchange(&pool, "one", &before, &now).await, taken(1, 1, 1, 0));
        let mut specs = pool.specs();
        specs.sort_unstable_by(|one, other| other.id.as_str().cmp(one.id.as_str()));
        assert_eq!(specs, now);
    }

    #[tokio::test]
    async fn operators_changes_stay_unless_the_file_changes() {
        let before = keys(&[("a", "sk-1"), ("b", "sk-2"), ("c", "sk-3")]);
        let pool = pool(&MemoryStore::new(), &before).await;
        pool.insert("d", "sk-4").await.unwrap();
        pool.remove("a").await.unwrap();
        pool.remove("b").await.unwrap();
        let now = keys(&[("a", "sk-1"), ("b", "sk-5"), ("c", "sk-3")]);
        assert_eq!(exchange(&pool, "one", &before, &now).await, taken(1, 0, 0, 0));
        assert_eq!(pool.specs(), keys(&[("c", "sk-3"), ("d", "sk-4"), ("b", "sk-5")]));
    }

    #[tokio::test]
    async fn gateways_with_one_store_exchange_keys_once() {
        let (before, now) = (keys(&[("a", "sk-1"), ("b", "sk-2")]), keys(&[("a", "sk-3"), ("c", "sk-4")]));
        let store = MemoryStore::new();
        let (here, there) = (pool(&store, &before).await, pool(&store, &before).await);
        assert_eq!(exchange(&here, "one", &before, &now).await, taken(1, 1, 1, 0));
        assert_eq!(exchange(&there, "one", &before, &now).await, taken(0, 0, 1, 0));
        assert_eq!((here.specs(), there.specs()), (now.clone(), now));
    }

    #[tokio::test]
    async fn a_key_that_cannot_be_taken_over_is_counted() {
        let before = keys(&[("a", "sk-1")]);
        let pool = pool(&MemoryStore::new(), &before).await;
        pool.insert("b", "sk-2").await.unwrap();
        let now = keys(&[("a", "sk-1"), ("c", "sk-2")]);
        assert_eq!(exchange(&pool, "one", &before, &now).await, taken(0, 0, 0, 1));
    }
}
