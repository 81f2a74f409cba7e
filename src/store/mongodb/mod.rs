//! Keys in MongoDB, for many processes.

mod builder;
mod bulk;
mod clock;
mod commands;
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

#[cfg(feature = "encryption")]
pub use self::encrypt::Encrypted;
pub use self::{
    builder::{ConnectError, MongoStoreBuilder},
    fields::Fields,
    store::MongoStore,
};
#[cfg(feature = "encryption")]
pub use super::encryption::{DataKeys, InvalidDataKeys};
