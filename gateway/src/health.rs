//! Health checks: `/healthz` for liveness, `/readyz` for readiness.

use axum::{Router, extract::State, http::StatusCode, routing::get};
use tower_key_rotation::KeyPool;

use crate::served::Current;

/// The paths that it answers.
pub(crate) const PATHS: [&str; 2] = [HEALTHZ, READYZ];

const HEALTHZ: &str = "/healthz";

const READYZ: &str = "/readyz";

pub(crate) fn router(current: Current) -> Router {
    Router::new().route(HEALTHZ, get("ok")).route(READYZ, get(ready)).with_state(current)
}

/// The gateway is ready while one upstream is: a load balancer must not take the others away with a broken one.
async fn ready(State(current): State<Current>) -> (StatusCode, String) {
    let served = current.get();
    let upstreams = served.upstreams.iter().map(|upstream| (upstream.name(), fault(&upstream.pool)));
    let (ready, broken): (Vec<_>, Vec<_>) = upstreams.partition(|(_, fault)| fault.is_none());
    let faults: Vec<_> = match &broken[..] {
        [(_, fault)] if ready.is_empty() => fault.iter().map(|fault| (*fault).to_owned()).collect(),
        broken => {
            broken.iter().filter_map(|(name, fault)| fault.map(|fault| format!("{name}: {fault}"))).collect()
        }
    };
    match (ready.is_empty(), faults.join("; ")) {
        (false, faults) if faults.is_empty() => (StatusCode::OK, "ready".to_owned()),
        (false, faults) => (StatusCode::OK, format!("ready, but {faults}")),
        (true, faults) => (StatusCode::SERVICE_UNAVAILABLE, faults),
    }
}

/// Why no request can be served, nor will be without an operator.
fn fault(pool: &KeyPool) -> Option<&'static str> {
    match pool.next_return() {
        Some(_) => None,
        None if pool.stats().keys.is_empty() => Some("there are no keys"),
        None => Some("no key is available until an operator resets one"),
    }
}
