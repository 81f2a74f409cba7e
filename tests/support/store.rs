use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use tokio::sync::{mpsc, watch};
#[cfg(feature = "file")]
use tower_key_rotation::store::file::FileStore;
use tower_key_rotation::{
    KeyId, KeySpec,
    clock::{Clock, ManualClock},
    store::{
        Change, KeyRecord, KeyStore, Loaded, Mark, MemoryStore, Operation, Recovered, Resting, Standing,
        StoreError, StoreFuture, Usage,
    },
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Works,
    Fails,
    FailsSaying(&'static str),
    Panics,
    /// Until the mode is another one.
    Hangs,
}

/// One of the store's methods, with its mode at the moment.
#[derive(Clone, Debug)]
pub struct Method {
    mode: watch::Sender<Mode>,
    begun: Arc<AtomicUsize>,
    under_way: Arc<AtomicUsize>,
    most_at_once: Arc<AtomicUsize>,
}

impl Method {
    fn new() -> Self {
        let (begun, under_way, most_at_once) = Default::default();
        Self { mode: watch::Sender::new(Mode::Works), begun, under_way, most_at_once }
    }

    pub fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }

    pub fn begun(&self) -> usize {
        self.begun.load(SeqCst)
    }

    pub fn most_at_once(&self) -> usize {
        self.most_at_once.load(SeqCst)
    }

    async fn run(&self) -> Result<(), StoreError> {
        self.begun.fetch_add(1, SeqCst);
        let now = self.under_way.fetch_add(1, SeqCst) + 1;
        self.most_at_once.fetch_max(now, SeqCst);
        let mode = *self.mode.subscribe().wait_for(|mode| *mode != Mode::Hangs).await.unwrap();
        self.under_way.fetch_sub(1, SeqCst);
        match mode {
            Mode::Fails => Err(StoreError::new("connection reset by mongod")),
            Mode::FailsSaying(text) => Err(StoreError::new(text)),
            Mode::Panics => panic!("the store panics, as the test has it"),
            Mode::Works | Mode::Hangs => Ok(()),
        }
    }
}

/// The store that a test is about: in memory, or in a file where the test's name begins so.
#[derive(Clone, Debug)]
pub enum Tested {
    Memory(MemoryStore),
    #[cfg(feature = "file")]
    File(FileStore, Arc<tempfile::TempDir>),
}

impl Tested {
    fn new(clock: &ManualClock) -> Self {
        #[cfg(feature = "file")]
        if env!("CARGO_CRATE_NAME").starts_with("file_") {
            let directory = tempfile::tempdir().unwrap();
            let builder = FileStore::builder().clock(clock.clone());
            return Self::File(
                builder.open(directory.path().join("keys.redb")).unwrap(),
                Arc::new(directory),
            );
        }
        Self::Memory(MemoryStore::with_clock(Arc::new(clock.clone())))
    }

    fn store(&self) -> &dyn KeyStore {
        match self {
            Self::Memory(store) => store,
            #[cfg(feature = "file")]
            Self::File(store, _) => store,
        }
    }
}

impl KeyStore for Tested {
    fn load<'a>(&'a self, only: Option<&'a [KeyId]>) -> StoreFuture<'a, Loaded> {
        self.store().load(only)
    }

    fn merge(&self, mark: Mark) -> StoreFuture<'_, Option<Standing>> {
        self.store().merge(mark)
    }

    fn operate(&self, id: KeyId, operation: Operation) -> StoreFuture<'_, Option<Standing>> {
        self.store().operate(id, operation)
    }

    fn sweep(&self) -> StoreFuture<'_, Recovered> {
        self.store().sweep()
    }
}

/// A store that fails, panics or hangs on demand, and counts its calls. Clones share all.
#[derive(Clone, Debug)]
pub struct FaultyStore {
    pub tested: Tested,
    clock: ManualClock,
    pub loads: Method,
    pub writes: Method,
    /// The replies to writes, which the store has made by then.
    pub replies: Method,
    pub recovers: Method,
    pub usage: Method,
    pub operators: Method,
    /// The replies to operators.
    pub confirmations: Method,
    /// The prefix of the ids of keys whose marks always fail.
    refused: Arc<Mutex<Option<&'static str>>>,
    marks: Arc<Mutex<Vec<Mark>>>,
    used: Arc<Mutex<Vec<Vec<Usage>>>>,
    watchers: Arc<Mutex<Vec<mpsc::Sender<Change>>>>,
}

impl FaultyStore {
    pub fn new(clock: &ManualClock) -> Self {
        Self::around(Tested::new(clock), clock)
    }

    /// One more connection to that store, whose clock this is, with faults of its own.
    pub fn over(memory: MemoryStore, clock: &ManualClock) -> Self {
        Self::around(Tested::Memory(memory), clock)
    }

    fn around(tested: Tested, clock: &ManualClock) -> Self {
        let (refused, marks, used, watchers) = Default::default();
        Self {
            tested,
            clock: clock.clone(),
            loads: Method::new(),
            writes: Method::new(),
            replies: Method::new(),
            recovers: Method::new(),
            usage: Method::new(),
            operators: Method::new(),
            confirmations: Method::new(),
            refused,
            marks,
            used,
            watchers,
        }
    }

    pub fn refuse_marks_of(&self, ids_that_begin_so: &'static str) {
        *self.refused.lock().unwrap() = Some(ids_that_begin_so);
    }

    /// Sets the mode of loads, writes, sweeps and usage.
    pub fn set(&self, mode: Mode) {
        for method in [&self.loads, &self.writes, &self.recovers, &self.usage] {
            method.set(mode);
        }
    }

    /// The marks that it has taken, the oldest first.
    pub fn marks(&self) -> Vec<Mark> {
        self.marks.lock().unwrap().clone()
    }

    /// The usage of each call, whether the call failed or not.
    pub fn used(&self) -> Vec<Vec<Usage>> {
        self.used.lock().unwrap().clone()
    }

    /// Tells all watchers.
    pub async fn tell(&self, change: Change) {
        let watchers = self.watchers.lock().unwrap().clone();
        for watcher in watchers {
            let _ = watcher.send(change.clone()).await;
        }
    }

    /// The record of a key, whatever the modes.
    pub async fn record(&self, id: &str) -> KeyRecord {
        let loaded = self.tested.load(Some(&[KeyId::new(id).unwrap()])).await.unwrap();
        loaded.records.into_iter().next().unwrap()
    }

    /// How a key rests, whatever the modes.
    pub async fn rest(&self, id: &str) -> Option<Resting> {
        self.record(id).await.standing.words.key
    }

    /// Inserts a key, as another program would.
    pub async fn insert(&self, id: &str, secret: &str) {
        let spec = KeySpec::new(KeyId::new(id).unwrap(), secret);
        self.operate_elsewhere(id, Operation::Insert(spec)).await;
    }

    /// Does what another program asks for.
    pub async fn operate_elsewhere(&self, id: &str, operation: Operation) -> Standing {
        self.tested.operate(KeyId::new(id).unwrap(), operation).await.unwrap().unwrap()
    }
}

fn age(standing: &mut Standing, by: Duration) {
    standing.words = std::mem::take(&mut standing.words).after(by);
}

impl KeyStore for FaultyStore {
    /// Held up after the read: the answer is as old as that, and its times are corrected by that.
    fn load<'a>(&'a self, only: Option<&'a [KeyId]>) -> StoreFuture<'a, Loaded> {
        Box::pin(async move {
            let mut loaded = self.tested.load(only).await?;
            let read_at = self.clock.now();
            self.loads.run().await?;
            let held_up = self.clock.now() - read_at;
            loaded.records.iter_mut().for_each(|record| age(&mut record.standing, held_up));
            Ok(loaded)
        })
    }

    /// Held up before or after the write, with times that are corrected by that.
    fn merge(&self, mut mark: Mark) -> StoreFuture<'_, Option<Standing>> {
        Box::pin(async move {
            let asked_at = self.clock.now();
            self.writes.run().await?;
            if self.refused.lock().unwrap().is_some_and(|refused| mark.id.as_str().starts_with(refused)) {
                return Err(StoreError::new("document failed validation"));
            }
            mark.words = mark.words.after(self.clock.now() - asked_at);
            self.marks.lock().unwrap().push(mark.clone());
            let mut standing = self.tested.merge(mark).await?;
            let done_at = self.clock.now();
            self.replies.run().await?;
            let held_up = self.clock.now() - done_at;
            standing.iter_mut().for_each(|standing| age(standing, held_up));
            Ok(standing)
        })
    }

    fn operate(&self, id: KeyId, operation: Operation) -> StoreFuture<'_, Option<Standing>> {
        Box::pin(async move {
            self.operators.run().await?;
            let mut standing = self.tested.operate(id, operation).await?;
            let done_at = self.clock.now();
            self.confirmations.run().await?;
            let held_up = self.clock.now() - done_at;
            standing.iter_mut().for_each(|standing| age(standing, held_up));
            Ok(standing)
        })
    }

    fn sweep(&self) -> StoreFuture<'_, Recovered> {
        Box::pin(async {
            self.recovers.run().await?;
            self.tested.sweep().await
        })
    }

    fn add_usage(&self, usage: Vec<Usage>) -> StoreFuture<'_, ()> {
        if !usage.is_empty() {
            self.used.lock().unwrap().push(usage);
        }
        Box::pin(self.usage.run())
    }

    fn changes(&self) -> Option<mpsc::Receiver<Change>> {
        let (watcher, changes) = mpsc::channel(1);
        self.watchers.lock().unwrap().push(watcher);
        Some(changes)
    }
}
