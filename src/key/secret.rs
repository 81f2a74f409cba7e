//! Key ids, which are public, and secrets, which are never shown.

use std::{
    borrow::Borrow,
    fmt,
    hash::{Hash, Hasher},
    sync::Arc,
};

use compact_str::CompactString;
use zeroize::Zeroizing;

/// The public name of a key: in logs, errors and statistics. It is never derived from the secret.
///
/// An id has 1 to 256 bytes and no control characters. Up to 24 bytes are stored inline; each clone of a longer id
/// allocates.
///
/// ```
/// use tower_key_rotation::KeyId;
///
/// assert_eq!(KeyId::new("alpha").unwrap().to_string(), "alpha");
/// assert!(KeyId::new("two\nlines").is_err());
/// ```
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize), serde(transparent))]
pub struct KeyId(CompactString);

impl KeyId {
    const MAX_BYTES: usize = 256;

    /// Checks a name and makes it an id.
    ///
    /// # Errors
    ///
    /// The name is empty, longer than 256 bytes, or has a control character.
    pub fn new(id: impl AsRef<str>) -> Result<Self, InvalidKeyId> {
        let id = id.as_ref();
        if id.is_empty() || id.len() > Self::MAX_BYTES || id.chars().any(char::is_control) {
            return Err(InvalidKeyId);
        }
        Ok(Self(id.into()))
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl Borrow<str> for KeyId {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl AsRef<str> for KeyId {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

/// The error of a name that can't be a [`KeyId`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a key id has 1 to 256 bytes and no control characters")]
pub struct InvalidKeyId;

/// The secret of a key. `Debug` does not show it, and its memory is wiped when the last clone is dropped.
///
/// ```
/// use tower_key_rotation::Secret;
///
/// let secret = Secret::new("sk-1");
/// assert_eq!(format!("{secret:?}"), "Secret(_)");
/// assert_eq!(secret.expose(), "sk-1");
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Arc<Zeroizing<String>>);

impl Secret {
    /// Takes ownership of a secret.
    #[must_use]
    pub fn new(secret: impl Into<String>) -> Self {
        Self(Arc::new(Zeroizing::new(secret.into())))
    }

    /// Returns the secret.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

/// Whether a secret is encrypted by a store, in any version of the format. Such a secret is never sent to a service.
pub(crate) fn is_encrypted(secret: &str) -> bool {
    secret.starts_with("encrypted.v")
}

impl Hash for Secret {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.expose().hash(state);
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(_)")
    }
}

impl From<String> for Secret {
    fn from(secret: String) -> Self {
        Self::new(secret)
    }
}

impl From<&str> for Secret {
    fn from(secret: &str) -> Self {
        Self::new(secret)
    }
}
