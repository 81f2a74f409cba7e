//! Accepts and serves connections until a stop signal, then shuts down gracefully.
//!
//! `axum::serve` sets no timeouts: an idle connection or half a request would stay open forever. Hence this module.

use std::{
    io,
    net::SocketAddr,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use axum::{Router, body::Body, extract::ConnectInfo};
use hyper::{Request, body::Incoming};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{
        conn::auto::Builder,
        graceful::{GracefulShutdown, Watcher},
    },
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    time::{sleep, timeout},
};
use tower::{ServiceExt, service_fn};

use crate::{
    caller::{Activity, Caller},
    settings::Settings,
};

/// Timeout for an incomplete request head at shutdown.
const HEAD_AT_STOP: Duration = Duration::from_secs(1);

#[derive(Clone, Copy)]
pub(crate) struct Limits {
    /// Timeout for the head of a connection's first request.
    first_request: Duration,
    /// Timeout for the head of the next request, in HTTP/1.1.
    next_request: Duration,
    /// Interval of HTTP/2 pings.
    ping: Duration,
    /// How long a caller may read nothing of its response.
    send: Duration,
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
            shutdown: settings.shutdown_limit.into(),
        }
    }
}

/// Serves until `stop` completes, then until the requests in flight finish or the shutdown limit passes.
pub(crate) async fn serve(
    listener: TcpListener,
    app: Router,
    stop: impl Future<Output = ()>,
    limits: Limits,
) {
    let connections = GracefulShutdown::new();
    let http = http(limits);
    let (stopping, stopped) = watch::channel(());
    let mut stop = pin!(stop);
    loop {
        let (connection, from) = tokio::select! {
            accepted = accept(&listener) => accepted,
            () = &mut stop => break,
        };
        // Without this, Nagle's algorithm would delay the small chunks of an event stream.
        _ = connection.set_nodelay(true);
        let activity = Activity::default();
        let idle = idle_at_stop(stopped.clone(), activity.clone());
        let connection = Caller::new(connection, activity, limits.send);
        let served = answer(http.clone(), connection, from, app.clone(), connections.watcher(), limits);
        tokio::spawn(async {
            tokio::select! {
                () = served => {}
                () = idle => {}
            }
        });
    }
    drop((listener, stopping));
    let limit = limits.shutdown;
    if timeout(limit, connections.shutdown()).await.is_err() {
        tracing::warn!("requests in flight are broken off after {limit:?}");
    }
}

fn http(limits: Limits) -> Builder<TokioExecutor> {
    let mut http = Builder::new(TokioExecutor::new());
    http.http1().timer(TokioTimer::new()).header_read_timeout(limits.next_request);
    http.http2()
        .timer(TokioTimer::new())
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

/// Completes once a connection has no request in flight after the stop signal. An incomplete head is not waited for.
async fn idle_at_stop(mut stopped: watch::Receiver<()>, activity: Activity) {
    // The sender never sends: its drop is the stop signal.
    _ = stopped.changed().await;
    loop {
        sleep(HEAD_AT_STOP).await;
        if activity.is_idle() {
            return;
        }
    }
}

async fn answer(
    http: Builder<TokioExecutor>,
    connection: Caller,
    from: SocketAddr,
    app: Router,
    watcher: Watcher,
    limits: Limits,
) {
    let was_asked = Arc::new(AtomicBool::new(false));
    let asked = was_asked.clone();
    let activity = connection.activity();
    let app = service_fn(move |request: Request<Incoming>| {
        asked.store(true, Relaxed);
        let in_flight = activity.begin();
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(ConnectInfo(from));
        let response = app.clone().oneshot(request);
        async move { response.await.map(|response| response.map(|body| in_flight.until_end_of(body))) }
    });
    let connection = http.serve_connection(TokioIo::new(connection), TowerToHyperService::new(app));
    let mut served = pin!(watcher.watch(connection));
    // hyper's header timeout starts only after it detects the HTTP version, and HTTP/2 has none.
    if timeout(limits.first_request, served.as_mut()).await.is_err() && was_asked.load(Relaxed) {
        // An error here concerns only the caller.
        _ = served.await;
    }
}
