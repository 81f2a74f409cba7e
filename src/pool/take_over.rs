//! Takes over into the pool, and its store, what has changed in a source of keys.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::{
    accepted::Accepted,
    key::UsableKey,
    key_pool::KeyPool,
    operate::OperateError,
    source::{Given, Read, Source},
};
use crate::{
    key::{KeyId, KeySpec, Rejected, Secret},
    replication::Chain,
};

/// How many keys came and went, and what went wrong.
#[derive(Debug, Default)]
pub(crate) struct Taken {
    pub(crate) added: usize,
    pub(crate) replaced: usize,
    pub(crate) renewed: usize,
    pub(crate) removed: usize,
    /// What could not be taken over.
    pub(crate) failures: Vec<String>,
    /// Whether the store is the reason for one of them: it may succeed later.
    pub(crate) has_store_failed: bool,
    pub(crate) rejected: Vec<Rejected>,
}

/// What a source says now, beside what it said before.
struct Changes {
    new: Vec<Given>,
    /// With what the source said before.
    different: Vec<(Given, Given)>,
    /// With secrets that expire: renewed in this process alone.
    expiring: Vec<Given>,
    gone: Vec<Given>,
}

impl KeyPool {
    /// Makes the pool's keys of a source those that it names now. Keys that are as before stay as they are, whatever
    /// became of them meanwhile.
    pub(crate) async fn take_over(&self, source: &Source, read: &Read) -> Taken {
        let mut accepted = Accepted::default();
        let inject = &self.engine().config.inject;
        source.parsed(read).into_iter().for_each(|parsed| accepted.add(parsed, inject));
        let specs: Vec<_> = accepted.keys.iter().map(UsableKey::spec).collect();
        let given = source.given();
        let mut taking = Taking {
            pool: self,
            source,
            written: Vec::new(),
            taken: Taken { rejected: accepted.rejected, ..Taken::default() },
        };
        let changes = Changes::between(given, read.given(&specs), &taking.taken.rejected);
        if !changes.are_none() {
            taking.take(changes).await;
            if let (Some(link), false) = (self.link(), taking.written.is_empty()) {
                link.note_sourced(&taking.written).await;
            }
        }
        let taken = taking.taken;
        let has_changed = taken.added + taken.replaced + taken.renewed + taken.removed > 0;
        source.took(read, has_changed, self.clock().now());
        taken
    }
}

impl Changes {
    fn between(
        mut before: BTreeMap<KeyId, Given>,
        now: BTreeMap<KeyId, Given>,
        rejected: &[Rejected],
    ) -> Self {
        let (mut new, mut different, mut expiring) = (Vec::new(), Vec::new(), Vec::new());
        for (id, key) in now {
            match before.remove(&id) {
                Some(_) if key.until.is_some() => expiring.push(key),
                Some(old) if old.spec != key.spec || old.until.is_some() => different.push((key, old)),
                Some(_) => {}
                None => new.push(key),
            }
        }
        // An entry that can't be used changes nothing.
        let stay: BTreeSet<_> = rejected.iter().filter_map(Rejected::id).collect();
        let gone = before.into_values().filter(|key| !stay.contains(&key.spec.id)).collect();
        Self { new, different, expiring, gone }
    }

    fn are_none(&self) -> bool {
        self.new.is_empty() && self.different.is_empty() && self.expiring.is_empty() && self.gone.is_empty()
    }
}

struct Taking<'a> {
    pool: &'a KeyPool,
    source: &'a Source,
    /// The keys that were inserted or replaced.
    written: Vec<KeySpec>,
    taken: Taken,
}

impl Taking<'_> {
    async fn take(&mut self, changes: Changes) {
        let Changes { new, different, expiring, gone } = changes;
        // First: these need no store.
        for key in expiring {
            self.renew(key).await;
        }
        if let (Some(_), false) =
            (self.pool.link(), new.is_empty() && different.is_empty() && gone.is_empty())
            && let Err(error) = self.pool.reload().await
        {
            // The changes fail as well, and are tried again.
            tracing::debug!(error = %Chain(&error), "the store could not be loaded before keys of a source change");
        }
        let there = There::of(self.pool);
        // Another process may have made the same change in a store that both share.
        let new = new.into_iter().filter(|key| !self.is_there(&there, key)).collect();
        // The new keys come first, so that the pool is never without any. The secret of a key that goes may be that of a
        // new one, which then has to wait.
        let late = self.insert(new).await;
        for key in gone {
            // The store may have the key under another id.
            let id = there.id_of(&key.spec).unwrap_or_else(|| key.spec.id.clone());
            match self.remove(&id).await {
                Err(error) if !error.is_unknown_key() => self.fails(&id, &error),
                removed => {
                    self.taken.removed += usize::from(removed.is_ok());
                    self.source.forget(&key.spec.id);
                }
            }
        }
        let mut again: Vec<_> = late.into_iter().map(|(key, _)| key).collect();
        for (key, before) in different {
            // Of a secret that no longer expires, the store may have an older one.
            if before.until.is_none() && self.is_there(&there, &key) {
                continue;
            }
            let id = there.id_of(&before.spec).unwrap_or_else(|| key.spec.id.clone());
            let spec = KeySpec { id, ..key.spec.clone() };
            match self.pool.replace(spec.clone()).await {
                Ok(()) => {
                    self.taken.replaced += 1;
                    self.written.push(spec);
                    self.note(key);
                }
                // An operator has removed it, but the source has changed since; or its secret has expired.
                Err(error) if error.is_unknown_key() => {
                    let _ = self.remove(&key.spec.id).await;
                    again.push(key);
                }
                Err(error) => self.fails(&key.spec.id, &error),
            }
        }
        for (key, error) in self.insert(again).await {
            self.fails(&key.spec.id, &error);
        }
    }

    /// Removes a key, also one that has left the pool because its secret has expired.
    async fn remove(&self, id: &KeyId) -> Result<(), OperateError> {
        let removed = self.pool.remove(id).await;
        if removed.as_ref().is_err_and(OperateError::is_unknown_key) && self.source.suspended(id).is_some() {
            return self.pool.remove_from_store(id).await;
        }
        removed
    }

    /// Whether the pool has the key as the source names it now.
    fn is_there(&mut self, there: &There, key: &Given) -> bool {
        let is_there = there.specs.get(&key.spec.id) == Some(&key.spec);
        if is_there {
            self.note(key.clone());
        }
        is_there
    }

    /// Inserts keys, and returns those that could not be.
    async fn insert(&mut self, keys: Vec<Given>) -> Vec<(Given, OperateError)> {
        if keys.is_empty() {
            return Vec::new();
        }
        let outcomes = self.pool.insert_all(keys.iter().map(|key| key.spec.clone())).await;
        let mut failed = Vec::new();
        for (key, outcome) in keys.into_iter().zip(outcomes) {
            match outcome {
                Ok(()) => {
                    self.taken.added += 1;
                    self.written.push(key.spec.clone());
                    self.note(key);
                }
                Err(error) => failed.push((key, error)),
            }
        }
        failed
    }

    /// Gives a key its new secret, in this process alone: what the store has of a secret that expires does not count.
    async fn renew(&mut self, key: Given) {
        let (engine, id) = (self.pool.engine(), key.spec.id.clone());
        let held = engine.snapshot().get(id.as_str()).cloned();
        let Some(old) = held.clone().or_else(|| self.source.suspended(&id)) else {
            // An operator has removed it.
            return self.note(key);
        };
        let before = old.spec();
        let with_new_secret = KeySpec { secret: key.spec.secret.clone(), ..before.clone() };
        if with_new_secret != key.spec {
            match self.pool.replace(key.spec.clone()).await {
                Ok(()) => self.taken.replaced += 1,
                Err(error) => return self.fails(&id, &error),
            }
            return self.note(key);
        }
        if held.is_some() && before.secret == key.spec.secret {
            return self.note(key);
        }
        if key.until.is_some_and(|until| until <= engine.now()) {
            return self.taken.failures.push(format!("key {id}: its secret has expired"));
        }
        let secret = &key.spec.secret;
        let same = engine
            .snapshot()
            .keys()
            .iter()
            .find(|other| other.id != id && other.secret() == *secret)
            .cloned();
        if let Some(other) = same {
            self.taken.failures.push(format!("key {id}: key {} has the same secret", other.id));
            return;
        }
        match UsableKey::new(&key.spec, &engine.config.inject) {
            // At once, or a load could bring the old secret back.
            Ok(usable) => engine.renew(&old, usable, || self.source.note(key)),
            Err(reason) => return self.taken.failures.push(format!("key {id} can't be used: {reason}")),
        }
        self.taken.renewed += 1;
    }

    fn note(&mut self, key: Given) {
        self.source.note(key);
    }

    fn fails(&mut self, id: &KeyId, error: &OperateError) {
        self.taken.has_store_failed |= error.is_store_failure();
        self.taken.failures.push(format!("key {id}: {}", Chain(error)));
    }
}

/// The keys of the pool.
struct There {
    specs: HashMap<KeyId, KeySpec>,
    by_secret: HashMap<Secret, KeyId>,
}

impl There {
    fn of(pool: &KeyPool) -> Self {
        let specs: HashMap<_, _> = pool.specs().into_iter().map(|spec| (spec.id.clone(), spec)).collect();
        let by_secret = specs.values().map(|spec| (spec.secret.clone(), spec.id.clone())).collect();
        Self { specs, by_secret }
    }

    /// The id of a key as the pool has it.
    fn id_of(&self, spec: &KeySpec) -> Option<KeyId> {
        if self.specs.contains_key(&spec.id) {
            return Some(spec.id.clone());
        }
        self.by_secret.get(&spec.secret).cloned()
    }
}
