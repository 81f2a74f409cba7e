//! What a body is said to be.

use axum::http::{HeaderMap, header::CONTENT_TYPE};

/// Without its parameters and in lower case, in which RFC 9110 section 8.3.1 takes all to be the same.
pub(crate) fn media_type(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(CONTENT_TYPE)?.to_str().ok()?;
    Some(value.split(';').next()?.trim().to_ascii_lowercase())
}
