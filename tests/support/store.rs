use std::sync::{
    Arc, Mutex,
    atomic::{AtomicUsize, Ordering::SeqCst},
};

use tokio::sync::{mpsc, watch};
use tower_key_rotation::{
    KeyId, Secret,
    clock::{Clock, ManualClock},
    store::{
        Changed, KeyRecord, KeyStore, Loaded, Mark, MemoryStore, Recovered, StoreError, StoreFuture,
        UsageBatch,
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

/// One of the store's operations, as it is at the moment.
#[derive(Clone, Debug)]
pub struct Operation {
    mode: watch::Sender<Mode>,
    begun: Arc<AtomicUsize>,
    under_way: Arc<AtomicUsize>,
    most_at_once: Arc<AtomicUsize>,
}

impl Operation {
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

/// What operators do, passed on to the store in that field.
#[allow(unused_macros)] // Not every test has a store of its own.
macro_rules! operators_of {
    ($inner:ident) => {
        fn insert(&self, id: KeyId, secret: Secret) -> StoreFuture<'_, bool> {
            self.$inner.insert(id, secret)
        }

        fn remove<'a>(&'a self, id: &'a KeyId) -> StoreFuture<'a, bool> {
            self.$inner.remove(id)
        }

        fn reset<'a>(&'a self, id: &'a KeyId) -> StoreFuture<'a, bool> {
            self.$inner.reset(id)
        }

        fn set_disabled<'a>(&'a self, id: &'a KeyId, disabled: bool) -> StoreFuture<'a, bool> {
            self.$inner.set_disabled(id, disabled)
        }
    };
}
#[allow(unused_imports)] // For the same reason.
pub(crate) use operators_of;

/// A [`MemoryStore`] that fails, panics or hangs as it is told, and counts what it is asked. Clones share all.
#[derive(Clone, Debug)]
pub struct FaultyStore {
    pub memory: MemoryStore,
    clock: ManualClock,
    pub loads: Operation,
    pub writes: Operation,
    /// Of writes: the store has done them by then.
    pub replies: Operation,
    pub recovers: Operation,
    pub usage: Operation,
    /// What operators do.
    pub operators: Operation,
    /// The ids of keys whose marks it never takes begin so.
    refused: Arc<Mutex<Option<&'static str>>>,
    marks: Arc<Mutex<Vec<Mark>>>,
    batches: Arc<Mutex<Vec<UsageBatch>>>,
    watchers: Arc<Mutex<Vec<mpsc::Sender<Changed>>>>,
}

impl FaultyStore {
    pub fn new(clock: &ManualClock) -> Self {
        Self::over(MemoryStore::with_clock(Arc::new(clock.clone())), clock)
    }

    /// One more way to that store, whose clock this is, with faults of its own.
    pub fn over(memory: MemoryStore, clock: &ManualClock) -> Self {
        Self {
            memory,
            clock: clock.clone(),
            loads: Operation::new(),
            writes: Operation::new(),
            replies: Operation::new(),
            recovers: Operation::new(),
            usage: Operation::new(),
            operators: Operation::new(),
            refused: Arc::default(),
            marks: Arc::default(),
            batches: Arc::default(),
            watchers: Arc::default(),
        }
    }

    pub fn refuse_marks_of(&self, ids_that_begin_so: &'static str) {
        *self.refused.lock().unwrap() = Some(ids_that_begin_so);
    }

    /// Loads, writes and sweeps alike.
    pub fn set(&self, mode: Mode) {
        for operation in [&self.loads, &self.writes, &self.recovers, &self.usage] {
            operation.set(mode);
        }
    }

    /// The marks that it has taken, the oldest first.
    pub fn marks(&self) -> Vec<Mark> {
        self.marks.lock().unwrap().clone()
    }

    /// The batches of usage that it was given, whether it took them or not.
    pub fn batches(&self) -> Vec<UsageBatch> {
        self.batches.lock().unwrap().clone()
    }

    /// Tells whoever watches it.
    pub async fn tell(&self, changed: Changed) {
        let watchers = self.watchers.lock().unwrap().clone();
        for watcher in watchers {
            let _ = watcher.send(changed.clone()).await;
        }
    }

    /// What it has of a key, whatever its mode.
    pub async fn record(&self, id: &str) -> KeyRecord {
        let loaded = self.memory.load().await.unwrap();
        loaded.records.into_iter().find(|record| record.id.as_str() == id).unwrap()
    }
}

impl KeyStore for FaultyStore {
    /// It is held up after the read: what it comes back with is as old as that, and it knows how old that is.
    fn load(&self) -> StoreFuture<'_, Loaded> {
        Box::pin(async {
            let mut loaded = self.memory.load().await?;
            let read_at = self.clock.now();
            self.loads.run().await?;
            let held_up = self.clock.now() - read_at;
            for (_, left) in loaded.records.iter_mut().filter_map(|record| record.rest.as_mut()) {
                *left = left.map(|left| left.saturating_sub(held_up));
            }
            Ok(loaded)
        })
    }

    /// It is held up before or after it is done, and knows for how long.
    fn write(&self, mut mark: Mark) -> StoreFuture<'_, ()> {
        Box::pin(async move {
            let asked_at = self.clock.now();
            self.writes.run().await?;
            if self.refused.lock().unwrap().is_some_and(|refused| mark.id.as_str().starts_with(refused)) {
                return Err(StoreError::new("document failed validation"));
            }
            let held_up = self.clock.now() - asked_at;
            mark.age += held_up;
            mark.left = mark.left.map(|left| left.saturating_sub(held_up));
            self.marks.lock().unwrap().push(mark.clone());
            self.memory.write(mark).await?;
            self.replies.run().await
        })
    }

    fn recover(&self) -> StoreFuture<'_, Recovered> {
        Box::pin(async {
            self.recovers.run().await?;
            self.memory.recover().await
        })
    }

    fn add_usage<'a>(&'a self, batch: &'a UsageBatch) -> StoreFuture<'a, ()> {
        self.batches.lock().unwrap().push(batch.clone());
        Box::pin(self.usage.run())
    }

    fn watch(&self) -> Option<mpsc::Receiver<Changed>> {
        let (watcher, changes) = mpsc::channel(1);
        self.watchers.lock().unwrap().push(watcher);
        Some(changes)
    }

    fn insert(&self, id: KeyId, secret: Secret) -> StoreFuture<'_, bool> {
        Box::pin(async {
            self.operators.run().await?;
            self.memory.insert(id, secret).await
        })
    }

    fn remove<'a>(&'a self, id: &'a KeyId) -> StoreFuture<'a, bool> {
        Box::pin(async {
            self.operators.run().await?;
            self.memory.remove(id).await
        })
    }

    fn reset<'a>(&'a self, id: &'a KeyId) -> StoreFuture<'a, bool> {
        Box::pin(async {
            self.operators.run().await?;
            self.memory.reset(id).await
        })
    }

    fn set_disabled<'a>(&'a self, id: &'a KeyId, disabled: bool) -> StoreFuture<'a, bool> {
        Box::pin(async move {
            self.operators.run().await?;
            self.memory.set_disabled(id, disabled).await
        })
    }
}
