//! Assembles the gateway and serves until a stop signal.

use std::{error::Error, io};

use axum::{Router, middleware};
use futures_util::FutureExt;
use tokio::net::TcpListener;
use tower_key_rotation::RecoveryHandle;

use crate::{
    admin::Admin,
    health, keys, metrics,
    proxy::Proxy,
    read_on::read_on,
    serve::{Limits, serve},
    settings::Settings,
};

pub(crate) async fn run(settings: Settings) -> Result<(), Box<dyn Error>> {
    let exporter = metrics::install()?;
    let pool = keys::open(&settings).await?;
    let listener =
        TcpListener::bind(settings.listen).await.map_err(|error| format!("{}: {error}", settings.listen))?;
    let recovery = RecoveryHandle::spawn(&pool);
    let stop = stop_signal()?;
    announce(&settings, &listener)?;

    let admin = Admin::of(&pool, &settings);
    let app = Router::new()
        .merge(admin.router())
        .merge(health::router(pool.clone()))
        .merge(admin.guard(metrics::router(pool.clone(), exporter)))
        .fallback_service(Proxy::new(&pool, &settings)?.router())
        .layer(middleware::map_request(read_on));
    let limits = Limits::of(&settings);
    serve(listener, app, stop.inspect(move |()| admin.stop()), limits).await;

    recovery.shutdown().await?;
    tracing::info!("stopped");
    Ok(())
}

/// Logs the listen address last, because programs that start the gateway wait for this line.
fn announce(settings: &Settings, listener: &TcpListener) -> io::Result<()> {
    if settings.client_token.is_empty() {
        tracing::warn!("without a client token, every program on this machine can use the keys");
    }
    let upstream = settings.upstream.authority();
    tracing::info!("listening on http://{}, for {upstream}", listener.local_addr()?);
    Ok(())
}

/// Returns a future that completes on SIGTERM or Ctrl-C.
///
/// The signal handlers are installed by this call, before the first poll.
#[cfg(unix)]
fn stop_signal() -> io::Result<impl Future<Output = ()> + Send + 'static> {
    use tokio::signal::unix::{SignalKind, signal};

    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

#[cfg(not(unix))]
fn stop_signal() -> io::Result<impl Future<Output = ()> + Send + 'static> {
    Ok(async {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending().await
        }
    })
}
