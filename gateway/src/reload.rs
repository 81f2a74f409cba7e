//! Reads the configuration again while the gateway serves: on SIGHUP, and when one of its files changes.
//!
//! A reload prepares all that can fail before it changes anything. So an invalid configuration changes nothing, and no
//! request is dropped: a request in flight keeps the upstream that it began with.

use std::{error::Error, io, mem, sync::Arc, time::Duration};

use tokio::time::sleep;
use tower_key_rotation::KeySpec;

use crate::{
    audit::AUDIT,
    callers::Callers,
    config::{CallerConfig, Config, UpstreamConfig},
    keys,
    served::{Current, Served},
    upstream::Upstream,
    watch::Files,
    with_sources,
};

/// Interval of looks at the files. A file that has changed is read when it has stayed the same for one interval, because
/// it may be half written.
const INTERVAL: Duration = Duration::from_secs(1);

pub(crate) struct Reload {
    /// As it was read last, without what it says of upstreams and callers.
    config: Config,
    current: Current,
    files: Files,
    asked: Asked,
    /// The last error that was logged, so that each is logged once.
    said: Option<String>,
}

/// What becomes of an upstream.
enum Next {
    /// It stays. If its keys have changed, these are the new ones.
    Same(Arc<Upstream>, Option<Vec<KeySpec>>),
    New(Arc<Upstream>),
}

impl Reload {
    /// `config` must be what the gateway has started with, and `files` its files. From now on, SIGHUP asks for a reload.
    pub(crate) fn new(config: Config, files: Files, current: Current) -> io::Result<Self> {
        Ok(Self { config, current, files, asked: asked()?, said: None })
    }

    /// Reloads whenever it is asked to, or a file has changed. Never completes.
    pub(crate) async fn run(mut self) {
        let watches = self.config.settings.watch;
        loop {
            let is_asked = tokio::select! {
                () = self.asked.recv() => true,
                () = sleep(INTERVAL) => false,
            };
            let has_changed = watches && self.files.have_settled();
            if is_asked || has_changed {
                self.reload().await;
            }
        }
    }

    async fn reload(&mut self) {
        match self.try_reload().await {
            Ok(()) => self.said = None,
            Err(error) => {
                // They are looked at again when they change again.
                self.files.take_over();
                let error = with_sources(&*error);
                if self.said.as_ref() != Some(&error) {
                    tracing::error!(target: AUDIT, "the configuration was not reloaded, and nothing has changed: {error}");
                }
                self.said = Some(error);
            }
        }
    }

    async fn try_reload(&mut self) -> Result<(), Box<dyn Error>> {
        let mut config = Config::read(&self.config.arguments)?;
        let served = self.current.get();
        if config.callers.is_empty() && !served.callers.are_all_here() {
            return Err("it has no client token any more, which needs a restart".into());
        }
        // Also if this reload fails: a file that is missing may come.
        self.files = Files::now(config.files());
        // All of them before any state is opened.
        let given = config.upstreams.iter().map(keys::given).collect::<Result<Vec<_>, _>>()?;
        let mut next = Vec::new();
        for (upstream, given) in mem::take(&mut config.upstreams).into_iter().zip(given) {
            next.push(next_of(&served, upstream, given).await?);
        }
        // Nothing fails from here on.
        for name in self.config.settings.fixed_differences(&config.settings) {
            tracing::warn!("--{name} has changed, which takes effect at the next start");
        }
        self.apply(&served, next, mem::take(&mut config.callers)).await;
        self.config = config;
        Ok(())
    }

    async fn apply(&self, served: &Served, next: Vec<Next>, callers: Vec<CallerConfig>) {
        let mut upstreams = Vec::new();
        for next in next {
            upstreams.push(match next {
                Next::Same(upstream, keys) => {
                    if let Some(keys) = keys {
                        let taken = upstream.take_keys(keys).await;
                        tracing::info!(target: AUDIT, upstream = upstream.name(), ?taken, "keys read again");
                    }
                    upstream
                }
                Next::New(upstream) => {
                    tracing::info!(target: AUDIT, upstream = upstream.name(), "upstream configured anew");
                    if let Some(old) = served.upstream(upstream.name()) {
                        upstream.take_over(old).await;
                    }
                    upstream.start();
                    upstream
                }
            });
        }
        let is_kept = |old: &Arc<Upstream>| upstreams.iter().any(|kept| Arc::ptr_eq(kept, old));
        let gone: Vec<_> = served.upstreams.iter().filter(|old| !is_kept(old)).cloned().collect();
        let callers = Callers::new(callers, Some(&served.callers));
        self.current.set(Served { upstreams, callers });
        tracing::info!(target: AUDIT, "configuration reloaded");
        for upstream in gone {
            tokio::spawn(close(upstream));
        }
    }
}

async fn next_of(
    served: &Served,
    config: UpstreamConfig,
    given: Vec<KeySpec>,
) -> Result<Next, Box<dyn Error>> {
    Ok(match served.upstream(&config.name) {
        Some(same) if same.config == config => Next::Same(same.clone(), same.changed_keys(given)),
        Some(old) => Next::New(Arc::new(old.changed(config, given).await?)),
        None => Next::New(Arc::new(Upstream::open_with(config, given).await?)),
    })
}

/// Ends an upstream when its last request has been answered.
async fn close(upstream: Arc<Upstream>) {
    while Arc::strong_count(&upstream) > 1 {
        sleep(INTERVAL).await;
    }
    if let Err(error) = upstream.shutdown().await {
        tracing::warn!(upstream = upstream.name(), "{}", with_sources(&error));
    }
}

#[cfg(unix)]
struct Asked(tokio::signal::unix::Signal);

#[cfg(unix)]
fn asked() -> io::Result<Asked> {
    use tokio::signal::unix::{SignalKind, signal};

    signal(SignalKind::hangup()).map(Asked)
}

#[cfg(unix)]
impl Asked {
    /// Completes on SIGHUP.
    async fn recv(&mut self) {
        self.0.recv().await;
    }
}

#[cfg(not(unix))]
struct Asked;

#[cfg(not(unix))]
fn asked() -> io::Result<Asked> {
    Ok(Asked)
}

#[cfg(not(unix))]
impl Asked {
    async fn recv(&mut self) {
        std::future::pending().await
    }
}
