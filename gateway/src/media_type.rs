//! The media type of a body.

use axum::http::{
    HeaderMap,
    header::{CONTENT_ENCODING, CONTENT_TYPE},
};

/// Returns the media type without parameters, in lower case: it is case-insensitive (RFC 9110 section 8.3.1).
pub(crate) fn media_type(headers: &HeaderMap) -> Option<String> {
    named(headers).map(str::to_ascii_lowercase)
}

/// Whether a body has this media type and is not compressed.
pub(crate) fn is_plain(headers: &HeaderMap, media_type: &str) -> bool {
    let is_compressed = || headers.get(CONTENT_ENCODING).is_some_and(|encoding| encoding != "identity");
    named(headers).is_some_and(|named| named.eq_ignore_ascii_case(media_type)) && !is_compressed()
}

fn named(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(CONTENT_TYPE)?.to_str().ok()?;
    Some(value.split(';').next()?.trim())
}
