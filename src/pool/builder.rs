//! Builds a pool from keys and settings.

use std::{borrow::Cow, env, io, path::PathBuf, sync::Arc, time::Duration};

use super::{
    accepted::Accepted,
    engine::{Config, Engine},
    key::UsableKey,
    key_pool::KeyPool,
    source::{Read, Source},
};
use crate::{
    clock::{Clock, SystemClock},
    key::hosts::{Host, Hosts, InvalidHost},
    key::inject::Inject,
    key::{
        InvalidKeyId, KeyId, KeySpec, Rejected, Secret,
        rejected::{ParsedKey, Place},
        source::{self, Unnamed},
    },
    limit::{Cooldowns, InvalidReset, Quota},
    meter::Meter,
    replication::Link,
    source::{KeySource, SourceError},
    store::{KeyStore, StoreError},
};

/// Builds a [`KeyPool`]: its keys, where they go in a request, and how long they rest.
///
/// Keys without an id are called `key-1`, `key-2` and so on, by their position among all keys of the builder.
///
/// The builder leaves out a key that can't be used, logs its place and id, and lists it in [`KeyPool::rejected`].
/// The other keys serve. With [`strict`](Self::strict), such a key is an error.
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
    Code(Result<KeySpec, InvalidKeyId>),
    Env(String),
    File(PathBuf),
    Source(Arc<Source>, Read),
}

impl KeyPool {
    /// Returns a builder without keys.
    pub fn builder() -> KeyPoolBuilder {
        let config = Config {
            clock: Arc::new(SystemClock::new()),
            inject: Inject::bearer(),
            hosts: Hosts::default(),
            cooldowns: Cooldowns::default(),
            meter: Arc::new(Meter::of(Cow::Borrowed("default"))),
            learns: false,
            quotas: Vec::new(),
            fills_first: false,
            sources: Vec::new(),
        };
        KeyPoolBuilder { given: Vec::new(), strict: false, invalid_host: None, config }
    }
}

impl KeyPoolBuilder {
    /// Sets the pool's name in metrics, for a program with several pools. The default is `default`.
    pub fn name(mut self, name: impl Into<Cow<'static, str>>) -> Self {
        self.config.meter = Arc::new(Meter::of(name.into()));
        self
    }

    /// Adds a key.
    pub fn key(mut self, id: impl Into<String>, secret: impl Into<Secret>) -> Self {
        // First, so that it is wiped whatever the id is.
        let secret = secret.into();
        self.given.push(Given::Code(KeyId::new(id.into()).map(|id| KeySpec::new(id, secret))));
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

    /// Adds a key by its spec, which can say more than id and secret.
    ///
    /// A spec with a field that has [no effect yet](KeySpec::unsupported) is rejected.
    ///
    /// ```
    /// use tower_key_rotation::{KeyId, KeyPool, KeySpec};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let alpha = KeySpec::new(KeyId::new("alpha")?, "sk-1");
    /// let mut beta = KeySpec::new(KeyId::new("beta")?, "sk-2");
    /// beta.tier = Some(1); // only while alpha has no room
    /// beta.group = Some("org-1".to_owned()); // shares its quotas with other keys of this group
    /// let pool = KeyPool::builder().key_spec(alpha).key_spec(beta).build()?;
    /// assert_eq!(pool.stats().healthy, 2);
    /// # Ok(())
    /// # }
    /// ```
    pub fn key_spec(mut self, spec: KeySpec) -> Self {
        self.given.push(Given::Code(Ok(spec)));
        self
    }

    /// Adds the keys of an environment variable: `id=secret,id=secret` or bare secrets, separated by commas.
    ///
    /// The first `=` of an entry separates id and secret, unless only a base64 secret's padding follows. The builder
    /// reads the variable in [`build`](Self::build).
    pub fn keys_from_env(mut self, variable: impl Into<String>) -> Self {
        self.given.push(Given::Env(variable.into()));
        self
    }

    /// Adds the keys of a file in one of three formats. The builder reads the file in [`build`](Self::build), once: for a
    /// file that changes, see [`source`](Self::source).
    ///
    /// **TOML**, with the feature `toml`, if the name ends in `.toml` or a line is `[[key]]`. A key needs only its
    /// `secret`:
    ///
    /// ```toml
    /// [[key]]
    /// id = "alpha"
    /// secret = "sk-1"
    /// note = "paid until May"                  # for people
    ///
    /// [[key]]
    /// id = "beta"
    /// secret = "sk-2"
    /// group = "org-1"                          # text
    /// tier = 1                                 # 0 to 255
    /// weight = 3                               # from 1: three times the requests of a key of weight 1
    /// max_in_flight = 8                        # from 1: requests that wait for their answers
    /// endpoint = "https://eu.api.example.com"  # text
    /// ```
    ///
    /// `endpoint` has [no effect yet](KeySpec::unsupported), so a key with it is rejected.
    ///
    /// **JSON**, if the name ends in `.json` or the text begins with `[` or `{`: `["secret"]`, `{"id": "secret"}`, or
    /// objects with the same fields, `[{"id": "…", "secret": "…"}]`. An object with both `id` and `secret` is one key.
    ///
    /// **Lines** otherwise: one `id|secret` or bare secret a line. Empty lines and those that begin with `#` are skipped.
    /// Spaces around an id are dropped. A secret with spaces around it is rejected.
    ///
    /// In all formats, a key with an unknown field or a value of the wrong type is rejected. A file of more than
    /// 32 MiB or 1,000,000 keys is an error.
    pub fn keys_from_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.given.push(Given::File(path.into()));
        self
    }

    /// Adds the keys of a source that may change, and reads them now.
    ///
    /// A [`RecoveryHandle`](crate::RecoveryHandle) follows the source: see [`source`](crate::source). In
    /// [`strict`](Self::strict) builders, an entry that can't be used is an error now, and is left out in later reads.
    ///
    /// ```
    /// use tower_key_rotation::{KeyPool, RecoveryHandle, source::KeyFile};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let directory = tempfile::tempdir()?;
    /// # let path = directory.path().join("keys.txt");
    /// # std::fs::write(&path, "alpha|sk-1")?;
    /// let pool = KeyPool::builder().source(KeyFile::new(path)).await?.build()?;
    /// let recovery = RecoveryHandle::spawn(&pool);
    /// assert_eq!(pool.sources()[0].keys, 1);
    /// # recovery.shutdown().await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// If the source can't be read within 30 seconds, or has no key.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub async fn source(mut self, source: impl KeySource) -> Result<Self, BuildError> {
        let source = Arc::new(Source::new(source));
        let read = source.read(&*self.config.clock).await;
        let read =
            read.map_err(|error| Problem::Source { name: source.name().into_owned(), source: error })?;
        self.given.push(Given::Source(source, read));
        Ok(self)
    }

    /// Sets the place of the key in a request. The default is `Authorization: Bearer`.
    pub fn inject(mut self, inject: Inject) -> Self {
        self.config.inject = inject;
        self
    }

    /// Restricts keys to requests to these hosts. By default every host gets a key.
    ///
    /// A request to another host passes through without a key, and the pool ignores its response. Such requests are
    /// counted in [`PoolStats::unkeyed`](crate::PoolStats::unkeyed), and each host is logged once.
    ///
    /// | a host | matches |
    /// |---|---|
    /// | `api.example.com` | this host, on any port |
    /// | `api.example.com:8443` | this host, on this port |
    /// | `*.example.com` | every host below `example.com`, but not `example.com` itself |
    ///
    /// [`build`](Self::build) reports anything else as an error. If a request's URI has no host, its `Host` header
    /// decides; such a request gets a key only for a host named here or in
    /// [`allow_cleartext_to`](Self::allow_cleartext_to), or for loopback, since it may travel in cleartext. A request
    /// without any host gets no key. Redirects that the client follows by itself bypass this check: see the README.
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

    /// Allows keys in cleartext requests to these hosts.
    ///
    /// Otherwise a request by `http` to any host but loopback fails with
    /// an [`InjectError`](crate::InjectError).
    pub fn allow_cleartext_to<I, H>(mut self, hosts: I) -> Self
    where
        I: IntoIterator<Item = H>,
        H: AsRef<str>,
    {
        self.config.hosts.cleartext = self.hosts(hosts);
        self
    }

    fn hosts(&mut self, hosts: impl IntoIterator<Item: AsRef<str>>) -> Vec<Host> {
        Host::all(hosts).unwrap_or_else(|invalid| {
            self.invalid_host = Some(invalid);
            Vec::new()
        })
    }

    /// Sets the cooldown after a 429: the default is 2 minutes. A longer wait that the service asks for takes
    /// precedence.
    pub fn cooldown(mut self, cooldown: Duration) -> Self {
        self.config.cooldowns.rate_limited = cooldown;
        self
    }

    /// Sets how long a key rests once its quota is exhausted, if the service does not say when the quota is reset: the
    /// default is 24 hours.
    pub fn exhausted_for(mut self, rest: Duration) -> Self {
        self.config.cooldowns.exhausted = rest;
        self
    }

    /// Follows the service's hint also if it is shorter than [`cooldown`](Self::cooldown).
    pub fn exact_hints(mut self) -> Self {
        self.config.cooldowns.exact_hints = true;
        self
    }

    /// Clamps the service's hints to a range: the default is 1 second to 1 hour.
    ///
    /// If `least` is greater than `most`, `most` applies. For an exhausted quota, the upper limit is at least
    /// [`exhausted_for`](Self::exhausted_for).
    pub fn hint_limits(mut self, least: Duration, most: Duration) -> Self {
        self.config.cooldowns.shortest_hint = least;
        self.config.cooldowns.longest_hint = most;
        self
    }

    /// Learns from responses what the service still allows, and sends no more than that.
    ///
    /// Recommended for every service that says in its responses what is left. The pool keeps a budget for each key, or
    /// quota group, and each [scope](crate::Traits::scope), and a request takes a key that has room. Where no key has, it
    /// fails with the time until one does, or waits in order: see
    /// [`wait_up_to`](crate::KeyRotationLayer::wait_up_to).
    ///
    /// - A 429 no longer rests its key for 2 minutes. The key rests in that scope, for as long as the service says, or for
    ///   a short time that grows with each 429.
    /// - Headers are believed until they contradict the answers, and then ignored for the life of the pool. Where a service says nothing, 429s show the limit.
    /// - Keys whose responses name the same organisation, in `anthropic-organization-id` or `openai-organization`, share one
    ///   limit from then on. A configured [group](KeySpec::group) takes precedence, and a key whose organisation changes more
    ///   than three times is in no such group.
    /// - What is learned stays in this process. Processes that open pools over one [store](crate::store) with messages, such as
    ///   `MongoStore`, share the limits: each limit has one owner, which lends the others what they need. This takes a
    ///   [`RecoveryHandle`](crate::RecoveryHandle) in each process, and one read and one write per second. Other processes
    ///   share the budget by what each sees of it.
    ///
    /// ```
    /// use std::time::Duration;
    /// use tower_key_rotation::{Failover, KeyPool, KeyRotationLayer};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let pool = KeyPool::builder().keys([("alpha", "sk-1"), ("beta", "sk-2")]).paced().build()?;
    /// let layer = KeyRotationLayer::new(&pool)
    ///     .failover(Failover::attempts(3))
    ///     .wait_up_to(Duration::from_secs(60));
    /// # let _ = layer;
    /// # Ok(())
    /// # }
    /// ```
    pub fn paced(mut self) -> Self {
        self.config.learns = true;
        self
    }

    /// Limits each key, or quota group, to a [`Quota`] in each [scope](crate::Traits::scope). May be called several times:
    /// all quotas hold.
    pub fn quota(mut self, quota: Quota) -> Self {
        self.config.quotas.push(quota);
        self
    }

    /// Uses the keys of a tier one after the other: the first one that has room serves all requests, instead of each key in
    /// its turn.
    ///
    /// For services whose windows begin with their first request: so the windows of the keys do not all begin, and end, at
    /// the same time. The keys stand in the order in which they were added; a key that has room again serves before those
    /// behind it. [Weights](KeySpec::weight) then decide nothing but the share of sessions: a request with a
    /// [session](crate::Traits::session) still prefers the session's keys.
    ///
    /// ```
    /// use tower_key_rotation::{KeyPool, Quota, Traits};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let pool = KeyPool::builder()
    ///     .keys([("alpha", "sk-1"), ("beta", "sk-2")])
    ///     .quota(Quota::per_hour(2).window())
    ///     .fill_first()
    ///     .build()?;
    /// let ids = [(); 3].map(|()| pool.lease(&Traits::new()).map(|key| key.id().to_string()));
    /// assert_eq!(ids.map(Result::unwrap), ["alpha", "alpha", "beta"]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn fill_first(mut self) -> Self {
        self.config.fills_first = true;
        self
    }

    /// Sets the clock, for tests: see [`clock`](crate::clock).
    pub fn clock(mut self, clock: impl Clock) -> Self {
        self.config.clock = Arc::new(clock);
        self
    }

    /// Makes keys that can't be used an error, which lists all of them.
    pub fn strict(mut self) -> Self {
        self.strict = true;
        self
    }

    /// Builds a pool in this process's memory. It may be empty, and be filled later.
    ///
    /// # Errors
    ///
    /// A file or variable can't be read, or a [quota](Self::quota) resets at what is no time of day; with [`strict`](Self::strict), also a key that can't be used.
    pub fn build(mut self) -> Result<KeyPool, BuildError> {
        let (keys, rejected) = self.read()?;
        Ok(KeyPool::new(Engine::new(keys, self.config, false), None, rejected))
    }

    /// Opens a pool over a store, with the store's keys and those of the builder.
    ///
    /// If the store already has a key's id or secret, the store's key takes precedence: its id, secret and state.
    ///
    /// # Errors
    ///
    /// Those of [`build`](Self::build), and [a failure of the store](BuildError::store_error).
    pub async fn open(mut self, store: impl KeyStore) -> Result<KeyPool, BuildError> {
        let (keys, rejected) = self.read()?;
        let seeds = seeds(&keys);
        let pool = over(store, Vec::new(), seeds, self.config, rejected);
        pool.reload().await.map_err(Problem::Store)?;
        Ok(pool)
    }

    /// Opens a pool over a store that need not be reachable yet.
    ///
    /// Until the store can be reached, the keys of the builder serve, all of them healthy. Then the pool becomes the
    /// one that [`open`](Self::open) would have opened, and writes the marks made in the meantime to the store, except
    /// those of a key that was ever reset there: a mark does not outlive a reset. A [`RecoveryHandle`](crate::RecoveryHandle) connects: at once, and again at random intervals that grow from about
    /// a second to its usual interval.
    ///
    /// # Errors
    ///
    /// Those of [`build`](Self::build).
    pub fn open_when_ready(mut self, store: impl KeyStore) -> Result<KeyPool, BuildError> {
        let (keys, rejected) = self.read()?;
        let seeds = seeds(&keys);
        Ok(over(store, keys, seeds, self.config, rejected))
    }

    fn read(&mut self) -> Result<(Vec<UsableKey>, Vec<Rejected>), BuildError> {
        let quotas = self.config.quotas.iter().map(Quota::of_a_pool).collect::<Result<_, _>>();
        self.config.quotas = quotas.map_err(Problem::Quota)?;
        if let Some(name) = self.config.inject.invalid_header() {
            return Err(Problem::HeaderName(name.to_owned()).into());
        }
        if let Some(invalid) = &self.invalid_host {
            return Err(Problem::Host(invalid.clone()).into());
        }
        let mut accepted = Accepted::default();
        for (number, given) in (1..).zip(&self.given) {
            let before = accepted.keys.len();
            for parsed in given.read(number, accepted.candidates)? {
                accepted.add(parsed, &self.config.inject);
            }
            if let Given::Source(source, read) = given {
                source.begin(read, &accepted.keys[before..]);
                self.config.sources.push(source.clone());
            }
        }
        let Accepted { keys, rejected, .. } = accepted;
        if self.strict && !rejected.is_empty() {
            return Err(Problem::Rejected(rejected).into());
        }
        for rejected in &rejected {
            tracing::warn!("key rejected: {rejected}");
        }
        Ok((keys, rejected))
    }
}

impl Given {
    /// `before`: the number of keys before these.
    fn read(&self, number: usize, before: usize) -> Result<Vec<ParsedKey>, Problem> {
        let unnamed = Unnamed::Numbered { before };
        match self {
            Self::Code(spec) => {
                let place = Place::Code(number);
                let key = spec.clone().map_err(|error| Rejected::new(place.clone(), None, error));
                Ok(vec![ParsedKey { place, key }])
            }
            Self::Env(variable) => {
                let value = env::var_os(variable).ok_or_else(|| Problem::NoVariable(variable.clone()))?;
                let value = value.to_str().ok_or_else(|| Problem::VariableNotText(variable.clone()))?;
                Ok(source::variable(variable, value, unnamed)?)
            }
            Self::File(path) => {
                let parsed = source::file(path, unnamed);
                Ok(parsed.map_err(|source| Problem::File { path: path.clone(), source })??)
            }
            Self::Source(source, read) => Ok(source.parsed(read)),
        }
    }
}

fn seeds(keys: &[UsableKey]) -> Vec<KeySpec> {
    keys.iter().map(UsableKey::spec).collect()
}

fn over(
    store: impl KeyStore,
    keys: Vec<UsableKey>,
    seeds: Vec<KeySpec>,
    config: Config,
    rejected: Vec<Rejected>,
) -> KeyPool {
    let engine = Engine::new(keys, config, true);
    let link = Link::new(engine.clone(), Arc::new(store), seeds);
    KeyPool::new(engine, Some(Arc::new(link)), rejected)
}

/// Why a pool could not be built or opened.
///
/// `Display` names the file, line, variable or setting, and the reason. No secret is shown.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct BuildError(#[from] Problem);

impl BuildError {
    /// Returns the keys that can't be used, if the builder is [`strict`](KeyPoolBuilder::strict).
    #[must_use]
    pub fn rejected(&self) -> &[Rejected] {
        match &self.0 {
            Problem::Rejected(rejected) => rejected,
            _ => &[],
        }
    }

    /// Returns the store's error, if [`open`](KeyPoolBuilder::open) failed because the store did.
    #[must_use]
    pub fn store_error(&self) -> Option<&StoreError> {
        match &self.0 {
            Problem::Store(error) => Some(error),
            _ => None,
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum Problem {
    #[error("the environment variable {0} is not set")]
    NoVariable(String),
    #[error("the environment variable {0} is not UTF-8 text")]
    VariableNotText(String),
    #[error("{} could not be read", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("{name} could not be read as a source of keys")]
    Source { name: String, source: SourceError },
    #[error(transparent)]
    Text(#[from] Rejected),
    #[error("{0:?} is not a header name")]
    HeaderName(String),
    #[error(transparent)]
    Host(InvalidHost),
    #[error(transparent)]
    Quota(InvalidReset),
    #[error("{} could not be used as keys:{}", .0.len(), listed(.0))]
    Rejected(Vec<Rejected>),
    #[error(transparent)]
    Store(StoreError),
}

fn listed(rejected: &[Rejected]) -> String {
    rejected.iter().map(|rejected| format!("\n  {rejected}")).collect()
}
