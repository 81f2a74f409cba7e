//! The rests of single scopes, of the few keys that have any. No request reads them yet.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, PoisonError, Weak},
    time::Duration,
};

use super::key::Key;
use crate::{
    key::KeyId,
    limit::{Resting, Scope, Word, Words, millis},
    sync::{Mutex, MutexGuard},
};

#[derive(Debug, Default)]
pub(crate) struct Scopes(Mutex<HashMap<KeyId, Scoped>>);

/// The scopes of one key object. A key of the same id that replaces it has none of them.
#[derive(Debug)]
struct Scoped {
    key: Weak<Key>,
    limits: BTreeMap<Scope, Limit>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Limit {
    state: Word,
    pending: Word,
}

/// The pending word of one scope.
pub(crate) type Pending = (Scope, Word);

impl Scopes {
    /// Joins what a response said of one scope. Returns whether the scope rests longer now.
    ///
    /// `is_current` is asked under the lock, so that a key that has been replaced leaves nothing here.
    pub(crate) fn mark(
        &self,
        key: &Arc<Key>,
        scope: Scope,
        word: Word,
        keeps_pending: bool,
        is_current: impl Fn() -> bool,
    ) -> bool {
        let mut scopes = self.lock();
        if !is_current() {
            return false;
        }
        let limit = entry(&mut scopes, key).entry(scope).or_default();
        let rests_longer = limit.state.join(word) != limit.state;
        if rests_longer {
            limit.state = word;
        }
        if rests_longer && keeps_pending {
            limit.pending = limit.pending.join(word);
            let generation = Word::HEALTHY.in_generation_of(word);
            // Under the lock, or `acknowledge` could clear the flag of a rest that it has not seen.
            key.pending.update(|pending| pending.join(generation).flag(true));
        }
        rests_longer
    }

    /// Joins what the store says of a key's scopes, and drops what has ended.
    pub(crate) fn join(&self, key: &Arc<Key>, words: &Words, now: Duration, is_current: impl Fn() -> bool) {
        let mut scopes = self.lock();
        if words.scopes.is_empty() && !scopes.contains_key(&key.id) || !is_current() {
            return;
        }
        let limits = entry(&mut scopes, key);
        for (scope, resting) in &words.scopes {
            let limit = limits.entry(scope.clone()).or_default();
            limit.state = limit.state.join(Word::new(words.generation, Some(*resting), now));
        }
        let generation = key.state.load().generation();
        limits.retain(|_, limit| rests(limit.state, generation, now).is_some());
        if limits.is_empty() {
            scopes.remove(&key.id);
        }
    }

    /// The rests of a key's scopes in this generation.
    pub(crate) fn of(&self, key: &Arc<Key>, generation: u64, now: Duration) -> BTreeMap<Scope, Resting> {
        let scopes = self.lock();
        let limits = scopes.get(&key.id).filter(|scoped| scoped.is_of(key)).map(|scoped| &scoped.limits);
        let resting = limits
            .into_iter()
            .flatten()
            .filter_map(|(scope, limit)| Some((scope.clone(), rests(limit.state, generation, now)?)));
        resting.collect()
    }

    pub(crate) fn pending(&self, key: &Arc<Key>) -> Vec<Pending> {
        let scopes = self.lock();
        let limits = scopes.get(&key.id).filter(|scoped| scoped.is_of(key)).map(|scoped| &scoped.limits);
        let pending = limits.into_iter().flatten().filter(|(_, limit)| limit.pending != Word::HEALTHY);
        pending.map(|(scope, limit)| (scope.clone(), limit.pending)).collect()
    }

    /// Clears the pending words that the store has, as far as they are unchanged, and the key's.
    pub(crate) fn acknowledge(&self, key: &Arc<Key>, before: Word, written: &[Pending]) {
        let mut scopes = self.lock();
        let mut is_pending = false;
        if let Some(scoped) = scopes.get_mut(&key.id).filter(|scoped| scoped.is_of(key)) {
            for (scope, word) in written {
                if let Some(limit) = scoped.limits.get_mut(scope).filter(|limit| limit.pending == *word) {
                    limit.pending = Word::HEALTHY;
                }
            }
            is_pending = scoped.limits.values().any(|limit| limit.pending != Word::HEALTHY);
        }
        let left = if is_pending { before.ended() } else { Word::HEALTHY };
        key.pending.replace(before, left);
    }

    /// Moves the scopes of a key to the same key under another id.
    pub(crate) fn rename(&self, key: &Arc<Key>, renamed: &Arc<Key>) {
        let mut scopes = self.lock();
        if let Some(scoped) = scopes.remove(&key.id) {
            scopes.insert(renamed.id.clone(), Scoped { key: Arc::downgrade(renamed), ..scoped });
        }
    }

    /// Drops the scopes of keys that are gone.
    pub(crate) fn retain(&self, is_held: impl Fn(&Arc<Key>) -> bool) {
        self.lock().retain(|_, scoped| scoped.key.upgrade().is_some_and(|key| is_held(&key)));
    }

    pub(crate) fn drop_ended(&self, now: Duration) {
        let mut scopes = self.lock();
        for scoped in scopes.values_mut() {
            let generation = scoped.key.upgrade().map_or(0, |key| key.state.load().generation());
            scoped.limits.retain(|_, limit| rests(limit.state, generation, now).is_some());
        }
        scopes.retain(|_, scoped| !scoped.limits.is_empty());
    }

    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<KeyId, Scoped>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Scoped {
    fn is_of(&self, key: &Arc<Key>) -> bool {
        self.key.as_ptr() == Arc::as_ptr(key)
    }
}

fn entry<'a>(scopes: &'a mut HashMap<KeyId, Scoped>, key: &Arc<Key>) -> &'a mut BTreeMap<Scope, Limit> {
    let new = || Scoped { key: Arc::downgrade(key), limits: BTreeMap::new() };
    let scoped = scopes.entry(key.id.clone()).or_insert_with(new);
    if !scoped.is_of(key) {
        *scoped = new();
    }
    &mut scoped.limits
}

/// The rest of a scope, if it is of that generation and not over.
fn rests(word: Word, generation: u64, now: Duration) -> Option<Resting> {
    word.resting(now).filter(|_| word.generation() == generation && !word.is_over(millis(now)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        clock::ManualClock,
        limit::{Rest, Status, Until},
        pool::{KeyPool, ScopeStats},
        store::{KeyRecord, KeyStore, MemoryStore, Operation},
    };

    const MINUTE: Duration = Duration::from_secs(60);

    fn scope(name: &str) -> Scope {
        Scope::new(name).unwrap()
    }

    struct Fixture {
        clock: ManualClock,
        store: MemoryStore,
        pool: KeyPool,
    }

    impl Fixture {
        async fn new() -> Self {
            let clock = ManualClock::new();
            let store = MemoryStore::with_clock(Arc::new(clock.clone()));
            let pool = open(&store, &clock).await;
            Self { clock, store, pool }
        }

        fn mark(&self, name: &str, hint: Duration) {
            mark(&self.pool, name, hint);
        }

        async fn write(&self) {
            self.pool.link().unwrap().write_marks().await.unwrap();
        }

        async fn stored(&self) -> KeyRecord {
            self.store.load(None).await.unwrap().records.remove(0)
        }
    }

    async fn open(store: &MemoryStore, clock: &ManualClock) -> KeyPool {
        let builder = KeyPool::builder().key("alpha", "sk-1").clock(clock.clone()).exact_hints();
        builder.open(store.clone()).await.unwrap()
    }

    fn mark(pool: &KeyPool, name: &str, hint: Duration) {
        let key = pool.engine().snapshot().get("alpha").unwrap().clone();
        pool.engine().mark_scope(&key, scope(name), Rest::RateLimited, Some(hint));
    }

    /// The scopes that rest, and for how long.
    fn shown(pool: &KeyPool) -> Vec<(String, Duration)> {
        let scopes = pool.stats().keys.remove(0).scopes;
        let shown = |ScopeStats { scope, status, time_left, .. }: ScopeStats| {
            assert_eq!(status, Status::RateLimited);
            (scope.to_string(), time_left.unwrap())
        };
        scopes.into_iter().map(shown).collect()
    }

    fn resting(name: &str, left: Duration) -> (String, Duration) {
        (name.to_owned(), left)
    }

    #[tokio::test]
    async fn scope_rests_reach_other_pools_through_the_store() {
        let one = Fixture::new().await;
        let other = open(&one.store, &one.clock).await;
        one.mark("a", 2 * MINUTE);
        one.mark("b", MINUTE);
        one.mark("a", MINUTE);
        assert_eq!((one.pool.stats().healthy, one.pool.stats().marks_waiting), (1, 1));
        one.write().await;
        assert_eq!(one.pool.stats().marks_waiting, 0);
        other.reload().await.unwrap();
        let both = [resting("a", 2 * MINUTE), resting("b", MINUTE)];
        assert_eq!((shown(&one.pool), shown(&other)), (both.to_vec(), both.to_vec()));

        one.clock.advance(MINUTE);
        assert_eq!(shown(&other), [resting("a", MINUTE)]);
    }

    #[tokio::test]
    async fn scope_marks_beside_a_write_stay_pending() {
        let one = Fixture::new().await;
        one.mark("a", MINUTE);
        let key = one.pool.engine().snapshot().keys()[0].clone();
        let written = one.pool.engine().unwritten(&key).unwrap();
        one.mark("b", MINUTE);
        one.pool.engine().acknowledge(&key, &written);
        assert_eq!(one.pool.stats().marks_waiting, 1);
        one.write().await;
        assert_eq!(
            one.stored().await.standing.words.scopes.len(),
            1,
            "a was acknowledged, b alone is written"
        );
        assert_eq!(one.pool.stats().marks_waiting, 0);
    }

    #[tokio::test]
    async fn f09_resets_end_all_scopes_or_one_alone() {
        let one = Fixture::new().await;
        for name in ["a", "b"] {
            one.mark(name, MINUTE);
        }
        one.write().await;
        one.pool.reset_scope("alpha", scope("a")).await.unwrap();
        assert_eq!(shown(&one.pool), [resting("b", MINUTE)]);
        // A mark from before the reset is of an older generation.
        one.mark("c", MINUTE);
        one.pool.reset("alpha").await.unwrap();
        assert_eq!(shown(&one.pool), []);
        one.write().await;
        assert_eq!((one.stored().await.standing.words.scopes.len(), one.pool.stats().marks_waiting), (0, 0));
        one.mark("c", MINUTE);
        one.write().await;
        assert_eq!(one.stored().await.standing.words.scopes.len(), 1);
    }

    #[tokio::test]
    async fn storeless_resets_end_scope_rests_too() {
        let clock = ManualClock::new();
        let pool =
            KeyPool::builder().key("alpha", "sk-1").clock(clock.clone()).exact_hints().build().unwrap();
        for name in ["a", "b"] {
            mark(&pool, name, MINUTE);
        }
        pool.reset_scope("alpha", scope("a")).await.unwrap();
        assert_eq!(shown(&pool), [resting("b", MINUTE)]);
        pool.reset("alpha").await.unwrap();
        assert_eq!((shown(&pool), pool.stats().marks_waiting), (vec![], 0));
    }

    #[tokio::test]
    async fn f17_replacing_keys_inherit_no_scopes() {
        let one = Fixture::new().await;
        let before = one.pool.engine().snapshot().keys()[0].clone();
        one.mark("a", MINUTE);
        let spec = one.stored().await.spec;
        one.store.operate(spec.id.clone(), Operation::Remove).await.unwrap();
        one.store.operate(spec.id.clone(), Operation::Insert(spec)).await.unwrap();
        one.pool.reload().await.unwrap();
        one.pool.engine().mark_scope(&before, scope("b"), Rest::RateLimited, None);
        assert_eq!((shown(&one.pool), one.pool.stats().marks_waiting), (vec![], 0));
        assert!(one.pool.engine().scopes_of(&before).is_empty());
    }

    #[tokio::test]
    async fn scopes_resting_until_reset_have_no_time_left() {
        let one = Fixture::new().await;
        let key = one.pool.engine().snapshot().keys()[0].clone();
        one.pool.engine().mark_scope(&key, scope("a"), Rest::Revoked, None);
        let shown = one.pool.stats().keys.remove(0).scopes.remove(0);
        assert_eq!((shown.status, shown.time_left), (Status::Revoked, None));
        one.write().await;
        assert_eq!(one.stored().await.standing.words.scopes[&scope("a")].until, Until::Reset);
    }

    #[tokio::test]
    async fn nothing_is_kept_of_scopes_that_have_ended() {
        let one = Fixture::new().await;
        one.mark("a", MINUTE);
        one.write().await;
        one.clock.advance(MINUTE);
        one.pool.reload().await.unwrap();
        assert!(one.pool.engine().scopes_of(&one.pool.engine().snapshot().keys()[0]).is_empty());
        assert!(one.pool.engine().has_no_scopes());
    }
}
