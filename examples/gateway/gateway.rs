//! Puts the gateway together, and serves until it is told to stop.

use std::{error::Error, io, net::SocketAddr, time::Duration};

use axum::{Router, middleware, serve::ListenerExt};
use futures_util::FutureExt;
use tokio::{net::TcpListener, time::sleep};
use tower_key_rotation::RecoveryHandle;

use crate::{admin::Admin, health, keys, metrics, proxy::Proxy, read_on::read_on, settings::Settings};

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
    serve(listener, app, stop.inspect(move |()| admin.stop()), settings.shutdown_limit.into()).await?;

    recovery.shutdown().await?;
    tracing::info!("stopped");
    Ok(())
}

/// That it listens comes last: who waits for it has read the rest.
fn announce(settings: &Settings, listener: &TcpListener) -> io::Result<()> {
    if settings.client_token.is_empty() {
        tracing::warn!("without a client token, whoever is on this machine can use the keys");
    }
    let upstream = settings.upstream.authority();
    tracing::info!("listening on http://{}, for {upstream}", listener.local_addr()?);
    Ok(())
}

/// Serves until a signal comes, and then until all requests under way are done or the limit is over.
async fn serve(
    listener: TcpListener,
    app: Router,
    stop: impl Future<Output = ()> + Send + 'static,
    limit: Duration,
) -> io::Result<()> {
    // A stream's small chunks are not held back to be sent together.
    let listener = listener.tap_io(|connection| _ = connection.set_nodelay(true));
    let stop = stop.shared();
    let served = axum::serve(listener, app.into_make_service_with_connect_info::<SocketAddr>())
        .with_graceful_shutdown(stop.clone());
    let limit_is_over = async {
        stop.await;
        tracing::info!("stopping: requests under way have {limit:?} to finish");
        sleep(limit).await;
    };
    tokio::select! {
        done = served.into_future() => done,
        () = limit_is_over => {
            tracing::warn!("requests under way are broken off after {limit:?}");
            Ok(())
        }
    }
}

/// Completes at a SIGTERM or Ctrl-C. They are listened for from now on.
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
