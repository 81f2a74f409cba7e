//! Keys whose secrets change or expire: what the pool does with their sources beside following them.

use std::{collections::HashMap, sync::Arc, time::Duration};

use super::{engine::Engine, key::Key, source::Source};
use crate::{
    clock::Clock,
    key::{KeyId, Secret},
};

/// How long a request waits for the read that it asked for.
const PATIENCE: Duration = Duration::from_secs(10);

impl Engine {
    fn source_of(&self, key: &Key) -> Option<&Arc<Source>> {
        self.config.sources.iter().find(|source| source.gives(key))
    }

    /// A service refused a key that a source may have another secret for.
    pub(super) fn ask_sources(&self, key: &Arc<Key>, http_status: u16) {
        if http_status == 401
            && let Some(source) = self.source_of(key)
            && self.snapshot().holds(key)
        {
            source.ask(self.now());
        }
    }

    /// Whether a source may have another secret for a key.
    pub(crate) fn may_be_outdated(&self, key: &Key) -> bool {
        self.source_of(key).is_some()
    }

    /// Whether the pool has another secret for a key that a service refused, after a read of the key's source if need be. That takes 10 seconds at most, by that clock.
    pub(crate) async fn is_outdated(&self, key: &Arc<Key>, clock: &dyn Clock) -> bool {
        let is_replaced = || {
            let snapshot = self.snapshot();
            snapshot
                .get(key.id.as_str())
                .is_some_and(|held| !Arc::ptr_eq(held, key) && held.secret() != key.secret())
        };
        if is_replaced() {
            return true;
        }
        let Some(source) = self.source_of(key) else { return false };
        let now = self.now();
        let Some(mut answers) = source.ask(now) else { return false };
        tokio::select! {
            biased;
            _ = answers.changed() => is_replaced(),
            () = clock.sleep_until(now.saturating_add(PATIENCE)) => false,
        }
    }

    /// The secrets of keys whose secrets expire; `None` for one that has expired. What a store has of them may be older.
    pub(crate) fn expiring(&self) -> HashMap<KeyId, Option<Secret>> {
        self.config.sources.iter().flat_map(|source| source.expiring()).collect()
    }

    /// Takes the keys of a source out of the pool whose secrets have expired. Returns their ids.
    pub(crate) fn expire(&self, source: &Source) -> Vec<KeyId> {
        let (ids, keys) = source.expire(self.now(), |id| self.snapshot().get(id.as_str()).cloned());
        keys.iter().for_each(|key| self.suspend(key));
        ids
    }
}
