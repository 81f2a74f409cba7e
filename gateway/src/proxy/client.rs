//! The client that sends requests to an upstream: the key rotation around `hyper`.

use std::{error::Error, io, time::Duration};

use axum::body::HttpBody;
use h2::Reason;
use http::{Request, Response, uri::Scheme};
use hyper::body::Incoming;
use hyper_rustls::HttpsConnectorBuilder;
use hyper_util::{
    client::legacy::{
        Client as HyperClient,
        connect::{Connect, HttpConnector},
    },
    rt::{TokioExecutor, TokioIo, TokioTimer},
};
use tokio::time::{Sleep, sleep};
use tower::{
    BoxError, ServiceBuilder,
    retry::{Policy, RetryLayer},
    timeout::TimeoutLayer,
    util::BoxCloneSyncService,
};
use tower_key_rotation::{Error as RotationError, Failover, KeyPool, KeyRotationLayer, Replay};

use super::{
    RequestBody,
    connections::{Connections, InFlight},
    streams::{NoStreams, Noted},
    turns::end_turn,
};
use crate::{config::UpstreamConfig, held::Held, sources, whole::Whole, with_sources};

pub(crate) type Client =
    BoxCloneSyncService<Request<RequestBody>, Response<UpstreamBody>, RotationError<BoxError>>;

/// The body of an upstream's response.
pub(crate) type UpstreamBody = Replay<Held<Whole<Incoming>, InFlight>>;

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
pub(crate) fn client(pool: &KeyPool, upstream: &UpstreamConfig) -> io::Result<Client> {
    // With no key twice, so that this is at most once with each.
    let failover = Failover::attempts(upstream.attempts.unwrap_or(u32::MAX)).clone_with(send_again);
    let rotation = KeyRotationLayer::new(pool)
        .classify(upstream.classifier.clone())
        .read_error_bodies(ERROR_BODY)
        .expose_key()
        .failover(failover)
        .wait_up_to(upstream.wait);
    let client = ServiceBuilder::new()
        .layer(rotation)
        .map_request(end_turn)
        .layer(RetryLayer::new(NotProcessed::default()))
        .layer(TimeoutLayer::new(upstream.response_timeout))
        .service(hyper(upstream)?);
    Ok(BoxCloneSyncService::new(client))
}

/// Builds the hyper clients. They follow no redirects, because the key would go with them.
fn hyper(
    upstream: &UpstreamConfig,
) -> io::Result<Connections<HyperClient<impl Connect + Clone + Send + Sync + 'static, RequestBody>>> {
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
        .layer(TimeoutLayer::new(upstream.connect_timeout))
        .service(tls);
    let ping = upstream.ping;
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
fn send_again(request: &Request<RequestBody>) -> Option<Request<RequestBody>> {
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

impl<B> Policy<Request<RequestBody>, Response<B>, BoxError> for NotProcessed {
    type Future = Sleep;

    fn retry(
        &mut self,
        request: &mut Request<RequestBody>,
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

    fn clone_request(&mut self, request: &Request<RequestBody>) -> Option<Request<RequestBody>> {
        // Without TLS, no upstream speaks HTTP/2, whose errors alone are retried.
        (request.uri().scheme() != Some(&Scheme::HTTP)).then(|| request.clone())
    }
}

fn is_not_processed(error: &(dyn Error + 'static), request: &Request<RequestBody>) -> bool {
    // h2 reports the same error for a request that it was still sending when a graceful `GOAWAY` arrived. The server
    // may have processed its head, so a request without a body must be idempotent.
    let is_harmless = request.method().is_idempotent() || !request.body().is_end_stream();
    let errors = sources(error).filter_map(|error| error.downcast_ref::<h2::Error>());
    errors.filter(|error| error.is_remote()).any(|error| {
        (error.is_go_away() && error.reason() == Some(Reason::NO_ERROR) && is_harmless)
            || (error.is_reset() && error.reason() == Some(Reason::REFUSED_STREAM))
    })
}
