//! Serves connections until it is told to stop. It is `axum::serve` with limits: that has no timer, so whoever connects
//! and says nothing, or half of a request, would be waited for.

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
    time::{sleep, timeout},
};
use tower::ServiceExt;

use crate::settings::Settings;

#[derive(Clone, Copy)]
pub(crate) struct Limits {
    /// Until a connection's first request has come.
    first_request: Duration,
    /// Until the next one has, in HTTP/1.1.
    next_request: Duration,
    /// How often a connection in HTTP/2 is asked whether there is still somebody.
    ping: Duration,
    /// For what is under way at the end.
    shutdown: Duration,
}

impl Limits {
    pub(crate) fn of(settings: &Settings) -> Self {
        Self {
            first_request: settings.head_timeout.into(),
            next_request: settings.keep_alive.into(),
            ping: settings.ping.into(),
            shutdown: settings.shutdown_limit.into(),
        }
    }
}

/// Serves until a signal comes, and then until all requests under way are done or the limit is over.
pub(crate) async fn serve(
    listener: TcpListener,
    app: Router,
    stop: impl Future<Output = ()>,
    limits: Limits,
) {
    let connections = GracefulShutdown::new();
    let http = http(limits);
    let mut stop = pin!(stop);
    loop {
        let (connection, from) = tokio::select! {
            accepted = accept(&listener) => accepted,
            () = &mut stop => break,
        };
        let connection = answer(http.clone(), connection, from, app.clone(), connections.watcher(), limits);
        tokio::spawn(connection);
    }
    drop(listener);
    let limit = limits.shutdown;
    tracing::info!("stopping: requests under way have {limit:?} to finish");
    if timeout(limit, connections.shutdown()).await.is_err() {
        tracing::warn!("requests under way are broken off after {limit:?}");
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

/// The next connection. Where there can be none, because too many files are open, it is tried again.
async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok(accepted) => return accepted,
            Err(error) if is_of_the_connection(&error) => {}
            Err(error) => {
                tracing::warn!("no connection can be accepted: {error}");
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
    app: Router,
    watcher: Watcher,
    limits: Limits,
) {
    // A stream's small chunks are not held back to be sent together.
    _ = connection.set_nodelay(true);
    let was_asked = Arc::new(AtomicBool::new(false));
    let asked = was_asked.clone();
    let app = app.map_request(move |request: Request<Incoming>| {
        asked.store(true, Relaxed);
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(ConnectInfo(from));
        request
    });
    let connection = http.serve_connection(TokioIo::new(connection), TowerToHyperService::new(app));
    let mut served = pin!(watcher.watch(connection));
    // hyper's own timer begins when it knows the version of HTTP, and in HTTP/2 there is none.
    if timeout(limits.first_request, served.as_mut()).await.is_err() && was_asked.load(Relaxed) {
        // How it went is of interest to the caller at most.
        _ = served.await;
    }
}
