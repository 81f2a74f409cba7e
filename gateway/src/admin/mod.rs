//! The admin: a page that shows each key as it is limited, rests and comes back, and a JSON API that does what the page
//! does.

mod access;
mod action;
mod api;
mod history;
mod import;
mod keys;
mod live;
mod page;
mod refusal;
mod search;

use std::sync::Arc;

use axum::{Router, http::StatusCode, middleware, routing::any};
use tower_key_rotation::KeyPool;

use self::{access::Access, live::Live, refusal::Refusal};
use crate::settings::Settings;

pub(crate) struct Admin {
    live: Arc<Live>,
    access: Access,
}

impl Admin {
    /// Watches the keys from now on, whether anybody looks or not.
    pub(crate) fn of(pool: &KeyPool, settings: &Settings) -> Self {
        Self { live: Live::start(pool.clone()), access: Access::by(settings) }
    }

    /// Everything at /admin and below. It needs to know who asks: the peer's address as `ConnectInfo`.
    pub(crate) fn router(&self) -> Router {
        let api = api::router(self.live.clone())
            .layer(middleware::from_fn(access::not_from_another_site))
            .layer(middleware::from_fn_with_state(self.access.clone(), access::with_the_token));
        let nothing = async || Refusal::new(StatusCode::NOT_FOUND, "there is nothing of that name");
        page::router()
            .nest("/admin/api", api)
            // Not to the upstream.
            .route("/admin/{*rest}", any(nothing))
            .layer(middleware::from_fn_with_state(self.access.clone(), access::on_this_machine))
            .layer(middleware::map_response(page::strictly))
    }

    /// Those to whom the admin is open may see this, too.
    pub(crate) fn guard(&self, router: Router) -> Router {
        router
            .layer(middleware::from_fn_with_state(self.access.clone(), access::with_the_token))
            .layer(middleware::from_fn_with_state(self.access.clone(), access::on_this_machine))
    }

    /// Ends the streams of changes, which would not end by themselves.
    pub(crate) fn stop(&self) {
        self.live.stop();
    }
}
