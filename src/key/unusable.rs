//! Which secrets no request can carry.

use super::secret::is_encrypted;

/// Why a secret can't be put into a request. The secret is never shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct UnusableSecret(&'static str);

impl UnusableSecret {
    pub(crate) const EMPTY: Self = Self::new("the secret is empty");
    pub(crate) const CONTROL: Self =
        Self::new("the secret has a newline, a tab or another control character");
    pub(crate) const NOT_ASCII: Self = Self::new("the secret has a character that is not ASCII");
    pub(crate) const EDGE_SPACE: Self = Self::new("the secret begins or ends with a space");
    pub(crate) const ENCRYPTED: Self =
        Self::new("the secret is encrypted: it is what a store holds, not a key");

    /// A reason of your own, for [`Inject::custom`](crate::Inject::custom).
    #[must_use]
    pub const fn new(reason: &'static str) -> Self {
        Self(reason)
    }
}

/// Checks that a request can carry a secret. `http` accepts tabs and bytes beyond ASCII in a header value, and trims
/// nothing; a pasted key that has them is a broken key.
pub(crate) fn check(secret: &str) -> Result<(), UnusableSecret> {
    if secret.is_empty() {
        return Err(UnusableSecret::EMPTY);
    }
    if is_encrypted(secret) {
        return Err(UnusableSecret::ENCRYPTED);
    }
    if secret.chars().any(char::is_control) {
        return Err(UnusableSecret::CONTROL);
    }
    if !secret.is_ascii() {
        return Err(UnusableSecret::NOT_ASCII);
    }
    if secret.trim() != secret {
        return Err(UnusableSecret::EDGE_SPACE);
    }
    Ok(())
}
