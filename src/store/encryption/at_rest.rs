//! How a secret stands in a store: in the clear or, with the feature `encryption`, encrypted.

#[cfg(feature = "encryption")]
use super::data_keys::DataKeys;
use super::not_encrypted::NotEncrypted;
use crate::key::{KeyId, Secret, is_encrypted};

/// The field that secrets stand in, and the data keys if they are encrypted.
pub(crate) struct AtRest {
    field: String,
    data_keys: Option<DataKeys>,
}

/// Without the feature there are none.
#[cfg(not(feature = "encryption"))]
pub(crate) enum DataKeys {}

impl AtRest {
    pub(crate) fn new(field: String, data_keys: Option<DataKeys>) -> Self {
        Self { field, data_keys }
    }

    /// The value that a new record holds.
    pub(crate) fn stored(&self, id: &KeyId, secret: &Secret) -> Result<String, NotEncrypted> {
        match &self.data_keys {
            None => Ok(secret.expose().to_owned()),
            Some(data_keys) => data_keys.seal(&self.field, id.as_str(), secret.expose()),
        }
    }

    /// The secret that a record holds, or why it cannot be told.
    pub(crate) fn secret(&self, id: &KeyId, stored: &str) -> Result<Secret, String> {
        match &self.data_keys {
            _ if !is_encrypted(stored) => Ok(stored.into()),
            Some(data_keys) => data_keys.open(&self.field, id.as_str(), stored),
            None => Err(format!("{} is encrypted, and this program was given no data keys", self.field)),
        }
    }

    #[cfg(feature = "mongodb")]
    pub(crate) fn encrypts(&self) -> bool {
        self.data_keys.is_some()
    }

    /// Whether a new record would hold it in the same form.
    #[cfg(feature = "encryption")]
    pub(crate) fn is_current(&self, stored: &str) -> bool {
        self.data_keys.as_ref().is_none_or(|data_keys| data_keys.is_current(stored))
    }
}

#[cfg(not(feature = "encryption"))]
impl DataKeys {
    fn seal(&self, _: &str, _: &str, _: &str) -> Result<String, NotEncrypted> {
        match *self {}
    }

    fn open(&self, _: &str, _: &str, _: &str) -> Result<Secret, String> {
        match *self {}
    }
}
