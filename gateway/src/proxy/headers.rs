//! Headers that the gateway removes or changes: hop-by-hop headers, the caller's credentials, and headers that describe
//! the caller or the upstream's host name.

use axum::{
    body::HttpBody,
    http::{
        HeaderMap, HeaderName, HeaderValue, Method, Request,
        header::{
            ACCEPT_ENCODING, ALT_SVC, CONNECTION, CONTENT_LENGTH, CONTENT_SECURITY_POLICY, COOKIE, EXPECT,
            FORWARDED, HOST, LOCATION, ORIGIN, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, REFERER,
            STRICT_TRANSPORT_SECURITY, TE, TRAILER, TRANSFER_ENCODING, UPGRADE, VIA, X_CONTENT_TYPE_OPTIONS,
        },
    },
};

use crate::{base_url::BaseUrl, callers::CREDENTIALS};

/// Hop-by-hop headers of RFC 9110 section 7.6.1, and those of proxy authentication, section 11.7.
// Not constants, of which each use would be a copy.
static HOP_BY_HOP: [HeaderName; 9] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION,
    TE,
    // The gateway drops trailers.
    TRAILER,
    TRANSFER_ENCODING,
    UPGRADE,
];

/// Headers that name the account of the caller's own key. The API refuses a key of another account with them.
static ACCOUNT: [HeaderName; 3] = [
    HeaderName::from_static("openai-organization"),
    HeaderName::from_static("openai-project"),
    HeaderName::from_static("x-goog-user-project"),
];

/// Headers that tell who or where the caller is, beside `x-forwarded-…`. The upstream should know only the gateway.
static OF_CALLER: [HeaderName; 7] = [
    FORWARDED,
    VIA,
    ORIGIN,
    REFERER,
    HeaderName::from_static("x-real-ip"),
    HeaderName::from_static("cf-connecting-ip"),
    HeaderName::from_static("true-client-ip"),
];

/// Headers that apply to the server's whole host name, which for the caller is the gateway's.
static OF_ORIGIN: [HeaderName; 3] =
    [STRICT_TRANSPORT_SECURITY, ALT_SVC, HeaderName::from_static("clear-site-data")];

const FETCH_MODE: HeaderName = HeaderName::from_static("sec-fetch-mode");

pub(super) fn to_upstream(headers: &mut HeaderMap) {
    remove(headers, |name| {
        // The client sets the upstream's `Host`. The gateway itself meets an expectation: hyper sends the 100 in
        // HTTP/1.1 when the body is first read. In HTTP/2 it sends none, and callers send the body after a timeout.
        *name == HOST
            || *name == EXPECT
            || CREDENTIALS.contains(name)
            || ACCOUNT.contains(name)
            || OF_CALLER.contains(name)
            || is_forwarded(name)
    });
    join_cookies(headers);
    // The gateway reads token counts from the response body, which therefore must not be compressed.
    headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
}

fn is_forwarded(name: &HeaderName) -> bool {
    name.as_str().starts_with("x-forwarded-")
}

/// Announces the chunked body of a GET or HEAD.
///
/// Without the header, hyper's client drops a body of unknown length from these methods. In HTTP/2 it removes the
/// header.
pub(super) fn announce_body(request: &mut Request<impl HttpBody>) {
    let body = request.body();
    let has_unknown_length = !body.is_end_stream() && body.size_hint().exact().is_none();
    let is_unusual = [Method::GET, Method::HEAD].contains(request.method());
    if is_unusual && has_unknown_length && !request.headers().contains_key(CONTENT_LENGTH) {
        request.headers_mut().insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
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

/// `prefix` goes before the upstream's paths at the gateway.
pub(super) fn to_caller(headers: &mut HeaderMap, url: &BaseUrl, prefix: &str) {
    remove(headers, |name| OF_ORIGIN.contains(name));
    let location = headers.get(LOCATION).and_then(|location| location.to_str().ok());
    let path = location.and_then(|location| url.path_of(location));
    if let Some(path) = path.and_then(|path| HeaderValue::try_from(format!("{prefix}{path}")).ok()) {
        headers.insert(LOCATION, path);
    }
}

/// Whether a browser requests a document to show in a tab or a frame.
pub(super) fn is_navigation(headers: &HeaderMap) -> bool {
    headers.get_all(FETCH_MODE).iter().any(|mode| mode == "navigate")
}

/// Makes a browser run no script of the document and give it an opaque origin. Otherwise it would have the gateway's.
pub(super) fn sandbox(headers: &mut HeaderMap) {
    // A browser enforces every policy of a response, so the upstream's own stays.
    headers.append(CONTENT_SECURITY_POLICY, HeaderValue::from_static("sandbox"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
}

/// Removes hop-by-hop headers and those that `is_unwanted` names, with one look at each header.
fn remove(headers: &mut HeaderMap, is_unwanted: impl Fn(&HeaderName) -> bool) {
    // The coding wins (RFC 9112 section 6.3), and the length is wrong then.
    let has_wrong_length = headers.contains_key(TRANSFER_ENCODING);
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|names| names.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    let is_unwanted = |name: &&HeaderName| {
        HOP_BY_HOP.contains(name)
            || (has_wrong_length && **name == CONTENT_LENGTH)
            || is_unwanted(name)
            || named.contains(name)
    };
    let unwanted: Vec<_> = headers.keys().filter(is_unwanted).cloned().collect();
    for name in unwanted {
        headers.remove(name);
    }
}
