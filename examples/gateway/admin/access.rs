//! Who may use the admin: whoever brings its token; without one, whoever is on this machine. And whether a change
//! was asked for by the page, or a program, rather than by another site in somebody's browser.

use std::net::SocketAddr;

use axum::{
    extract::{ConnectInfo, Request, State},
    http::{
        HeaderMap, HeaderName, StatusCode,
        header::{AUTHORIZATION, FORWARDED, WWW_AUTHENTICATE},
    },
    middleware::Next,
    response::{IntoResponse, Response},
};

use super::refusal::Refusal;
use crate::{callers::Token, this_machine};

/// A page of another site can't have a browser send it.
const CHANGE: HeaderName = HeaderName::from_static("x-gateway-admin");

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
        if !this_machine::is_named_by(request.headers(), request.uri()) {
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
    let site = headers.get(this_machine::FETCH_SITE).map(|site| site.as_bytes());
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

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

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
