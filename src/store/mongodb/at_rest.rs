//! How a secret stands in a document: as it is or, with the feature `encryption`, encrypted.

#[cfg(feature = "encryption")]
use std::{
    collections::HashSet,
    sync::{Mutex, MutexGuard, PoisonError},
};

#[cfg(feature = "encryption")]
use super::data_keys::DataKeys;
use super::error::Failure;
use crate::key::{KeyId, Secret, is_encrypted};

/// The field that secrets stand in, and how they stand there.
pub(super) struct AtRest {
    field: String,
    encryption: Option<Encryption>,
}

/// Without the feature there is none.
#[cfg(not(feature = "encryption"))]
pub(super) enum Encryption {}

#[cfg(feature = "encryption")]
pub(super) struct Encryption {
    keys: DataKeys,
    /// Keys that were last seen unencrypted. Only of these is the server told the secret, to find them by: it
    /// may keep commands, in its log or profile.
    in_the_clear: Mutex<HashSet<KeyId>>,
}

impl AtRest {
    pub(super) fn new(field: String, encryption: Option<Encryption>) -> Self {
        Self { field, encryption }
    }

    /// What a new document holds.
    pub(super) fn stored(&self, id: &KeyId, secret: &Secret) -> Result<String, Failure> {
        match &self.encryption {
            None => Ok(secret.expose().to_owned()),
            Some(encryption) => encryption.seal(&self.field, id, secret),
        }
    }

    /// All that a document may hold that has this secret.
    pub(super) fn may_be_stored_as(&self, id: &KeyId, secret: &Secret) -> Result<Vec<String>, Failure> {
        match &self.encryption {
            None => Ok(vec![secret.expose().to_owned()]),
            Some(encryption) => encryption.forms(&self.field, id, secret),
        }
    }

    /// The secret that a document holds, or why it can't be said.
    pub(super) fn secret(&self, id: &KeyId, stored: &str) -> Result<Secret, String> {
        match &self.encryption {
            Some(encryption) => encryption.open(&self.field, id, stored),
            None if is_encrypted(stored) => {
                Err(format!("{} is encrypted, and this program was given no data keys", self.field))
            }
            None => Ok(stored.into()),
        }
    }

    pub(super) fn encrypts(&self) -> bool {
        self.encryption.is_some()
    }

    /// Whether a new document would hold it in the same form.
    #[cfg(feature = "encryption")]
    pub(super) fn is_current(&self, stored: &str) -> bool {
        self.encryption.as_ref().is_none_or(|encryption| encryption.keys.is_current(stored))
    }
}

#[cfg(feature = "encryption")]
impl Encryption {
    pub(super) fn with(keys: DataKeys) -> Self {
        Self { keys, in_the_clear: Mutex::default() }
    }

    fn seal(&self, field: &str, id: &KeyId, secret: &Secret) -> Result<String, Failure> {
        self.keys.seal(field, id.as_str(), secret.expose())
    }

    fn forms(&self, field: &str, id: &KeyId, secret: &Secret) -> Result<Vec<String>, Failure> {
        let mut forms = self.keys.seal_by_each(field, id.as_str(), secret.expose())?;
        if self.in_the_clear().contains(id) {
            forms.push(secret.expose().to_owned());
        }
        Ok(forms)
    }

    fn open(&self, field: &str, id: &KeyId, stored: &str) -> Result<Secret, String> {
        if is_encrypted(stored) {
            self.in_the_clear().remove(id);
            return self.keys.open(field, id.as_str(), stored);
        }
        self.in_the_clear().insert(id.clone());
        Ok(stored.into())
    }

    fn in_the_clear(&self) -> MutexGuard<'_, HashSet<KeyId>> {
        self.in_the_clear.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(not(feature = "encryption"))]
impl Encryption {
    fn seal(&self, _: &str, _: &KeyId, _: &Secret) -> Result<String, Failure> {
        match *self {}
    }

    fn forms(&self, _: &str, _: &KeyId, _: &Secret) -> Result<Vec<String>, Failure> {
        match *self {}
    }

    fn open(&self, _: &str, _: &KeyId, _: &str) -> Result<Secret, String> {
        match *self {}
    }
}
