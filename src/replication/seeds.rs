//! The keys that a store is to begin with.

use std::collections::{HashMap, HashSet};

use crate::{
    key::KeySpec,
    pool::Engine,
    store::{KeyStore, Operation, StoreError},
};

/// Inserts the seeds of which the store has neither the id nor the secret. If the store has a secret under another id,
/// the pool's key takes that id.
pub(super) async fn plant(
    seeds: &mut Vec<KeySpec>,
    store: &dyn KeyStore,
    engine: &Engine,
) -> Result<(), StoreError> {
    if seeds.is_empty() {
        return Ok(());
    }
    let records = store.load(None).await?.records;
    let ids: HashSet<_> = records.iter().map(|key| &key.spec.id).collect();
    let by_secret: HashMap<_, _> = records.iter().map(|key| (&key.spec.secret, &key.spec.id)).collect();
    for seed in seeds.iter() {
        match by_secret.get(&seed.secret) {
            _ if ids.contains(&seed.id) => {}
            Some(same) => {
                tracing::info!(key = %same, given_as = %seed.id, "the store has this key under its own id");
                engine.rename(&seed.id, same);
            }
            None => _ = store.operate(seed.id.clone(), Operation::Insert(seed.clone())).await?,
        }
    }
    seeds.clear();
    Ok(())
}
