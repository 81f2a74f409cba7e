//! The store: each method of the trait as a change or a read.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use super::{
    clock::FileClock,
    error::Failure,
    owner::Owner,
    tables::{self, Tables},
};
use crate::{
    key::{KeyId, KeySpec},
    store::{
        Heard, KeyStore, Loaded, Mark, Operation, Planted, Recovered, Standing, StoreError, StoreFuture,
        Usage, Writes, encryption::AtRest, messages::Messages,
    },
};

/// Many entries are changed in parts, so that marks come in between.
const IN_A_CHANGE: usize = 1_000;

/// How marks are written: all that there are in one commit, and the next ones in the next.
const WRITES: Writes = Writes { at_once: 1_024, pause: Duration::from_millis(5) };

/// Keys and their state in a file, for one process. It needs no server.
///
/// ```
/// use tower_key_rotation::{KeyPool, RecoveryHandle, store::file::FileStore};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let directory = tempfile::tempdir()?;
/// # let path = directory.path().join("keys.redb");
/// let store = FileStore::open(&path)?;
/// let pool = KeyPool::builder().key("alpha", "sk-1").open(store).await?;
/// let recovery = RecoveryHandle::spawn(&pool);
/// pool.disable("alpha").await?;
///
/// // after a restart
/// recovery.shutdown().await?;
/// drop(pool);
/// let pool = KeyPool::builder().key("alpha", "sk-1").open(FileStore::open(&path)?).await?;
/// assert_eq!(pool.stats().disabled, 1);
/// # Ok(())
/// # }
/// ```
///
/// The file holds keys with all their settings, what they and their scopes rest for, and how much they were used. Pools
/// need a running [`RecoveryHandle`](crate::RecoveryHandle), which writes marks. Clones of a store share the file, and
/// several pools may be opened over it.
///
/// # Which keys there are
///
/// If a pool is opened with keys of its builder, **those keys are the truth for which keys there are, and the file for their
/// state**, in this order:
///
/// - A key of the builder is in the pool with the builder's id, secret and settings. It keeps the state that its secret has
///   in the file, also under another id. A key with another secret than before is a new key.
/// - A key that came from a builder at an earlier opening, or from one of its [sources](crate::source) since, and is not
///   given any more, is removed.
/// - A key that an operator added ([`KeyPool::insert`](crate::KeyPool::insert)) stays, until an operator removes it.
/// - A key that an operator removed, and that the builder still gives, is back.
///
/// A pool without keys in its builder takes all keys from the file. All pools over one file have the same keys; a further
/// pool in the same process removes no key.
///
/// # Quotas
///
/// What is left of the windows of the pool's [quotas](crate::Quota) is kept once a second: a day's quota is not whole again
/// after a restart. It is that of the pool that kept it last: a second pool over the file should have no such quotas.
///
/// # Durability
///
/// When a call to the store completes, its change is on the disk (`fsync`), and a process that is killed at any point
/// leaves a file that opens with all of these. A mark is written some milliseconds after its response; one commit takes
/// all marks that there are. No request waits for it.
///
/// If the disk is full, fails or is read-only, requests go on. Marks wait in memory, and are written as soon as possible;
/// the failure is logged once, and reported by the recovery's passes. What is written to a file that somebody deleted is lost.
///
/// # One process
///
/// While a store is open, the file is locked, and a second process or store gets an
/// [error](super::OpenError::is_in_use). Dropping the last clone waits for the commit in progress, and unlocks the file. The lock is
/// the operating system's: a file system that has no locks, as some network file systems, is not for this store.
///
/// # Time
///
/// Deadlines are read by a clock of the file's own, which runs with the process's monotonic clock while the file is open, and
/// with the wall clock while it is closed, but never backwards. A wall clock that is set back lengthens no rest beyond what
/// was left of it at the last commit; one that is set forward between two processes ends rests early.
///
/// # Secrets
///
/// On Unix only the user who made the file can read it (mode 0600). With the feature `encryption`,
/// [`encrypt_with`](super::FileStoreBuilder::encrypt_with) encrypts the secrets in it.
///
/// # Format
///
/// A file of [redb](https://docs.rs/redb), with a format number of this crate. A file of a later format is refused. To back it
/// up, copy it while no process has it open.
#[derive(Clone)]
pub struct FileStore {
    inner: Arc<Inner>,
}

struct Inner {
    path: PathBuf,
    clock: FileClock,
    at_rest: Arc<AtRest>,
    owner: Owner,
    /// Whether a pool has given its keys since the opening.
    was_planted: AtomicBool,
    /// Of the pools of this process.
    messages: Messages,
}

impl FileStore {
    pub(super) fn new(path: PathBuf, clock: FileClock, at_rest: Arc<AtRest>, owner: Owner) -> Self {
        let (was_planted, messages) = Default::default();
        Self { inner: Arc::new(Inner { path, clock, at_rest, owner, was_planted, messages }) }
    }

    /// The path that was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// How much each key was used since it was added, as far as a [`RecoveryHandle`](crate::RecoveryHandle) has written it.
    /// Keys that were never used are left out.
    ///
    /// # Errors
    ///
    /// If the file can't be read.
    pub async fn usage(&self) -> Result<Vec<Usage>, StoreError> {
        self.inner.done(self.inner.owner.read(tables::usage).wait().await)
    }
}

impl Inner {
    async fn change<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Tables<'_>) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.done(self.owner.change(self.clock.moment(), work).wait().await)
    }

    fn done<T>(&self, done: Result<T, Failure>) -> Result<T, StoreError> {
        done.map_err(|failure| failure.of(&self.path))
    }

    /// The same key, with words that count from now.
    fn count_from_now(&self, standing: &mut Standing) {
        standing.words = std::mem::take(&mut standing.words).after(self.clock.now());
    }

    async fn load(&self, only: Option<&[KeyId]>) -> Result<Loaded, StoreError> {
        let (only, at_rest) = (only.map(<[_]>::to_vec), self.at_rest.clone());
        let read = self.owner.read(move |transaction| tables::load(transaction, only.as_deref(), &at_rest));
        let mut loaded = self.done(read.wait().await)?;
        loaded.records.iter_mut().for_each(|record| self.count_from_now(&mut record.standing));
        Ok(loaded)
    }

    async fn sweep(&self) -> Result<Recovered, StoreError> {
        let at = self.clock.moment();
        let read = self.owner.read(move |transaction| tables::ended(transaction, at));
        let mut ended = self.done(read.wait().await)?;
        let mut dropped = Vec::new();
        // At least once, also for nothing: a change notes that the wall clock was set.
        loop {
            let rest = ended.split_off(ended.len().min(IN_A_CHANGE));
            dropped.extend(self.change(move |tables| tables.drop_ended(&ended, at)).await?);
            if rest.is_empty() {
                return Ok(Recovered::new(dropped.len() as u64, dropped));
            }
            ended = rest;
        }
    }

    async fn add_usage(&self, usage: Vec<Usage>) -> Result<(), StoreError> {
        for part in usage.chunks(IN_A_CHANGE) {
            let part = part.to_vec();
            self.change(move |tables| tables.add_usage(&part)).await?;
        }
        Ok(())
    }
}

impl KeyStore for FileStore {
    fn load<'a>(&'a self, only: Option<&'a [KeyId]>) -> StoreFuture<'a, Loaded> {
        Box::pin(self.inner.load(only))
    }

    fn merge(&self, mark: Mark) -> StoreFuture<'_, Option<Standing>> {
        let at = self.inner.clock.moment();
        let merged = self.inner.owner.change(at, move |tables| tables.merge(&mark, at));
        Box::pin(async { self.inner.standing(merged.wait().await) })
    }

    fn operate(&self, id: KeyId, operation: Operation) -> StoreFuture<'_, Option<Standing>> {
        let at_rest = self.inner.at_rest.clone();
        let operate = move |tables: &mut Tables<'_>| tables.operate(&id, &operation, &at_rest);
        let operated = self.inner.owner.change(self.inner.clock.moment(), operate);
        Box::pin(async { self.inner.standing(operated.wait().await) })
    }

    fn sweep(&self) -> StoreFuture<'_, Recovered> {
        Box::pin(self.inner.sweep())
    }

    fn plant<'a>(&'a self, seeds: &'a [KeySpec]) -> StoreFuture<'a, Vec<Planted>> {
        let (seeds, at_rest) = (seeds.to_vec(), self.inner.at_rest.clone());
        Box::pin(async move {
            let removes = !self.inner.was_planted.load(SeqCst);
            self.inner.change(move |tables| tables.plant(&seeds, removes, &at_rest)).await?;
            self.inner.was_planted.store(true, SeqCst);
            Ok(Vec::new())
        })
    }

    fn note_sourced<'a>(&'a self, keys: &'a [KeySpec]) -> StoreFuture<'a, ()> {
        Box::pin(async { self.plant(keys).await.map(drop) })
    }

    fn writes(&self) -> Writes {
        WRITES
    }

    fn add_usage(&self, usage: Vec<Usage>) -> StoreFuture<'_, ()> {
        Box::pin(self.inner.add_usage(usage))
    }

    fn quotas(&self) -> StoreFuture<'_, Option<Vec<u8>>> {
        let read = self.inner.owner.read(tables::quotas);
        Box::pin(async { self.inner.done(read.wait().await) })
    }

    fn keep_quotas(&self, quotas: Vec<u8>) -> StoreFuture<'_, bool> {
        let at = self.inner.clock.moment();
        let kept = self.inner.owner.change(at, move |tables| tables.keep_quotas(&quotas));
        Box::pin(async { self.inner.done(kept.wait().await).map(|()| true) })
    }

    fn messages(&self) -> StoreFuture<'_, Option<Vec<Heard>>> {
        let heard = self.inner.messages.heard(self.inner.clock.now());
        Box::pin(std::future::ready(Ok(Some(heard))))
    }

    fn publish(&self, process: u64, body: Vec<u8>) -> StoreFuture<'_, ()> {
        self.inner.messages.publish(process, body, self.inner.clock.now());
        Box::pin(std::future::ready(Ok(())))
    }
}

impl Inner {
    fn standing(&self, done: Result<Option<Standing>, Failure>) -> Result<Option<Standing>, StoreError> {
        let mut standing = self.done(done)?;
        standing.iter_mut().for_each(|standing| self.count_from_now(standing));
        Ok(standing)
    }
}

impl fmt::Debug for FileStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileStore").field("path", &self.inner.path).finish_non_exhaustive()
    }
}
