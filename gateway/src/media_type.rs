//! The media type of a body.

use axum::http::{
    HeaderMap,
    header::{CONTENT_ENCODING, CONTENT_TYPE},
};

/// Returns the media type without parameters, in lower case: it is case-insensitive (RFC 9110 section 8.3.1).
pub(crate) fn media_type(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(CONTENT_TYPE)?.to_str().ok()?;
    Some(value.split(';').next()?.trim().to_ascii_lowercase())
}

/// The same for a body that is not compressed; `None` for a compressed one.
pub(crate) fn plain_media_type(headers: &HeaderMap) -> Option<String> {
    let is_plain = headers.get(CONTENT_ENCODING).is_none_or(|encoding| encoding == "identity");
    media_type(headers).filter(|_| is_plain)
}
