//! Key ids and secrets: what may be shown, and what never is.

use std::{
    borrow::Borrow,
    fmt,
    hash::{Hash, Hasher},
    sync::Arc,
};

use compact_str::CompactString;
use secrecy::{ExposeSecret, SecretString};

/// The public name of a key: in logs, errors and statistics. It is never derived from the secret.
///
/// 1 to 256 bytes without control characters; up to 24 are kept in place, a longer one is allocated with each clone.
///
/// ```
/// use tower_key_rotation::KeyId;
///
/// assert_eq!(KeyId::new("alpha").unwrap().to_string(), "alpha");
/// assert!(KeyId::new("two\nlines").is_err());
/// ```
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KeyId(CompactString);

impl KeyId {
    const MAX_BYTES: usize = 256;

    /// An id of that name.
    ///
    /// # Errors
    ///
    /// Where the name is empty, longer than 256 bytes, or has a control character.
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

#[cfg(feature = "serde")]
impl serde::Serialize for KeyId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

/// A name that can't be a [`KeyId`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a key id has 1 to 256 bytes and no control characters")]
pub struct InvalidKeyId;

/// The secret of a key. Shown by nothing, wiped from memory when its last clone is dropped.
///
/// ```
/// use tower_key_rotation::Secret;
///
/// let secret = Secret::new("sk-1");
/// assert_eq!(format!("{secret:?}"), "Secret(_)");
/// assert_eq!(secret.expose(), "sk-1");
/// ```
#[derive(Clone)]
pub struct Secret(Arc<SecretString>);

impl Secret {
    /// Takes a secret over.
    #[must_use]
    pub fn new(secret: impl Into<String>) -> Self {
        Self(Arc::new(SecretString::from(secret.into())))
    }

    /// The secret itself.
    #[must_use]
    pub fn expose(&self) -> &str {
        self.0.expose_secret()
    }
}

/// Whether it is a secret as a store encrypts it, of whatever version, and so none to send to a service.
pub(crate) fn is_encrypted(secret: &str) -> bool {
    secret.starts_with("encrypted.v")
}

impl PartialEq for Secret {
    fn eq(&self, other: &Self) -> bool {
        self.expose() == other.expose()
    }
}

impl Eq for Secret {}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_not_shown_by_debug() {
        assert_eq!(format!("{:?}", Secret::new("sk-canary")), "Secret(_)");
    }

    #[test]
    fn an_id_is_refused_where_it_could_not_be_logged_on_one_line() {
        for id in ["", "a\nb", "a\u{7f}b", &"x".repeat(257)] {
            assert_eq!(KeyId::new(id), Err(InvalidKeyId), "{id:?}");
        }
        assert_eq!(KeyId::new("ключ 1").unwrap().as_str(), "ключ 1");
    }
}
