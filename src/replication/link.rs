//! A pool's store, and the parts of the pool that deal with it.

use std::sync::Arc;

use super::{loader::Loader, usage::Account, writer::Writer};
use crate::{
    key::KeySpec,
    pool::Engine,
    store::{KeyStore, StoreError},
};

pub(crate) struct Link {
    pub(crate) store: Arc<dyn KeyStore>,
    pub(crate) loader: Arc<Loader>,
    pub(crate) writer: Writer,
    pub(crate) account: Arc<Account>,
}

impl Link {
    /// To a store that is still to be read, and to be given these keys if it does not have them.
    pub(crate) fn new(engine: &Arc<Engine>, store: Arc<dyn KeyStore>, seeds: Vec<KeySpec>) -> Self {
        let account = Arc::new(Account::new(engine.clone(), store.clone()));
        let loader = Arc::new(Loader::new(engine.clone(), store.clone(), account.clone(), seeds));
        let writer = Writer::new(engine.clone(), store.clone(), loader.clone());
        Self { store, loader, writer, account }
    }

    /// Puts standby keys in the place of keys that failed. Returns how many.
    pub(crate) async fn replace_failed(&self) -> Result<usize, StoreError> {
        let replaced = self.store.replace_failed().await?;
        for replaced in &replaced {
            tracing::info!(key = %replaced.failed, by = %replaced.by, "key replaced by a standby key");
        }
        Ok(replaced.len())
    }
}
