//! The failure of the cipher.

/// A secret could not be encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a secret could not be encrypted")]
pub(crate) struct NotEncrypted;
