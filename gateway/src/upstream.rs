//! An upstream as it runs: its keys, and the client that sends requests with them.

use std::{
    error::Error,
    sync::{Mutex, MutexGuard, PoisonError},
};

use tower_key_rotation::{KeyPool, KeySpec, MarksNotWritten, OperateError, RecoveryHandle};

use crate::{
    config::{Invalid, UpstreamConfig},
    keys,
    proxy::{Client, client},
    with_sources,
};

pub(crate) struct Upstream {
    pub(crate) config: UpstreamConfig,
    pub(crate) pool: KeyPool,
    pub(crate) client: Client,
    /// The keys of its files and variables, when these were last read.
    given: Mutex<Vec<KeySpec>>,
    /// `None` before the start and after the shutdown.
    recovery: Mutex<Option<RecoveryHandle>>,
}

impl Upstream {
    /// Reads the keys and opens the pool, without its recovery.
    pub(crate) async fn open(config: UpstreamConfig) -> Result<Self, Box<dyn Error>> {
        let given = keys::given(&config)?;
        Self::with_keys(config, given.clone(), given).await
    }

    /// Opens an upstream that replaces this one with another configuration. What operators have changed stays, and so do
    /// the rests of keys.
    pub(crate) async fn changed(&self, config: UpstreamConfig) -> Result<Self, Box<dyn Error>> {
        let given = keys::given(&config)?;
        let (before, there) = (lock(&self.given).clone(), self.pool.specs());
        let is_in = |keys: &[KeySpec], key: &KeySpec| keys.iter().any(|other| other.id == key.id);
        let was_removed = |key: &&KeySpec| before.contains(key) && !is_in(&there, key);
        let mut keys: Vec<_> = given.iter().filter(|key| !was_removed(key)).cloned().collect();
        // Where the store is another one now, keys that were added in the old one stay there.
        if config.mongodb.is_none() && self.config.mongodb.is_none() {
            let added = there.iter().filter(|key| !is_in(&before, key) && !is_in(&given, key));
            keys.extend(added.cloned());
        }
        let changed = Self::with_keys(config, keys, given).await?;
        changed.pool.adopt_rests(&self.pool);
        Ok(changed)
    }

    async fn with_keys(
        config: UpstreamConfig,
        keys: Vec<KeySpec>,
        given: Vec<KeySpec>,
    ) -> Result<Self, Box<dyn Error>> {
        let pool = keys::open(&config, keys).await?;
        let client = client(&pool, &config)?;
        Ok(Self { config, pool, client, given: Mutex::new(given), recovery: Mutex::default() })
    }

    /// An upstream on this machine with these keys.
    #[cfg(test)]
    pub(crate) fn of(pool: KeyPool) -> Self {
        let config = UpstreamConfig::local();
        let client = client(&pool, &config).unwrap();
        let given = Mutex::new(pool.specs());
        Self { config, pool, client, given, recovery: Mutex::default() }
    }

    pub(crate) fn name(&self) -> &str {
        &self.config.name
    }

    /// Reads the keys of its files and variables again, and returns them if they have changed.
    pub(crate) fn changed_keys(&self) -> Result<Option<Vec<KeySpec>>, Invalid> {
        let given = keys::given(&self.config)?;
        Ok((given != *lock(&self.given)).then_some(given))
    }

    /// Makes the pool's keys those that its files and variables name now. Keys that stay keep their rests, and keys that
    /// an operator has added stay.
    pub(crate) async fn take_keys(&self, now: Vec<KeySpec>) -> Taken {
        let before = std::mem::replace(&mut *lock(&self.given), now.clone());
        let old = |key: &KeySpec| before.iter().find(|old| old.id == key.id);
        let (new, kept): (Vec<_>, Vec<_>) = now.iter().cloned().partition(|key| old(key).is_none());
        let different: Vec<_> = kept.into_iter().filter(|key| old(key) != Some(key)).collect();
        let gone = before.iter().filter(|old| !now.iter().any(|key| key.id == old.id));

        let mut taken = Taken::default();
        // The new keys come first, so that the pool is never without any. The secret of a key that goes may be that of a
        // new one, which then has to wait.
        let late = self.insert(new, &mut taken).await;
        for key in gone {
            match self.pool.remove(&key.id).await {
                Err(error) if !error.is_unknown_key() => self.fails(key, &error, &mut taken),
                _ => taken.removed += 1,
            }
        }
        for key in different {
            match self.pool.replace(key.clone()).await {
                Ok(()) => taken.replaced += 1,
                // An operator has removed it, but the file has changed since.
                Err(error) if error.is_unknown_key() => {
                    for (key, error) in self.insert(vec![key], &mut taken).await {
                        self.fails(&key, &error, &mut taken);
                    }
                }
                Err(error) => self.fails(&key, &error, &mut taken),
            }
        }
        let late = late.into_iter().map(|(key, _)| key).collect();
        for (key, error) in self.insert(late, &mut taken).await {
            self.fails(&key, &error, &mut taken);
        }
        taken
    }

    /// Inserts keys, and returns those that could not be.
    async fn insert(&self, keys: Vec<KeySpec>, taken: &mut Taken) -> Vec<(KeySpec, OperateError)> {
        let outcomes = self.pool.insert_all(keys.clone()).await;
        taken.added += outcomes.iter().filter(|outcome| outcome.is_ok()).count();
        keys.into_iter().zip(outcomes).filter_map(|(key, outcome)| Some((key, outcome.err()?))).collect()
    }

    fn fails(&self, key: &KeySpec, error: &OperateError, taken: &mut Taken) {
        taken.failed += 1;
        let (key, error) = (key.id.as_str(), with_sources(error));
        tracing::warn!(key, upstream = self.name(), error, "key of the file not taken over");
    }

    /// Begins to recover keys and to exchange their state with the store.
    pub(crate) fn start(&self) {
        *lock(&self.recovery) = Some(RecoveryHandle::spawn(&self.pool));
    }

    /// Writes the pending state of the keys to their store.
    pub(crate) async fn shutdown(&self) -> Result<(), MarksNotWritten> {
        let recovery = lock(&self.recovery).take();
        match recovery {
            Some(recovery) => recovery.shutdown().await,
            None => Ok(()),
        }
    }
}

/// How many keys of a file were taken over.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Taken {
    pub(crate) added: usize,
    pub(crate) replaced: usize,
    pub(crate) removed: usize,
    pub(crate) failed: usize,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
