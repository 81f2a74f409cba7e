//! An upstream as it runs: its keys, and the client that sends requests with them.

use std::{
    collections::{HashMap, HashSet},
    error::Error,
    sync::{Mutex, MutexGuard, PoisonError},
};

use tower_key_rotation::{
    KeyPool, KeySpec, MarksNotWritten, RecoveryHandle,
    store::{KeyStore, file::FileStore},
};

use crate::{
    config::{Invalid, UpstreamConfig},
    exchange::{Taken, exchange},
    keys,
    proxy::{Client, client},
    with_sources,
};

pub(crate) struct Upstream {
    pub(crate) config: UpstreamConfig,
    pub(crate) pool: KeyPool,
    pub(crate) client: Client,
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
        let (given, state) = (keys::given(&config)?, keys::state(&config)?);
        Self::with_keys(config, given.clone(), given, state).await
    }

    /// Opens an upstream that replaces this one with another configuration. What operators have changed stays, and so do
    /// the rests of keys.
    pub(crate) async fn changed(&self, config: UpstreamConfig) -> Result<Self, Box<dyn Error>> {
        let given = keys::given(&config)?;
        let (before, there) = (lock(&self.given).clone(), self.pool.specs());
        let by_id = |keys: &[KeySpec]| keys.iter().map(|key| (key.id.clone(), key.clone())).collect();
        let [old, now, in_pool]: [HashMap<_, _>; 3] = [by_id(&before), by_id(&given), by_id(&there)];
        let was_removed = |key: &KeySpec| old.get(&key.id) == Some(key) && !in_pool.contains_key(&key.id);
        let keys: Vec<_> = given.iter().filter(|key| !was_removed(key)).cloned().collect();
        let gone = before.iter().filter(|key| !now.contains_key(&key.id));
        let mut added = Vec::new();
        // Where the store is another one now, keys that were added in the old one stay there.
        if config.mongodb.is_none() && self.config.mongodb.is_none() {
            let was_added = |key: &KeySpec| !old.contains_key(&key.id) && !now.contains_key(&key.id);
            added.extend(there.into_iter().filter(was_added));
        }
        // A file can be opened once.
        let state =
            if config.state == self.config.state { self.state.clone() } else { keys::state(&config)? };
        let changed = Self::with_keys(config, keys, given, state).await?;
        // A pool over a file that is open already removes no key by itself.
        for key in gone {
            let _ = changed.pool.remove(&key.id).await;
        }
        // Those that are in a file already stay as they are.
        let _ = changed.pool.insert_all(added).await;
        changed.pool.adopt_rests(&self.pool);
        Ok(changed)
    }

    async fn with_keys(
        config: UpstreamConfig,
        keys: Vec<KeySpec>,
        given: Vec<KeySpec>,
        state: Option<FileStore>,
    ) -> Result<Self, Box<dyn Error>> {
        let pool = keys::open(&config, keys, state.clone()).await?;
        let client = client(&pool, &config)?;
        Ok(Self { config, pool, client, state, given: Mutex::new(given), recovery: Mutex::default() })
    }

    /// An upstream on this machine with these keys.
    #[cfg(test)]
    pub(crate) fn of(pool: KeyPool) -> Self {
        let config = UpstreamConfig::local();
        let client = client(&pool, &config).unwrap();
        let given = Mutex::new(pool.specs());
        Self { config, pool, client, state: None, given, recovery: Mutex::default() }
    }

    pub(crate) fn name(&self) -> &str {
        &self.config.name
    }

    /// Reads the keys of its files and variables again, and returns them if they have changed.
    pub(crate) fn changed_keys(&self) -> Result<Option<Vec<KeySpec>>, Invalid> {
        let given = keys::given(&self.config)?;
        Ok((given != *lock(&self.given)).then_some(given))
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
    pub(crate) async fn shutdown(&self) -> Result<(), MarksNotWritten> {
        let recovery = lock(&self.recovery).take();
        match recovery {
            Some(recovery) => recovery.shutdown().await,
            None => Ok(()),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
