//! The upstreams, and the one that a call of the API names.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use axum::{
    Json,
    extract::{ConnectInfo, FromRequestParts, Query, State, rejection::QueryRejection},
    http::{StatusCode, request::Parts},
};
use serde::{Deserialize, Serialize};
use tower_key_rotation::KeyPool;

use super::{live::Live, refusal::Refusal, search::rests};
use crate::upstream::Upstream;

/// An upstream as the API shows it.
#[derive(Serialize)]
pub(super) struct Shown {
    name: String,
    /// Host and port.
    host: String,
    /// Which requests it gets: path prefixes, hosts, or `/` for the rest.
    route: String,
    total: usize,
    healthy: usize,
    resting: usize,
    out_of_service: usize,
    requests: u64,
    tokens: u64,
}

pub(super) async fn list(State(live): State<Arc<Live>>) -> Json<Vec<Shown>> {
    Json(live.served().upstreams.iter().map(|upstream| Shown::of(upstream)).collect())
}

impl Shown {
    fn of(upstream: &Upstream) -> Self {
        let stats = upstream.pool.stats();
        Self {
            name: upstream.name().to_owned(),
            host: upstream.config.url.authority().to_owned(),
            route: upstream.config.route.shown().into_owned(),
            total: stats.keys.len(),
            healthy: stats.healthy,
            resting: stats.keys.iter().filter(|key| rests(key.status)).count(),
            out_of_service: stats.revoked + stats.disabled,
            requests: stats.keys.iter().map(|key| key.requests).sum(),
            tokens: stats.keys.iter().map(|key| key.tokens).sum(),
        }
    }
}

/// The upstream of a call: the query's `upstream`, or the only one.
pub(super) struct Named {
    upstream: Arc<Upstream>,
    /// The caller's address, for the log.
    from: Option<IpAddr>,
}

#[derive(Deserialize)]
struct Name {
    upstream: Option<String>,
}

impl Named {
    pub(super) fn pool(&self) -> &KeyPool {
        &self.upstream.pool
    }

    pub(super) fn name(&self) -> &str {
        self.upstream.name()
    }

    pub(super) fn from(&self) -> Option<String> {
        self.from.map(|from| from.to_canonical().to_string())
    }
}

impl FromRequestParts<Arc<Live>> for Named {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, live: &Arc<Live>) -> Result<Self, Refusal> {
        let name: Result<Query<Name>, QueryRejection> = Query::from_request_parts(parts, live).await;
        let Query(Name { upstream }) = name.map_err(|error| Refusal::bad_request(error.body_text()))?;
        let served = live.served();
        let upstream = match (upstream, &served.upstreams[..]) {
            (Some(name), _) => served.upstream(&name).ok_or_else(|| {
                Refusal::new(StatusCode::NOT_FOUND, format!("there is no upstream {name:?}"))
            })?,
            (None, [only]) => only,
            (None, _) => {
                return Err(Refusal::bad_request("there are several upstreams: name one by ?upstream=NAME"));
            }
        };
        let peer: Option<&ConnectInfo<SocketAddr>> = parts.extensions.get();
        Ok(Self { upstream: upstream.clone(), from: peer.map(|ConnectInfo(peer)| peer.ip()) })
    }
}
