//! Where keys and their state outlive a process.
//!
//! A pool keeps what requests need in memory, and no request waits for the store. A
//! [`RecoveryHandle`](crate::RecoveryHandle) writes marks afterwards, and loads the store every 30 seconds. A pool that is
//! built, rather than opened over a store, has none: its own memory is all there is.
//!
//! Pools that learn limits ([`paced`](crate::KeyPoolBuilder::paced)) also share them through the store, if it carries
//! messages between processes: [`KeyStore::messages`], [`KeyStore::publish`].
//!
//! [`MemoryStore`] is for several pools in one process; `MongoStore`, with the feature `mongodb`, for several processes,
//! and for state that outlives a restart.

#[cfg(any(feature = "file", feature = "mongodb"))]
mod encryption;
#[cfg(feature = "file")]
pub mod file;
mod key_store;
mod memory;
mod messages;
#[cfg(feature = "mongodb")]
pub mod mongodb;

#[cfg(all(feature = "encryption", any(feature = "file", feature = "mongodb")))]
pub use self::encryption::{DataKeys, InvalidDataKeys};
pub use self::{
    key_store::{
        Born, Change, Heard, KeyRecord, KeyStore, Loaded, Mark, Operation, Planted, Recovered, Replaced,
        Standing, StoreError, StoreFuture, Unreadable, Usage, Writes,
    },
    memory::MemoryStore,
};
pub use crate::limit::{InvalidScope, Resting, Scope, Until, Words};
