//! From a document to a key.

use std::{collections::BTreeMap, num::NonZeroU32, time::Duration};

use ::mongodb::bson::{Bson, Document, RawBsonRef, RawDocument, doc, oid::ObjectId};

use super::{
    fields::{Fields, KNOWN, computed, ours},
    stored::resting,
};
use crate::{
    key::{KeyId, KeySpec},
    limit::{Resting, Scope, Words},
    store::{Born, KeyRecord, Standing, Unreadable, encryption::AtRest},
};

/// A document that can be read as a key.
#[cfg_attr(test, derive(Debug, PartialEq))]
pub(super) enum Read {
    /// Its words count from the epoch, by the server's clock.
    Key(Box<KeyRecord>),
    /// Another program has changed it since the last write: it has to be absorbed first.
    Unsettled(KeyId),
}

/// Reads a document as a load projects it.
pub(super) fn decode(document: &RawDocument, fields: &Fields, at_rest: &AtRest) -> Result<Read, Unreadable> {
    let unreadable = |reason: String| Unreadable::new(shown_id(document), reason);
    let id = key_id(document).map_err(unreadable)?;
    let secret = text(document, &fields.api_key).and_then(|stored| at_rest.secret(&id, stored));
    let spec = KeySpec::new(id, secret.map_err(unreadable)?);
    text(document, &fields.status).map_err(unreadable)?;
    let spec = with_its_spec(spec, document).map_err(unreadable)?;
    if !document.get_bool(computed::IS_SETTLED).unwrap_or_default() {
        return Ok(Read::Unsettled(spec.id));
    }
    let standing =
        standing(document, fields).ok_or_else(|| unreadable("born is not hexadecimal".to_owned()))?;
    Ok(Read::Key(Box::new(KeyRecord::new(spec, standing))))
}

/// How a key stands, with times that count from the epoch. `None` if the document was never absorbed.
pub(super) fn standing(document: &RawDocument, fields: &Fields) -> Option<Standing> {
    let born = u64::from_str_radix(document.get_str(ours::BORN).ok()?, 16).ok()?;
    let rest = document.get_document(ours::REST).ok()?;
    let generation = whole_number(rest, "g")?.max(0).unsigned_abs();
    let words = Words { generation, key: rest_in(rest), scopes: scopes(document) };
    let is_disabled = text(document, &fields.status).is_ok_and(|status| !KNOWN.contains(&status));
    Some(Standing::new(Born(born), words, is_disabled))
}

/// The rests of scopes. An entry that another program has spoiled is dropped by the next write.
fn scopes(document: &RawDocument) -> BTreeMap<Scope, Resting> {
    let limits = document.get_array(ours::LIMITS).into_iter().flatten();
    let limits = limits.filter_map(|limit| limit.ok()?.as_document());
    let scope = |limit: &RawDocument| Some((Scope::new(limit.get_str("s").ok()?).ok()?, rest_in(limit)?));
    limits.filter_map(scope).collect()
}

fn rest_in(rest: &RawDocument) -> Option<Resting> {
    let until = rest.get_datetime("u").ok()?;
    resting(until.timestamp_millis(), whole_number(rest, "r")?)
}

fn with_its_spec(mut spec: KeySpec, document: &RawDocument) -> Result<KeySpec, String> {
    let said = match document.get(ours::SPEC) {
        Ok(None | Some(RawBsonRef::Null | RawBsonRef::Undefined)) => return Ok(spec),
        Ok(Some(RawBsonRef::Document(said))) => said,
        Ok(Some(other)) => return Err(wrong_type(ours::SPEC, other, "a document")),
        Err(_) => return Err(BROKEN.to_owned()),
    };
    for field in said {
        let (name, value) = field.map_err(|_| BROKEN.to_owned())?;
        if value == RawBsonRef::Null {
            continue;
        }
        match name.as_str() {
            "group" => spec.group = Some(spec_text(name.as_str(), value)?),
            "endpoint" => spec.endpoint = Some(spec_text(name.as_str(), value)?),
            "tier" => spec.tier = Some(spec_number(name.as_str(), value)?),
            "weight" => spec.weight = Some(spec_number::<NonZeroU32>(name.as_str(), value)?),
            "maxInFlight" => spec.max_in_flight = Some(spec_number::<NonZeroU32>(name.as_str(), value)?),
            _ => return Err("spec has a field that this version does not know".to_owned()),
        }
    }
    Ok(spec)
}

fn spec_text(name: &str, value: RawBsonRef<'_>) -> Result<String, String> {
    let text = value.as_str().map(str::to_owned);
    text.ok_or_else(|| wrong_type(&format!("{}.{name}", ours::SPEC), value, "a string"))
}

fn spec_number<N: TryFrom<u32>>(name: &str, value: RawBsonRef<'_>) -> Result<N, String> {
    let number = match value {
        RawBsonRef::Int32(number) => Some(number.into()),
        RawBsonRef::Int64(number) => Some(number),
        // Numbers of a shell or a Node page are doubles.
        RawBsonRef::Double(number) if number.fract() == 0.0 => Some(number as i64),
        _ => None,
    };
    let number =
        number.and_then(|number| u32::try_from(number).ok()).and_then(|number| N::try_from(number).ok());
    number.ok_or_else(|| format!("{}.{name} is not a whole number that it can be", ours::SPEC))
}

/// The id of a document that a key may have.
pub(super) fn id(document: &RawDocument) -> Option<KeyId> {
    key_id(document).ok()
}

/// Drivers of other programs make ObjectIds. In a key's id, one is its hexadecimal digits.
fn key_id(document: &RawDocument) -> Result<KeyId, String> {
    let hex;
    let id = match document.get("_id") {
        Ok(Some(RawBsonRef::ObjectId(id))) => {
            hex = id.to_hex();
            &*hex
        }
        _ => text(document, "_id")?,
    };
    KeyId::new(id).map_err(|error| error.to_string())
}

/// What the `_id` of a key's document is, in a filter.
pub(super) fn is_id(id: &KeyId) -> Bson {
    match object_id(id) {
        Some(object_id) => doc! { "$in": [id.as_str(), object_id] }.into(),
        None => id.as_str().into(),
    }
}

/// The same for several keys.
pub(super) fn is_one_of_ids(ids: &[KeyId]) -> Document {
    let texts = ids.iter().map(|id| Bson::from(id.as_str()));
    let object_ids = ids.iter().filter_map(object_id).map(Bson::from);
    doc! { "$in": texts.chain(object_ids).collect::<Vec<_>>() }
}

/// The ObjectId that a key's id may be the digits of.
pub(super) fn object_id(id: &KeyId) -> Option<ObjectId> {
    ObjectId::parse_str(id.as_str()).ok().filter(|object_id| object_id.to_hex() == id.as_str())
}

const BROKEN: &str = "the document is broken";

pub(super) fn text<'a>(document: &'a RawDocument, field: &str) -> Result<&'a str, String> {
    match document.get(field) {
        Ok(Some(RawBsonRef::String(text))) => Ok(text),
        Ok(Some(other)) => Err(wrong_type(field, other, "a string")),
        Ok(None) => Err(format!("{field} is missing")),
        // Without the error, which may quote anything.
        Err(_) => Err(BROKEN.to_owned()),
    }
}

fn wrong_type(field: &str, value: RawBsonRef<'_>, expected: &str) -> String {
    format!("{field} is of the type {:?}, not {expected}", value.element_type())
}

/// The value of a field; `None` if that is null.
pub(super) fn value(document: &RawDocument, field: &str) -> Option<Bson> {
    let value = document.get(field).ok().flatten()?;
    Bson::try_from(value).ok().filter(|value| *value != Bson::Null)
}

pub(super) fn whole_number(document: &RawDocument, field: &str) -> Option<i64> {
    match document.get(field) {
        Ok(Some(RawBsonRef::Int64(number))) => Some(number),
        Ok(Some(RawBsonRef::Int32(number))) => Some(number.into()),
        _ => None,
    }
}

/// The same key, with words that count from now. It was read before, so what has passed since then is no longer left.
pub(super) fn from_now(standing: Standing, server_time: Duration) -> Standing {
    Standing { words: standing.words.after(server_time), ..standing }
}

/// An id as it can be logged: on one line, and of bounded length.
pub(super) fn shown_id(document: &RawDocument) -> String {
    let id = match document.get("_id") {
        Ok(Some(RawBsonRef::String(id))) => id.to_owned(),
        Ok(Some(RawBsonRef::ObjectId(id))) => id.to_hex(),
        Ok(Some(RawBsonRef::Int32(id))) => id.to_string(),
        Ok(Some(RawBsonRef::Int64(id))) => id.to_string(),
        Ok(Some(other)) => format!("an id of the type {:?}", other.element_type()),
        _ => "without an id".to_owned(),
    };
    const LONGEST: usize = 256;
    let printable = id.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c });
    printable.take(LONGEST).collect()
}
