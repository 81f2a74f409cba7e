//! Where keys and their state outlive a process.
//!
//! A pool keeps what it needs for requests in memory and never waits for its store on their way. The store is
//! told afterwards, and asked every 30 seconds, by a [`RecoveryHandle`](crate::RecoveryHandle).
//! A pool that is built, rather than opened over a store, has none: its own memory is all there is.
//! [`MemoryStore`] is for several pools in one process, `MongoStore`, with the feature `mongodb`, for several
//! processes, and for those that shall outlive a restart.

mod memory;
#[cfg(feature = "metrics")]
pub(crate) mod metered;
#[cfg(feature = "mongodb")]
pub mod mongodb;

use std::{error::Error, fmt, future::Future, pin::Pin, time::Duration};

use tokio::sync::mpsc;

pub use self::memory::MemoryStore;
#[cfg(feature = "mongodb")]
pub use self::mongodb::MongoStore;
use crate::{
    key::{KeyId, Secret},
    limit::Rest,
};

/// What the methods of a [`KeyStore`] return.
pub type StoreFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'a>>;

/// Keys and their state, kept for several pools and processes.
///
/// Times are given as what is left or has passed, so that a store can reckon by a clock of its own and no
/// process's clock decides for another.
///
/// A method that may take long has to end by itself, and to outlive the future that it returns: a caller may
/// drop that.
///
/// A store around another one, which counts what is written. It has to pass on the methods that have a default,
/// too: by default, a store has no changes to tell, no account of usage and no standby keys.
///
/// ```
/// use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
/// use tokio::sync::mpsc;
/// use tower_key_rotation::{
///     KeyId, Secret,
///     store::{Changed, KeyStore, Loaded, Mark, MemoryStore, Recovered, Replaced, StoreFuture, UsageBatch},
/// };
///
/// #[derive(Debug, Default)]
/// struct Counting {
///     inner: MemoryStore,
///     writes: AtomicUsize,
/// }
///
/// impl KeyStore for Counting {
///     fn write(&self, mark: Mark) -> StoreFuture<'_, ()> {
///         self.writes.fetch_add(1, Relaxed);
///         self.inner.write(mark)
///     }
///     fn load(&self) -> StoreFuture<'_, Loaded> {
///         self.inner.load()
///     }
///     fn load_some<'a>(&'a self, ids: &'a [KeyId]) -> StoreFuture<'a, Loaded> {
///         self.inner.load_some(ids)
///     }
///     fn watch(&self) -> Option<mpsc::Receiver<Changed>> {
///         self.inner.watch()
///     }
///     fn add_usage<'a>(&'a self, usage: &'a UsageBatch) -> StoreFuture<'a, ()> {
///         self.inner.add_usage(usage)
///     }
///     fn replace_failed(&self) -> StoreFuture<'_, Vec<Replaced>> {
///         self.inner.replace_failed()
///     }
///     fn recover(&self) -> StoreFuture<'_, Recovered> {
///         self.inner.recover()
///     }
///     fn insert(&self, id: KeyId, secret: Secret) -> StoreFuture<'_, bool> {
///         self.inner.insert(id, secret)
///     }
///     fn remove<'a>(&'a self, id: &'a KeyId) -> StoreFuture<'a, bool> {
///         self.inner.remove(id)
///     }
///     fn reset<'a>(&'a self, id: &'a KeyId) -> StoreFuture<'a, bool> {
///         self.inner.reset(id)
///     }
///     fn set_disabled<'a>(&'a self, id: &'a KeyId, disabled: bool) -> StoreFuture<'a, bool> {
///         self.inner.set_disabled(id, disabled)
///     }
/// }
/// ```
pub trait KeyStore: fmt::Debug + Send + Sync + 'static {
    /// Every key that can be read, with what is left of its rest. All of them or an error: a key that is
    /// missing is removed from the pool.
    fn load(&self) -> StoreFuture<'_, Loaded>;

    /// The same of these keys alone: one that is missing is removed from the pool. Unless a store can do
    /// better, it loads all and leaves out the others.
    fn load_some<'a>(&'a self, ids: &'a [KeyId]) -> StoreFuture<'a, Loaded> {
        Box::pin(async move {
            let mut loaded = self.load().await?;
            loaded.records.retain(|record| ids.contains(&record.id));
            loaded.unreadable.retain(|unreadable| ids.iter().any(|id| id.as_str() == unreadable.id));
            Ok(loaded)
        })
    }

    /// Says when something has changed, for as long as the receiver lives, so that it is loaded before the
    /// next pass. `None` where a store doesn't know. It is called within a tokio runtime.
    fn watch(&self) -> Option<mpsc::Receiver<Changed>> {
        None
    }

    /// Records what a response said of a key. It applies only to a key of that id and that secret, never
    /// replaces a later deadline by an earlier one, and does nothing where the key was reset after the mark
    /// was observed.
    fn write(&self, mark: Mark) -> StoreFuture<'_, ()>;

    /// Resets every rest that has ended, and says how many.
    fn recover(&self) -> StoreFuture<'_, Recovered>;

    /// Adds up how much keys were used. It may be asked to do so again with the same batch, when it had failed
    /// or seemed to: nothing may be counted twice then. What is said of a key that is gone is dropped.
    ///
    /// A store that keeps no account of it has nothing to do.
    fn add_usage<'a>(&'a self, usage: &'a UsageBatch) -> StoreFuture<'a, ()> {
        let _ = usage;
        Box::pin(std::future::ready(Ok(())))
    }

    /// Puts standby keys in the place of those that were marked as exhausted or revoked, and says which. What
    /// was begun and not finished, here or in another process, is finished.
    ///
    /// A store without standby keys has nothing to do.
    fn replace_failed(&self) -> StoreFuture<'_, Vec<Replaced>> {
        Box::pin(std::future::ready(Ok(Vec::new())))
    }

    /// Adds a healthy key; `false` where there is one of that id.
    fn insert(&self, id: KeyId, secret: Secret) -> StoreFuture<'_, bool>;

    /// Removes a key; `false` where there is none.
    fn remove<'a>(&'a self, id: &'a KeyId) -> StoreFuture<'a, bool>;

    /// Ends a key's rest, and outlives marks that were observed before; `false` where there is no such key.
    fn reset<'a>(&'a self, id: &'a KeyId) -> StoreFuture<'a, bool>;

    /// Takes a key out of service, or puts it back; `false` where there is no such key.
    fn set_disabled<'a>(&'a self, id: &'a KeyId, disabled: bool) -> StoreFuture<'a, bool>;
}

/// One key as a store knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KeyRecord {
    /// Its public name.
    pub id: KeyId,
    /// Its secret.
    pub secret: Secret,
    /// Why it rests, and how much of that is left; `None` is left where it rests until somebody resets it.
    pub rest: Option<(Rest, Option<Duration>)>,
    /// Whether an operator took it out of service.
    pub disabled: bool,
}

impl KeyRecord {
    /// A healthy key.
    #[must_use]
    pub fn new(id: KeyId, secret: Secret) -> Self {
        Self { id, secret, rest: None, disabled: false }
    }
}

/// What a load found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Loaded {
    /// The keys.
    pub records: Vec<KeyRecord>,
    /// What could not be read as a key, and stops no other one.
    pub unreadable: Vec<Unreadable>,
}

impl From<Vec<KeyRecord>> for Loaded {
    fn from(records: Vec<KeyRecord>) -> Self {
        Self { records, unreadable: Vec::new() }
    }
}

/// Something in a store that can't be used as a key.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Unreadable {
    /// What it is called there, in a form that can be logged.
    pub id: String,
    /// What is wrong with it. It must not hold a secret.
    pub reason: String,
}

impl Unreadable {
    /// That entry, for that reason.
    pub fn new(id: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { id: id.into(), reason: reason.into() }
    }
}

/// What has changed in a store.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Changed {
    /// These keys: some may be new, and some gone.
    Keys(Vec<KeyId>),
    /// Anything.
    Anything,
}

/// How much some keys were used since the batch before.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct UsageBatch {
    /// Who says so: a pool in a process, by a name that no other one has.
    pub writer: String,
    /// The writer's batches are numbered; a later one has a higher number.
    pub number: u64,
    /// How long ago it was put together.
    pub age: Duration,
    /// Each key at most once.
    pub usage: Vec<Usage>,
}

impl UsageBatch {
    /// A writer's batch of that number, put together just now.
    pub fn new(writer: impl Into<String>, number: u64, usage: Vec<Usage>) -> Self {
        Self { writer: writer.into(), number, age: Duration::ZERO, usage }
    }
}

/// How much a key was used.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Usage {
    /// The key.
    pub id: KeyId,
    /// Requests that were sent with it.
    pub requests: u64,
    /// What [`KeyPool::record_usage`](crate::KeyPool::record_usage) credited to it.
    pub tokens: u64,
}

impl Usage {
    /// So many requests and tokens.
    #[must_use]
    pub fn new(id: KeyId, requests: u64, tokens: u64) -> Self {
        Self { id, requests, tokens }
    }
}

/// A standby key that took another one's place.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Replaced {
    /// The key that is exhausted or revoked.
    pub failed: KeyId,
    /// The one that is used in its place.
    pub by: KeyId,
}

impl Replaced {
    /// `failed`, by `by`.
    #[must_use]
    pub fn new(failed: KeyId, by: KeyId) -> Self {
        Self { failed, by }
    }
}

/// What a response said of a key, for the store.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Mark {
    /// The key.
    pub id: KeyId,
    /// The secret that the request was sent with.
    pub secret: Secret,
    /// Why the key rests.
    pub rest: Rest,
    /// How much of the rest is left; `None` for until somebody resets the key.
    pub left: Option<Duration>,
    /// How long ago the response arrived.
    pub age: Duration,
    /// The response's HTTP status.
    pub http_status: Option<u16>,
}

impl Mark {
    /// Of a response that has arrived just now.
    #[must_use]
    pub fn new(id: KeyId, secret: Secret, rest: Rest, left: Option<Duration>) -> Self {
        Self { id, secret, rest, left, age: Duration::ZERO, http_status: None }
    }
}

/// What a sweep reset.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Recovered {
    /// How many keys.
    pub count: u64,
    /// Which, where there are few and the store knows.
    pub ids: Vec<KeyId>,
}

impl Recovered {
    /// The most ids that are named.
    pub const NAMED_AT_MOST: usize = 5;

    /// That many keys; the ids are named where there are no more than [`NAMED_AT_MOST`](Self::NAMED_AT_MOST).
    #[must_use]
    pub fn new(count: u64, ids: Vec<KeyId>) -> Self {
        let ids = if ids.len() > Self::NAMED_AT_MOST { Vec::new() } else { ids };
        Self { count, ids }
    }
}

/// A store could not do what it was asked to. The pool goes on in memory.
#[derive(Debug)]
pub struct StoreError(Box<dyn Error + Send + Sync>);

impl StoreError {
    /// Wraps the cause, whose text must not hold a secret.
    pub fn new(cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self(cause.into())
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the key store failed")
    }
}

impl Error for StoreError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&*self.0)
    }
}

#[cfg(test)]
mod tests {
    use std::future::ready;

    use super::*;

    /// A store of somebody's own, which has no better way to load some of its keys than to load all.
    #[derive(Debug)]
    struct Fixed(Loaded);

    impl KeyStore for Fixed {
        fn load(&self) -> StoreFuture<'_, Loaded> {
            Box::pin(ready(Ok(self.0.clone())))
        }

        fn write(&self, _: Mark) -> StoreFuture<'_, ()> {
            Box::pin(ready(Ok(())))
        }

        fn recover(&self) -> StoreFuture<'_, Recovered> {
            Box::pin(ready(Ok(Recovered::default())))
        }

        fn insert(&self, _: KeyId, _: Secret) -> StoreFuture<'_, bool> {
            Box::pin(ready(Ok(false)))
        }

        fn remove<'a>(&'a self, _: &'a KeyId) -> StoreFuture<'a, bool> {
            Box::pin(ready(Ok(false)))
        }

        fn reset<'a>(&'a self, _: &'a KeyId) -> StoreFuture<'a, bool> {
            Box::pin(ready(Ok(false)))
        }

        fn set_disabled<'a>(&'a self, _: &'a KeyId, _: bool) -> StoreFuture<'a, bool> {
            Box::pin(ready(Ok(false)))
        }
    }

    #[tokio::test]
    async fn some_keys_of_a_store_are_those_asked_for_readable_or_not() {
        let record = |name: &str| KeyRecord::new(KeyId::new(name).unwrap(), "sk".into());
        let unreadable = |name: &str| Unreadable::new(name, "no secret");
        let store = Fixed(Loaded {
            records: vec![record("alpha"), record("beta")],
            unreadable: vec![unreadable("gamma"), unreadable("delta")],
        });
        let asked = ["beta", "gamma", "epsilon"].map(|name| KeyId::new(name).unwrap());
        let some = Loaded { records: vec![record("beta")], unreadable: vec![unreadable("gamma")] };
        assert_eq!(store.load_some(&asked).await.unwrap(), some);
    }

    #[test]
    fn an_error_of_a_store_leaves_the_cause_to_its_source() {
        let error = StoreError::new("connection reset");
        assert_eq!(error.to_string(), "the key store failed");
        assert_eq!(error.source().unwrap().to_string(), "connection reset");
    }
}
