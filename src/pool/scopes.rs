//! The rests of single scopes, of the few keys that have any: those that responses named here, and those that the store
//! knows.
//!
//! A pick looks at a scope's limits alone (`scoped.rs`). What begins here closes them, and a scope that is used for the
//! first time takes what it finds here. Rests of less than [`WORTH_SHARING`], and what budgets allow, are not kept here.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap},
    sync::{Arc, PoisonError, Weak},
    time::Duration,
};

use super::{key::Key, layout::Layout};
use crate::{
    key::KeyId,
    limit::{Resting, Scope, Word, Words, millis},
    sync::{Mutex, MutexGuard},
};

/// A shorter rest is over before another process could make use of it: a mark takes some 250 ms to the store, and up to a
/// second from there.
pub(super) const WORTH_SHARING: Duration = Duration::from_secs(5);

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
    /// The join of the marks that the store does not have yet.
    pending: Word,
}

/// The pending word of one scope.
pub(super) type Pending = (Scope, Word);

impl Scopes {
    /// Joins what a response said of one scope. Returns whether the scope rests longer now.
    ///
    /// `is_current` is asked under the lock, so that a key that has been replaced leaves nothing here.
    pub(super) fn mark(
        &self,
        key: &Arc<Key>,
        scope: &Scope,
        word: Word,
        keeps_pending: bool,
        is_current: impl Fn() -> bool,
    ) -> bool {
        let mut scopes = self.lock();
        if !is_current() {
            return false;
        }
        let limits = entry(&mut scopes, key);
        let limit = limits.entry(scope.clone()).or_default();
        if limit.state.join(word) == limit.state {
            return false;
        }
        limit.state = word;
        if keeps_pending {
            limit.pending = limit.pending.join(word);
            let generation = Word::HEALTHY.in_generation_of(word);
            // Under the lock, or `acknowledge` could clear the flag of a rest that it has not seen.
            key.pending.update(|pending| pending.join(generation).with_scopes(true));
        }
        drop_the_first_to_end(limits);
        true
    }

    /// Joins what the store says of a key's scopes, and drops what has ended. Returns the scopes that rest longer now,
    /// with their deadlines in milliseconds.
    ///
    /// `is_current` is asked under the lock, so that a key that has been replaced leaves nothing here.
    pub(super) fn join(
        &self,
        key: &Arc<Key>,
        words: &Words,
        now: Duration,
        is_current: impl Fn() -> bool,
    ) -> Vec<(Scope, u64)> {
        let mut longer = Vec::new();
        let mut scopes = self.lock();
        if words.scopes.is_empty() && !scopes.contains_key(&key.id) || !is_current() {
            return longer;
        }
        let limits = entry(&mut scopes, key);
        let generation = key.state.load().generation();
        for (scope, resting) in &words.scopes {
            let word = Word::new(words.generation, Some(*resting), now);
            let known = limits.get(scope).map_or(Word::HEALTHY, |limit| limit.state);
            if known.join(word) == known {
                continue;
            }
            limits.entry(scope.clone()).or_default().state = word;
            if rests(word, generation, now).is_some() {
                longer.push((scope.clone(), word.deadline()));
            }
        }
        limits.retain(|_, limit| rests(limit.state, generation, now).is_some());
        drop_the_first_to_end(limits);
        if limits.is_empty() {
            scopes.remove(&key.id);
        }
        longer
    }

    /// The rests of a key's scopes in this generation.
    pub(super) fn of(&self, key: &Arc<Key>, generation: u64, now: Duration) -> BTreeMap<Scope, Resting> {
        let scopes = self.lock();
        let limits = limits_of(&scopes, key).into_iter().flatten();
        limits
            .filter_map(|(scope, limit)| Some((scope.clone(), rests(limit.state, generation, now)?)))
            .collect()
    }

    /// Until when a scope of a key rests, in milliseconds; 0 if it does not.
    fn rests_until(&self, key: &Arc<Key>, scope: &Scope, now: Duration) -> u64 {
        let scopes = self.lock();
        let generation = key.state.load().generation();
        let state = limits_of(&scopes, key).and_then(|limits| limits.get(scope)).map(|limit| limit.state);
        state.filter(|state| rests(*state, generation, now).is_some()).map_or(0, Word::deadline)
    }

    /// Until when the limit of a slot rests in a scope, in ns; 0 if it does not: for the longest of its quota group's rests.
    pub(super) fn limit_rests_until(
        &self,
        (keys, layout): (&[Arc<Key>], &Layout),
        slot: usize,
        scope: &Scope,
        now: Duration,
    ) -> u64 {
        let until = |slot: usize| self.rests_until(&keys[slot], scope, now);
        let until = match layout.group_of(slot) {
            Some((_, members)) => members.iter().map(|member| until(*member as usize)).max().unwrap_or(0),
            None => until(slot),
        };
        until.saturating_mul(1_000_000)
    }

    /// The keys whose scope of that name rests, with the deadlines in milliseconds.
    pub(super) fn resting_in(&self, scope: &Scope, now: Duration) -> Vec<(Arc<Key>, u64)> {
        let resting = |scoped: &Scoped| {
            let word = scoped.limits.get(scope)?.state;
            let key = scoped.key.upgrade()?;
            rests(word, key.state.load().generation(), now)?;
            Some((key, word.deadline()))
        };
        self.lock().values().filter_map(resting).collect()
    }

    /// The rests of these scopes, with the deadlines in milliseconds.
    pub(super) fn all(&self, now: Duration, is_one: impl Fn(&Scope) -> bool) -> Vec<(Arc<Key>, Scope, u64)> {
        let mut all = Vec::new();
        for scoped in self.lock().values() {
            let Some(key) = scoped.key.upgrade() else { continue };
            let generation = key.state.load().generation();
            let limits = scoped.limits.iter().filter(|(scope, _)| is_one(scope));
            let resting = limits.filter(|(_, limit)| rests(limit.state, generation, now).is_some());
            all.extend(resting.map(|(scope, limit)| (key.clone(), scope.clone(), limit.state.deadline())));
        }
        all
    }

    /// The words that the store is to be told.
    pub(super) fn pending(&self, key: &Arc<Key>) -> Vec<Pending> {
        let scopes = self.lock();
        let limits = limits_of(&scopes, key).into_iter().flatten();
        let pending = limits.filter(|(_, limit)| limit.pending != Word::HEALTHY);
        pending.map(|(scope, limit)| (scope.clone(), limit.pending)).collect()
    }

    /// Clears the pending words that the store has, as far as they are unchanged, and the key's, which was `before`.
    pub(super) fn acknowledge(&self, key: &Arc<Key>, before: Word, written: &[Pending]) {
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
    pub(super) fn rename(&self, key: &Arc<Key>, renamed: &Arc<Key>) {
        let mut scopes = self.lock();
        if let Some(scoped) = scopes.remove(&key.id) {
            scopes.insert(renamed.id.clone(), Scoped { key: Arc::downgrade(renamed), ..scoped });
        }
    }

    /// Drops the scopes of keys that are gone.
    pub(super) fn retain(&self, is_held: impl Fn(&Arc<Key>) -> bool) {
        self.lock().retain(|_, scoped| scoped.key.upgrade().is_some_and(|key| is_held(&key)));
    }

    pub(super) fn drop_ended(&self, now: Duration) {
        let mut scopes = self.lock();
        for scoped in scopes.values_mut() {
            let generation = scoped.key.upgrade().map_or(0, |key| key.state.load().generation());
            scoped.limits.retain(|_, limit| rests(limit.state, generation, now).is_some());
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

fn limits_of<'a>(scopes: &'a HashMap<KeyId, Scoped>, key: &Arc<Key>) -> Option<&'a BTreeMap<Scope, Limit>> {
    scopes.get(&key.id).filter(|scoped| scoped.is_of(key)).map(|scoped| &scoped.limits)
}

fn entry<'a>(scopes: &'a mut HashMap<KeyId, Scoped>, key: &Arc<Key>) -> &'a mut BTreeMap<Scope, Limit> {
    let new = || Scoped { key: Arc::downgrade(key), limits: BTreeMap::new() };
    let scoped = scopes.entry(key.id.clone()).or_insert_with(new);
    if !scoped.is_of(key) {
        *scoped = new();
    }
    &mut scoped.limits
}

/// A store drops the same ones.
fn drop_the_first_to_end(limits: &mut BTreeMap<Scope, Limit>) {
    while limits.len() > Words::MOST_SCOPES {
        let last = |(scope, limit): (&Scope, &Limit)| (limit.state, Reverse(scope.clone()));
        let Some((_, Reverse(first))) = limits.iter().map(last).min() else { return };
        limits.remove(&first);
    }
}

/// The rest of a scope, if it is of that generation and not over.
fn rests(word: Word, generation: u64, now: Duration) -> Option<Resting> {
    word.resting(now).filter(|_| word.generation() == generation && !word.is_over(millis(now)))
}
