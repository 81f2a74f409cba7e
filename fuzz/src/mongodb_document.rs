//! Decoding of a MongoDB document into a key.
//!
//! Each input is used twice: as the bytes of a document whose length field is corrected, and as entropy for a generated
//! document that has the relevant fields with values of every type.

use std::future::ready;

use arbitrary::{Result, Unstructured};
use mongodb::bson::{
    Binary, DateTime, Decimal128, RawBson, RawBsonRef, RawDocument, RawDocumentBuf,
    RawJavaScriptCodeWithScope, Regex, Timestamp,
    oid::ObjectId,
    raw::{CStr, CString},
    spec::BinarySubtype,
};
use tower_key_rotation::{
    KeyId, KeyPool, Secret,
    clock::ManualClock,
    store::{
        KeyStore, Loaded, Mark, Recovered, StoreFuture,
        mongodb::{DataKeys, fuzzing::Documents},
    },
};

use crate::{can_be_sent, now};

/// The part of every secret that no reason may show.
const CANARY: &str = "canary";

pub fn check(input: &[u8]) {
    if let Some(document) = as_it_is(input) {
        check_document(&document);
    }
    if let Ok(document) = made(&mut Unstructured::new(input), 2) {
        check_document(&document);
    }
}

fn as_it_is(input: &[u8]) -> Option<RawDocumentBuf> {
    let mut bytes = input.to_vec();
    let length = i32::try_from(bytes.len()).ok()?;
    *bytes.last_mut()? = 0;
    bytes.first_chunk_mut::<4>()?.copy_from_slice(&length.to_le_bytes());
    RawDocumentBuf::from_bytes(bytes).ok()
}

/// The prefix of encrypted values.
const ENCRYPTED: &str = "encrypted.v";

/// The data keys of the encrypted seeds: 64 zero bytes, in base64.
fn data_keys() -> DataKeys {
    DataKeys::parse(format!("2026a={}==", "A".repeat(86))).unwrap()
}

fn check_document(document: &RawDocument) {
    check_in_the_clear(document);
    check_decrypted(document);
}

/// Asserts that a decrypted secret encrypts to the stored value again.
fn check_decrypted(document: &RawDocument) {
    let documents = Documents::of(Some(data_keys()));
    let Ok(record) = documents.decode(document) else { return };
    let stored = document.get_str("apiKey").unwrap();
    let is_encrypted = stored.starts_with(ENCRYPTED);
    assert!(is_encrypted || stored == record.secret.expose());
    assert!(!is_encrypted || Some(stored) == documents.stored(&record.id, &record.secret).as_deref());
}

fn check_in_the_clear(document: &RawDocument) {
    let text = |field: &str| document.get_str(field).ok();
    let id = text("_id").and_then(|id| KeyId::new(id).ok());
    let mut loaded = Loaded::default();
    match Documents::of(None).decode(document) {
        Ok(record) => {
            assert_eq!(Some(&record.id), id.as_ref());
            assert_eq!(Some(record.secret.expose()), text("apiKey"));
            loaded.records.push(record);
        }
        Err(unreadable) => {
            let secret = text("apiKey").filter(|secret| !secret.starts_with(ENCRYPTED));
            assert!(id.is_none() || secret.is_none() || text("status").is_none(), "{unreadable:?}");
            assert!(unreadable.id.chars().count() <= 256 && is_one_line(&unreadable.id), "{unreadable:?}");
            assert!(unreadable.reason.len() <= 100 && is_one_line(&unreadable.reason), "{unreadable:?}");
            assert!(!unreadable.reason.contains(CANARY), "{unreadable:?}");
            let is_in_id = text("_id").is_some_and(|id| id.contains(CANARY));
            assert!(is_in_id || !unreadable.id.contains(CANARY), "{unreadable:?}");
            loaded.unreadable.push(unreadable);
        }
    }

    let is_key = id.is_some() && text("status").is_some() && text("apiKey").is_some_and(can_be_sent);
    let pool = now(KeyPool::builder().clock(ManualClock::new()).open(Holding(loaded))).unwrap();
    let stats = pool.stats();
    assert_eq!((stats.keys.len(), stats.unreadable), if is_key { (1, 0) } else { (0, 1) });
    assert_eq!(stats.healthy == 1, is_key && may_be_used(document));
}

fn is_one_line(text: &str) -> bool {
    !text.chars().any(char::is_control)
}

/// Returns whether a key with this document is available.
///
/// A key with an unknown status is out of service, and a rest without a date never ends by itself.
fn may_be_used(document: &RawDocument) -> bool {
    let is_over = match document.get("left") {
        Ok(Some(RawBsonRef::Int32(left))) => left <= 0,
        Ok(Some(RawBsonRef::Int64(left))) => left <= 0,
        _ => false,
    };
    match document.get_str("status") {
        Ok("healthy") => true,
        Ok("rate_limited") => is_over,
        Ok("exhausted") => is_over && document.get_bool("exhaustionIsDated").unwrap_or_default(),
        _ => false,
    }
}

/// A store whose `load` returns these records.
#[derive(Debug)]
struct Holding(Loaded);

impl KeyStore for Holding {
    fn load(&self) -> StoreFuture<'_, Loaded> {
        Box::pin(ready(Ok(self.0.clone())))
    }

    fn write(&self, _: Mark) -> StoreFuture<'_, ()> {
        unreachable!()
    }

    fn recover(&self) -> StoreFuture<'_, Recovered> {
        unreachable!()
    }

    fn insert(&self, _: KeyId, _: Secret) -> StoreFuture<'_, bool> {
        unreachable!()
    }

    fn remove<'a>(&'a self, _: &'a KeyId) -> StoreFuture<'a, bool> {
        unreachable!()
    }

    fn reset<'a>(&'a self, _: &'a KeyId) -> StoreFuture<'a, bool> {
        unreachable!()
    }

    fn set_disabled<'a>(&'a self, _: &'a KeyId, _: bool) -> StoreFuture<'a, bool> {
        unreachable!()
    }
}

const FIELDS: [&str; 9] = [
    "_id",
    "apiKey",
    "status",
    "left",
    "exhaustionIsDated",
    "disabledFrom",
    "serverTime",
    "cooldownUntil",
    "lastError",
];

const STATUSES: [&str; 5] = ["healthy", "rate_limited", "exhausted", "error", "disabled"];

/// Generates a document with nested documents, up to this depth.
fn made(input: &mut Unstructured<'_>, depth: u8) -> Result<RawDocumentBuf> {
    let mut document = RawDocumentBuf::new();
    for _ in 0..input.int_in_range(0..=8)? {
        let field = match input.choose(&[true, true, true, false])? {
            true => *input.choose(&FIELDS)?,
            false => input.arbitrary()?,
        };
        if let Ok(name) = <&CStr>::try_from(field) {
            document.append(name, value(input, field, depth)?);
        }
    }
    Ok(document)
}

fn value(input: &mut Unstructured<'_>, field: &str, depth: u8) -> Result<RawBson> {
    // Half of the values have the expected type, so that they get further into the decoder.
    if input.arbitrary()? {
        return Ok(match field {
            "left" => RawBson::Int64(input.arbitrary()?),
            "exhaustionIsDated" => RawBson::Boolean(input.arbitrary()?),
            "serverTime" | "cooldownUntil" => RawBson::DateTime(DateTime::from_millis(input.arbitrary()?)),
            _ => RawBson::String(string(input, field)?),
        });
    }
    Ok(match input.int_in_range(0..=19)? {
        0 => RawBson::Double(input.arbitrary()?),
        1 => RawBson::String(string(input, field)?),
        2 if depth > 0 => RawBson::Document(made(input, depth - 1)?),
        3 if depth > 0 => RawBson::Array([value(input, field, depth - 1)?].into_iter().collect()),
        4 => RawBson::Binary(Binary { subtype: BinarySubtype::Generic, bytes: secret(input)?.into() }),
        5 => RawBson::Undefined,
        6 => RawBson::ObjectId(ObjectId::from_bytes(input.arbitrary()?)),
        7 => RawBson::Boolean(input.arbitrary()?),
        8 => RawBson::DateTime(DateTime::from_millis(input.arbitrary()?)),
        9 => RawBson::RegularExpression(Regex { pattern: c_string(input)?, options: c_string(input)? }),
        10 => RawBson::JavaScriptCode(secret(input)?),
        11 => RawBson::Symbol(secret(input)?),
        12 if depth > 0 => RawBson::JavaScriptCodeWithScope(RawJavaScriptCodeWithScope {
            code: secret(input)?,
            scope: made(input, depth - 1)?,
        }),
        13 => RawBson::Int32(input.arbitrary()?),
        14 => RawBson::Timestamp(Timestamp { time: input.arbitrary()?, increment: input.arbitrary()? }),
        15 => RawBson::Int64(input.arbitrary()?),
        16 => RawBson::Decimal128(Decimal128::from_bytes(input.arbitrary()?)),
        17 => RawBson::MinKey,
        18 => RawBson::MaxKey,
        _ => RawBson::Null,
    })
}

fn string(input: &mut Unstructured<'_>, field: &str) -> Result<String> {
    match field {
        "_id" => input.arbitrary(),
        "status" | "disabledFrom" if input.arbitrary()? => Ok((*input.choose(&STATUSES)?).to_owned()),
        _ => secret(input),
    }
}

fn secret(input: &mut Unstructured<'_>) -> Result<String> {
    Ok(format!("{CANARY}{}", input.arbitrary::<&str>()?))
}

fn c_string(input: &mut Unstructured<'_>) -> Result<CString> {
    let text = secret(input)?.replace('\0', "");
    CString::try_from(text).map_err(|_| arbitrary::Error::IncorrectFormat)
}
