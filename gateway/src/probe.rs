//! One cheap request with each key of an upstream, to see whether the key works.

use std::{error::Error, fmt, time::Duration};

use futures_util::{StreamExt, stream};
use http::{HeaderName, HeaderValue, Request, StatusCode};
use tokio::time::timeout;
use tower::ServiceExt;
use tower_key_rotation::{KeyId, Traits};

use crate::{
    config::UpstreamConfig,
    keys,
    proxy::{Client, client, without_body},
    with_sources,
};

/// How many keys are tried at once.
const AT_ONCE: usize = 8;

/// How long the upstream has for its answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// What came of the request with one key.
pub(crate) enum Outcome {
    Answered { status: StatusCode, path: String },
    Failed(String),
}

impl Outcome {
    /// Whether the upstream has accepted the key. A 429 comes for accepted keys only.
    pub(crate) fn works(&self) -> bool {
        matches!(self, Self::Answered { status, .. } if status.is_success() || *status == StatusCode::TOO_MANY_REQUESTS)
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Answered { status, .. } if status.is_success() => f.write_str("works"),
            Self::Answered { status: StatusCode::TOO_MANY_REQUESTS, .. } => {
                f.write_str("works, and is rate limited now (HTTP 429)")
            }
            Self::Answered { status, .. } if [401, 402, 403].contains(&status.as_u16()) => {
                write!(f, "is refused (HTTP {})", status.as_u16())
            }
            Self::Answered { status, path } => {
                write!(f, "may work or not: {path} answers {}; name another path by `probe`", status.as_u16())
            }
            Self::Failed(reason) => write!(f, "was not tried: {reason}"),
        }
    }
}

/// Tries each key that the files and variables of the upstream name, or else those in MongoDB.
pub(crate) async fn keys(upstream: &UpstreamConfig) -> Result<Vec<(KeyId, Outcome)>, Box<dyn Error>> {
    let mut upstream = upstream.clone();
    if !upstream.keys.is_empty() {
        // The state file stays closed: a gateway that runs may have it open.
        (upstream.mongodb, upstream.state) = (None, None);
    }
    // Each key gets one request, whatever its limits.
    (upstream.attempts, upstream.wait, upstream.pace) = (Some(1), Duration::ZERO, false);
    upstream.quotas.clear();
    let pool = keys::open(&upstream, keys::given(&upstream)?, keys::state(&upstream)?).await?;
    let client = client(&pool, &upstream)?;
    let ids = pool.stats().keys.into_iter().map(|key| key.id);
    let outcomes = stream::iter(ids).map(|id| {
        let (client, upstream) = (client.clone(), &upstream);
        async move {
            let outcome = try_key(client, upstream, id.clone()).await;
            (id, outcome)
        }
    });
    Ok(outcomes.buffered(AT_ONCE).collect().await)
}

async fn try_key(client: Client, upstream: &UpstreamConfig, id: KeyId) -> Outcome {
    let path = upstream.probe.clone().unwrap_or_else(|| usual_path(upstream));
    let Some(uri) = path.parse().ok().and_then(|path| upstream.url.uri_of(&path)) else {
        return Outcome::Failed(format!("{path} is no path"));
    };
    let mut request = Request::new(without_body());
    *request.uri_mut() = uri;
    // Anthropic requires it, and others ignore it.
    let version = (HeaderName::from_static("anthropic-version"), HeaderValue::from_static("2023-06-01"));
    request.headers_mut().insert(version.0, version.1);
    request.extensions_mut().insert(Traits::new().key(id));
    match timeout(PATIENCE, client.oneshot(request)).await {
        Ok(Ok(response)) => Outcome::Answered { status: response.status(), path },
        Ok(Err(error)) => Outcome::Failed(with_sources(&*error.into_inner())),
        Err(_) => Outcome::Failed(format!("no answer within {PATIENCE:?}")),
    }
}

/// A path of the usual APIs that lists models, which costs nothing.
fn usual_path(upstream: &UpstreamConfig) -> String {
    let url = &upstream.url;
    let path = if url.authority().ends_with("googleapis.com") {
        "/v1beta/models?pageSize=1"
    } else if url.authority().ends_with(".openai.azure.com") {
        "/openai/models?api-version=2024-10-21"
    } else if url.has_version() {
        "/models"
    } else {
        "/v1/models"
    };
    path.to_owned()
}
