//! Keys in an environment variable.

use std::{borrow::Cow, env};

use super::{
    key_set::KeySet,
    key_source::{KeySource, SourceError, SourceFuture},
};
use crate::key::source::{self, Unnamed};

/// The keys of an environment variable, `id=secret,id=secret`, as in
/// [`KeyPoolBuilder::keys_from_env`](crate::KeyPoolBuilder::keys_from_env). Each key needs an id.
///
/// Nobody tells of a change of the environment, so the pool reads the variable again only after a 401.
#[derive(Debug)]
#[must_use]
pub struct KeyVariable {
    name: String,
}

impl KeyVariable {
    /// The keys of that variable.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into() }
    }

    fn parse(&self) -> Result<KeySet, SourceError> {
        let value = env::var_os(&self.name).ok_or_else(|| SourceError::new("the variable is not set"))?;
        let value = value.to_str().ok_or_else(|| SourceError::new("the variable is not UTF-8 text"))?;
        let parsed = source::variable(&self.name, value, Unnamed::Rejected);
        Ok(KeySet::of(parsed.map_err(SourceError::new)?))
    }
}

impl KeySource for KeyVariable {
    fn name(&self) -> Cow<'_, str> {
        self.name.as_str().into()
    }

    fn read(&self) -> SourceFuture<'_, Result<KeySet, SourceError>> {
        Box::pin(std::future::ready(self.parse()))
    }
}
