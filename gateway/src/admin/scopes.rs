//! The scopes that requests use, as the API shows them: what their limits still allow, and who waits.

use std::sync::Arc;

use axum::{Json, extract::State};
use serde::Serialize;
use tower_key_rotation::ScopeTotals;

use super::live::Live;
use crate::upstream::Upstream;

#[derive(Serialize)]
pub(super) struct Shown {
    upstream: String,
    #[serde(flatten)]
    totals: ScopeTotals,
}

pub(super) async fn list(State(live): State<Arc<Live>>) -> Json<Vec<Shown>> {
    let served = live.served();
    let of = |upstream: &Arc<Upstream>| {
        let name = upstream.name().to_owned();
        let shown = move |totals| Shown { upstream: name.clone(), totals };
        upstream.pool.scopes().into_iter().map(shown).collect::<Vec<_>>()
    };
    Json(served.upstreams.iter().flat_map(of).collect())
}
