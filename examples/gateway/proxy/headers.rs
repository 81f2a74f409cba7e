//! Which headers a proxy passes on: all but those of a connection, and but the caller's credentials.

use axum::http::{
    HeaderMap, HeaderName, HeaderValue,
    header::{
        ACCEPT_ENCODING, CONNECTION, EXPECT, HOST, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE,
        TRANSFER_ENCODING, UPGRADE,
    },
};

use crate::callers::CREDENTIALS;

/// RFC 9110 section 7.6.1, and what belongs to the proxy itself by section 11.7.
const HOP_BY_HOP: [HeaderName; 8] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION,
    TE,
    TRANSFER_ENCODING,
    UPGRADE,
];

pub(super) fn to_upstream(headers: &mut HeaderMap) {
    remove_hop_by_hop(headers);
    // The client sets the upstream's own, and has answered the caller's expectation itself.
    for name in [HOST, EXPECT].into_iter().chain(CREDENTIALS) {
        headers.remove(name);
    }
    // Tokens are read from the body as it passes.
    headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
}

pub(super) fn to_caller(headers: &mut HeaderMap) {
    remove_hop_by_hop(headers);
}

fn remove_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|names| names.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named.into_iter().chain(HOP_BY_HOP) {
        headers.remove(name);
    }
}
