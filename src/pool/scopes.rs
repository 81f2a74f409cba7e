//! The rests of single scopes, of the few keys that have any, as the store knows them. No request reads or makes them
//! yet.

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
    limits: BTreeMap<Scope, Word>,
}

impl Scopes {
    /// Joins what the store says of a key's scopes, and drops what has ended.
    ///
    /// `is_current` is asked under the lock, so that a key that has been replaced leaves nothing here.
    pub(crate) fn join(&self, key: &Arc<Key>, words: &Words, now: Duration, is_current: impl Fn() -> bool) {
        let mut scopes = self.lock();
        if words.scopes.is_empty() && !scopes.contains_key(&key.id) || !is_current() {
            return;
        }
        let limits = entry(&mut scopes, key);
        for (scope, resting) in &words.scopes {
            let limit = limits.entry(scope.clone()).or_default();
            *limit = limit.join(Word::new(words.generation, Some(*resting), now));
        }
        let generation = key.state.load().generation();
        limits.retain(|_, limit| rests(*limit, generation, now).is_some());
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
            .filter_map(|(scope, limit)| Some((scope.clone(), rests(*limit, generation, now)?)));
        resting.collect()
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
            scoped.limits.retain(|_, limit| rests(*limit, generation, now).is_some());
        }
        scopes.retain(|_, scoped| !scoped.limits.is_empty());
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

fn entry<'a>(scopes: &'a mut HashMap<KeyId, Scoped>, key: &Arc<Key>) -> &'a mut BTreeMap<Scope, Word> {
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
