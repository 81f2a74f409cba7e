//! The admin: a page that shows each key's status live, and the JSON API behind it.

mod access;
mod action;
mod api;
mod callers;
mod history;
mod import;
mod keys;
mod live;
mod page;
mod refusal;
mod scopes;
mod search;
mod upstreams;

use std::sync::Arc;

use axum::{Router, http::StatusCode, middleware};

pub(crate) use self::access::Access;
use self::{live::Live, refusal::Refusal};
use crate::served::Current;

pub(crate) struct Admin {
    live: Arc<Live>,
    access: Access,
}

impl Admin {
    /// Starts to record the keys' history, whether or not a page is open.
    pub(crate) fn of(current: Current, access: Access) -> Self {
        Self { live: Live::start(current), access }
    }

    /// Returns the routes at `/admin` and below. They need the peer's address as `ConnectInfo`.
    pub(crate) fn router(&self) -> Router {
        let api = api::router(self.live.clone())
            .layer(middleware::from_fn(access::not_from_another_site))
            .layer(middleware::from_fn_with_state(self.access.clone(), access::with_the_token));
        let nothing = async || Refusal::new(StatusCode::NOT_FOUND, "there is no such path");
        page::router()
            .nest("/admin/api", api)
            .fallback(nothing)
            .layer(middleware::from_fn_with_state(self.access.clone(), access::on_this_machine))
            .layer(middleware::map_response(page::strictly))
    }

    /// Restricts a router to those who may use the admin.
    pub(crate) fn guard(&self, router: Router) -> Router {
        router
            .layer(middleware::from_fn_with_state(self.access.clone(), access::with_the_token))
            .layer(middleware::from_fn_with_state(self.access.clone(), access::on_this_machine))
    }

    /// Ends the event streams, which would otherwise hold up a graceful shutdown.
    pub(crate) fn stop(&self) {
        self.live.stop();
    }
}
