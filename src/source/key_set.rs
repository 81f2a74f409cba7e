//! All keys that a source has at one moment.

use std::{path::Path, time::Duration};

use crate::key::{
    KeySpec, Rejected,
    rejected::ParsedKey,
    source::{self, Unnamed},
};

/// All keys of a source.
///
/// ```
/// use tower_key_rotation::source::KeySet;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let set = KeySet::parse("keys.txt", "alpha|sk-1\nsk-2\n")?;
/// assert_eq!(set.keys[0].spec.id.as_str(), "alpha");
/// assert_eq!(set.rejected[0].to_string(), "keys.txt, line 2: the key has no id");
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct KeySet {
    /// The keys.
    pub keys: Vec<SourcedKey>,
    /// The entries that can't be used as a key.
    pub rejected: Vec<Rejected>,
}

impl KeySet {
    /// Parses the keys of a text in one of the formats of a [key file](crate::KeyPoolBuilder::keys_from_file). Unlike there,
    /// each key needs an id.
    ///
    /// The name decides the format as that of a file does, and stands in each [`Rejected`].
    ///
    /// # Errors
    ///
    /// The whole text can't be read: see [`KeySpec::parse_all`].
    pub fn parse(name: impl AsRef<str>, text: impl AsRef<[u8]>) -> Result<Self, Rejected> {
        Ok(Self::of(source::parse(name.as_ref(), text.as_ref(), Unnamed::Rejected)?))
    }

    /// Reads a file. The outer error says that it could not be read, the inner one that its text could not be parsed.
    pub(super) fn of_file(path: &Path) -> std::io::Result<Result<Self, Rejected>> {
        Ok(source::file(path, Unnamed::Rejected)?.map(Self::of))
    }

    pub(super) fn of(parsed: Vec<ParsedKey>) -> Self {
        let mut set = Self::default();
        for ParsedKey { key, .. } in parsed {
            match key {
                Ok(spec) => set.keys.push(spec.into()),
                Err(rejected) => set.rejected.push(rejected),
            }
        }
        set
    }
}

impl<K: Into<SourcedKey>> From<Vec<K>> for KeySet {
    fn from(keys: Vec<K>) -> Self {
        Self { keys: keys.into_iter().map(Into::into).collect(), rejected: Vec::new() }
    }
}

impl From<SourcedKey> for KeySet {
    fn from(key: SourcedKey) -> Self {
        vec![key].into()
    }
}

impl From<KeySpec> for KeySet {
    fn from(spec: KeySpec) -> Self {
        SourcedKey::from(spec).into()
    }
}

/// A key of a source, and how long its secret lives.
///
/// ```
/// use std::time::Duration;
/// use tower_key_rotation::{KeyId, KeySpec, source::SourcedKey};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let token = KeySpec::new(KeyId::new("alpha")?, "token-1");
/// let key = SourcedKey::from(token).expires_in(Duration::from_secs(3600));
/// assert_eq!(key.expires_in, Some(Duration::from_secs(3600)));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SourcedKey {
    /// The key.
    pub spec: KeySpec,
    /// The time to live of its secret, from the beginning of the read on; `None` if it does not expire. No store keeps it.
    pub expires_in: Option<Duration>,
}

impl SourcedKey {
    /// Sets the time to live of the secret, as `expires_in` of an OAuth response says it.
    #[must_use]
    pub fn expires_in(self, time: Duration) -> Self {
        Self { expires_in: Some(time), ..self }
    }
}

impl From<KeySpec> for SourcedKey {
    fn from(spec: KeySpec) -> Self {
        Self { spec, expires_in: None }
    }
}
