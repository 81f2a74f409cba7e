//! Secrets at rest: in the clear, or encrypted with data keys.

mod at_rest;
#[cfg(feature = "encryption")]
mod data_keys;
mod not_encrypted;

pub(crate) use self::at_rest::AtRest;
#[cfg(feature = "encryption")]
pub use self::data_keys::{DataKeys, InvalidDataKeys};
pub(crate) use self::not_encrypted::NotEncrypted;
