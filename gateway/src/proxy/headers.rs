//! Which headers a proxy passes on: all but those of a connection, but the caller's credentials, and but what the
//! upstream says of its own name.

use axum::http::{
    HeaderMap, HeaderName, HeaderValue,
    header::{
        ACCEPT_ENCODING, ALT_SVC, CONNECTION, COOKIE, EXPECT, HOST, LOCATION, PROXY_AUTHENTICATE,
        PROXY_AUTHORIZATION, STRICT_TRANSPORT_SECURITY, TE, TRANSFER_ENCODING, UPGRADE,
    },
};

use super::Upstream;
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

/// They say to whom the caller's own key belongs. A key of another account is refused with them.
const ACCOUNT: [HeaderName; 3] = [
    HeaderName::from_static("openai-organization"),
    HeaderName::from_static("openai-project"),
    HeaderName::from_static("x-goog-user-project"),
];

/// What a server says of all that has its name, which to the caller is the gateway's.
const OF_ORIGIN: [HeaderName; 3] =
    [STRICT_TRANSPORT_SECURITY, ALT_SVC, HeaderName::from_static("clear-site-data")];

pub(super) fn to_upstream(headers: &mut HeaderMap) {
    remove_hop_by_hop(headers);
    // The client sets the upstream's own, and an expectation is the gateway's to meet: hyper does in HTTP/1.1, once the
    // body is read, and in HTTP/2 callers go on after a while.
    for name in [HOST, EXPECT].into_iter().chain(CREDENTIALS).chain(ACCOUNT) {
        headers.remove(name);
    }
    join_cookies(headers);
    // Tokens are read from the body as it passes.
    headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
}

/// HTTP/2 lets a caller split them, RFC 9113 section 8.2.3, and HTTP/1.1 knows one line of them only.
fn join_cookies(headers: &mut HeaderMap) {
    let cookies: Vec<_> = headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if cookies.len() > 1
        && let Ok(joined) = HeaderValue::from_bytes(&cookies.join(&b"; "[..]))
    {
        headers.insert(COOKIE, joined);
    }
}

pub(super) fn to_caller(headers: &mut HeaderMap, upstream: &Upstream) {
    remove_hop_by_hop(headers);
    for name in OF_ORIGIN {
        headers.remove(name);
    }
    let location = headers.get(LOCATION).and_then(|location| location.to_str().ok());
    if let Some(path) = location.and_then(|location| upstream.path_of(location)) {
        headers.insert(LOCATION, path);
    }
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
