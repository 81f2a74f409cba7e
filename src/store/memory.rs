//! The store of a single process.

use std::{
    collections::BTreeMap,
    future::ready,
    sync::{Arc, PoisonError},
    time::Duration,
};

use super::{KeyRecord, KeyStore, Loaded, Mark, Recovered, StoreFuture};
use crate::{
    clock::{Clock, SystemClock},
    key::{KeyId, Secret},
    limit::Rest,
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
    entries: Arc<Mutex<BTreeMap<KeyId, Entry>>>,
}

#[derive(Debug)]
struct Entry {
    secret: Secret,
    /// Why the key rests and until when; without a time, until somebody resets it.
    rest: Option<(Rest, Option<Duration>)>,
    disabled: bool,
    reset_at: Option<Duration>,
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
        Self { clock, entries: Arc::default() }
    }

    pub(crate) fn add(&self, id: KeyId, secret: Secret) -> bool {
        let mut entries = self.entries();
        let free = !entries.contains_key(&id);
        if free {
            let entry = Entry { secret, rest: None, disabled: false, reset_at: None };
            entries.insert(id, entry);
        }
        free
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<KeyId, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn records(&self) -> Vec<KeyRecord> {
        let now = self.clock.now();
        self.entries().iter().map(|(id, entry)| entry.record(id, now)).collect()
    }

    fn apply(&self, mark: &Mark) {
        let now = self.clock.now();
        let mut entries = self.entries();
        let Some(entry) = entries.get_mut(&mark.id) else { return };
        let observed = now.saturating_sub(mark.age);
        let reset_since = entry.reset_at.is_some_and(|reset| observed < reset);
        if entry.secret == mark.secret && !reset_since {
            let until = mark.left.map(|left| now.saturating_add(left));
            entry.extend(mark.rest, until);
        }
    }

    fn reset_expired(&self) -> Recovered {
        let now = self.clock.now();
        let mut ids = Vec::new();
        for (id, entry) in self.entries().iter_mut() {
            if matches!(entry.rest, Some((_, Some(until))) if until <= now) {
                entry.rest = None;
                ids.push(id.clone());
            }
        }
        Recovered::new(ids.len() as u64, ids)
    }

    fn change(&self, id: &KeyId, change: impl FnOnce(&mut Entry)) -> bool {
        self.entries().get_mut(id).map(change).is_some()
    }
}

impl Entry {
    fn record(&self, id: &KeyId, now: Duration) -> KeyRecord {
        let left = |until: Duration| until.saturating_sub(now);
        KeyRecord {
            rest: self.rest.map(|(rest, until)| (rest, until.map(left))),
            disabled: self.disabled,
            ..KeyRecord::new(id.clone(), self.secret.clone())
        }
    }

    fn extend(&mut self, rest: Rest, until: Option<Duration>) {
        let longer = match (self.rest, until) {
            (None, _) => true,
            (Some((_, None)), _) => false,
            (Some(_), None) => true,
            (Some((_, Some(before))), Some(until)) => until > before,
        };
        if longer {
            self.rest = Some((rest, until));
        }
    }
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

impl KeyStore for MemoryStore {
    fn load(&self) -> StoreFuture<'_, Loaded> {
        Box::pin(ready(Ok(self.records().into())))
    }

    fn write(&self, mark: Mark) -> StoreFuture<'_, ()> {
        self.apply(&mark);
        Box::pin(ready(Ok(())))
    }

    fn recover(&self) -> StoreFuture<'_, Recovered> {
        Box::pin(ready(Ok(self.reset_expired())))
    }

    fn insert(&self, id: KeyId, secret: Secret) -> StoreFuture<'_, bool> {
        Box::pin(ready(Ok(self.add(id, secret))))
    }

    fn remove<'a>(&'a self, id: &'a KeyId) -> StoreFuture<'a, bool> {
        Box::pin(ready(Ok(self.entries().remove(id).is_some())))
    }

    fn reset<'a>(&'a self, id: &'a KeyId) -> StoreFuture<'a, bool> {
        let now = self.clock.now();
        let reset = self.change(id, |entry| {
            entry.rest = None;
            entry.reset_at = Some(now);
        });
        Box::pin(ready(Ok(reset)))
    }

    fn set_disabled<'a>(&'a self, id: &'a KeyId, disabled: bool) -> StoreFuture<'a, bool> {
        let set = self.change(id, |entry| entry.disabled = disabled);
        Box::pin(ready(Ok(set)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;

    const MINUTE: Duration = Duration::from_secs(60);

    fn store() -> (MemoryStore, ManualClock, KeyId) {
        let clock = ManualClock::new();
        let store = MemoryStore::with_clock(Arc::new(clock.clone()));
        let id = KeyId::new("alpha").unwrap();
        assert!(store.add(id.clone(), "sk-1".into()));
        (store, clock, id)
    }

    fn limited(id: &KeyId, left: Duration) -> Mark {
        Mark {
            id: id.clone(),
            secret: "sk-1".into(),
            rest: Rest::RateLimited,
            left: Some(left),
            age: Duration::ZERO,
            http_status: Some(429),
        }
    }

    fn rest(store: &MemoryStore) -> Option<(Rest, Option<Duration>)> {
        store.records()[0].rest
    }

    #[tokio::test]
    async fn f10_a_shorter_mark_leaves_the_longer_one() {
        let (store, _, id) = store();
        store.write(limited(&id, 2 * MINUTE)).await.unwrap();
        store.write(limited(&id, MINUTE)).await.unwrap();
        assert_eq!(rest(&store), Some((Rest::RateLimited, Some(2 * MINUTE))));
    }

    #[tokio::test]
    async fn f09_a_mark_that_was_observed_before_a_reset_is_dropped() {
        let (store, clock, id) = store();
        clock.advance(MINUTE);
        assert!(store.reset(&id).await.unwrap());
        clock.advance(MINUTE);
        let old = Mark { age: MINUTE * 3 / 2, ..limited(&id, MINUTE) };
        store.write(old).await.unwrap();
        assert_eq!(rest(&store), None);
        store.write(limited(&id, MINUTE)).await.unwrap();
        assert!(rest(&store).is_some());
    }

    #[tokio::test]
    async fn f17_a_mark_of_another_secret_is_dropped() {
        let (store, _, id) = store();
        store.write(Mark { secret: "sk-old".into(), ..limited(&id, MINUTE) }).await.unwrap();
        assert_eq!(rest(&store), None);
    }

    #[tokio::test]
    async fn f16_a_mark_of_a_removed_key_inserts_nothing() {
        let (store, _, id) = store();
        assert!(store.remove(&id).await.unwrap());
        store.write(limited(&id, MINUTE)).await.unwrap();
        assert_eq!(store.records(), []);
    }

    #[tokio::test]
    async fn a_sweep_resets_what_has_ended_once_and_nothing_else() {
        let (store, clock, id) = store();
        store.write(limited(&id, MINUTE)).await.unwrap();
        assert_eq!(store.recover().await.unwrap().count, 0);
        clock.advance(MINUTE);
        assert_eq!(store.recover().await.unwrap(), Recovered::new(1, vec![id.clone()]));
        assert_eq!(store.recover().await.unwrap(), Recovered::default());

        store.write(Mark { rest: Rest::Revoked, left: None, ..limited(&id, MINUTE) }).await.unwrap();
        clock.advance(1_000_000 * MINUTE);
        assert_eq!(store.recover().await.unwrap().count, 0);
    }

    #[tokio::test]
    async fn of_two_marks_that_end_together_the_first_one_stays() {
        let (store, _, id) = store();
        store.write(limited(&id, MINUTE)).await.unwrap();
        store.write(Mark { rest: Rest::Exhausted, ..limited(&id, MINUTE) }).await.unwrap();
        assert_eq!(rest(&store), Some((Rest::RateLimited, Some(MINUTE))));
    }
}
