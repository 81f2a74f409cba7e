//! Access control of the admin: by token, or by machine if no token is set. Protection of changes against cross-site
//! request forgery.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    http::{
        HeaderMap, HeaderName, HeaderValue, StatusCode,
        header::{AUTHORIZATION, RETRY_AFTER, WWW_AUTHENTICATE},
    },
    middleware::Next,
    response::{IntoResponse, Response},
};

use super::refusal::Refusal;
use crate::{
    callers::Token,
    guesses::{Denied, Guesses, Tokens},
    proxy::seconds_up,
    served::Current,
    settings::Settings,
    this_machine,
};

/// A required header of changes. A page of another site can't make a browser send it without a CORS preflight.
const CHANGE: HeaderName = HeaderName::from_static("x-gateway-admin");

/// The admin's token, and the wrong ones that were given instead.
pub(crate) struct AdminToken {
    token: Token,
    guesses: Guesses,
}

/// Who may use the admin.
#[derive(Clone)]
pub(crate) enum Access {
    WithToken(Arc<AdminToken>),
    /// Programs on this machine, unless callers have tokens.
    OnThisMachine(Current),
}

impl Access {
    /// Decides who may use the admin.
    ///
    /// Client tokens mean that callers are on other machines. They may come through a proxy on this machine, which
    /// makes them look local, so a local peer is no proof then.
    pub(crate) fn by(settings: &Settings, current: Current) -> Self {
        match &settings.admin_token {
            Some(token) => {
                let guesses = Guesses::new(Tokens::Admin);
                Self::WithToken(Arc::new(AdminToken { token: token.clone(), guesses }))
            }
            // The configuration allows only a loopback address then, unless callers have tokens.
            None => Self::OnThisMachine(current),
        }
    }
}

/// Middleware for every route: if no admin token is set, rejects requests that are not from this machine.
pub(super) async fn on_this_machine(State(access): State<Access>, request: Request, next: Next) -> Response {
    let (head, body) = request.into_parts();
    if !this_machine::has_valid_host(&head) {
        return Refusal::bad_request("a request must name exactly one valid host").into_response();
    }
    let refusal = match access {
        Access::OnThisMachine(current) if !current.get().callers.are_all_here() => {
            "because client tokens are set, the admin needs a token, too: set --admin-token"
        }
        Access::OnThisMachine(_) if !this_machine::asks(&head) => {
            "without an admin token the admin answers only requests to localhost or a loopback address, not through a \
             proxy: set --admin-token"
        }
        _ => return next.run(Request::from_parts(head, body)).await,
    };
    Refusal::new(StatusCode::FORBIDDEN, refusal).into_response()
}

/// Middleware for the API: requires the admin token if one is set.
///
/// Otherwise it rejects requests from pages of other origins: a browser may send those, although the page can't read
/// the response.
pub(super) async fn with_the_token(State(access): State<Access>, request: Request, next: Next) -> Response {
    let (head, body) = request.into_parts();
    match access {
        Access::WithToken(admin) => {
            let given = bearer(&head.headers).into_iter();
            match admin.guesses.check(&head, given, |given| admin.token.is(given)) {
                Ok(()) => next.run(Request::from_parts(head, body)).await,
                Err(denied) => refuse(denied),
            }
        }
        Access::OnThisMachine(_) if this_machine::is_for_another_page(&head) => {
            let refusal =
                "without an admin token the admin answers no page of another origin: set --admin-token";
            Refusal::new(StatusCode::FORBIDDEN, refusal).into_response()
        }
        _ => next.run(Request::from_parts(head, body)).await,
    }
}

fn refuse(denied: Denied) -> Response {
    match denied {
        Denied::Wrong => {
            let refusal = Refusal::new(StatusCode::UNAUTHORIZED, "the admin token is missing or wrong");
            ([(WWW_AUTHENTICATE, "Bearer")], refusal).into_response()
        }
        Denied::TooMany { wait } => {
            let seconds = seconds_up(wait);
            let refusal = format!("too many wrong tokens from this address: wait {seconds} s");
            let refusal = Refusal::new(StatusCode::TOO_MANY_REQUESTS, refusal);
            ([(RETRY_AFTER, HeaderValue::from(seconds))], refusal).into_response()
        }
    }
}

pub(super) async fn not_from_another_site(request: Request, next: Next) -> Response {
    let headers = request.headers();
    let site = headers.get(this_machine::FETCH_SITE).map(|site| site.as_bytes());
    let is_ours = headers.contains_key(CHANGE) && matches!(site, None | Some(b"same-origin" | b"none"));
    if !request.method().is_safe() && !is_ours {
        return Refusal::new(
            StatusCode::FORBIDDEN,
            "a change needs the header x-gateway-admin: 1 and must not come from another site",
        )
        .into_response();
    }
    next.run(request).await
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}
