//! From keys, wherever they are written down, to a pool.

use std::{
    borrow::Cow,
    collections::{HashMap, HashSet},
    env, fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use super::{KeyPool, Persistence, UsableKey};
use crate::{
    clock::{Clock, SystemClock},
    key::hosts::{Host, Hosts, InvalidHost},
    key::inject::Inject,
    key::{
        KeyId, Place, Rejected, Rejection, Secret,
        source::{self, Candidate},
    },
    limit::Cooldowns,
    meter::Meter,
    store::{KeyStore, StoreError},
};

/// Puts a [`KeyPool`] together: its keys, where they go, and how long they rest.
///
/// Keys without an id are called `key-1`, `key-2` and so on, by their place among all keys.
///
/// A key that can't be used is left out, logged by place and id, and listed in [`KeyPool::rejected`]; the
/// others serve. With [`strict`](Self::strict), it is an error instead.
///
/// ```
/// use std::time::Duration;
/// use tower_key_rotation::{Inject, KeyPool};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let pool = KeyPool::builder()
///     .key("alpha", "sk-1")
///     .keys([("beta", "sk-2"), ("gamma", "sk 3\n")])
///     .inject(Inject::header("x-api-key"))
///     .cooldown(Duration::from_secs(60))
///     .build()?;
///
/// assert_eq!(pool.stats().healthy, 2);
/// assert_eq!(
///     pool.rejected()[0].to_string(),
///     "key 3 in code: key gamma: the secret has a newline, a tab or another control character",
/// );
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use]
pub struct KeyPoolBuilder {
    given: Vec<Given>,
    strict: bool,
    invalid_host: Option<InvalidHost>,
    config: Config,
}

#[derive(Debug)]
enum Given {
    Key(String, Secret),
    Env(String),
    File(PathBuf),
}

#[derive(Debug)]
pub(super) struct Config {
    pub(super) clock: Arc<dyn Clock>,
    pub(super) inject: Inject,
    pub(super) hosts: Hosts,
    pub(super) cooldowns: Cooldowns,
    pub(super) meter: Arc<Meter>,
}

impl Default for KeyPoolBuilder {
    fn default() -> Self {
        Self {
            given: Vec::new(),
            strict: false,
            invalid_host: None,
            config: Config {
                clock: Arc::new(SystemClock::new()),
                inject: Inject::default(),
                hosts: Hosts::default(),
                cooldowns: Cooldowns::default(),
                meter: Arc::new(Meter::of(Cow::Borrowed("default"))),
            },
        }
    }
}

impl KeyPoolBuilder {
    /// What the pool is called in metrics, where a program has several; `default` otherwise.
    pub fn name(mut self, name: impl Into<Cow<'static, str>>) -> Self {
        self.config.meter = Arc::new(Meter::of(name.into()));
        self
    }

    /// Adds a key.
    pub fn key(mut self, id: impl Into<String>, secret: impl Into<Secret>) -> Self {
        self.given.push(Given::Key(id.into(), secret.into()));
        self
    }

    /// Adds keys, each with its id.
    pub fn keys<I, K, S>(self, keys: I) -> Self
    where
        I: IntoIterator<Item = (K, S)>,
        K: Into<String>,
        S: Into<Secret>,
    {
        keys.into_iter().fold(self, |builder, (id, secret)| builder.key(id, secret))
    }

    /// Adds the keys of an environment variable: `id=secret,id=secret` or bare secrets, divided by commas.
    /// It is read by [`build`](Self::build).
    ///
    /// The first `=` of an entry divides, unless only a base64 secret's padding stands behind it.
    pub fn keys_from_env(mut self, variable: impl Into<String>) -> Self {
        self.given.push(Given::Env(variable.into()));
        self
    }

    /// Adds the keys of a file, which is read by [`build`](Self::build).
    ///
    /// One `id|secret` or bare secret a line; empty lines and those that begin with `#` are skipped. Or JSON,
    /// where the name ends in `.json` or the text begins with `[` or `{`: `["secret"]`,
    /// `[{"id": "…", "secret": "…"}]` or `{"id": "secret"}`.
    ///
    /// Spaces around an id are dropped. Those around a secret are not: such a key is rejected.
    pub fn keys_from_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.given.push(Given::File(path.into()));
        self
    }

    /// Where keys go in a request. By default `Authorization: Bearer`.
    pub fn inject(mut self, inject: Inject) -> Self {
        self.config.inject = inject;
        self
    }

    /// Gives keys to requests to these hosts only. Any other request passes through without a key, and its
    /// response is not looked at.
    ///
    /// A host is `api.example.com`, on any port, or `api.example.com:8443`, on that one; `*.example.com` is
    /// every host below `example.com`, and not `example.com` itself. What is none of these is reported by
    /// [`build`](Self::build). A request whose URI has no host is judged by its `Host` header.
    ///
    /// A redirect that the client follows by itself is not seen here: the README says what that means.
    ///
    /// ```
    /// use tower_key_rotation::KeyPool;
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let pool = KeyPool::builder()
    ///     .key("alpha", "sk-1")
    ///     .allowed_hosts(["api.example.com", "*.openai.azure.com"])
    ///     .build()?;
    ///
    /// assert!(KeyPool::builder().allowed_hosts(["https://api.example.com"]).build().is_err());
    /// # Ok(())
    /// # }
    /// ```
    pub fn allowed_hosts<I, H>(mut self, hosts: I) -> Self
    where
        I: IntoIterator<Item = H>,
        H: AsRef<str>,
    {
        self.config.hosts.allowed = Some(self.hosts(hosts));
        self
    }

    /// Gives keys to requests in cleartext to these hosts as well. Without this, a request by `http` to any
    /// host but loopback fails with [`InjectError::Cleartext`](crate::InjectError::Cleartext).
    pub fn allow_cleartext_to<I, H>(mut self, hosts: I) -> Self
    where
        I: IntoIterator<Item = H>,
        H: AsRef<str>,
    {
        self.config.hosts.cleartext = self.hosts(hosts);
        self
    }

    fn hosts<I, H>(&mut self, hosts: I) -> Vec<Host>
    where
        I: IntoIterator<Item = H>,
        H: AsRef<str>,
    {
        Host::all(hosts).unwrap_or_else(|invalid| {
            self.invalid_host = Some(invalid);
            Vec::new()
        })
    }

    /// How long a key rests after a 429 where the service doesn't say, and at least where it does. By
    /// default 2 minutes.
    pub fn cooldown(mut self, cooldown: Duration) -> Self {
        self.config.cooldowns.rate_limited = cooldown;
        self
    }

    /// How long a key rests once its quota is used up. By default 24 hours.
    pub fn exhausted_for(mut self, rest: Duration) -> Self {
        self.config.cooldowns.exhausted = rest;
        self
    }

    /// Takes the service at its word where it asks for less than [`cooldown`](Self::cooldown), too.
    pub fn exact_hints(mut self) -> Self {
        self.config.cooldowns.exact_hints = true;
        self
    }

    /// The least and the most that a service's hint can ask for: a hint below or above counts as that. By
    /// default 1 second and 1 hour. Where the two cross, the most holds. Of a quota that is used up, the most is at
    /// least [`exhausted_for`](Self::exhausted_for).
    pub fn hint_limits(mut self, least: Duration, most: Duration) -> Self {
        self.config.cooldowns.shortest_hint = least;
        self.config.cooldowns.longest_hint = most;
        self
    }

    /// Where the time comes from: for tests, see [`clock`](crate::clock).
    pub fn clock(mut self, clock: impl Clock) -> Self {
        self.config.clock = Arc::new(clock);
        self
    }

    /// Makes a key that can't be used an error, which lists all of them.
    pub fn strict(mut self) -> Self {
        self.strict = true;
        self
    }

    /// A pool with these keys, kept in this process's memory. It may be empty, and be filled later.
    ///
    /// # Errors
    ///
    /// Where a file or variable can't be read, or with [`strict`](Self::strict) where a key can't be used.
    pub fn build(self) -> Result<KeyPool, BuildError> {
        let (keys, rejected) = self.read()?;
        Ok(KeyPool::new(keys, rejected, self.config, Persistence::none()))
    }

    /// A pool over that store: the store's keys and their state, and those given here. A key given here whose
    /// id or secret the store has already is the store's: its id, its secret and its state hold.
    ///
    /// # Errors
    ///
    /// As for [`build`](Self::build), and where the store fails.
    pub async fn open(self, store: impl KeyStore) -> Result<KeyPool, OpenError> {
        let (keys, rejected) = self.read()?;
        let persistence = Persistence::over(metered(store, &self.config.meter), seeds(&keys));
        let pool = KeyPool::new(Vec::new(), rejected, self.config, persistence);
        pool.reload().await?;
        Ok(pool)
    }

    /// A pool over a store that need not be there yet. Until it is, the keys given here serve, as healthy ones;
    /// then it is as if the pool had been [opened](Self::open) over it, and what was learnt of the keys in the
    /// meantime is written to it.
    ///
    /// A [`RecoveryHandle`](crate::RecoveryHandle) tries to reach it: at once, and again at random intervals
    /// that grow from about a second to the usual one.
    ///
    /// # Errors
    ///
    /// As for [`build`](Self::build).
    pub fn open_when_ready(self, store: impl KeyStore) -> Result<KeyPool, BuildError> {
        let (keys, rejected) = self.read()?;
        let persistence = Persistence::over(metered(store, &self.config.meter), seeds(&keys));
        Ok(KeyPool::new(keys, rejected, self.config, persistence))
    }

    fn read(&self) -> Result<(Vec<UsableKey>, Vec<Rejected>), BuildError> {
        if let Some(name) = self.config.inject.invalid_header() {
            return Err(BuildError::HeaderName(name.to_owned()));
        }
        if let Some(invalid) = &self.invalid_host {
            return Err(BuildError::Host(invalid.clone()));
        }
        let mut accepted = Accepted::default();
        for (number, given) in (1..).zip(&self.given) {
            for candidate in given.read(number)? {
                accepted.add(candidate, &self.config.inject);
            }
        }
        let Accepted { keys, rejected, .. } = accepted;
        if self.strict && !rejected.is_empty() {
            return Err(BuildError::Rejected(rejected));
        }
        for rejected in &rejected {
            tracing::warn!("key rejected: {rejected}");
        }
        Ok((keys, rejected))
    }
}

impl Given {
    fn read(&self, number: usize) -> Result<Vec<Candidate>, BuildError> {
        match self {
            Self::Key(id, secret) => Ok(vec![Candidate {
                place: Place::Code(number),
                id: Some(id.clone()),
                secret: Ok(secret.clone()),
            }]),
            Self::Env(variable) => {
                let value = env::var_os(variable).ok_or_else(|| BuildError::NoVariable(variable.clone()))?;
                let value = value.to_str().ok_or_else(|| BuildError::VariableNotText(variable.clone()))?;
                Ok(source::env(variable, value))
            }
            Self::File(path) => read_file(path),
        }
    }
}

fn read_file(path: &Path) -> Result<Vec<Candidate>, BuildError> {
    let text =
        fs::read_to_string(path).map_err(|source| BuildError::File { path: path.to_owned(), source })?;
    if source::is_json(path, &text) {
        source::json(path, &text).map_err(|source| BuildError::Json {
            path: path.to_owned(),
            line: source.line(),
            source,
        })
    } else {
        Ok(source::lines(path, &text))
    }
}

#[cfg(feature = "metrics")]
fn metered(store: impl KeyStore, meter: &Arc<Meter>) -> Arc<dyn KeyStore> {
    Arc::new(crate::store::metered::Metered::new(store, meter.clone()))
}

#[cfg(not(feature = "metrics"))]
fn metered(store: impl KeyStore, _: &Arc<Meter>) -> Arc<dyn KeyStore> {
    Arc::new(store)
}

fn seeds(keys: &[UsableKey]) -> Vec<(KeyId, Secret)> {
    keys.iter().map(|key| (key.id.clone(), key.secret())).collect()
}

#[derive(Default)]
struct Accepted {
    keys: Vec<UsableKey>,
    rejected: Vec<Rejected>,
    ids: HashSet<KeyId>,
    by_secret: HashMap<Secret, KeyId>,
    candidates: usize,
}

impl Accepted {
    fn add(&mut self, candidate: Candidate, inject: &Inject) {
        self.candidates += 1;
        let id = match &candidate.id {
            Some(id) => KeyId::new(id),
            None => KeyId::new(format!("key-{}", self.candidates)),
        };
        let known_id = id.as_ref().ok().cloned();
        match id.map_err(Rejection::from).and_then(|id| self.check(id, candidate.secret, inject)) {
            Ok(key) => {
                self.ids.insert(key.id.clone());
                self.by_secret.insert(key.secret(), key.id.clone());
                self.keys.push(key);
            }
            Err(reason) => self.rejected.push(Rejected { place: candidate.place, id: known_id, reason }),
        }
    }

    fn check(
        &self,
        id: KeyId,
        secret: Result<Secret, Rejection>,
        inject: &Inject,
    ) -> Result<UsableKey, Rejection> {
        let secret = secret?;
        if self.ids.contains(&id) {
            return Err(Rejection::DuplicateId);
        }
        if let Some(other) = self.by_secret.get(&secret) {
            return Err(Rejection::DuplicateSecret(other.clone()));
        }
        Ok(UsableKey::new(id, &secret, inject)?)
    }
}

/// Why a pool could not be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// An environment variable is not set.
    #[error("the environment variable {0} is not set")]
    NoVariable(String),
    /// An environment variable is not UTF-8.
    #[error("the environment variable {0} is not UTF-8 text")]
    VariableNotText(String),
    /// A file could not be read.
    #[error("{} could not be read", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is not the JSON that it should be.
    #[error("{}, line {line}: not valid JSON", path.display())]
    Json {
        /// Which.
        path: PathBuf,
        /// On which line.
        line: usize,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// The name given to [`Inject::header`] can't be one.
    #[error("{0:?} is not a header name")]
    HeaderName(String),
    /// What was given to [`KeyPoolBuilder::allowed_hosts`] or [`KeyPoolBuilder::allow_cleartext_to`] can't be
    /// a host.
    #[error(transparent)]
    Host(InvalidHost),
    /// These keys can't be used, and the builder is [`strict`](KeyPoolBuilder::strict).
    #[error("{} could not be used as keys:{}", .0.len(), listed(.0))]
    Rejected(Vec<Rejected>),
}

fn listed(rejected: &[Rejected]) -> String {
    rejected.iter().map(|rejected| format!("\n  {rejected}")).collect()
}

/// Why a pool could not be opened over a store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Its own keys could not be read.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f30_a_bad_key_is_rejected_by_id_and_the_others_serve() {
        let pool = KeyPool::builder()
            .keys((0..99).map(|number| (format!("key-{number}"), format!("sk-{number}"))))
            .key("bad", "canary\n")
            .build()
            .unwrap();
        assert_eq!(pool.stats().healthy, 99);
        let shown = format!("{:?} {}", pool.rejected(), pool.rejected()[0]);
        assert!(shown.contains("bad") && !shown.contains("canary"), "{shown}");
    }

    #[test]
    fn two_keys_of_one_id_or_one_secret_are_one_key() {
        let pool = KeyPool::builder().keys([("a", "sk-1"), ("a", "sk-2"), ("b", "sk-1")]).build().unwrap();
        let shown: Vec<_> = pool.rejected().iter().map(ToString::to_string).collect();
        assert_eq!(
            shown,
            [
                "key 2 in code: key a: another key has this id",
                "key 3 in code: key b: key a has the same secret"
            ]
        );
    }

    #[test]
    fn a_strict_builder_lists_all_that_is_wrong() {
        let error = KeyPool::builder().keys([("a", ""), ("", "sk")]).strict().build().unwrap_err();
        let shown = error.to_string();
        assert!(shown.contains("key 1 in code: key a: the secret is empty"), "{shown}");
        assert!(shown.contains("key 2 in code: a key id has"), "{shown}");
    }

    #[test]
    fn what_cannot_be_read_is_an_error_that_names_it() {
        let error = |builder: KeyPoolBuilder| builder.build().unwrap_err().to_string();
        assert_eq!(
            error(KeyPool::builder().keys_from_file("no/such/file")),
            "no/such/file could not be read"
        );
        let unset = KeyPool::builder().keys_from_env("TOWER_KEY_ROTATION_UNSET");
        assert!(error(unset).contains("TOWER_KEY_ROTATION_UNSET is not set"));
        let header = KeyPool::builder().inject(Inject::header("no header"));
        assert_eq!(error(header), "\"no header\" is not a header name");
    }
}
