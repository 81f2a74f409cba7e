//! The gateway as a part of another program.

use std::{error::Error, fmt, io};

use tokio::{sync::oneshot, task::JoinHandle};
use tower_key_rotation::{NotWritten, Secret};

use crate::{
    config,
    gateway::{Opened, shut_down},
    with_sources,
};

/// What a gateway serves: an API and its keys, or whatever a configuration file of the program can say.
///
/// Its settings are those of the program, except that:
///
/// - it listens on a free port of 127.0.0.1,
/// - it keeps the state of its keys in memory (`state = "gateway.redb"` keeps it in a file),
/// - it reads no environment variables, does not look at its files again, and has no admin page: `watch`, `log`,
///   `webhook`, `webhook-below`, `admin-listen` and `admin-token` are errors.
#[derive(Clone)]
#[must_use]
pub struct Config {
    upstream: Option<String>,
    text: String,
    keys: Vec<(String, Secret)>,
}

impl Config {
    /// The API at this URL. Its keys follow, by [`key`](Self::key).
    ///
    /// An `http` URL must be of this machine, because the keys would cross the network in cleartext.
    pub fn new(upstream: impl Into<String>) -> Self {
        Self { upstream: Some(upstream.into()), text: String::new(), keys: Vec::new() }
    }

    /// The text of a configuration file, as the program's `--config` takes it.
    ///
    /// ```
    /// # #[tokio::main]
    /// # async fn main() -> Result<(), key_rotation_gateway::ServeError> {
    /// let config = key_rotation_gateway::Config::from_toml(
    ///     r#"
    ///     upstream = "https://api.anthropic.com"
    ///     inject = "header:x-api-key"
    ///     wait = 5
    ///     "#,
    /// );
    /// let gateway = key_rotation_gateway::serve(config.key("first", "sk-1")).await?;
    /// # gateway.shutdown().await
    /// # }
    /// ```
    pub fn from_toml(text: impl Into<String>) -> Self {
        Self { upstream: None, text: text.into(), keys: Vec::new() }
    }

    /// Adds a key. The id stands for the key in logs and metrics.
    ///
    /// With `[[upstream]]` tables it is an error: they name their keys by `keys` or `keys-variable`.
    pub fn key(mut self, id: impl Into<String>, secret: impl Into<String>) -> Self {
        self.keys.push((id.into(), Secret::from(secret.into())));
        self
    }
}

impl fmt::Debug for Config {
    /// The text may contain tokens.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config").field("upstream", &self.upstream).finish_non_exhaustive()
    }
}

/// Starts a gateway on the current tokio runtime, whose I/O and timers must be enabled.
///
/// It answers programs on this machine only, unless the configuration has a client token. Its log goes to the program's
/// `tracing` subscriber, and its metrics to the recorder of the `metrics` crate that the program has installed before.
///
/// # Errors
///
/// If the configuration is invalid, the address can't be bound, or the store of the keys can't be opened.
pub async fn serve(config: Config) -> Result<Gateway, ServeError> {
    let mut config = config::Config::of_program(config.upstream.as_deref(), &config.text, config.keys)?;
    let opened = Opened::open(&mut config).await.map_err(|error| ServeError(with_sources(&*error)))?;
    let url = format!("http://{}", opened.address()?);
    let current = opened.current.clone();
    opened.start();
    let (stop, stopped) = oneshot::channel::<()>();
    let served = tokio::spawn(async move {
        // The sender never sends: its drop is the signal.
        opened.serve(async { _ = stopped.await }).await;
        shut_down(&current).await
    });
    Ok(Gateway { url, stop, served })
}

/// A running gateway. Dropping it stops the gateway, as [`shutdown`](Self::shutdown) does, in the background.
#[must_use = "dropping it stops the gateway"]
pub struct Gateway {
    url: String,
    stop: oneshot::Sender<()>,
    served: JoinHandle<Result<(), NotWritten>>,
}

impl Gateway {
    /// The base URL for clients of the API, without a trailing slash: `http://127.0.0.1:40123`.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Accepts no more connections, waits for requests in flight (`shutdown-limit`, 30 s by default), and writes the state
    /// of the keys to their store.
    ///
    /// # Errors
    ///
    /// If that state can't be written.
    pub async fn shutdown(self) -> Result<(), ServeError> {
        drop(self.stop);
        self.served.await.map_err(|error| ServeError(error.to_string()))??;
        Ok(())
    }
}

impl fmt::Debug for Gateway {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gateway").field("url", &self.url).finish_non_exhaustive()
    }
}

/// Why a gateway does not serve, or has not ended well. The text contains no secret.
#[derive(Debug)]
pub struct ServeError(String);

impl fmt::Display for ServeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for ServeError {}

impl From<config::Invalid> for ServeError {
    fn from(error: config::Invalid) -> Self {
        Self(error.to_string())
    }
}

impl From<io::Error> for ServeError {
    fn from(error: io::Error) -> Self {
        Self(error.to_string())
    }
}

impl From<NotWritten> for ServeError {
    fn from(error: NotWritten) -> Self {
        Self(with_sources(&error))
    }
}
