//! Why a key that somebody wrote down can't be used, and where it is.

use std::{fmt, sync::Arc};

use super::{
    secret::{InvalidKeyId, KeyId},
    spec::KeySpec,
    unusable::UnusableSecret,
};

/// One key of a text: a [`KeySpec`], or the reason why it is none.
#[derive(Debug)]
pub(crate) struct ParsedKey {
    pub(crate) place: Place,
    pub(crate) key: Result<KeySpec, Rejected>,
}

/// A key that can't be used, or a whole text that can't be read.
///
/// `Display` names the place, the id if there is a usable one, and the reason:
/// `keys.txt, line 4: key beta: the secret is empty`. The secret is never shown.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {}{reason}", of_key(.id.as_ref()))]
pub struct Rejected {
    place: Place,
    id: Option<KeyId>,
    reason: Reason,
}

fn of_key(id: Option<&KeyId>) -> String {
    id.map_or_else(String::new, |id| format!("key {id}: "))
}

impl Rejected {
    pub(crate) fn new(place: Place, id: Option<KeyId>, reason: impl Into<Reason>) -> Self {
        Self { place, id, reason: reason.into() }
    }

    /// Returns the key's id, unless it has no usable one.
    #[must_use]
    pub fn id(&self) -> Option<&KeyId> {
        self.id.as_ref()
    }

    /// Returns the reason alone, without place and id.
    #[must_use]
    pub fn reason(&self) -> impl fmt::Display + '_ {
        &self.reason
    }
}

/// Where a key was given.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Place {
    /// In code, as the builder's source of that number.
    #[error("key {0} in code")]
    Code(usize),
    /// In a file, on that line.
    #[error("{0}, line {1}")]
    Line(Arc<str>, usize),
    /// In a file, on that line, from that column on.
    #[error("{0}, line {1}, column {2}")]
    Column(Arc<str>, usize, usize),
    /// In a JSON file or an environment variable, as the entry of that number.
    #[error("{0}, entry {1}")]
    Entry(Arc<str>, usize),
    /// A whole file.
    #[error("{0}")]
    Whole(Arc<str>),
}

impl Place {
    /// The line, or the position among the entries of a JSON text or a variable, from 1.
    pub(crate) fn number(&self) -> usize {
        match self {
            Self::Code(number)
            | Self::Line(_, number)
            | Self::Column(_, number, _)
            | Self::Entry(_, number) => *number,
            Self::Whole(_) => 1,
        }
    }
}

/// Why something can't be used as a key. No variant holds a part of a secret.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Reason {
    #[error(transparent)]
    Id(#[from] InvalidKeyId),
    #[error(transparent)]
    Secret(#[from] UnusableSecret),
    #[error("another key has this id")]
    DuplicateId,
    #[error("key {0} has the same secret")]
    DuplicateSecret(KeyId),
    #[error("the key has no id")]
    NoId,
    #[error("the key has no `secret`")]
    NoSecret,
    #[error("neither a string nor an object with a `secret`")]
    Form,
    #[cfg(feature = "toml")]
    #[error("not a [[key]] table")]
    NoKeyTable,
    #[error("`{field}` is not {expected}")]
    Type { field: &'static str, expected: &'static str },
    #[error("`{0}` is given twice")]
    Twice(&'static str),
    #[error("{}: a key has {FIELDS}", unknown(.0.as_deref()))]
    UnknownField(Option<Box<str>>),
    #[error("`{0}` is not supported yet, remove it")]
    Unsupported(&'static str),
    #[error("not UTF-8")]
    NotUtf8,
    #[error("not valid {format}: {error}")]
    Syntax { format: &'static str, error: Box<str> },
    #[cfg(not(feature = "toml"))]
    #[error("TOML needs the crate's feature `toml`")]
    NoToml,
    #[error("larger than {0} MiB")]
    TooLarge(usize),
    #[error("more than {0} keys")]
    TooMany(usize),
}

const FIELDS: &str = "`id`, `secret`, `group`, `tier`, `weight`, `max_in_flight`, `endpoint` and `note`";

fn unknown(field: Option<&str>) -> String {
    match field {
        Some(field) => format!("unknown field `{field}`"),
        None => "an unknown field, which is not shown since it may be a secret".to_owned(),
    }
}

impl Reason {
    /// Names the field if its name looks like one. Anything else may be a secret in the wrong place.
    pub(crate) fn unknown_field(name: &str) -> Self {
        const LONGEST: usize = 20;
        let is_harmless =
            name.len() <= LONGEST && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
        Self::UnknownField(is_harmless.then(|| name.into()))
    }
}
