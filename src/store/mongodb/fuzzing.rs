//! What the fuzz targets get hold of, and nobody else.

use ::mongodb::bson::RawDocument;

use super::{Fields, at_rest::AtRest, document};
use crate::store::{KeyRecord, Unreadable};

/// A key, of a document with the usual names.
pub fn decode(document: &RawDocument) -> Result<KeyRecord, Unreadable> {
    let fields = Fields::default();
    let in_the_clear = AtRest::new(fields.api_key.clone(), None);
    document::decode(document, &fields, &in_the_clear)
}
