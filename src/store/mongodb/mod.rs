//! Keys in MongoDB, for many processes.

mod at_rest;
mod builder;
mod bulk;
mod clock;
mod commands;
#[cfg(feature = "encryption")]
mod data_keys;
mod document;
#[cfg(feature = "encryption")]
mod encrypt;
mod error;
mod expr;
mod fields;
#[cfg(all(fuzzing, feature = "encryption"))]
#[doc(hidden)]
pub mod fuzzing;
mod inner;
mod lane;
mod load;
mod messages;
mod rendered;
mod standby;
mod store;
mod stored;
mod usage;
mod watch;
mod words;

pub use self::{
    builder::{ConnectError, MongoStoreBuilder},
    fields::Fields,
    store::MongoStore,
};
#[cfg(feature = "encryption")]
pub use self::{
    data_keys::{DataKeys, InvalidDataKeys},
    encrypt::Encrypted,
};
