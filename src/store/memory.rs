//! The store of a single process.

use std::{
    collections::BTreeMap,
    future::ready,
    sync::{Arc, PoisonError},
};

use super::{KeyRecord, KeyStore, Loaded, Mark, Operation, Recovered, Standing, StoreFuture};
use crate::{
    clock::{Clock, SystemClock},
    key::KeyId,
    sync::{Mutex, MutexGuard},
};

/// Keys and their state in this process's memory. Clones share them.
///
/// A pool that is built rather than opened needs none. Several pools can be opened over the same one:
///
/// ```
/// use tower_key_rotation::{KeyPool, store::MemoryStore};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let store = MemoryStore::new();
/// let chat = KeyPool::builder().key("alpha", "sk-1").open(store.clone()).await?;
/// let embeddings = KeyPool::builder().open(store).await?;
/// assert_eq!(embeddings.stats().healthy, 1);
/// # let _ = chat;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct MemoryStore {
    clock: Arc<dyn Clock>,
    /// With words that count from the clock's start.
    keys: Arc<Mutex<BTreeMap<KeyId, KeyRecord>>>,
}

impl MemoryStore {
    /// An empty store.
    #[must_use]
    pub fn new() -> Self {
        Self::with_clock(Arc::new(SystemClock::new()))
    }

    /// An empty store with that clock.
    #[must_use]
    pub fn with_clock(clock: Arc<dyn Clock>) -> Self {
        Self { clock, keys: Arc::default() }
    }

    fn keys(&self) -> MutexGuard<'_, BTreeMap<KeyId, KeyRecord>> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How a key stands, with words that count from now.
    fn count_from_now(&self, standing: &Standing) -> Standing {
        Standing { words: standing.words.clone().after(self.clock.now()), ..standing.clone() }
    }

    fn records(&self, only: Option<&[KeyId]>) -> Vec<KeyRecord> {
        let keys = self.keys();
        let record = |key: &KeyRecord| KeyRecord::new(key.spec.clone(), self.count_from_now(&key.standing));
        match only {
            Some(ids) => ids.iter().filter_map(|id| keys.get(id)).map(record).collect(),
            None => keys.values().map(record).collect(),
        }
    }

    fn join(&self, mark: Mark) -> Option<Standing> {
        let mut keys = self.keys();
        let key = keys.get_mut(&mark.id).filter(|key| key.standing.born == mark.born)?;
        key.standing.words.join(&mark.words.later(self.clock.now()));
        Some(self.count_from_now(&key.standing))
    }

    fn apply(&self, id: KeyId, operation: Operation) -> Option<Standing> {
        let mut keys = self.keys();
        let key = match operation {
            Operation::Insert(_) if keys.contains_key(&id) => return None,
            Operation::Insert(spec) => keys.entry(id).or_insert(KeyRecord::new(spec, Standing::healthy())),
            Operation::Remove => return keys.remove(&id).map(|key| self.count_from_now(&key.standing)),
            Operation::Reset(scope) => {
                let key = keys.get_mut(&id)?;
                key.standing.words.reset(scope.as_ref());
                key
            }
            Operation::Disable | Operation::Enable => {
                let key = keys.get_mut(&id)?;
                key.standing.disabled = operation == Operation::Disable;
                key
            }
        };
        Some(self.count_from_now(&key.standing))
    }

    fn drop_ended(&self) -> Recovered {
        let now = self.clock.now();
        let mut ids = Vec::new();
        for (id, key) in self.keys().iter_mut() {
            let left = key.standing.words.clone().after(now).later(now);
            if left != key.standing.words {
                key.standing.words = left;
                ids.push(id.clone());
            }
        }
        Recovered::new(ids.len() as u64, ids)
    }
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

impl KeyStore for MemoryStore {
    fn load<'a>(&'a self, only: Option<&'a [KeyId]>) -> StoreFuture<'a, Loaded> {
        Box::pin(ready(Ok(self.records(only).into())))
    }

    fn merge(&self, mark: Mark) -> StoreFuture<'_, Option<Standing>> {
        Box::pin(ready(Ok(self.join(mark))))
    }

    fn operate(&self, id: KeyId, operation: Operation) -> StoreFuture<'_, Option<Standing>> {
        Box::pin(ready(Ok(self.apply(id, operation))))
    }

    fn sweep(&self) -> StoreFuture<'_, Recovered> {
        Box::pin(ready(Ok(self.drop_ended())))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        clock::ManualClock,
        key::KeySpec,
        limit::{Rest, Resting, Scope, Until, Words},
        store::Born,
    };

    const MINUTE: Duration = Duration::from_secs(60);

    struct Fixture {
        store: MemoryStore,
        clock: ManualClock,
        id: KeyId,
    }

    impl Fixture {
        async fn new() -> Self {
            let clock = ManualClock::new();
            let store = MemoryStore::with_clock(Arc::new(clock.clone()));
            let id = KeyId::new("alpha").unwrap();
            let fixture = Self { store, clock, id };
            fixture.insert().await.unwrap();
            fixture
        }

        async fn insert(&self) -> Option<Standing> {
            self.operate(Operation::Insert(KeySpec::new(self.id.clone(), "sk-1"))).await
        }

        async fn operate(&self, operation: Operation) -> Option<Standing> {
            self.store.operate(self.id.clone(), operation).await.unwrap()
        }

        fn standing(&self) -> Standing {
            self.store.records(None)[0].standing.clone()
        }

        async fn mark(&self, words: Words) -> Option<Standing> {
            self.store.merge(Mark::new(self.id.clone(), self.standing().born, words)).await.unwrap()
        }
    }

    fn limited(generation: u64, left: Duration) -> Words {
        Words { generation, key: Some(resting(left)), ..Words::default() }
    }

    fn resting(left: Duration) -> Resting {
        Resting { until: Until::After(left), reason: Rest::RateLimited }
    }

    fn scope(name: &str) -> Scope {
        Scope::new(name).unwrap()
    }

    #[tokio::test]
    async fn f10_a_shorter_mark_leaves_the_longer_one() {
        let alpha = Fixture::new().await;
        alpha.mark(limited(0, 2 * MINUTE)).await.unwrap();
        let standing = alpha.mark(limited(0, MINUTE)).await.unwrap();
        assert_eq!(standing.words, limited(0, 2 * MINUTE));
    }

    #[tokio::test]
    async fn f09_a_mark_of_an_older_generation_is_dropped() {
        let alpha = Fixture::new().await;
        assert_eq!(alpha.operate(Operation::Reset(None)).await.unwrap().words.generation, 1);
        alpha.mark(limited(0, MINUTE)).await.unwrap();
        assert_eq!(alpha.standing().words.key, None);
        alpha.mark(limited(1, MINUTE)).await.unwrap();
        assert_eq!(alpha.standing().words, limited(1, MINUTE));
    }

    #[tokio::test]
    async fn f17_marks_of_replaced_keys_are_refused() {
        let alpha = Fixture::new().await;
        let born = alpha.standing().born;
        alpha.operate(Operation::Remove).await.unwrap();
        alpha.insert().await.unwrap();
        let late = Mark::new(alpha.id.clone(), born, limited(0, MINUTE));
        assert_eq!(alpha.store.merge(late).await.unwrap(), None);
        assert_eq!(alpha.standing().words, Words::default());
    }

    #[tokio::test]
    async fn f16_a_mark_of_a_removed_key_inserts_nothing() {
        let alpha = Fixture::new().await;
        alpha.operate(Operation::Remove).await.unwrap();
        let late = Mark::new(alpha.id.clone(), Born(7), limited(0, MINUTE));
        assert_eq!(alpha.store.merge(late).await.unwrap(), None);
        assert_eq!(alpha.store.records(None), []);
    }

    #[tokio::test]
    async fn resetting_a_scope_leaves_the_other_rests() {
        let alpha = Fixture::new().await;
        let scopes = [(scope("a"), resting(MINUTE)), (scope("b"), resting(MINUTE))].into();
        alpha.mark(Words { scopes, ..limited(0, MINUTE) }).await.unwrap();
        let words = alpha.operate(Operation::Reset(Some(scope("a")))).await.unwrap().words;
        assert_eq!(words, Words { scopes: [(scope("b"), resting(MINUTE))].into(), ..limited(1, MINUTE) });
    }

    #[tokio::test]
    async fn a_sweep_resets_each_expired_key_once() {
        let alpha = Fixture::new().await;
        alpha.mark(limited(0, MINUTE)).await.unwrap();
        assert_eq!(alpha.store.sweep().await.unwrap().count, 0);
        alpha.clock.advance(MINUTE);
        assert_eq!(alpha.store.sweep().await.unwrap(), Recovered::new(1, vec![alpha.id.clone()]));
        assert_eq!(alpha.store.sweep().await.unwrap(), Recovered::default());

        let revoked = Resting { until: Until::Reset, reason: Rest::Revoked };
        alpha.mark(Words { key: Some(revoked), ..Words::default() }).await.unwrap();
        alpha.clock.advance(1_000_000 * MINUTE);
        assert_eq!(alpha.store.sweep().await.unwrap().count, 0);
    }

    #[tokio::test]
    async fn partial_loads_return_the_requested_keys() {
        let alpha = Fixture::new().await;
        let other = KeyId::new("beta").unwrap();
        assert_eq!(alpha.store.records(Some(&[other])), []);
        assert_eq!(alpha.store.records(Some(std::slice::from_ref(&alpha.id))).len(), 1);
    }
}
