//! An upstream as it runs: its keys, and the client that sends requests with them.

use std::{
    collections::{HashMap, HashSet},
    error::Error,
    sync::{Mutex, MutexGuard, PoisonError},
};

use tower_key_rotation::{
    KeyId, KeyPool, KeySpec, NotWritten, RecoveryHandle,
    store::{KeyStore, file::FileStore},
};

use crate::{
    config::UpstreamConfig,
    exchange::{Taken, exchange},
    keys,
    metrics::Durations,
    proxy::{Client, Turns, client},
    with_sources,
};

pub(crate) struct Upstream {
    pub(crate) config: UpstreamConfig,
    pub(crate) pool: KeyPool,
    pub(crate) client: Client,
    pub(crate) turns: Turns,
    pub(crate) durations: Durations,
    /// The file that keeps the state.
    state: Option<FileStore>,
    /// The keys of its files and variables, when these were last read.
    given: Mutex<Vec<KeySpec>>,
    /// `None` before the start and after the shutdown.
    recovery: Mutex<Option<RecoveryHandle>>,
}

impl Upstream {
    /// Reads the keys and opens the pool, without its recovery.
    pub(crate) async fn open(config: UpstreamConfig) -> Result<Self, Box<dyn Error>> {
        let given = keys::given(&config)?;
        Self::open_with(config, given).await
    }

    /// Opens the pool over keys that have been read already.
    pub(crate) async fn open_with(
        config: UpstreamConfig,
        given: Vec<KeySpec>,
    ) -> Result<Self, Box<dyn Error>> {
        let state = keys::state(&config)?;
        Self::with_keys(config, given.clone(), given, state).await
    }

    /// Opens an upstream that is to replace this one with another configuration, without the keys that operators have
    /// removed.
    pub(crate) async fn changed(
        &self,
        config: UpstreamConfig,
        given: Vec<KeySpec>,
    ) -> Result<Self, Box<dyn Error>> {
        let (before, there) = (lock(&self.given).clone(), ids(&self.pool.specs()));
        let before: HashMap<_, _> = before.iter().map(|key| (&key.id, key)).collect();
        let was_removed = |key: &KeySpec| before.get(&key.id) == Some(&key) && !there.contains(&key.id);
        let keys: Vec<_> = given.iter().filter(|key| !was_removed(key)).cloned().collect();
        // A file can be opened once.
        let state =
            if config.state == self.config.state { self.state.clone() } else { keys::state(&config)? };
        Self::with_keys(config, keys, given, state).await
    }

    /// Takes over what operators have changed in the upstream that this one replaces, and the rests of its keys.
    pub(crate) async fn take_over(&self, old: &Self) {
        let (before, now) = (ids(&lock(&old.given)), ids(&lock(&self.given)));
        let gone: Vec<_> = before.difference(&now).collect();
        // A pool over MongoDB may not have read its keys yet.
        if !gone.is_empty()
            && let Err(error) = self.pool.reload().await
        {
            tracing::warn!(upstream = self.name(), "the key store can't be read: {}", with_sources(&error));
        }
        // A pool over a file that is open already removes no key by itself.
        for id in gone {
            if let Err(error) = self.pool.remove(id).await
                && !error.is_unknown_key()
            {
                tracing::warn!(upstream = self.name(), key = %id, "not removed: {}", with_sources(&error));
            }
        }
        // Where the store is another one now, keys that were added in the old one stay there.
        if self.config.mongodb.is_none() && old.config.mongodb.is_none() {
            let was_added = |key: &KeySpec| !before.contains(&key.id) && !now.contains(&key.id);
            let added = old.pool.specs().into_iter().filter(was_added);
            for error in self.pool.insert_all(added).await.into_iter().filter_map(Result::err) {
                // What is in a file already stays as it is.
                if !error.is_taken() {
                    tracing::warn!(upstream = self.name(), "not added: {}", with_sources(&error));
                }
            }
        }
        self.pool.adopt_rests(&old.pool);
    }

    async fn with_keys(
        config: UpstreamConfig,
        keys: Vec<KeySpec>,
        given: Vec<KeySpec>,
        state: Option<FileStore>,
    ) -> Result<Self, Box<dyn Error>> {
        let pool = keys::open(&config, keys, state.clone()).await?;
        let client = client(&pool, &config)?;
        let durations = Durations::of(&config.name);
        Ok(Self {
            config,
            pool,
            client,
            durations,
            turns: Turns::default(),
            state,
            given: Mutex::new(given),
            recovery: Mutex::default(),
        })
    }

    /// An upstream on this machine with these keys.
    #[cfg(test)]
    pub(crate) fn of(pool: KeyPool) -> Self {
        let config = UpstreamConfig::local();
        let client = client(&pool, &config).unwrap();
        let given = Mutex::new(pool.specs());
        let durations = Durations::of(&config.name);
        Self {
            config,
            pool,
            client,
            turns: Turns::default(),
            durations,
            state: None,
            given,
            recovery: Mutex::default(),
        }
    }

    pub(crate) fn name(&self) -> &str {
        &self.config.name
    }

    /// Reads the keys of its files and variables again, and returns them if they have changed.
    pub(crate) fn changed_keys(&self, given: Vec<KeySpec>) -> Option<Vec<KeySpec>> {
        (given != *lock(&self.given)).then_some(given)
    }

    /// Makes the pool's keys those that its files and variables name now.
    pub(crate) async fn take_keys(&self, now: Vec<KeySpec>) -> Taken {
        let before = lock(&self.given).clone();
        let taken = exchange(&self.pool, self.name(), &before, &now).await;
        // What has failed is tried again with the next reload.
        if taken.failed == 0 {
            lock(&self.given).clone_from(&now);
        }
        self.note_source(now).await;
        taken
    }

    /// Has the state file know which keys came from files and variables: the next start removes them when they are gone
    /// from there.
    async fn note_source(&self, mut given: Vec<KeySpec>) {
        let Some(state) = &self.state else { return };
        let there: HashSet<_> = self.pool.specs().into_iter().map(|key| key.id).collect();
        given.retain(|key| there.contains(&key.id));
        if let Err(error) = state.plant(&given).await {
            tracing::warn!(upstream = self.name(), "{}", with_sources(&error));
        }
    }

    /// Begins to recover keys and to exchange their state with the store.
    pub(crate) fn start(&self) {
        *lock(&self.recovery) = Some(RecoveryHandle::spawn(&self.pool));
    }

    /// Writes the pending state of the keys to their store.
    pub(crate) async fn shutdown(&self) -> Result<(), NotWritten> {
        let recovery = lock(&self.recovery).take();
        match recovery {
            Some(recovery) => recovery.shutdown().await,
            None => Ok(()),
        }
    }
}

fn ids(keys: &[KeySpec]) -> HashSet<KeyId> {
    keys.iter().map(|key| key.id.clone()).collect()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
