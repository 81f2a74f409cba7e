//! An upstream as it runs: its keys, and the client that sends requests with them.

use std::{
    error::Error,
    sync::{Mutex, MutexGuard, PoisonError},
};

use tower_key_rotation::{KeyPool, MarksNotWritten, RecoveryHandle};

use crate::{
    config::UpstreamConfig,
    keys,
    proxy::{Client, client},
};

pub(crate) struct Upstream {
    pub(crate) config: UpstreamConfig,
    pub(crate) pool: KeyPool,
    pub(crate) client: Client,
    /// `None` before the start and after the shutdown.
    recovery: Mutex<Option<RecoveryHandle>>,
}

impl Upstream {
    /// Opens the pool of keys, without its recovery.
    pub(crate) async fn open(config: UpstreamConfig) -> Result<Self, Box<dyn Error>> {
        let pool = keys::open(&config).await?;
        let client = client(&pool, &config)?;
        Ok(Self { config, pool, client, recovery: Mutex::default() })
    }

    /// An upstream on this machine with these keys.
    #[cfg(test)]
    pub(crate) fn of(pool: KeyPool) -> Self {
        let config = UpstreamConfig::local();
        let client = client(&pool, &config).unwrap();
        Self { config, pool, client, recovery: Mutex::default() }
    }

    pub(crate) fn name(&self) -> &str {
        &self.config.name
    }

    /// Begins to recover keys and to exchange their state with the store.
    pub(crate) fn start(&self) {
        *self.lock() = Some(RecoveryHandle::spawn(&self.pool));
    }

    /// Writes the pending state of the keys to their store.
    pub(crate) async fn shutdown(&self) -> Result<(), MarksNotWritten> {
        let recovery = self.lock().take();
        match recovery {
            Some(recovery) => recovery.shutdown().await,
            None => Ok(()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<RecoveryHandle>> {
        self.recovery.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
