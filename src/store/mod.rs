//! Where keys and their state outlive a process.
//!
//! A pool keeps what it needs for requests in memory and never waits for its store on their way. The store is
//! told afterwards, and asked every 30 seconds, by a [`RecoveryHandle`](crate::RecoveryHandle).
//! [`MemoryStore`] is what a pool has unless it is opened over another one.

mod memory;

use std::{error::Error, fmt, future::Future, pin::Pin, time::Duration};

pub use self::memory::MemoryStore;
use crate::{
    pool::Rest,
    secret::{KeyId, Secret},
};

/// What the methods of a [`KeyStore`] return.
pub type StoreFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'a>>;

/// Keys and their state, kept for several pools and processes.
///
/// Times are given as what is left or has passed, so that a store can reckon by a clock of its own and no
/// process's clock decides for another.
///
/// A method that may take long has to end by itself: nothing here is cut off half-way.
///
/// A store around another one, which counts what is written:
///
/// ```
/// use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
/// use tower_key_rotation::{KeyId, Secret, store::{KeyRecord, KeyStore, Mark, MemoryStore, Recovered, StoreFuture}};
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
///     fn load(&self) -> StoreFuture<'_, Vec<KeyRecord>> {
///         self.inner.load()
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
    fn load(&self) -> StoreFuture<'_, Vec<KeyRecord>>;

    /// Records what a response said of a key. It applies only to a key of that id and that secret, never
    /// replaces a later deadline by an earlier one, and does nothing where the key was reset after the mark
    /// was observed.
    fn write(&self, mark: Mark) -> StoreFuture<'_, ()>;

    /// Resets every rest that has ended, and says how many.
    fn recover(&self) -> StoreFuture<'_, Recovered>;

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
