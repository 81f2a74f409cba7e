//! Who may use the admin: whoever brings its token; without one, whoever is on this machine. And whether a change
//! was asked for by the page, or a program, rather than by another site in somebody's browser.

use std::net::{IpAddr, SocketAddr};

use axum::{
    extract::{ConnectInfo, Request, State},
    http::{
        HeaderMap, HeaderName, StatusCode,
        header::{AUTHORIZATION, FORWARDED, HOST, WWW_AUTHENTICATE},
        uri::Authority,
    },
    middleware::Next,
    response::{IntoResponse, Response},
};

use super::refusal::Refusal;
use crate::callers::Token;

/// A page of another site can't have a browser send it.
const CHANGE: HeaderName = HeaderName::from_static("x-gateway-admin");

const FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// What a proxy in between adds: then the peer is the proxy, and says nothing of who asks.
const BY_A_PROXY: [HeaderName; 2] = [FORWARDED, HeaderName::from_static("x-forwarded-for")];

/// For everything, where there is no token: only to this machine, and under a name of it, since any site's name can
/// be made to mean this machine.
pub(super) async fn on_this_machine(
    State(token): State<Option<Token>>,
    request: Request,
    next: Next,
) -> Response {
    let refused = |error: &str| Refusal::new(StatusCode::FORBIDDEN, error).into_response();
    if token.is_none() {
        if !is_from_this_machine(&request) {
            return refused(
                "without an admin token the admin is there for this machine only: set --admin-token",
            );
        }
        if !is_to_this_machine(&request) {
            return refused(
                "without an admin token the admin is there as localhost or a loopback address only: set --admin-token",
            );
        }
    }
    next.run(request).await
}

/// For the API, where there is a token.
pub(super) async fn with_the_token(
    State(token): State<Option<Token>>,
    request: Request,
    next: Next,
) -> Response {
    match token {
        Some(token) if !bearer(request.headers()).is_some_and(|given| token.is(given)) => {
            let refusal = Refusal::new(StatusCode::UNAUTHORIZED, "this needs the admin token");
            ([(WWW_AUTHENTICATE, "Bearer")], refusal).into_response()
        }
        _ => next.run(request).await,
    }
}

pub(super) async fn not_from_another_site(request: Request, next: Next) -> Response {
    let headers = request.headers();
    let site = headers.get(FETCH_SITE).map(|site| site.as_bytes());
    let is_ours = headers.contains_key(CHANGE) && matches!(site, None | Some(b"same-origin" | b"none"));
    if !request.method().is_safe() && !is_ours {
        return Refusal::new(
            StatusCode::FORBIDDEN,
            "a change needs the header x-gateway-admin: 1, and comes from no other site",
        )
        .into_response();
    }
    next.run(request).await
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

fn is_from_this_machine(request: &Request) -> bool {
    let peer = request.extensions().get::<ConnectInfo<SocketAddr>>();
    let is_proxied = BY_A_PROXY.iter().any(|name| request.headers().contains_key(name));
    peer.is_some_and(|ConnectInfo(peer)| peer.ip().to_canonical().is_loopback()) && !is_proxied
}

/// By its `Host` and, of HTTP/2, its `:authority`: all that there are, and there is one.
fn is_to_this_machine(request: &Request) -> bool {
    let hosts = request.headers().get_all(HOST).iter().map(|host| Authority::try_from(host.as_bytes()).ok());
    let mut hosts = hosts.chain(request.uri().authority().cloned().map(Some)).peekable();
    hosts.peek().is_some() && hosts.all(|host| host.is_some_and(|host| is_loopback(host.host())))
}

fn is_loopback(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']');
    host.eq_ignore_ascii_case("localhost")
        || address.parse().is_ok_and(|address: IpAddr| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

    #[test]
    fn only_names_of_this_machine_are() {
        let is = |host: &str| {
            is_to_this_machine(&Request::get("/admin").header(HOST, host).body(Body::empty()).unwrap())
        };
        for host in ["localhost", "LOCALHOST:8080", "127.0.0.1:8080", "127.8.9.1", "[::1]", "[::1]:8080"] {
            assert!(is(host), "{host}");
        }
        for host in [
            "example.com",
            "localhost.example.com",
            "127.0.0.1.example.com",
            "0.0.0.0",
            "10.0.0.1",
            "[::2]:8080",
            "",
            "local host",
            "localhost@example.com",
        ] {
            assert!(!is(host), "{host}");
        }
    }

    #[test]
    fn a_second_name_must_be_of_this_machine_as_well() {
        let request = |uri: &str, host: Option<&str>| {
            let request = Request::get(uri);
            let request = host.into_iter().fold(request, |request, host| request.header(HOST, host));
            request.body(Body::empty()).unwrap()
        };
        assert!(is_to_this_machine(&request("http://localhost/admin", None)));
        assert!(!is_to_this_machine(&request("http://example.com/admin", Some("localhost"))));
        assert!(!is_to_this_machine(&request("/admin", None)));
    }

    #[test]
    fn who_comes_through_a_proxy_is_not_taken_for_somebody_on_this_machine() {
        let request = |peer: &str, header: &str| {
            let mut request = Request::get("/admin").header(header, "x").body(Body::empty()).unwrap();
            request.extensions_mut().insert(ConnectInfo(peer.parse::<SocketAddr>().unwrap()));
            request
        };
        assert!(is_from_this_machine(&request("127.0.0.1:1", "accept")));
        assert!(is_from_this_machine(&request("[::ffff:127.0.0.1]:1", "accept")));
        assert!(!is_from_this_machine(&request("127.0.0.1:1", "x-forwarded-for")));
        assert!(!is_from_this_machine(&request("127.0.0.1:1", "forwarded")));
        assert!(!is_from_this_machine(&request("10.0.0.1:1", "accept")));
    }
}
