//! Health checks: `/healthz` for liveness, `/readyz` for readiness.

use axum::{Router, extract::State, http::StatusCode, routing::get};
use tower_key_rotation::KeyPool;

pub(crate) fn router(pool: KeyPool) -> Router {
    Router::new().route("/healthz", get("ok")).route("/readyz", get(ready)).with_state(pool)
}

async fn ready(State(pool): State<KeyPool>) -> (StatusCode, &'static str) {
    match pool.next_return() {
        Some(_) => (StatusCode::OK, "ready"),
        None if pool.stats().keys.is_empty() => (StatusCode::SERVICE_UNAVAILABLE, "there are no keys"),
        None => (StatusCode::SERVICE_UNAVAILABLE, "no key is available until an operator resets one"),
    }
}
