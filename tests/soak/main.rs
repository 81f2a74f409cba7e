//! Full load on a service that limits, over a MongoDB that fails every few seconds, while keys come and go.
//!
//! ```text
//! SOAK_SECONDS=600 cargo test --release --all-features --test soak -- --nocapture
//! ```
//!
//! Without `SOAK_SECONDS` it takes about ten seconds. Everything is on this machine: the service, a `mongod` of its
//! own, a proxy before it for each of two processes, and what the processes consist of: a store, a pool, its recovery,
//! and callers that send all they can by a failover, a rotation and `reqwest`.

mod faults;
mod figures;
mod ledger;
mod operator;
mod process;
mod service;
#[path = "../support/mod.rs"]
mod support;
#[allow(dead_code)]
#[path = "../../examples/local/watch.rs"]
mod watch;

use std::{
    collections::BTreeSet,
    env,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use tokio::{
    runtime::{Builder, Handle, Runtime},
    time::{interval, sleep},
};

use self::{
    faults::{Schedule, Store, probe},
    figures::{Figures, Held},
    ledger::{Books, HINDSIGHT},
    operator::{Keys, Operator},
    process::Process,
    service::Service,
    support::{MINUTE, Proxy, SECOND, mongo::*},
};

const KEYS: usize = 40;

/// By how many bytes more may be allocated at the end than after a third of the time.
const FLAT: usize = 2 * 1024 * 1024;
/// How many bytes may be left when all is over, beyond those that were there before it began.
const LEFT: usize = 128 * 1024;

#[test]
fn faults_under_load_leak_nothing_nor_lose_marks() {
    let seconds =
        env::var("SOAK_SECONDS").map_or(10, |seconds| seconds.parse().expect("a number of seconds"));
    // Two runtimes, so that the tasks that are counted are the processes' own.
    let (world, processes) = (runtime(), runtime());
    let held = || processes.block_on(async { Held::now() });
    let before = held();
    processes.block_on(soak(Duration::from_secs(seconds), world.handle()));
    world.shutdown_timeout(MINUTE);
    let left = held();
    println!("| held before | {before} |\n| held when all was over | {left} |");
    assert!(left.bytes < before.bytes + LEFT, "something is left: {before:?}, {left:?}");
}

fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

async fn soak(time: Duration, world: &Handle) {
    let (books, figures) = (Books::open(), Arc::<Figures>::default());
    let World { store, service, urls, keys } = world.spawn(World::start(books.clone())).await.unwrap();
    let soak = Soak { books, figures, service };
    let pools_held = Arc::new(());
    let mut processes = [
        Process::open(&store.mongo, &store.proxies[0], &pools_held).await,
        Process::open(&store.mongo, &store.proxies[1], &pools_held).await,
    ];
    let stop = Arc::new(AtomicBool::new(false));
    for (number, process) in processes.iter_mut().enumerate() {
        process.call(number, &urls[number], &soak.books, &soak.figures, &stop);
    }

    let (began, until) = (Instant::now(), Instant::now() + time.saturating_sub(3 * SECOND));
    let operator = Operator {
        mongo: store.mongo.clone(),
        pools: processes.each_ref().map(|process| process.pool.clone()),
        keys,
        books: soak.books.clone(),
        figures: soak.figures.clone(),
    };
    let probe = tokio::spawn(probe(store.mongo.clone(), soak.books.clone()));
    let operator = world.spawn(operator.operate((time / 20).min(2 * SECOND), until));
    let faults =
        world.spawn(store.suffer(Schedule::of(time, until), soak.books.clone(), soak.figures.clone()));
    let (samples, world) = tokio::join!(soak.watch(until), async { tokio::try_join!(faults, operator) });
    let (store, keys) = world.unwrap();
    probe.abort();

    soak.last_marks(&store, &keys, &processes).await;
    stop.store(true, Relaxed);
    for process in &mut processes {
        process.callers_have_stopped().await;
    }
    let took = began.elapsed();
    soak.nothing_went_wrong(Duration::ZERO);
    assert_eq!(soak.books.unmarked(), 0, "answers that no request has received");
    for process in processes {
        process.shut_down(&soak.figures).await;
    }
    store.is_as_it_was_told(&soak.books, &keys).await;

    let all_has_gone = || async { Arc::strong_count(&pools_held) == 1 && Held::now().tasks == 0 };
    eventually_within(MINUTE, "pools and tasks have gone", all_has_gone).await;
    soak.show(took, &samples);
    let [third, end] = third_and_end(&samples);
    assert!(end.bytes < third.bytes + FLAT, "it grows: {third:?}, {end:?}");
}

struct Soak {
    books: Arc<Books>,
    figures: Arc<Figures>,
    service: Arc<Service>,
}

impl Soak {
    /// Looks at what is held until then, tells how it goes, and fails as soon as anything has gone wrong.
    async fn watch(&self, until: Instant) -> Vec<Held> {
        const EACH: Duration = Duration::from_millis(100);
        let began = Instant::now();
        let time = until - began;
        let mut samples = Vec::with_capacity(2 * time.div_duration_f64(EACH) as usize);
        let (mut ticks, mut told) = (interval(EACH), began);
        while Instant::now() < until {
            ticks.tick().await;
            samples.push(Held::now());
            self.nothing_went_wrong(HINDSIGHT);
            if told.elapsed() > (time / 4).min(30 * SECOND) {
                told = Instant::now();
                println!("{}", self.line(began.elapsed(), samples[samples.len() - 1]));
            }
        }
        samples
    }

    fn nothing_went_wrong(&self, hindsight: Duration) {
        let hits = self.books.hits();
        assert!(hits.is_empty(), "{} requests with keys that rested, or were gone: {hits:#?}", hits.len());
        let failures = self.figures.failures();
        assert!(failures.is_empty(), "requests that failed: {failures:#?}");
        let late = self.books.late(hindsight);
        assert!(
            late.is_empty(),
            "{} requests with keys that the other process knew to rest: {late:#?}",
            late.len()
        );
        assert_eq!(self.service.answers.unknown.load(Relaxed), 0, "requests with keys that nobody has");
    }

    /// Marks that are made while the store takes none, and up to the end: with long rests, so that they can be
    /// looked for. When this returns, the store and the pools are as one again.
    async fn last_marks(&self, store: &Store, keys: &BTreeSet<String>, processes: &[Process; 2]) {
        let _trouble = self.books.trouble();
        self.service.begin_to_close();
        store.take_no_mark().await;
        sleep(SECOND).await;
        store.well().await;
        for Process { pool, recovery, .. } in processes {
            let follows = || async {
                let has: BTreeSet<_> = pool.stats().keys.into_iter().map(|key| key.id.to_string()).collect();
                recovery.sweep_now().await.outcome.is_ok() && has == *keys
            };
            eventually_within(MINUTE, "the pool has made a pass, and has the keys that there are", follows)
                .await;
        }
        self.service.close();
        sleep(SECOND / 20).await;
    }
}

/// What is outside of the processes.
struct World {
    store: Store,
    service: Arc<Service>,
    urls: [String; 2],
    keys: Keys,
}

impl World {
    async fn start(books: Arc<Books>) -> Self {
        let server = own(Kind::ReplicaSet).await;
        let mongo = Mongo::at(&server.uri()).await;
        let proxies = [Proxy::to(server.address()).await, Proxy::to(server.address()).await];
        let (service, urls) = Service::start(&books).await;
        let mut keys = Keys::of(&service);
        for _ in 0..KEYS {
            mongo.insert(keys.give().as_str()).await;
        }
        Self { store: Store { server, mongo, proxies }, service, urls, keys }
    }
}

fn third_and_end(samples: &[Held]) -> [Held; 2] {
    let (third, tenth) = (samples.len() / 3, samples.len() / 10);
    [&samples[third..third + tenth], &samples[samples.len() - tenth..]].map(Held::median)
}
