//! The callers as the API shows them: their limits, what is left of these, and their usage.

use std::sync::Arc;

use axum::{Json, extract::State};
use serde::Serialize;

use super::live::Live;
use crate::callers::NamedCaller;

/// A caller. Usage counts since the start of the gateway.
#[derive(Serialize)]
pub(super) struct Shown {
    name: String,
    requests: u64,
    tokens: u64,
    /// Requests that were beyond a limit of the caller.
    over_limit: u64,
    in_flight: u64,
    requests_per_minute: Option<u32>,
    requests_left: Option<u64>,
    tokens_per_minute: Option<u32>,
    tokens_left: Option<u64>,
    max_in_flight: Option<u32>,
}

pub(super) async fn list(State(live): State<Arc<Live>>) -> Json<Vec<Shown>> {
    Json(live.served().callers.shown().iter().map(|caller| Shown::of(caller)).collect())
}

impl Shown {
    fn of(caller: &NamedCaller) -> Self {
        let limits = caller.limits();
        let [requests_left, tokens_left] = caller.left().map(|left| left.map(|left| left.max(0.0) as u64));
        Self {
            name: caller.name().to_owned(),
            requests: caller.requests(),
            tokens: caller.tokens(),
            over_limit: caller.over_limit(),
            in_flight: caller.in_flight(),
            requests_per_minute: limits.requests_per_minute,
            requests_left,
            tokens_per_minute: limits.tokens_per_minute,
            tokens_left,
            max_in_flight: limits.max_in_flight.map(Into::into),
        }
    }
}
