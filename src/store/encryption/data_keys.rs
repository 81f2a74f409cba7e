//! The keys that secrets are encrypted with in stores.

use std::{env, fmt, fs, io, path::Path, path::PathBuf, sync::Arc};

use aes_siv::{KeyInit, siv::Aes256Siv};
use base64::{Engine, prelude::BASE64_STANDARD, prelude::BASE64_URL_SAFE_NO_PAD};
use zeroize::Zeroizing;

use super::not_encrypted::NotEncrypted;
use crate::key::Secret;

/// What an encrypted value begins with: then the data key's name, a dot, and base64.
const VERSION_1: &str = "encrypted.v1.";

const BYTES: usize = 64;

/// Data keys: stores encrypt the secrets of API keys with them, by `MongoStoreBuilder::encrypt_with` or
/// `FileStoreBuilder::encrypt_with`.
///
/// A list of `name=base64`, an entry a line or divided by commas. New values are encrypted with the **first**
/// one; the others are for values that were encrypted before. Each is 64 random bytes in base64, on one line:
///
/// ```sh
/// echo "2026a=$(openssl rand -base64 64 | tr -d '\n')"
/// ```
///
/// A name has 1 to 32 letters, digits, `-` and `_`. It stands in each value, in the clear.
///
/// # How
///
/// AES-256 in SIV mode ([RFC 5297]), with the name of the field and the key's id as associated data: a value
/// that was copied to another key, or changed in any way, is not accepted. It takes no nonce: the same
/// secret of the same key id always becomes the same value, so that a document can be found by its secret
/// without telling the server that.
///
/// [RFC 5297]: https://datatracker.ietf.org/doc/html/rfc5297
///
/// ```
/// use tower_key_rotation::store::DataKeys;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let base64 = format!("{}==", "A".repeat(86)); // of 64 bytes that are, here, not random at all
/// let keys = DataKeys::parse(format!("2026a={base64}"))?;
/// assert_eq!(format!("{keys:?}"), r#"DataKeys(["2026a"])"#);
///
/// let error = DataKeys::parse("2026a=c2hvcnQ=").unwrap_err();
/// assert_eq!(error.to_string(), "data key 2026a: it has 5 bytes in base64, not 64");
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct DataKeys(Arc<[DataKey]>);

struct DataKey {
    name: String,
    bytes: Zeroizing<[u8; BYTES]>,
}

impl DataKeys {
    /// Those of an environment variable.
    ///
    /// # Errors
    ///
    /// Where it is not set, and as for [`parse`](Self::parse).
    pub fn from_env(variable: impl AsRef<str>) -> Result<Self, InvalidDataKeys> {
        let variable = variable.as_ref();
        let text = env::var(variable).map_err(|_| InvalidDataKeys(Invalid::NotSet(variable.to_owned())))?;
        Self::parse(Zeroizing::new(text).as_str())
    }

    /// Those of a file. Lines that begin with `#` are skipped.
    ///
    /// # Errors
    ///
    /// Where it can't be read, and as for [`parse`](Self::parse).
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self, InvalidDataKeys> {
        let path = path.as_ref();
        let unreadable = |error: io::Error| InvalidDataKeys(Invalid::File(path.to_owned(), error.kind()));
        let text = fs::read_to_string(path).map_err(unreadable)?;
        Self::parse(Zeroizing::new(text).as_str())
    }

    /// Those of a text.
    ///
    /// # Errors
    ///
    /// Where there is none, or one has another form, or two have one name.
    pub fn parse(text: impl AsRef<str>) -> Result<Self, InvalidDataKeys> {
        let entries = text.as_ref().split(['\n', ',']).map(str::trim);
        let entries = entries.filter(|entry| !entry.is_empty() && !entry.starts_with('#'));
        let mut keys: Vec<DataKey> = Vec::new();
        for (number, entry) in (1..).zip(entries) {
            let key = DataKey::parse(number, entry).map_err(InvalidDataKeys)?;
            if keys.iter().any(|other| other.name == key.name) {
                return Err(InvalidDataKeys(Invalid::SameName(key.name)));
            }
            keys.push(key);
        }
        if keys.is_empty() { Err(InvalidDataKeys(Invalid::None)) } else { Ok(Self(keys.into())) }
    }

    /// The secret of the key of that id, as it shall stand in that field.
    pub(crate) fn seal(&self, field: &str, id: &str, secret: &str) -> Result<String, NotEncrypted> {
        let key = &self.0[0];
        let sealed = key.cipher().encrypt([field, id], secret.as_bytes());
        let sealed = sealed.map_err(|_| NotEncrypted)?;
        Ok(format!("{VERSION_1}{}.{}", key.name, BASE64_URL_SAFE_NO_PAD.encode(sealed)))
    }

    /// What was sealed, or why that can't be said.
    pub(crate) fn open(&self, field: &str, id: &str, stored: &str) -> Result<Secret, String> {
        let Some(sealed) = stored.strip_prefix(VERSION_1) else {
            return Err(format!("{field} is encrypted in a form that this version does not know"));
        };
        let damaged = || format!("{field} is encrypted, and damaged");
        let (name, base64) = sealed.split_once('.').ok_or_else(damaged)?;
        let Some(key) = self.0.iter().find(|key| key.name == name) else {
            let name = if is_name(name) { name } else { "of a name that is none" };
            return Err(format!("{field} is encrypted with the data key {name}, which is not given here"));
        };
        let sealed = BASE64_URL_SAFE_NO_PAD.decode(base64).map_err(|_| damaged())?;
        let opened = key.cipher().decrypt([field, id], &sealed).map_err(|_| {
            format!(
                "{field} can't be decrypted with the data key {name}: that is another data key than it was, or \
                 the value was changed, or comes from another key or field"
            )
        })?;
        String::from_utf8(opened).map(Secret::new).map_err(|_| damaged())
    }

    /// Whether it was sealed with the data key that is used for new values.
    pub(crate) fn is_current(&self, stored: &str) -> bool {
        let name = stored.strip_prefix(VERSION_1).and_then(|sealed| sealed.split_once('.'));
        name.is_some_and(|(name, _)| name == self.0[0].name)
    }
}

impl DataKey {
    fn parse(number: usize, entry: &str) -> Result<Self, Invalid> {
        let (name, base64) = entry.split_once('=').unwrap_or_default();
        if !is_name(name) {
            return Err(Invalid::Entry(number));
        }
        let bytes = BASE64_STANDARD.decode(base64).map(Zeroizing::new);
        let bytes = bytes.map_err(|_| Invalid::NotBase64(name.to_owned()))?;
        let length = || Invalid::Length { name: name.to_owned(), bytes: bytes.len() };
        let bytes = <[u8; BYTES]>::try_from(bytes.as_slice()).map_err(|_| length())?;
        Ok(Self { name: name.to_owned(), bytes: bytes.into() })
    }

    fn cipher(&self) -> Aes256Siv {
        Aes256Siv::new((&*self.bytes).into())
    }
}

fn is_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    (1..=32).contains(&name.len()) && name.chars().all(allowed)
}

/// By their names.
impl fmt::Debug for DataKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.0.iter().map(|key| &key.name).collect();
        f.debug_tuple("DataKeys").field(&names).finish()
    }
}

/// What is wrong with [`DataKeys`]. It never shows more of one than its name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(transparent)]
pub struct InvalidDataKeys(Invalid);

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
enum Invalid {
    #[error("there is no data key")]
    None,
    #[error("the environment variable {0} is not set, or not valid Unicode")]
    NotSet(String),
    #[error("{}: {}", .0.display(), .1)]
    File(PathBuf, io::ErrorKind),
    /// Counted from 1.
    #[error("data key {0}: not `name=base64` on one line, with a name of 1 to 32 letters, digits, - and _")]
    Entry(usize),
    #[error("data key {0}: what stands behind its name is not base64 on one line, with its padding")]
    NotBase64(String),
    #[error("data key {name}: it has {bytes} bytes in base64, not {BYTES}")]
    Length { name: String, bytes: usize },
    #[error("there are two data keys of the name {0}")]
    SameName(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys() -> DataKeys {
        DataKeys::parse(format!("a={}\nb={}", "A".repeat(86) + "==", "B".repeat(85) + "A==")).unwrap()
    }

    #[test]
    fn moved_or_tampered_sealed_values_are_never_opened() {
        let keys = keys();
        let sealed = keys.seal("apiKey", "alpha", "sk-1").unwrap();
        for (field, id) in [("apiKey", "beta"), ("token", "alpha"), ("apiKeya", "lpha")] {
            assert!(keys.open(field, id, &sealed).is_err(), "{field} {id}");
        }
        for at in 0..sealed.len() {
            for other in ['A', 'b', '.', '_'] {
                let mut changed = sealed.clone();
                changed.replace_range(at..=at, &other.to_string());
                // The last character has bits that stand for nothing, which base64 refuses.
                assert_eq!(keys.open("apiKey", "alpha", &changed).is_ok(), changed == sealed, "{changed}");
            }
            assert!(keys.open("apiKey", "alpha", &sealed[..at]).is_err());
        }
    }

    #[test]
    fn hostile_names_of_data_keys_are_not_quoted() {
        let reason = keys().open("apiKey", "alpha", "encrypted.v1.x\ny.AAAA").unwrap_err();
        assert!(reason.contains("the data key of a name that is none"), "{reason}");
        assert_eq!(
            keys().open("apiKey", "alpha", "encrypted.v1.a").unwrap_err(),
            "apiKey is encrypted, and damaged"
        );
    }
}
