//! Accepts and serves connections until a stop signal, then shuts down gracefully.
//!
//! `axum::serve` sets no timeouts: an idle connection or half a request would stay open forever. Hence this module.

use std::{convert::Infallible, io, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use axum::{Router, body::Body, extract::ConnectInfo, response::Response};
use http_body_util::Either;
use hyper::{Request, Version, body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto::Builder,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    time::{Instant, sleep, timeout},
};
use tower::ServiceExt;

use crate::{
    caller::{Activity, Caller},
    held::Held,
    read_on::ReadOn,
    settings::Settings,
    unread::Responses,
    whole::Whole,
};

/// Timeout for an incomplete request head at shutdown.
const HEAD_AT_STOP: Duration = Duration::from_secs(1);

/// How much of a request an HTTP/2 caller may send while the gateway does not read.
const STREAM_WINDOW: u32 = 128 << 10;

/// The largest window of a connection, so that only the streams' windows limit a caller: a proxy may send the requests
/// of many callers over one connection.
const CONNECTION_WINDOW: u32 = (1 << 31) - 1;

/// Shortest pause between two looks at a connection.
const SHORTEST_PAUSE: Duration = Duration::from_millis(20);

/// The body of a caller's request.
pub(crate) type CallerBody = ReadOn<Whole<Incoming>>;

/// What answers requests.
pub(crate) trait App: Send + Sync + 'static {
    fn answer(&self, request: Request<CallerBody>) -> impl Future<Output = Response> + Send;
}

impl App for Router {
    async fn answer(&self, request: Request<CallerBody>) -> Response {
        let Ok(response) = self.clone().oneshot(request).await;
        response
    }
}

#[derive(Clone, Copy)]
pub(crate) struct Limits {
    /// Timeout for the head of a connection's first request.
    first_request: Duration,
    /// How long a connection may be idle.
    next_request: Duration,
    /// Interval of HTTP/2 pings.
    ping: Duration,
    /// How long a caller may read nothing of its response.
    send: Duration,
    /// How many connections there may be.
    connections: usize,
    /// Timeout for requests in flight at shutdown.
    pub(crate) shutdown: Duration,
}

impl Limits {
    pub(crate) fn of(settings: &Settings) -> Self {
        Self {
            first_request: settings.head_timeout.into(),
            next_request: settings.keep_alive.into(),
            ping: settings.ping.into(),
            send: settings.send_timeout.into(),
            connections: settings.max_connections,
            shutdown: settings.shutdown_limit.into(),
        }
    }
}

/// Serves until `stop` completes, then until the requests in flight finish or the shutdown limit passes.
pub(crate) async fn serve(
    listener: TcpListener,
    app: impl App,
    stop: impl Future<Output = ()>,
    limits: Limits,
) {
    let (http, app) = (http(limits), Arc::new(app));
    let places = Arc::new(Semaphore::new(limits.connections));
    let (stopping, stopped) = watch::channel(());
    let mut stop = pin!(stop);
    let (mut refused, mut refused_at) = (0, None);
    loop {
        let (connection, from) = tokio::select! {
            accepted = accept(&listener) => accepted,
            () = &mut stop => break,
        };
        let Ok(place) = places.clone().try_acquire_owned() else {
            refused += 1;
            // Not each: refusals must not fill the log.
            if refused_at.is_none_or(|at: Instant| at.elapsed() >= Duration::from_secs(1)) {
                tracing::warn!(refused, "connections are refused, because {} are open", limits.connections);
                (refused, refused_at) = (0, Some(Instant::now()));
            }
            continue;
        };
        // Without this, Nagle's algorithm would delay the small chunks of an event stream.
        _ = connection.set_nodelay(true);
        let served = answer(http.clone(), connection, from, app.clone(), stopped.clone(), limits);
        tokio::spawn(async {
            served.await;
            drop(place);
        });
    }
    drop((listener, stopped));
    stopping.send_replace(());
    let limit = limits.shutdown;
    // Every connection holds a receiver.
    if timeout(limit, stopping.closed()).await.is_err() {
        tracing::warn!("requests in flight are broken off after {limit:?}");
    }
}

fn http(limits: Limits) -> Builder<TokioExecutor> {
    let mut http = Builder::new(TokioExecutor::new());
    http.http1().timer(TokioTimer::new()).header_read_timeout(limits.next_request);
    http.http2()
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .keep_alive_interval((!limits.ping.is_zero()).then_some(limits.ping))
        .keep_alive_timeout(limits.ping / 2);
    http
}

/// Accepts the next connection. After an error such as too many open files, it tries again.
async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok(accepted) => return accepted,
            Err(error) if is_of_the_connection(&error) => {}
            Err(error) => {
                tracing::warn!("can't accept connections: {error}");
                sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

fn is_of_the_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};

    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

async fn answer(
    http: Builder<TokioExecutor>,
    connection: TcpStream,
    from: SocketAddr,
    app: Arc<impl App>,
    mut stopped: watch::Receiver<()>,
    limits: Limits,
) {
    let (activity, responses) = (Activity::default(), Responses::default());
    let connection = Caller::new(connection, activity.clone(), limits.send);
    let (counted, watched) = (activity.clone(), responses.clone());
    let app = service_fn(move |request: Request<Incoming>| {
        let version = request.version();
        let in_flight = counted.begin(version);
        // In HTTP/1.1, a caller that does not read makes the whole connection wait, which `Caller` sees.
        let responses = (version == Version::HTTP_2).then(|| watched.clone());
        let app = app.clone();
        async move {
            let mut request = ReadOn::wrap(request.map(|body| Whole::new(body, version)));
            request.extensions_mut().insert(ConnectInfo(from));
            let response = app.answer(request).await;
            Ok::<_, Infallible>(response.map(|body| {
                let body = Held::new(body, in_flight);
                match responses {
                    Some(responses) => Either::Left(responses.watch(Body::new(body))),
                    None => Either::Right(body),
                }
            }))
        }
    });
    let served = http.serve_connection(TokioIo::new(connection), app);
    let mut served = pin!(served);
    let is_stopping = tokio::select! {
        // An error here concerns only the caller.
        _ = served.as_mut() => return,
        _ = stopped.changed() => true,
        () = is_to_end(&activity, &responses, limits) => false,
        () = asks_nothing(&activity, limits) => return,
    };
    served.as_mut().graceful_shutdown();
    tokio::select! {
        _ = served => {}
        () = idle_at_stop(&activity) => {}
        // At a stop, the limit of the shutdown applies.
        () = sleep(limits.send), if !is_stopping => {}
    }
}

/// Completes if no request's head arrives in time. hyper's header timeout starts only after it detects the HTTP
/// version, and HTTP/2 has none.
async fn asks_nothing(activity: &Activity, limits: Limits) {
    sleep(limits.first_request).await;
    if activity.requests() > 0 {
        std::future::pending().await
    }
}

/// Completes when no request has been in flight for a while, or when a response was broken off that its caller did not
/// read: hyper tells the caller only when it reads, and the stream counts until then. HTTP/1.1 has an idle timeout of its
/// own, which counts from the last response to the next request's head.
async fn is_to_end(activity: &Activity, responses: &Responses, limits: Limits) {
    let pause = (limits.send.min(limits.next_request) / 4).max(SHORTEST_PAUSE);
    let (mut requests, mut idle_since) = (0, Instant::now());
    loop {
        sleep(pause).await;
        let unread = responses.break_off(limits.send);
        if unread > 0 {
            tracing::info!(
                unread,
                "responses are broken off, because their caller read nothing for {:?}",
                limits.send
            );
            return;
        }
        if !activity.is_idle() || activity.requests() != requests {
            (requests, idle_since) = (activity.requests(), Instant::now());
        } else if requests > 0 && idle_since.elapsed() >= limits.next_request {
            return;
        }
    }
}

/// Completes once a connection has no request in flight after it was told to end. An incomplete head is not waited for.
///
/// An HTTP/2 connection ends by itself when the last response has been sent.
async fn idle_at_stop(activity: &Activity) {
    loop {
        sleep(HEAD_AT_STOP).await;
        if activity.is_idle() && !activity.is_http_2() {
            return;
        }
    }
}
