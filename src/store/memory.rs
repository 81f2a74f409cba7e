//! The store of a single process.

use std::{
    collections::BTreeMap,
    future::ready,
    sync::{Arc, PoisonError},
};

use super::{
    Heard, KeyRecord, KeyStore, Loaded, Mark, Operation, Recovered, Standing, StoreFuture, messages::Messages,
};
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
    messages: Arc<Messages>,
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
        Self { clock, keys: Arc::default(), messages: Arc::default() }
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

    fn messages(&self) -> StoreFuture<'_, Option<Vec<Heard>>> {
        Box::pin(ready(Ok(Some(self.messages.heard(self.clock.now())))))
    }

    fn publish(&self, process: u64, body: Vec<u8>) -> StoreFuture<'_, ()> {
        self.messages.publish(process, body, self.clock.now());
        Box::pin(ready(Ok(())))
    }
}
