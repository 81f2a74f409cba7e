//! The pool as programs and layers see it: a façade over the engine and over what replicates it.

use std::{fmt, sync::Arc, time::Duration};

use super::{
    engine::Engine,
    no_key::NoKeyAvailable,
    source::SourceStats,
    stats::{PoolStats, ScopeTotals},
};
use crate::{
    clock::Clock,
    key::{KeyId, Rejected, hosts::Hosts},
    meter::Meter,
    replication::Link,
    store::StoreError,
};

/// The keys of one service, and what is known about each of them.
///
/// Cheap to clone; every clone is the same pool. Layers pick from it, and nothing else has to be done: a key
/// that rests is skipped, and is picked again as soon as its cooldown ends.
///
/// ```
/// use tower_key_rotation::KeyPool;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let pool = KeyPool::builder()
///     .key("alpha", "sk-1")
///     .key("beta", "sk-2")
///     .build()?;
///
/// assert_eq!(pool.stats().healthy, 2);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct KeyPool {
    inner: Arc<Inner>,
}

struct Inner {
    engine: Arc<Engine>,
    /// `None` if the pool's memory is all there is.
    link: Option<Arc<Link>>,
    rejected: Vec<Rejected>,
}

impl KeyPool {
    pub(super) fn new(engine: Arc<Engine>, link: Option<Arc<Link>>, rejected: Vec<Rejected>) -> Self {
        Self { inner: Arc::new(Inner { engine, link, rejected }) }
    }

    /// The entries given to the builder that could not be used: each names its place, never its secret.
    #[must_use]
    pub fn rejected(&self) -> &[Rejected] {
        &self.inner.rejected
    }

    /// The clock that all of the pool's times are read from.
    #[must_use]
    pub fn clock(&self) -> &Arc<dyn Clock> {
        &self.engine().config.clock
    }

    /// The time until a key can be picked: zero if one can be picked now, `None` if no key comes back by itself.
    ///
    /// ```
    /// use std::time::Duration;
    /// use tower_key_rotation::KeyPool;
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let pool = KeyPool::builder().key("alpha", "sk-1").build()?;
    /// assert_eq!(pool.next_return(), Some(Duration::ZERO));
    /// assert_eq!(KeyPool::builder().build()?.next_return(), None);
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn next_return(&self) -> Option<Duration> {
        self.engine().next_return()
    }

    /// The totals, and each key. Takes a time that grows with the number of keys; requests don't notice.
    ///
    /// ```
    /// use tower_key_rotation::{KeyPool, Status};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let pool = KeyPool::builder().key("alpha", "sk-1").build()?;
    /// let stats = pool.stats();
    /// assert_eq!((stats.healthy, stats.rate_limited), (1, 0));
    /// assert_eq!(stats.keys[0].id.as_str(), "alpha");
    /// assert_eq!(stats.keys[0].status, Status::Healthy);
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn stats(&self) -> PoolStats {
        self.engine().stats(self.unreadable())
    }

    /// The scopes that requests use, each with what its limits still allow together. [`explain`](Self::explain) says the
    /// same for each key of one scope.
    ///
    /// There are 1,024 scopes at most, and one without a name. Takes a time that grows with the number of limits in use;
    /// requests don't notice.
    ///
    /// ```
    /// use tower_key_rotation::{KeyPool, Quota, Traits};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let pool = KeyPool::builder().key("alpha", "sk-1").quota(Quota::per_minute(60).burst(10)).build()?;
    /// let lease = pool.lease(&Traits::new().scope("gpt-5-mini"))?;
    ///
    /// let scopes = pool.scopes();
    /// assert_eq!(scopes[0].scope.as_ref().unwrap().as_str(), "gpt-5-mini");
    /// assert_eq!((scopes[0].in_flight, scopes[0].limited_despite_pacing), (1, 0));
    /// assert!(scopes[0].requests_left < Some(9.5)); // of 10, which refill at 1 a second
    /// # drop(lease);
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn scopes(&self) -> Vec<ScopeTotals> {
        self.engine().scopes()
    }

    /// The [sources](crate::source) of the pool's keys, and how fresh each is. No secret is in it.
    ///
    /// ```
    /// use tower_key_rotation::{KeyPool, source::KeyVariable};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let error = KeyPool::builder().source(KeyVariable::new("OPENAI_KEYS")).await.unwrap_err();
    /// assert_eq!(error.to_string(), "OPENAI_KEYS could not be read as a source of keys");
    ///
    /// let pool = KeyPool::builder().key("alpha", "sk-1").build()?;
    /// assert!(pool.sources().is_empty()); // keys in code have no source
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn sources(&self) -> Vec<SourceStats> {
        let now = self.clock().now();
        self.engine().config.sources.iter().map(|source| source.stats(now)).collect()
    }

    /// Credits tokens, or whatever else the service counts, to a key. An unknown id is ignored: the key may
    /// have been removed while its request was in flight.
    ///
    /// [`ServedBy`](crate::ServedBy) says which key served a request.
    ///
    /// ```
    /// use tower_key_rotation::{KeyId, KeyPool};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let pool = KeyPool::builder().key("alpha", "sk-1").build()?;
    /// pool.record_usage(&KeyId::new("alpha")?, 1_200);
    /// assert_eq!(pool.stats().keys[0].tokens, 1_200);
    /// # Ok(())
    /// # }
    /// ```
    pub fn record_usage(&self, id: &KeyId, tokens: u64) {
        if let Some(key) = self.engine().snapshot().get(id.as_str()) {
            key.counts.tokens.add(tokens);
        }
    }

    /// A form of a key's secret that may be shown to people who have to tell keys apart: an ellipsis and the last
    /// 4 characters, or fewer, so that it is never more than a quarter of the secret. `None` if there is no such key.
    ///
    /// ```
    /// use tower_key_rotation::KeyPool;
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let pool = KeyPool::builder()
    ///     .key("alpha", "sk-proj-2f81c9d07b3e64a5")
    ///     .key("beta", "sk-2")
    ///     .build()?;
    /// assert_eq!(pool.masked_secret("alpha").as_deref(), Some("…64a5"));
    /// assert_eq!(pool.masked_secret("beta").as_deref(), Some("…2"));
    /// assert_eq!(pool.masked_secret("gamma"), None);
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn masked_secret(&self, id: impl AsRef<str>) -> Option<String> {
        self.engine().snapshot().get(id.as_ref()).map(|key| key.masked_secret())
    }

    /// Loads the store's keys and their state into the pool: all of them or, on an error, nothing.
    ///
    /// A [`RecoveryHandle`](crate::RecoveryHandle) does this every 30 seconds. A pool that was built without a store
    /// has nothing to load.
    ///
    /// ```
    /// use tower_key_rotation::{KeyPool, store::MemoryStore};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let store = MemoryStore::new();
    /// let here = KeyPool::builder().open(store.clone()).await?;
    /// let there = KeyPool::builder().open(store).await?;
    ///
    /// there.insert("alpha", "sk-1").await?;
    /// here.reload().await?;
    /// assert_eq!(here.stats().healthy, 1);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// If the store can't be read. The pool continues with what it has.
    pub async fn reload(&self) -> Result<(), StoreError> {
        match self.link() {
            Some(link) => link.load(None).await,
            None => Ok(()),
        }
    }

    #[inline(always)]
    pub(crate) fn engine(&self) -> &Arc<Engine> {
        &self.inner.engine
    }

    pub(crate) fn link(&self) -> Option<&Arc<Link>> {
        self.inner.link.as_ref()
    }

    pub(super) fn unreadable(&self) -> usize {
        self.link().map_or(0, |link| link.unreadable())
    }

    #[inline(always)]
    pub(crate) fn hosts(&self) -> &Hosts {
        &self.engine().config.hosts
    }

    pub(crate) fn meter(&self) -> &Meter {
        &self.engine().config.meter
    }

    #[cold]
    pub(crate) fn no_key(&self) -> NoKeyAvailable {
        let keys = self.engine().snapshot().keys().len();
        NoKeyAvailable::resting(keys, self.next_return())
    }
}

impl fmt::Debug for KeyPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let keys = self.engine().snapshot().keys().len();
        f.debug_struct("KeyPool").field("keys", &keys).finish_non_exhaustive()
    }
}
