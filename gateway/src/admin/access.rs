//! Who may use the admin: whoever brings its token; without one, whoever is on this machine, where the gateway is for
//! nobody else. And whether a change was asked for by the page, or a program, rather than by another site in somebody's
//! browser.

use axum::{
    extract::{Request, State},
    http::{
        HeaderMap, HeaderName, StatusCode,
        header::{AUTHORIZATION, WWW_AUTHENTICATE},
    },
    middleware::Next,
    response::{IntoResponse, Response},
};

use super::refusal::Refusal;
use crate::{callers::Token, settings::Settings, this_machine};

/// A page of another site can't have a browser send it.
const CHANGE: HeaderName = HeaderName::from_static("x-gateway-admin");

/// To whom the admin is open.
#[derive(Clone)]
pub(super) enum Access {
    WithToken(Token),
    OnThisMachine,
    Nobody,
}

impl Access {
    /// Who has given client tokens has callers elsewhere. They may come through a proxy on this machine, which looks
    /// like somebody on it.
    pub(super) fn by(settings: &Settings) -> Self {
        match &settings.admin_token {
            Some(token) => Self::WithToken(token.clone()),
            // It listens on loopback, as the settings have been checked.
            None if settings.client_token.is_empty() => Self::OnThisMachine,
            None => Self::Nobody,
        }
    }
}

/// For everything, where there is no token.
pub(super) async fn on_this_machine(State(access): State<Access>, request: Request, next: Next) -> Response {
    let (head, body) = request.into_parts();
    let refusal = match access {
        Access::Nobody => "where there are client tokens, the admin needs one of its own: set --admin-token",
        Access::OnThisMachine if !this_machine::asks(&head) => {
            "without an admin token the admin is there for this machine only, as localhost or a loopback address and \
             through no proxy: set --admin-token"
        }
        _ => return next.run(Request::from_parts(head, body)).await,
    };
    Refusal::new(StatusCode::FORBIDDEN, refusal).into_response()
}

/// For the API: with the token, where there is one. Without, it is not for other pages either, which a browser may let
/// send what they can't read.
pub(super) async fn with_the_token(State(access): State<Access>, request: Request, next: Next) -> Response {
    let (head, body) = request.into_parts();
    match access {
        Access::WithToken(token) if !bearer(&head.headers).is_some_and(|given| token.is(given)) => {
            let refusal = Refusal::new(StatusCode::UNAUTHORIZED, "this needs the admin token");
            ([(WWW_AUTHENTICATE, "Bearer")], refusal).into_response()
        }
        Access::OnThisMachine if this_machine::is_for_another_page(&head) => {
            let refusal =
                "without an admin token the admin is there for its own page only: set --admin-token";
            Refusal::new(StatusCode::FORBIDDEN, refusal).into_response()
        }
        _ => next.run(Request::from_parts(head, body)).await,
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
