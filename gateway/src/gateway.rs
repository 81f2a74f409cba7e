//! Assembles the gateway and serves until a stop signal.

use std::{error::Error, io, mem, net, sync::Arc, thread};

use axum::{Router, response::Response};
use futures_util::{FutureExt, future::join_all};
use http::Request;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::{
    join,
    net::TcpListener,
    runtime,
    sync::{oneshot, watch},
};
use tower_key_rotation::NotWritten;

use crate::{
    admin::{Access, Admin},
    callers::Callers,
    config::Config,
    health, metrics,
    proxy::Proxy,
    reload::Reload,
    serve::{App, CallerBody, Limits, serve},
    served::{Current, Served},
    settings::Settings,
    upstream::Upstream,
    watch::Files,
    webhook::Webhook,
};

/// A gateway whose configuration is right and whose address is bound. Nobody is served yet.
pub(crate) struct Opened {
    pub(crate) current: Current,
    listener: TcpListener,
    proxy: Proxy,
    limits: Limits,
}

impl Opened {
    /// Opens the upstreams and callers, which are taken out of the configuration.
    pub(crate) async fn open(config: &mut Config) -> Result<Self, Box<dyn Error>> {
        let mut upstreams = Vec::new();
        for upstream in mem::take(&mut config.upstreams) {
            upstreams.push(Arc::new(Upstream::open(upstream).await?));
        }
        let callers = Callers::new(mem::take(&mut config.callers), None);
        let current = Current::new(Served { upstreams, callers });
        let settings = &config.settings;
        let listener = bind("--listen", settings.listen).await?;
        let proxy = Proxy::new(current.clone(), settings);
        Ok(Self { current, listener, proxy, limits: Limits::of(settings) })
    }

    pub(crate) fn address(&self) -> io::Result<net::SocketAddr> {
        self.listener.local_addr()
    }

    /// Begins to recover keys and to exchange their state with the store.
    pub(crate) fn start(&self) {
        for upstream in &self.current.get().upstreams {
            upstream.start();
        }
    }

    /// Serves until `stop` completes and the requests in flight have ended.
    pub(crate) async fn serve(self, stop: impl Future<Output = ()>) {
        let limits = self.limits;
        let stop = stop.inspect(move |()| {
            tracing::info!("stopping: requests in flight have {:?} to finish", limits.shutdown);
        });
        let front = Front { health: health::router(self.current), proxy: self.proxy };
        serve(self.listener, front, stop, limits).await;
    }
}

/// Writes what is pending of the keys' state to the stores.
pub(crate) async fn shut_down(current: &Current) -> Result<(), NotWritten> {
    let served = current.get();
    let written = join_all(served.upstreams.iter().map(|upstream| upstream.shutdown())).await;
    written.into_iter().collect()
}

/// Serves with an admin, and reloads, until a stop signal.
pub(crate) async fn run(mut config: Config) -> Result<(), Box<dyn Error>> {
    let exporter = metrics::install()?;
    let files = Files::now(config.files());
    let opened = Opened::open(&mut config).await?;
    let (current, settings) = (opened.current.clone(), &config.settings);
    let admin_listener = bind("--admin-listen", settings.admin_listen).await?;
    let signal = stop_signal()?;
    opened.start();
    let admin_address = admin_listener.local_addr()?;
    let (stop, stopped) = watch::channel(());
    let admin = start_admin(admin_listener.into_std()?, &current, exporter, settings, stopped)?;
    let webhook = settings.webhook.clone().map(|url| {
        let webhook = Webhook::new(url, settings.webhook_below, current.clone());
        tokio::spawn(webhook.run())
    });
    let reload = Reload::new(config, files, current.clone())?;
    announce(&current.get(), opened.address()?, admin_address);

    let signal = signal.inspect(|()| drop(stop));
    let reload = tokio::spawn(reload.run());
    // An error means that the admin's thread has ended, by a panic at worst, which the panic hook logs.
    _ = join!(opened.serve(signal), admin);

    reload.abort();
    if let Some(webhook) = webhook {
        webhook.abort();
    }
    shut_down(&current).await?;
    tracing::info!("stopped");
    Ok(())
}

/// What answers callers: the proxy, and health checks. The proxy is not behind a router, which costs each request more
/// than all that the proxy does with its headers.
struct Front {
    health: Router,
    proxy: Proxy,
}

impl App for Front {
    async fn answer(&self, request: Request<CallerBody>) -> Response {
        if health::PATHS.contains(&request.uri().path()) {
            self.health.answer(request).await
        } else {
            self.proxy.answer(request).await
        }
    }
}

async fn bind(setting: &str, address: net::SocketAddr) -> Result<TcpListener, String> {
    TcpListener::bind(address).await.map_err(|error| format!("{setting}: {address}: {error}"))
}

/// Serves the admin on its own thread, so that no proxied request waits for the admin.
///
/// The receiver completes when that thread ends.
fn start_admin(
    listener: net::TcpListener,
    current: &Current,
    exporter: PrometheusHandle,
    settings: &Settings,
    mut stopped: watch::Receiver<()>,
) -> io::Result<oneshot::Receiver<()>> {
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    let (current, access, limits) =
        (current.clone(), Access::by(settings, current.clone()), Limits::of(settings));
    let (ends, ended) = oneshot::channel();
    let run = async move {
        let listener = TcpListener::from_std(listener)?;
        let admin = Admin::of(current.clone(), access);
        let app = Router::new().merge(admin.router()).merge(admin.guard(metrics::router(current, exporter)));
        let stop = async {
            // The sender never sends: its drop is the signal.
            _ = stopped.changed().await;
            admin.stop();
        };
        serve(listener, app, stop, limits).await;
        io::Result::Ok(())
    };
    thread::Builder::new().name("admin".to_owned()).spawn(move || {
        if let Err(error) = runtime.block_on(run) {
            tracing::error!("the admin can't be served: {error}");
        }
        drop(ends);
    })?;
    Ok(ended)
}

/// Logs the listen address last, because programs that start the gateway wait for this line.
fn announce(served: &Served, address: net::SocketAddr, admin: net::SocketAddr) {
    if served.callers.are_all_here() {
        tracing::warn!("without a client token, every program on this machine can use the keys");
    }
    let upstreams: Vec<_> = served.upstreams.iter().map(|upstream| upstream.config.url.authority()).collect();
    tracing::info!("the admin is at http://{admin}/admin");
    tracing::info!("listening on http://{address}, for {}", upstreams.join(", "));
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
