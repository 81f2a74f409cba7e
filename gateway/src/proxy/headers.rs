//! Headers that the gateway removes or changes: hop-by-hop headers, the caller's credentials, and headers that describe
//! the upstream's host name.

use axum::http::{
    HeaderMap, HeaderName, HeaderValue,
    header::{
        ACCEPT_ENCODING, ALT_SVC, CONNECTION, COOKIE, EXPECT, HOST, LOCATION, PROXY_AUTHENTICATE,
        PROXY_AUTHORIZATION, STRICT_TRANSPORT_SECURITY, TE, TRANSFER_ENCODING, UPGRADE,
    },
};

use super::Upstream;
use crate::callers::CREDENTIALS;

/// Hop-by-hop headers of RFC 9110 section 7.6.1, and those of proxy authentication, section 11.7.
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

/// Headers that name the account of the caller's own key. The API refuses a key of another account with them.
const ACCOUNT: [HeaderName; 3] = [
    HeaderName::from_static("openai-organization"),
    HeaderName::from_static("openai-project"),
    HeaderName::from_static("x-goog-user-project"),
];

/// Headers that apply to the server's whole host name, which for the caller is the gateway's.
const OF_ORIGIN: [HeaderName; 3] =
    [STRICT_TRANSPORT_SECURITY, ALT_SVC, HeaderName::from_static("clear-site-data")];

pub(super) fn to_upstream(headers: &mut HeaderMap) {
    remove_hop_by_hop(headers);
    // The client sets the upstream's `Host`. The gateway itself meets an expectation: hyper sends the 100 in HTTP/1.1
    // when the body is first read. In HTTP/2 it sends none, and callers send the body after a timeout.
    for name in [HOST, EXPECT].into_iter().chain(CREDENTIALS).chain(ACCOUNT) {
        headers.remove(name);
    }
    join_cookies(headers);
    // The gateway reads token counts from the response body, which therefore must not be compressed.
    headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
}

/// Joins several `Cookie` headers into one: HTTP/2 allows several (RFC 9113 section 8.2.3), HTTP/1.1 only one.
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
