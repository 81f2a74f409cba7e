//! From a document to a key.

use std::time::Duration;

use ::mongodb::bson::{Bson, RawBsonRef, RawDocument};

use super::{
    at_rest::AtRest,
    fields::{Fields, ours},
};
use crate::{
    key::KeyId,
    limit::Rest,
    store::{KeyRecord, Unreadable},
};

pub(super) const HEALTHY: &str = "healthy";
pub(super) const RATE_LIMITED: &str = "rate_limited";
pub(super) const EXHAUSTED: &str = "exhausted";
pub(super) const ERROR: &str = "error";
pub(super) const DISABLED: &str = "disabled";

/// What a limited key rests for that somebody left without a date.
pub(super) const WITHOUT_A_DATE: Duration = Duration::from_secs(120);

/// What a load has the server say: its time, the milliseconds until `cooldownUntil`, and whether an exhaustion ends
/// then.
pub(super) const SERVER_TIME: &str = "serverTime";
pub(super) const LEFT: &str = "left";
pub(super) const EXHAUSTION_IS_DATED: &str = "exhaustionIsDated";
pub(super) const COMPUTED: [&str; 3] = [SERVER_TIME, LEFT, EXHAUSTION_IS_DATED];

/// A key, of a document as a load projects it.
pub(super) fn decode(
    document: &RawDocument,
    fields: &Fields,
    at_rest: &AtRest,
) -> Result<KeyRecord, Unreadable> {
    let unreadable = |reason: String| Unreadable::new(shown_id(document), reason);
    let id = text(document, "_id").map_err(unreadable)?;
    let id = KeyId::new(id).map_err(|error| unreadable(error.to_string()))?;
    let secret = text(document, &fields.api_key).and_then(|stored| at_rest.secret(&id, stored));
    let secret = secret.map_err(unreadable)?;
    let status = text(document, &fields.status).map_err(unreadable)?;
    let (disabled, status) = match status {
        DISABLED => (true, text(document, ours::DISABLED_FROM).unwrap_or(HEALTHY)),
        status => (!is_known(status), status),
    };
    let rest = match status {
        RATE_LIMITED => Some((Rest::RateLimited, Some(left(document).unwrap_or(WITHOUT_A_DATE)))),
        EXHAUSTED => {
            let is_dated = document.get_bool(EXHAUSTION_IS_DATED).unwrap_or_default();
            Some((Rest::Exhausted, left(document).filter(|_| is_dated)))
        }
        ERROR => Some((Rest::Revoked, None)),
        _ => None,
    };
    Ok(KeyRecord { rest, disabled, ..KeyRecord::new(id, secret) })
}

/// The id of a document that a key may have.
pub(super) fn id(document: &RawDocument) -> Option<KeyId> {
    text(document, "_id").ok().and_then(|id| KeyId::new(id).ok())
}

fn is_known(status: &str) -> bool {
    matches!(status, HEALTHY | RATE_LIMITED | EXHAUSTED | ERROR)
}

pub(super) fn text<'a>(document: &'a RawDocument, field: &str) -> Result<&'a str, String> {
    match document.get(field) {
        Ok(Some(RawBsonRef::String(text))) => Ok(text),
        Ok(Some(other)) => Err(format!("{field} is of the type {:?}, not a string", other.element_type())),
        Ok(None) => Err(format!("{field} is missing")),
        // Without the error, which may quote anything.
        Err(_) => Err("the document is broken".to_owned()),
    }
}

/// What a field holds; none where that is null.
pub(super) fn value(document: &RawDocument, field: &str) -> Option<Bson> {
    let value = document.get(field).ok().flatten()?;
    Bson::try_from(value).ok().filter(|value| *value != Bson::Null)
}

fn left(document: &RawDocument) -> Option<Duration> {
    match document.get(LEFT) {
        Ok(Some(RawBsonRef::Int64(millis))) => Some(Duration::from_millis(millis.max(0).unsigned_abs())),
        Ok(Some(RawBsonRef::Int32(millis))) => {
            Some(Duration::from_millis(millis.max(0).unsigned_abs().into()))
        }
        _ => None,
    }
}

/// Takes off what is left the time that has passed since it was true.
pub(super) fn pass_time(records: &mut [KeyRecord], time: Duration) {
    for record in records {
        if let Some((_, Some(left))) = &mut record.rest {
            *left = left.saturating_sub(time);
        }
    }
}

/// An id as it can be logged: on one line, and not longer than one.
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

#[cfg(test)]
mod tests {
    use ::mongodb::bson::{Bson, Document, RawDocumentBuf, doc, oid::ObjectId};

    use super::*;

    fn left_of_a_limited_key(left: impl Into<Bson>) -> Option<Duration> {
        let document = doc! { "_id": "alpha", "apiKey": "sk-1", "status": RATE_LIMITED, LEFT: left.into() };
        let document = RawDocumentBuf::try_from(&document).unwrap();
        let record = decode(&document, &Fields::default(), &AtRest::new("apiKey".into(), None)).unwrap();
        record.rest.and_then(|(_, left)| left)
    }

    #[test]
    fn an_id_is_shown_whatever_it_is() {
        let shown = |document: Document| shown_id(&RawDocumentBuf::try_from(&document).unwrap());
        let object = ObjectId::from_bytes([0xab; 12]);
        assert_eq!(shown(doc! { "_id": object }), "ab".repeat(12));
        assert_eq!(shown(doc! { "_id": 7_i32 }), "7");
        assert_eq!(shown(doc! { "_id": -8_i64 }), "-8");
        assert_eq!(shown(doc! { "_id": true }), "an id of the type Boolean");
        assert_eq!(shown(doc! {}), "without an id");
        assert_eq!(
            shown(doc! { "_id": format!("a\n{}", "b".repeat(300)) }),
            format!("a\u{fffd}{}", "b".repeat(254))
        );
    }

    #[test]
    fn what_is_left_may_be_a_number_of_either_width_and_is_never_below_zero() {
        let second = Some(Duration::from_secs(1));
        assert_eq!((left_of_a_limited_key(1_000_i64), left_of_a_limited_key(1_000_i32)), (second, second));
        let zero = Some(Duration::ZERO);
        assert_eq!((left_of_a_limited_key(-1_i64), left_of_a_limited_key(-1_i32)), (zero, zero));
        assert_eq!(left_of_a_limited_key("soon"), Some(WITHOUT_A_DATE));
    }
}
