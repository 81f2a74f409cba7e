//! The processes of a run: which one gets a request, how they share a store, and what becomes of them.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use clap::ValueEnum;
use fastrand::Rng;
use tokio::{sync::mpsc, time::sleep};
use tower_key_rotation::{
    KeyId, RecoveryHandle,
    store::{
        Change, Heard, KeyStore, Loaded, Mark, MemoryStore, Operation, Recovered, Replaced, Standing,
        StoreFuture, Usage,
    },
};

use crate::{
    arrivals::Job,
    clients::{Client, ClientKind, paced},
    run::PATIENCE,
    upstream::Upstream,
};

/// How long the store takes for a message, in ms.
const DELAY: std::ops::RangeInclusive<u64> = 5..=300;
/// When a process joins or ends, as a share of the run.
const HALF: f64 = 0.5;
/// The share of the requests that one process gets, if it gets most of them.
const MOST: f64 = 0.8;
/// The number of the process that is killed.
const KILLED: usize = 1;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Scene {
    /// Each process gets the same share of the requests
    #[default]
    Even,
    /// One process gets 80 % of the requests
    Skew,
    /// One more process joins half-way
    Join,
    /// A process is killed half-way; its requests in flight don't count
    Kill,
}

/// How the processes of a run work together.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Together {
    /// Whether they share a store.
    pub(crate) store: bool,
    pub(crate) scene: Scene,
}

pub(crate) struct Processes {
    kind: ClientKind,
    together: Together,
    upstream: Upstream,
    store: DelayedStore,
    clients: Vec<Client>,
    recoveries: Vec<Option<RecoveryHandle>>,
    /// How many there are in the beginning.
    first: usize,
    /// When one joins or ends.
    turn: f64,
    has_turned: bool,
    killed: Option<usize>,
}

impl Processes {
    /// The only process, whatever it does.
    pub(crate) fn single(client: Client, upstream: &Upstream, seed: u64) -> Self {
        Self {
            kind: ClientKind::Paced,
            together: Together::default(),
            upstream: upstream.clone(),
            store: DelayedStore::new(seed),
            clients: vec![client],
            recoveries: vec![None],
            first: 1,
            turn: f64::INFINITY,
            has_turned: false,
            killed: None,
        }
    }

    pub(crate) async fn start(
        kind: ClientKind,
        together: Together,
        upstream: &Upstream,
        first: usize,
        seconds: f64,
        seed: u64,
    ) -> Self {
        let mut processes = Self {
            kind,
            together,
            upstream: upstream.clone(),
            store: DelayedStore::new(seed),
            clients: Vec::new(),
            recoveries: Vec::new(),
            first,
            turn: HALF * seconds,
            has_turned: false,
            killed: None,
        };
        for _ in 0..first {
            processes.add().await;
        }
        processes
    }

    async fn add(&mut self) {
        let (client, recovery) = if self.together.store {
            let pool = paced::builder(&self.upstream).open(self.store.clone()).await.unwrap();
            (paced::of_pool(&pool, self.upstream.service(), PATIENCE), Some(RecoveryHandle::spawn(&pool)))
        } else {
            (self.kind.start(&self.upstream, self.first), None)
        };
        self.clients.push(client);
        self.recoveries.push(recovery);
    }

    /// Returns the number of a process, and its client, for a request that arrives now.
    pub(crate) async fn of(&mut self, job: &Job) -> (usize, Client) {
        let has_turned = job.arrives >= self.turn;
        if has_turned && !std::mem::replace(&mut self.has_turned, true) {
            match self.together.scene {
                Scene::Join => self.add().await,
                Scene::Kill => {
                    self.recoveries[KILLED] = None;
                    self.killed = Some(KILLED);
                }
                Scene::Even | Scene::Skew => {}
            }
        }
        let number = match self.together.scene {
            Scene::Even => job.lot % self.first,
            Scene::Skew if (job.lot % 1_000) < (1_000.0 * MOST) as usize => 0,
            Scene::Skew => 1 + job.lot / 1_000 % (self.first - 1),
            Scene::Join => job.lot % self.clients.len(),
            Scene::Kill if self.has_turned => match job.lot % (self.first - 1) {
                before if before < KILLED => before,
                after => after + 1,
            },
            Scene::Kill => job.lot % self.first,
        };
        (number, self.clients[number].clone())
    }

    /// Returns the number of the process that has been killed since the last call.
    pub(crate) fn killed(&mut self) -> Option<usize> {
        self.killed.take()
    }
}

/// A store in memory that takes its time for messages.
#[derive(Clone, Debug)]
struct DelayedStore {
    inner: MemoryStore,
    rng: Arc<Mutex<Rng>>,
}

impl DelayedStore {
    fn new(seed: u64) -> Self {
        Self { inner: MemoryStore::new(), rng: Arc::new(Mutex::new(Rng::with_seed(seed))) }
    }

    /// Waits for a random part of the delay, and returns the rest.
    async fn delay(&self) -> Duration {
        let (all, before) = {
            let mut rng = self.rng.lock().unwrap_or_else(PoisonError::into_inner);
            (Duration::from_millis(rng.u64(DELAY)), rng.f64())
        };
        sleep(all.mul_f64(before)).await;
        all.mul_f64(1.0 - before)
    }
}

impl KeyStore for DelayedStore {
    fn load<'a>(&'a self, only: Option<&'a [KeyId]>) -> StoreFuture<'a, Loaded> {
        self.inner.load(only)
    }
    fn merge(&self, mark: Mark) -> StoreFuture<'_, Option<Standing>> {
        self.inner.merge(mark)
    }
    fn operate(&self, id: KeyId, operation: Operation) -> StoreFuture<'_, Option<Standing>> {
        self.inner.operate(id, operation)
    }
    fn sweep(&self) -> StoreFuture<'_, Recovered> {
        self.inner.sweep()
    }
    fn changes(&self) -> Option<mpsc::Receiver<Change>> {
        self.inner.changes()
    }
    fn add_usage(&self, usage: Vec<Usage>) -> StoreFuture<'_, ()> {
        self.inner.add_usage(usage)
    }
    fn replace_failed(&self) -> StoreFuture<'_, Vec<Replaced>> {
        self.inner.replace_failed()
    }
    fn messages(&self) -> StoreFuture<'_, Option<Vec<Heard>>> {
        Box::pin(async {
            let rest = self.delay().await;
            let heard = self.inner.messages().await;
            sleep(rest).await;
            heard
        })
    }
    fn publish(&self, process: u64, body: Vec<u8>) -> StoreFuture<'_, ()> {
        Box::pin(async move {
            let rest = self.delay().await;
            let published = self.inner.publish(process, body).await;
            sleep(rest).await;
            published
        })
    }
}
