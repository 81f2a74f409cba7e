//! Decoding of a MongoDB document into a key.
//!
//! Each input is used twice: as the bytes of a document whose length field is corrected, and as entropy for a generated
//! document that has the relevant fields with values of every type.

use std::future::ready;

use arbitrary::{Result, Unstructured};
use mongodb::bson::{
    Binary, DateTime, Decimal128, RawBson, RawDocument, RawDocumentBuf, RawJavaScriptCodeWithScope, Regex,
    Timestamp,
    oid::ObjectId,
    raw::{CStr, CString},
    spec::BinarySubtype,
};
use tower_key_rotation::{
    KeyId, KeyPool, KeySpec,
    clock::ManualClock,
    store::{
        KeyStore, Loaded, Mark, Operation, Recovered, Standing, StoreFuture,
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
    let Ok(Some(record)) = documents.decode(document) else { return };
    let KeySpec { id, secret, .. } = &record.spec;
    let stored = document.get_str("apiKey").unwrap();
    let is_encrypted = stored.starts_with(ENCRYPTED);
    assert!(is_encrypted || stored == secret.expose());
    assert!(!is_encrypted || Some(stored) == documents.stored(id, secret).as_deref());
}

fn check_in_the_clear(document: &RawDocument) {
    let text = |field: &str| document.get_str(field).ok();
    let hex = document.get_object_id("_id").ok().map(ObjectId::to_hex);
    let id = hex.as_deref().or(text("_id")).and_then(|id| KeyId::new(id).ok());
    let mut loaded = Loaded::default();
    // The numbers of keys that serve, and of entries that are no keys.
    let mut expected = (0, 0);
    let mut is_healthy = false;
    match Documents::of(None).decode(document) {
        // The store absorbs such a document, and reads it again.
        Ok(None) => assert!(!document.get_bool("isSettled").unwrap_or_default()),
        Ok(Some(record)) => {
            assert_eq!(Some(&record.spec.id), id.as_ref());
            assert_eq!(Some(record.spec.secret.expose()), text("apiKey"));
            assert_eq!(record.standing.disabled, !KNOWN.contains(&text("status").unwrap()));
            let is_key = can_be_sent(record.spec.secret.expose()) && record.spec.unsupported().is_none();
            expected = if is_key { (1, 0) } else { (0, 1) };
            is_healthy = is_key && !record.standing.disabled && record.standing.words.key.is_none();
            loaded.records.push(record);
        }
        Err(unreadable) => {
            expected = (0, 1);
            let secret = text("apiKey").filter(|secret| !secret.starts_with(ENCRYPTED));
            let is_plain =
                !["spec", "born"].iter().any(|field| matches!(document.get(field), Ok(Some(_)) | Err(_)));
            let is_settled = document.get_bool("isSettled").unwrap_or_default();
            let has_all = id.is_some() && secret.is_some() && text("status").is_some();
            assert!(!has_all || !is_plain || is_settled, "{unreadable:?}");
            assert!(unreadable.id.chars().count() <= 256 && is_one_line(&unreadable.id), "{unreadable:?}");
            assert!(unreadable.reason.len() <= 100 && is_one_line(&unreadable.reason), "{unreadable:?}");
            assert!(!unreadable.reason.contains(CANARY), "{unreadable:?}");
            let is_in_id = text("_id").is_some_and(|id| id.contains(CANARY));
            assert!(is_in_id || !unreadable.id.contains(CANARY), "{unreadable:?}");
            loaded.unreadable.push(unreadable);
        }
    }
    let pool = now(KeyPool::builder().clock(ManualClock::new()).open(Holding(loaded))).unwrap();
    let stats = pool.stats();
    assert_eq!((stats.keys.len(), stats.unreadable), expected);
    assert_eq!(stats.healthy == 1, is_healthy);
}

fn is_one_line(text: &str) -> bool {
    !text.chars().any(char::is_control)
}

/// A store whose `load` returns these records.
#[derive(Debug)]
struct Holding(Loaded);

impl KeyStore for Holding {
    fn load<'a>(&'a self, _: Option<&'a [KeyId]>) -> StoreFuture<'a, Loaded> {
        Box::pin(ready(Ok(self.0.clone())))
    }

    fn merge(&self, _: Mark) -> StoreFuture<'_, Option<Standing>> {
        unreachable!()
    }

    fn operate(&self, _: KeyId, _: Operation) -> StoreFuture<'_, Option<Standing>> {
        unreachable!()
    }

    fn sweep(&self) -> StoreFuture<'_, Recovered> {
        unreachable!()
    }
}

/// The statuses of keys in service. A key with another one is out of service.
const KNOWN: [&str; 4] = ["healthy", "rate_limited", "exhausted", "error"];

const FIELDS: [&str; 18] = [
    "_id",
    "apiKey",
    "status",
    "isSettled",
    "born",
    "rest",
    "limits",
    "spec",
    "serverTime",
    "cooldownUntil",
    "lastError",
    "g",
    "u",
    "r",
    "s",
    "tier",
    "group",
    "weight",
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
            "isSettled" => RawBson::Boolean(true),
            "born" => RawBson::String(format!("{:016x}", input.arbitrary::<u64>()?)),
            "rest" | "spec" if depth > 0 => RawBson::Document(made(input, depth - 1)?),
            "limits" if depth > 0 => RawBson::Array([value(input, "rest", depth - 1)?].into_iter().collect()),
            "g" | "r" | "tier" | "weight" => RawBson::Int64(input.int_in_range(-1..=4)?),
            "u" | "serverTime" | "cooldownUntil" => {
                RawBson::DateTime(DateTime::from_millis(input.arbitrary()?))
            }
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
        "status" if input.arbitrary()? => Ok((*input.choose(&STATUSES)?).to_owned()),
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
