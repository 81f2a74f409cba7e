//! The upstream, and the client that sends requests to it: failover around rotation around `hyper`.

use std::{io, str::FromStr};

use axum::body::Body;
use http::{
    Request, Response, Uri,
    uri::{Authority, Scheme},
};
use hyper_rustls::HttpsConnectorBuilder;
use hyper_util::{
    client::legacy::{
        Client as HyperClient,
        connect::{Connect, HttpConnector},
    },
    rt::{TokioExecutor, TokioTimer},
};
use percent_encoding::percent_decode_str;
use tower::{BoxError, ServiceBuilder, timeout::TimeoutLayer, util::BoxCloneSyncService};
use tower_key_rotation::{
    Error, FailoverLayer, KeyPool, KeyRotationLayer, classify::LlmGateway, failover::CloneRequest,
};

use super::body::KeptBody;
use crate::{settings::Settings, this_machine};

pub(super) type Client = BoxCloneSyncService<Request<KeptBody>, Response<Body>, Error<BoxError>>;

/// How much of an error's body is looked at, for what it says of the key.
const ERROR_BODY: usize = 16 * 1024;

/// A client that puts one of the pool's keys into each request, and sends a limited one again with another.
pub(super) fn client(pool: &KeyPool, settings: &Settings) -> io::Result<Client> {
    let failover = FailoverLayer::new(pool)
        // With no key twice, so that this is at most once with each.
        .attempts(settings.attempts.unwrap_or(u32::MAX))
        .wait_up_to(settings.wait.into())
        .clone_with(SendAgain);
    let rotation =
        KeyRotationLayer::new(pool).classify(LlmGateway::new()).read_error_bodies(ERROR_BODY).expose_key();
    let client = ServiceBuilder::new()
        .map_response(|response: Response<_>| response.map(Body::new))
        .layer(failover)
        .layer(rotation)
        .layer(TimeoutLayer::new(settings.response_timeout.into()))
        .service(hyper(settings)?);
    Ok(BoxCloneSyncService::new(client))
}

/// It follows no redirect: a key would go with it.
fn hyper(
    settings: &Settings,
) -> io::Result<HyperClient<impl Connect + Clone + Send + Sync + 'static, KeptBody>> {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    let tls = HttpsConnectorBuilder::new()
        .try_with_platform_verifier()
        .map_err(io::Error::other)?
        .https_or_http()
        .enable_all_versions()
        .wrap_connector(tcp);
    let connect = ServiceBuilder::new()
        .map_future(Box::pin)
        .layer(TimeoutLayer::new(settings.connect_timeout.into()))
        .service(tls);
    Ok(HyperClient::builder(TokioExecutor::new()).pool_timer(TokioTimer::new()).build(connect))
}

#[derive(Clone)]
struct SendAgain;

impl CloneRequest<Request<KeptBody>> for SendAgain {
    fn clone_request(&self, request: &Request<KeptBody>) -> Option<Request<KeptBody>> {
        Some(request.clone())
    }

    fn can_send_again(&self, request: &Request<KeptBody>) -> bool {
        request.body().hold()
    }
}

/// Where the API is.
#[derive(Clone)]
pub(crate) struct Upstream {
    scheme: Scheme,
    authority: Authority,
    /// Without a slash at its end.
    base: String,
}

impl Upstream {
    /// Host and port.
    pub(crate) fn authority(&self) -> &str {
        self.authority.as_str()
    }

    /// Whether nobody on the way can read what is sent there.
    pub(crate) fn is_safe(&self) -> bool {
        self.scheme == Scheme::HTTPS || this_machine::is_loopback(self.authority.host())
    }

    /// Where a request goes that came with this URI. `None` where that has no path, or one that leads out of the
    /// upstream's own.
    pub(super) fn uri_of(&self, uri: &Uri) -> Option<Uri> {
        let path = uri.path_and_query()?.as_str();
        if !path.starts_with('/') || leads_out(uri.path()) {
            return None;
        }
        let target = format!("{}{path}", self.base);
        Uri::builder()
            .scheme(self.scheme.clone())
            .authority(self.authority.clone())
            .path_and_query(target)
            .build()
            .ok()
    }
}

fn leads_out(path: &str) -> bool {
    percent_decode_str(path).decode_utf8_lossy().split(['/', '\\']).any(|segment| segment == "..")
}

impl FromStr for Upstream {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let uri: Uri = text.parse().map_err(|_| "not a URL")?;
        let parts = uri.into_parts();
        let scheme = parts.scheme.filter(|scheme| [Scheme::HTTP, Scheme::HTTPS].contains(scheme));
        let (Some(scheme), Some(authority)) = (scheme, parts.authority) else {
            return Err("it is http://… or https://…");
        };
        if authority.as_str().contains('@') {
            return Err("it has a user or password: keys come from --keys or --mongodb");
        }
        let path = parts.path_and_query;
        if path.as_ref().is_some_and(|path| path.query().is_some()) {
            return Err("it has a query, which can't be put before the path of a request");
        }
        let base = path.map_or(String::new(), |path| path.path().trim_end_matches('/').to_owned());
        Ok(Self { scheme, authority, base })
    }
}
