//! The upstream, and the client that sends requests to it: the key rotation around `hyper`.

use std::{error::Error, io, str::FromStr, time::Duration};

use axum::body::{Body, Bytes, HttpBody};
use h2::Reason;
use http::{
    HeaderValue, Request, Response, Uri,
    uri::{Authority, Scheme},
};
use http_body_util::BodyExt;
use hyper_rustls::HttpsConnectorBuilder;
use hyper_util::{
    client::legacy::{
        Client as HyperClient,
        connect::{Connect, HttpConnector},
    },
    rt::{TokioExecutor, TokioIo, TokioTimer},
};
use percent_encoding::percent_decode_str;
use tokio::time::{Sleep, sleep};
use tower::{
    BoxError, ServiceBuilder,
    retry::{Policy, RetryLayer},
    timeout::TimeoutLayer,
    util::BoxCloneSyncService,
};
use tower_http::timeout::TimeoutBody;
use tower_key_rotation::{Error as RotationError, Failover, KeyPool, KeyRotationLayer, classify::LlmGateway};

use super::{
    body::KeptBody,
    connections::Connections,
    streams::{NoStreams, Noted},
};
use crate::{settings::Settings, sources, this_machine, with_sources};

pub(super) type Client = BoxCloneSyncService<Request<KeptBody>, Response<Body>, RotationError<BoxError>>;

/// How many bytes of an error body the classifier reads.
const ERROR_BODY: usize = 16 * 1024;

/// How often a request is sent again with the same key if the upstream did not process it.
const RESENDS: u32 = 5;

/// The first backoff before such a retry. It doubles each time.
const FIRST_PAUSE: Duration = Duration::from_millis(10);

/// How much of a response an HTTP/2 upstream may send while its caller does not read.
const STREAM_WINDOW: u32 = 128 << 10;

/// The largest window of a connection (RFC 9113 section 6.9.1). Only the streams' windows limit the upstream: a smaller
/// window would be used up by a few callers that do not read, and everybody else on the connection would wait for them.
const CONNECTION_WINDOW: u32 = (1 << 31) - 1;

/// How long an unresponsive HTTP/1.1 connection lasts before TCP keepalive closes it.
const GONE_AFTER: Duration = Duration::from_secs(60);

/// Returns a client that puts one of the pool's keys into each request and retries a limited request with another.
pub(super) fn client(pool: &KeyPool, settings: &Settings) -> io::Result<Client> {
    // With no key twice, so that this is at most once with each.
    let failover = Failover::attempts(settings.attempts.unwrap_or(u32::MAX)).clone_with(send_again);
    let rotation = KeyRotationLayer::new(pool)
        .classify(LlmGateway::new())
        .read_error_bodies(ERROR_BODY)
        .expose_key()
        .failover(failover)
        .wait_up_to(settings.wait.into());
    let idle = settings.idle_timeout.into();
    let client = ServiceBuilder::new()
        .map_response(move |response: Response<_>| response.map(|body| with_limit(idle, body)))
        .layer(rotation)
        .layer(RetryLayer::new(NotProcessed::default()))
        .layer(TimeoutLayer::new(settings.response_timeout.into()))
        .service(hyper(settings)?);
    Ok(BoxCloneSyncService::new(client))
}

/// Adds an idle timeout to a response body. After it, the response to the caller breaks off, too.
fn with_limit<B>(idle: Duration, body: B) -> Body
where
    B: HttpBody<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
{
    // `TimeoutBody` does not forward `is_end_stream`, so an empty body would look like a stream.
    if body.is_end_stream() {
        return Body::empty();
    }
    let body = TimeoutBody::new(idle, body);
    Body::new(body.map_err(|error| {
        tracing::warn!("the upstream's response broke off: {}", with_sources(&*error));
        error
    }))
}

/// Builds the hyper clients. They follow no redirects, because the key would go with them.
fn hyper(
    settings: &Settings,
) -> io::Result<Connections<HyperClient<impl Connect + Clone + Send + Sync + 'static, KeptBody>>> {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    // TCP keepalive detects a dead HTTP/1.1 connection. HTTP/2 pings do so for HTTP/2, where one connection carries all
    // requests.
    tcp.set_keepalive(Some(GONE_AFTER / 2));
    tcp.set_keepalive_interval(Some(GONE_AFTER / 6));
    tcp.set_keepalive_retries(Some(3));
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
    let ping = Duration::from(settings.ping);
    let mut client = HyperClient::builder(TokioExecutor::new());
    client
        .timer(TokioTimer::new())
        .pool_timer(TokioTimer::new())
        .http2_initial_stream_window_size(STREAM_WINDOW)
        .http2_initial_connection_window_size(CONNECTION_WINDOW)
        // No request is sent before the upstream has said how many it allows.
        .http2_initial_max_send_streams(0)
        .http2_keep_alive_interval((!ping.is_zero()).then_some(ping))
        .http2_keep_alive_timeout(ping / 2);
    Ok(Connections::new(move |streams| {
        let noted = move |connection| TokioIo::new(Noted::new(connection, streams.clone()));
        client.build(ServiceBuilder::new().map_response(noted).service(connect.clone()))
    }))
}

/// Clones a request for a further attempt, and a kept clone if its body can still be sent.
fn send_again(request: &Request<KeptBody>) -> Option<Request<KeptBody>> {
    let clone = request.clone();
    (request.body().is_first() || clone.body().hold()).then_some(clone)
}

/// Retry policy for requests that an HTTP/2 server did not process (RFC 9113 section 8.7).
///
/// The server sends a graceful `GOAWAY`, as nginx does after a thousand requests, or `REFUSED_STREAM`.
#[derive(Clone, Default)]
struct NotProcessed {
    pauses: u32,
}

impl<B> Policy<Request<KeptBody>, Response<B>, BoxError> for NotProcessed {
    type Future = Sleep;

    fn retry(
        &mut self,
        request: &mut Request<KeptBody>,
        result: &mut Result<Response<B>, BoxError>,
    ) -> Option<Self::Future> {
        let error = result.as_ref().err()?;
        let is_not_sent = error.is::<NoStreams>() && self.pauses == 0;
        let may_resend = is_not_sent || is_not_processed(&**error, request);
        if self.pauses >= RESENDS || !may_resend || !request.body().hold() {
            return None;
        }
        tracing::debug!("sent again, because the upstream did not process it: {}", with_sources(&**error));
        let pause = FIRST_PAUSE * 2_u32.pow(self.pauses);
        self.pauses += 1;
        Some(sleep(pause))
    }

    fn clone_request(&mut self, request: &Request<KeptBody>) -> Option<Request<KeptBody>> {
        Some(request.clone())
    }
}

fn is_not_processed(error: &(dyn Error + 'static), request: &Request<KeptBody>) -> bool {
    // h2 reports the same error for a request that it was still sending when a graceful `GOAWAY` arrived. The server
    // may have processed its head, so a request without a body must be idempotent.
    let is_harmless = request.method().is_idempotent() || !request.body().is_end_stream();
    let errors = sources(error).filter_map(|error| error.downcast_ref::<h2::Error>());
    errors.filter(|error| error.is_remote()).any(|error| {
        (error.is_go_away() && error.reason() == Some(Reason::NO_ERROR) && is_harmless)
            || (error.is_reset() && error.reason() == Some(Reason::REFUSED_STREAM))
    })
}

/// The URL of the API.
#[derive(Clone)]
pub(crate) struct Upstream {
    scheme: Scheme,
    authority: Authority,
    /// Path without a trailing slash.
    base: String,
}

impl Upstream {
    /// Host and port.
    pub(crate) fn authority(&self) -> &str {
        self.authority.as_str()
    }

    /// Whether keys do not cross a network in cleartext.
    pub(crate) fn is_safe(&self) -> bool {
        self.scheme == Scheme::HTTPS || this_machine::is_loopback(self.authority.host())
    }

    /// Maps the URI of a caller's request to the upstream.
    ///
    /// Returns `None` if the URI has no path, or a path that leads out of the upstream's.
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

    /// Maps a `Location` below the upstream's URL to a path of the gateway, and any other to `None`.
    pub(super) fn path_of(&self, location: &str) -> Option<HeaderValue> {
        let uri: Uri = location.parse().ok()?;
        let is_here = match uri.authority() {
            Some(authority) => {
                uri.scheme() == Some(&self.scheme)
                    && authority.host().eq_ignore_ascii_case(self.authority.host())
                    && self.port_of(authority) == self.port_of(&self.authority)
            }
            None => true,
        };
        let path = uri.path_and_query()?.as_str().strip_prefix(&*self.base)?;
        let slash = if path.starts_with('/') { "" } else { "/" };
        let is_below = self.base.is_empty() || path.is_empty() || path.starts_with(['/', '?']);
        // A browser reads a host name after these.
        let names_a_host = ["//", "/\\"].iter().any(|slashes| path.starts_with(slashes));
        if !is_here || !is_below || names_a_host || leads_out(uri.path()) {
            return None;
        }
        HeaderValue::try_from(format!("{slash}{path}")).ok()
    }

    fn port_of(&self, authority: &Authority) -> u16 {
        let default = if self.scheme == Scheme::HTTPS { 443 } else { 80 };
        authority.port_u16().unwrap_or(default)
    }
}

/// Whether any server might read a segment as `..`. Some servers decode a path twice, cut a segment at its parameters,
/// or end it at a NUL.
fn leads_out(path: &str) -> bool {
    let mut path = path.to_owned();
    loop {
        if path.contains('\0')
            || path.split(['/', '\\']).any(|segment| segment.split(';').next() == Some(".."))
        {
            return true;
        }
        let decoded = percent_decode_str(&path).decode_utf8_lossy().into_owned();
        // A decoded path is shorter, so the loop ends.
        if decoded.len() >= path.len() {
            return false;
        }
        path = decoded;
    }
}

impl FromStr for Upstream {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let uri: Uri = text.parse().map_err(|_| "not a URL")?;
        let parts = uri.into_parts();
        let scheme = parts.scheme.filter(|scheme| [Scheme::HTTP, Scheme::HTTPS].contains(scheme));
        let (Some(scheme), Some(authority)) = (scheme, parts.authority) else {
            return Err("it must be http://… or https://…");
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

#[cfg(test)]
mod tests {
    use super::*;

    fn path(upstream: &str, location: &str) -> Option<String> {
        let upstream: Upstream = upstream.parse().unwrap();
        upstream.path_of(location).map(|path| path.to_str().unwrap().to_owned())
    }

    #[test]
    fn locations_under_the_upstream_become_gateway_paths() {
        for (location, expected) in [
            ("https://api.example.com/tenant/v1/files/1?part=2", "/v1/files/1?part=2"),
            ("https://API.example.com:443/tenant", "/"),
            ("https://api.example.com/tenant?page=2", "/?page=2"),
            ("/tenant/v1/files/1", "/v1/files/1"),
        ] {
            assert_eq!(
                path("https://api.example.com/tenant/", location).as_deref(),
                Some(expected),
                "{location}"
            );
        }
        assert_eq!(path("http://localhost:1", "http://localhost:1/v1").as_deref(), Some("/v1"));
        assert_eq!(path("http://localhost:1", "http://localhost:1?q").as_deref(), Some("/?q"));
    }

    #[test]
    fn one_that_leads_elsewhere_is_none() {
        for location in [
            "https://files.example.com/tenant/1",
            "http://api.example.com/tenant/1",
            "https://api.example.com:8443/tenant/1",
            "https://api.example.com/tenants",
            "https://api.example.com/tenant/../other",
            "https://api.example.com/tenant//files.example.com",
            "https://api.example.com/tenant/\\files.example.com",
            "//files.example.com/tenant",
            "/login",
            "part/2",
            "",
        ] {
            assert_eq!(path("https://api.example.com/tenant", location), None, "{location}");
        }
        assert_eq!(path("https://api.example.com", "//files.example.com"), None);
        assert_eq!(path("https://api.example.com", "https://api.example.com//files.example.com"), None);
    }
}
