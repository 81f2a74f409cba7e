//! What the fuzz targets get hold of, and nobody else.

use ::mongodb::bson::RawDocument;

use super::{
    DataKeys, Fields,
    at_rest::{AtRest, Encryption},
    document,
};
use crate::{
    key::{KeyId, Secret},
    store::{KeyRecord, Unreadable},
};

/// Documents with the usual names.
#[allow(missing_debug_implementations)]
pub struct Documents {
    fields: Fields,
    at_rest: AtRest,
}

impl Documents {
    /// Of a store with these data keys.
    #[must_use]
    pub fn of(data_keys: Option<DataKeys>) -> Self {
        let fields = Fields::default();
        let at_rest = AtRest::new(fields.api_key.clone(), data_keys.map(Encryption::with));
        Self { fields, at_rest }
    }

    /// A key.
    ///
    /// # Errors
    ///
    /// Where it can't be read as one.
    pub fn decode(&self, document: &RawDocument) -> Result<KeyRecord, Unreadable> {
        document::decode(document, &self.fields, &self.at_rest)
    }

    /// What a new document holds for this secret.
    #[must_use]
    pub fn stored(&self, id: &KeyId, secret: &Secret) -> Option<String> {
        self.at_rest.stored(id, secret).ok()
    }
}
