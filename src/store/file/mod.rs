//! Keys in a file, for one process.

mod builder;
mod clock;
#[cfg(test)]
mod crashes;
mod create;
#[cfg(feature = "encryption")]
mod encrypt;
mod error;
mod owner;
mod plant;
mod record;
mod store;
mod tables;

pub use self::{builder::FileStoreBuilder, error::OpenError, store::FileStore};
