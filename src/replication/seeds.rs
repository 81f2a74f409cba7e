//! The keys that a store is to begin with.

use crate::{
    key::KeySpec,
    pool::Engine,
    store::{KeyStore, StoreError},
};

/// Gives the store the seeds, once. If the store has one under another id, the pool's key takes that id.
pub(super) async fn plant(
    seeds: &mut Vec<KeySpec>,
    store: &dyn KeyStore,
    engine: &Engine,
) -> Result<(), StoreError> {
    if seeds.is_empty() {
        return Ok(());
    }
    for planted in store.plant(seeds).await? {
        tracing::info!(key = %planted.id, given_as = %planted.given_as, "the store has this key under its own id");
        engine.rename(&planted.given_as, &planted.id);
    }
    seeds.clear();
    Ok(())
}
