//! What the fuzz targets get hold of, and nobody else.

use ::mongodb::bson::RawDocument;

use super::{
    document::{self, Read},
    fields::Fields,
};
use crate::{
    key::{KeyId, Secret},
    store::{
        KeyRecord, Unreadable,
        encryption::{AtRest, DataKeys},
    },
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
        let at_rest = AtRest::new(fields.api_key.clone(), data_keys);
        Self { fields, at_rest }
    }

    /// A key, with words that count from the epoch; `None` if the document has to be absorbed first.
    ///
    /// # Errors
    ///
    /// If it cannot be read as a key.
    pub fn decode(&self, document: &RawDocument) -> Result<Option<KeyRecord>, Unreadable> {
        Ok(match document::decode(document, &self.fields, &self.at_rest)? {
            Read::Key(record) => Some(*record),
            Read::Unsettled(_) => None,
        })
    }

    /// What a new document holds for this secret.
    #[must_use]
    pub fn stored(&self, id: &KeyId, secret: &Secret) -> Option<String> {
        self.at_rest.stored(id, secret).ok()
    }
}
