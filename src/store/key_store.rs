//! What a pool asks of a store.

use std::{
    collections::{HashMap, HashSet},
    error::Error,
    fmt,
    future::Future,
    pin::Pin,
    time::Duration,
};

use tokio::sync::mpsc;

use crate::{
    key::{KeyId, KeySpec},
    limit::{Scope, Words},
};

/// What the methods of a [`KeyStore`] return.
pub type StoreFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'a>>;

/// Keys and their state, kept for several pools and processes.
///
/// A pool and its store agree by [`Words::join`], whatever the order in which they hear of each other. A store's
/// part is small: it joins what [`merge`](Self::merge) brings, and it alone makes generations, one with each reset.
/// One that keeps its words in a map is a page long; see [`MemoryStore`](super::MemoryStore).
///
/// The times in [`Words`] count from now: what a pool sends from the call, what a store answers from the moment in
/// which its future completes. A store reckons by a clock of its own and takes off what the answer took, so that
/// neither another process's clock nor a delay lengthens a rest.
///
/// A method that may take long has to end by itself, and to outlive the future that it returns: a caller may
/// drop that.
///
/// A store around another one, which counts marks. It has to pass on the methods that have a default, too:
///
/// ```
/// use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
/// use tokio::sync::mpsc;
/// use tower_key_rotation::{
///     KeyId, KeySpec,
///     store::{
///         Change, Heard, KeyStore, Loaded, Mark, MemoryStore, Operation, Planted, Recovered, Replaced, Standing, StoreFuture,
///         Usage, Writes,
///     },
/// };
///
/// #[derive(Debug, Default)]
/// struct Counting {
///     inner: MemoryStore,
///     marks: AtomicUsize,
/// }
///
/// impl KeyStore for Counting {
///     fn load<'a>(&'a self, only: Option<&'a [KeyId]>) -> StoreFuture<'a, Loaded> {
///         self.inner.load(only)
///     }
///     fn merge(&self, mark: Mark) -> StoreFuture<'_, Option<Standing>> {
///         self.marks.fetch_add(1, Relaxed);
///         self.inner.merge(mark)
///     }
///     fn operate(&self, id: KeyId, operation: Operation) -> StoreFuture<'_, Option<Standing>> {
///         self.inner.operate(id, operation)
///     }
///     fn sweep(&self) -> StoreFuture<'_, Recovered> {
///         self.inner.sweep()
///     }
///     fn plant<'a>(&'a self, seeds: &'a [KeySpec]) -> StoreFuture<'a, Vec<Planted>> {
///         self.inner.plant(seeds)
///     }
///     fn note_sourced<'a>(&'a self, keys: &'a [KeySpec]) -> StoreFuture<'a, ()> {
///         self.inner.note_sourced(keys)
///     }
///     fn writes(&self) -> Writes {
///         self.inner.writes()
///     }
///     fn changes(&self) -> Option<mpsc::Receiver<Change>> {
///         self.inner.changes()
///     }
///     fn add_usage(&self, usage: Vec<Usage>) -> StoreFuture<'_, ()> {
///         self.inner.add_usage(usage)
///     }
///     fn quotas(&self) -> StoreFuture<'_, Option<Vec<u8>>> {
///         self.inner.quotas()
///     }
///     fn keep_quotas(&self, quotas: Vec<u8>) -> StoreFuture<'_, bool> {
///         self.inner.keep_quotas(quotas)
///     }
///     fn replace_failed(&self) -> StoreFuture<'_, Vec<Replaced>> {
///         self.inner.replace_failed()
///     }
///     fn messages(&self) -> StoreFuture<'_, Option<Vec<Heard>>> {
///         self.inner.messages()
///     }
///     fn publish(&self, process: u64, body: Vec<u8>) -> StoreFuture<'_, ()> {
///         self.inner.publish(process, body)
///     }
/// }
/// ```
pub trait KeyStore: fmt::Debug + Send + Sync + 'static {
    /// Loads every key that can be read, or these alone. All of them or an error: a key that is missing is removed
    /// from the pool.
    fn load<'a>(&'a self, only: Option<&'a [KeyId]>) -> StoreFuture<'a, Loaded>;

    /// Joins what responses said of a key, and answers how the key stands then. `None`, and no change, if there
    /// is no key of that id that was born then.
    ///
    /// Words of an older generation change nothing, and are answered all the same.
    fn merge(&self, mark: Mark) -> StoreFuture<'_, Option<Standing>>;

    /// Does what an operator asks for, and answers how the key stands then: after a removal, how it stood last.
    /// `None`, and no change, if the key does not exist; if it does, for an insertion.
    fn operate(&self, id: KeyId, operation: Operation) -> StoreFuture<'_, Option<Standing>>;

    /// Resets every rest that has ended, and answers how many keys had one. This is for those who look at the
    /// store: pools know when a rest ends.
    fn sweep(&self) -> StoreFuture<'_, Recovered>;

    /// Gives the store the keys that a pool was built with, and answers which of them it has under another id: the pool
    /// then uses that id. A pool calls this before its first load, unless it was built without keys.
    ///
    /// By default a key is inserted if the store has neither its id nor its secret; all other keys of the store stay as
    /// they are.
    fn plant<'a>(&'a self, seeds: &'a [KeySpec]) -> StoreFuture<'a, Vec<Planted>> {
        Box::pin(async move {
            let records = self.load(None).await?.records;
            let ids: HashSet<_> = records.iter().map(|key| &key.spec.id).collect();
            let by_secret: HashMap<_, _> =
                records.iter().map(|key| (&key.spec.secret, &key.spec.id)).collect();
            let mut planted = Vec::new();
            for seed in seeds {
                match by_secret.get(&seed.secret) {
                    _ if ids.contains(&seed.id) => {}
                    Some(same) => planted.push(Planted::new(seed.id.clone(), (*same).clone())),
                    None => _ = self.operate(seed.id.clone(), Operation::Insert(seed.clone())).await?,
                }
            }
            Ok(planted)
        })
    }

    /// Notes that these keys of the store came from a pool's [source](crate::source), not from an operator. A pool calls
    /// this when it has taken over keys of a source that has changed.
    ///
    /// A store for which that makes no difference has nothing to do.
    fn note_sourced<'a>(&'a self, keys: &'a [KeySpec]) -> StoreFuture<'a, ()> {
        let _ = keys;
        Box::pin(std::future::ready(Ok(())))
    }

    /// How a pool writes marks and new keys to this store.
    fn writes(&self) -> Writes {
        Writes::default()
    }

    /// Tells of changes for as long as the receiver lives, so that pools need not wait for the next pass. `None`
    /// if the store does not know of any. It is called within a tokio runtime.
    fn changes(&self) -> Option<mpsc::Receiver<Change>> {
        None
    }

    /// Adds up how much keys were used. Usage of a key that is gone is dropped. What may have been added although
    /// the store fails is not added again: usage is a statistic that may lose something and counts nothing twice.
    ///
    /// `usage` may be empty: then there is only what the store has kept since an earlier call.
    ///
    /// A store that keeps no account of usage has nothing to do.
    fn add_usage(&self, usage: Vec<Usage>) -> StoreFuture<'_, ()> {
        drop(usage);
        Box::pin(std::future::ready(Ok(())))
    }

    /// Reads what the last call to [`keep_quotas`](Self::keep_quotas) kept, here or in an earlier process. `None` if
    /// nothing is kept.
    fn quotas(&self) -> StoreFuture<'_, Option<Vec<u8>>> {
        Box::pin(std::future::ready(Ok(None)))
    }

    /// Keeps what is left of the windows of the pool's [quotas](crate::Quota), in place of what was kept before, and
    /// answers whether the store keeps it. A pool calls this once a second, if anything has changed.
    ///
    /// A store that several processes share keeps nothing: each process counts its own requests.
    fn keep_quotas(&self, quotas: Vec<u8>) -> StoreFuture<'_, bool> {
        drop(quotas);
        Box::pin(std::future::ready(Ok(false)))
    }

    /// Puts standby keys in the place of keys that were marked as exhausted or revoked, and answers which. It
    /// finishes what was begun before, here or in another process.
    ///
    /// A store without standby keys has nothing to do.
    fn replace_failed(&self) -> StoreFuture<'_, Vec<Replaced>> {
        Box::pin(std::future::ready(Ok(Vec::new())))
    }

    /// Reads the newest message of each process, this one's included. `None` if the store keeps no messages: then pools
    /// that learn limits see other processes only in what the service says is left.
    ///
    /// Messages older than 10 seconds may be missing. A pool reads them once a second, and only while it learns limits.
    fn messages(&self) -> StoreFuture<'_, Option<Vec<Heard>>> {
        Box::pin(std::future::ready(Ok(None)))
    }

    /// Replaces a process's message by this one.
    ///
    /// A store that keeps no messages has nothing to do.
    fn publish(&self, process: u64, body: Vec<u8>) -> StoreFuture<'_, ()> {
        drop((process, body));
        Box::pin(std::future::ready(Ok(())))
    }
}

/// The newest message of a process to the others that share its keys.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Heard {
    /// A random number that the process has chosen.
    pub process: u64,
    /// How long ago the message was published.
    pub age: Duration,
    /// The message: how much the process needs, and what it lends. It holds no secret and no id.
    pub body: Vec<u8>,
}

impl Heard {
    /// That message.
    #[must_use]
    pub fn new(process: u64, age: Duration, body: Vec<u8>) -> Self {
        Self { process, age, body }
    }
}

/// Which key object an id stands for: a key that is removed and inserted again, or whose secret changes, is
/// another one, and has another birth.
///
/// A random number that the store makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Born(pub u64);

impl Born {
    /// A birth that no other key has.
    #[must_use]
    pub fn now() -> Self {
        Self(fastrand::u64(..))
    }
}

/// How a key stands in its store.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Standing {
    /// Which key object it is.
    pub born: Born,
    /// What it rests for.
    pub words: Words,
    /// Whether an operator took it out of service.
    pub disabled: bool,
}

impl Standing {
    /// That of a healthy key which was born now.
    #[must_use]
    pub fn healthy() -> Self {
        Self::new(Born::now(), Words::default(), false)
    }

    /// That of a key with this birth, these words, and perhaps disabled.
    #[must_use]
    pub fn new(born: Born, words: Words, disabled: bool) -> Self {
        Self { born, words, disabled }
    }
}

/// One key as a store knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KeyRecord {
    /// The key.
    pub spec: KeySpec,
    /// How it stands.
    pub standing: Standing,
}

impl KeyRecord {
    /// That key, and how it stands.
    #[must_use]
    pub fn new(spec: KeySpec, standing: Standing) -> Self {
        Self { spec, standing }
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

/// Something in a store that cannot be used as a key.
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
pub enum Change {
    /// How that key stands. Nothing has to be loaded, unless the key was born at another time than the pool knows.
    Standing(KeyId, Standing),
    /// These keys, in a way that has to be loaded: some may be new, and some gone.
    Keys(Vec<KeyId>),
    /// Anything.
    Anything,
}

/// What an operator asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Operation {
    /// Adds a healthy key.
    Insert(KeySpec),
    /// Removes the key.
    Remove,
    /// Ends all rests of the key, or that of one scope, in a new generation.
    Reset(Option<Scope>),
    /// Takes the key out of service.
    Disable,
    /// Puts a disabled key back into service.
    Enable,
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

/// A key of a pool's builder that the store has under another id.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Planted {
    /// The id in the builder.
    pub given_as: KeyId,
    /// The id in the store.
    pub id: KeyId,
}

impl Planted {
    /// `given_as`, which the store has as `id`.
    #[must_use]
    pub fn new(given_as: KeyId, id: KeyId) -> Self {
        Self { given_as, id }
    }
}

/// How a pool writes marks and new keys to a store: some at once, and then a pause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Writes {
    /// The most writes in flight, by default 8. Each of them is about another key.
    pub at_once: usize,
    /// The pause between two rounds of marks, by default 250 ms. A storm of marks on one key becomes one write in each
    /// round.
    pub pause: Duration,
}

impl Writes {
    /// So many at once, and that pause.
    #[must_use]
    pub fn new(at_once: usize, pause: Duration) -> Self {
        Self { at_once, pause }
    }
}

impl Default for Writes {
    fn default() -> Self {
        Self::new(8, Duration::from_millis(250))
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

/// What responses said of a key, for the store.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Mark {
    /// The key.
    pub id: KeyId,
    /// Which key object the requests were sent with.
    pub born: Born,
    /// What is left of the rests that the responses asked for, in the generation that the pool knew.
    pub words: Words,
    /// The HTTP status of the last of those responses.
    pub http_status: Option<u16>,
}

impl Mark {
    /// These words about that key.
    #[must_use]
    pub fn new(id: KeyId, born: Born, words: Words) -> Self {
        Self { id, born, words, http_status: None }
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
    pub(crate) const NAMED_AT_MOST: usize = 5;

    /// That many keys; the ids are named where there are no more than 5.
    #[must_use]
    pub fn new(count: u64, ids: Vec<KeyId>) -> Self {
        let ids = if ids.len() > Self::NAMED_AT_MOST { Vec::new() } else { ids };
        Self { count, ids }
    }
}

/// A store could not do what it was asked to. The pool goes on in memory.
#[derive(Debug, thiserror::Error)]
#[error("the key store failed")]
pub struct StoreError(#[source] Box<dyn Error + Send + Sync>);

impl StoreError {
    /// Wraps the cause, whose text must not hold a secret.
    pub fn new(cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self(cause.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_error_leaves_the_cause_to_source() {
        let error = StoreError::new("connection reset");
        assert_eq!(error.to_string(), "the key store failed");
        assert_eq!(error.source().unwrap().to_string(), "connection reset");
    }
}
