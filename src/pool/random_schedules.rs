//! A pool and its store in random schedules by `shuttle`, and in schedules with priorities that change at a few random
//! steps (PCT). CONTRIBUTING.md says how to run them.
//!
//! A failure names its schedule, which `shuttle::replay` plays again.

use std::{collections::BTreeMap, env, sync::Arc, time::Duration};

use shuttle::{
    future::{block_on, yield_now},
    thread,
};

use super::{KeyPool, Lease, Trials};
use crate::{
    clock::ManualClock,
    key::KeyId,
    limit::{Rest, Status},
    store::{KeyRecord, KeyStore, Loaded, Mark, MemoryStore, Operation, Recovered, Standing, StoreFuture},
};

const COOLDOWN: Duration = Duration::from_secs(120);
const LONGER: Duration = Duration::from_secs(600);

/// How many schedules of either kind each test goes through; `SCHEDULES` says otherwise.
const SCHEDULES: usize = 500;

/// Steps at which priorities change.
const DEPTH: usize = 4;

fn in_many_schedules(test: impl Fn() + Send + Sync + Copy + 'static) {
    let schedules = env::var("SCHEDULES").map_or(SCHEDULES, |schedules| schedules.parse().unwrap());
    shuttle::check_random(test, schedules);
    shuttle::check_pct(test, schedules, DEPTH);
}

/// A store that takes its time before and after each operation.
#[derive(Clone, Debug)]
struct Slow(MemoryStore);

async fn slowly<T>(operation: impl Future<Output = T>) -> T {
    yield_now().await;
    let result = operation.await;
    yield_now().await;
    result
}

impl KeyStore for Slow {
    fn load<'a>(&'a self, only: Option<&'a [KeyId]>) -> StoreFuture<'a, Loaded> {
        Box::pin(slowly(async move { self.0.load(only).await }))
    }

    fn merge(&self, mark: Mark) -> StoreFuture<'_, Option<Standing>> {
        Box::pin(slowly(async { self.0.merge(mark).await }))
    }

    fn operate(&self, id: KeyId, operation: Operation) -> StoreFuture<'_, Option<Standing>> {
        Box::pin(slowly(async { self.0.operate(id, operation).await }))
    }

    fn sweep(&self) -> StoreFuture<'_, Recovered> {
        Box::pin(slowly(async { self.0.sweep().await }))
    }
}

/// One process: its pool, over a store that it may share.
#[derive(Clone)]
struct Process {
    pool: KeyPool,
    store: Slow,
    clock: ManualClock,
}

impl Process {
    /// The store has alpha and beta.
    fn start() -> Self {
        let clock = ManualClock::new();
        let store = Slow(MemoryStore::with_clock(Arc::new(clock.clone())));
        Self::join(store, clock)
    }

    /// One with alpha alone.
    fn without_store() -> Self {
        let clock = ManualClock::new();
        let pool = KeyPool::builder().key("alpha", "sk-1").cooldown(COOLDOWN).clock(clock.clone());
        Self { pool: pool.build().unwrap(), store: Slow(MemoryStore::new()), clock }
    }

    fn join(store: Slow, clock: ManualClock) -> Self {
        let builder = KeyPool::builder().keys([("alpha", "sk-1"), ("beta", "sk-2")]);
        let builder = builder.cooldown(COOLDOWN).clock(clock.clone());
        Self { pool: block_on(builder.open(store.clone())).unwrap(), store, clock }
    }

    fn lease(&self, id: &str) -> Lease {
        Lease::of(self.pool.engine().snapshot().get(id).unwrap().clone())
    }

    /// A response says that the key is to rest that long.
    fn mark(&self, id: &str, time: Duration) {
        self.lease(id).mark(Rest::RateLimited, Some(time), 429);
    }

    fn picked(&self) -> Option<String> {
        self.pool.engine().pick(Trials::OfAll).map(|lease| lease.id().to_string())
    }

    fn write_marks(&self) {
        block_on(self.pool.link().unwrap().write_marks()).unwrap();
    }

    fn sweep(&self) {
        block_on(self.store.sweep()).unwrap();
        self.pool.engine().return_all_expired();
    }

    fn reset(&self) {
        block_on(self.pool.reset("alpha")).unwrap();
    }

    fn reload(&self) {
        block_on(self.pool.reload()).unwrap();
    }

    /// How long each key rests.
    fn rests(&self) -> BTreeMap<String, Option<Duration>> {
        let keys = self.pool.stats().keys;
        keys.into_iter().map(|key| (key.id.to_string(), key.time_left)).collect()
    }

    /// How long each key rests in the store.
    fn stored(&self) -> BTreeMap<String, Option<Duration>> {
        let left = |record: &KeyRecord| record.standing.words.key?.until.left();
        let records = block_on(self.store.0.load(None)).unwrap().records;
        records.iter().map(|record| (record.spec.id.to_string(), left(record))).collect()
    }

    fn assert_in_line(&self) {
        self.pool.engine().snapshot().assert_in_line();
    }

    /// A last pass, when nobody does anything else any more.
    fn come_to_rest(&self) {
        self.assert_in_line();
        self.write_marks();
        self.sweep();
        self.reload();
        assert_eq!(self.pool.stats().marks_waiting, 0);
        assert_eq!(self.rests(), self.stored());
        self.assert_in_line();
    }
}

/// Runs all of it at once, each in a thread of its own, until all are done.
fn at_once<const N: usize>(process: &Process, doings: [fn(&Process); N]) {
    let threads = doings.map(|doing| {
        let process = process.clone();
        thread::spawn(move || doing(&process))
    });
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

/// An older rest ends at the same moment.
#[test]
fn f08_sweeps_and_reloads_never_shorten_fresh_marks() {
    in_many_schedules(|| {
        let process = Process::start();
        process.mark("alpha", COOLDOWN);
        process.write_marks();
        process.clock.advance(COOLDOWN);
        at_once(
            &process,
            [
                |process| {
                    process.mark("alpha", 2 * COOLDOWN);
                    process.mark("alpha", LONGER);
                    assert_eq!(process.picked().as_deref(), Some("beta"));
                },
                |process| {
                    process.write_marks();
                    process.write_marks();
                },
                |process| {
                    process.sweep();
                    process.reload();
                },
                |process| drop((process.picked(), process.picked())),
            ],
        );
        assert_eq!(process.rests()["alpha"], Some(LONGER));
        process.come_to_rest();
        assert_eq!(process.stored()["alpha"], Some(LONGER));
    });
}

/// All of it in one instant: no time says what came first.
#[test]
fn f09_resets_win_over_marks_in_flight() {
    in_many_schedules(|| {
        let here = Process::start();
        let there = Process::join(here.store.clone(), here.clock.clone());
        [&here, &there].into_iter().for_each(|process| process.mark("alpha", LONGER));
        let theirs = thread::spawn({
            let there = there.clone();
            move || at_once(&there, [|there| there.write_marks(), |there| there.reload()])
        });
        at_once(&here, [|here| here.reset(), |here| here.write_marks(), |here| here.reload()]);
        theirs.join().unwrap();
        there.come_to_rest();
        here.come_to_rest();
        assert_eq!((here.rests()["alpha"], there.rests()["alpha"]), (None, None));
    });
}

#[test]
fn f09_marks_beside_a_reset_end_or_are_stored() {
    in_many_schedules(|| {
        let process = Process::start();
        process.mark("alpha", LONGER);
        at_once(
            &process,
            [
                |process| process.reset(),
                |process| process.mark("alpha", LONGER + COOLDOWN),
                |process| process.write_marks(),
                |process| process.reload(),
            ],
        );
        let rest = process.rests()["alpha"];
        assert!(rest.is_none() || rest == Some(LONGER + COOLDOWN));
        process.come_to_rest();
        assert_eq!(process.rests()["alpha"], rest);
    });
}

#[test]
fn older_reloads_never_undo_operator_changes() {
    in_many_schedules(|| {
        let process = Process::start();
        process.mark("alpha", LONGER);
        process.write_marks();
        at_once(
            &process,
            [
                |process| process.reset(),
                |process| block_on(process.pool.disable("beta")).unwrap(),
                |process| {
                    process.reload();
                    process.reload();
                },
            ],
        );
        let statuses = || process.pool.stats().keys.iter().map(|key| key.status).collect::<Vec<_>>();
        assert_eq!(statuses(), [Status::Healthy, Status::Disabled]);
        process.come_to_rest();
        assert_eq!(statuses(), [Status::Healthy, Status::Disabled]);
    });
}

#[test]
fn inserts_and_removals_hold_during_marks_and_reloads() {
    in_many_schedules(|| {
        let process = Process::start();
        at_once(
            &process,
            [
                |process| block_on(process.pool.insert("gamma", "sk-3")).unwrap(),
                |process| {
                    block_on(process.pool.remove("beta")).unwrap();
                    assert_ne!(process.picked().as_deref(), Some("beta"));
                },
                |process| {
                    process.reload();
                    process.reload();
                },
                |process| {
                    process.mark("alpha", LONGER);
                    assert_ne!(process.picked().as_deref(), Some("alpha"));
                },
            ],
        );
        let expected = [("alpha".to_owned(), Some(LONGER)), ("gamma".to_owned(), None)];
        assert_eq!(process.rests(), expected.clone().into());
        process.come_to_rest();
        assert_eq!(process.stored(), expected.into());
    });
}

/// Few steps, so that priorities change at the right ones.
#[test]
fn a_mark_during_an_insert_reaches_new_indexes() {
    in_many_schedules(|| {
        let process = Process::without_store();
        at_once(
            &process,
            [
                |process| process.mark("alpha", COOLDOWN),
                |process| block_on(process.pool.insert("beta", "sk-2")).unwrap(),
            ],
        );
        process.assert_in_line();
    });
}

#[test]
fn pick_finds_a_healthy_key_amid_concurrent_changes() {
    in_many_schedules(|| {
        let process = Process::start();
        at_once(
            &process,
            [
                |process| {
                    process.mark("beta", COOLDOWN);
                    process.clock.advance(COOLDOWN);
                    process.picked().unwrap();
                },
                |process| {
                    block_on(process.pool.insert("gamma", "sk-3")).unwrap();
                    block_on(process.pool.remove("gamma")).unwrap();
                },
                |process| process.reload(),
                |process| {
                    process.picked().unwrap();
                    assert_eq!(process.pool.next_return(), Some(Duration::ZERO));
                    process.picked().unwrap();
                },
            ],
        );
        process.come_to_rest();
    });
}

#[test]
fn a_return_is_counted_once_whoever_notices_it() {
    in_many_schedules(|| {
        let process = Process::without_store();
        process.mark("alpha", COOLDOWN);
        process.clock.advance(COOLDOWN);
        at_once(
            &process,
            [
                |process| assert!(process.picked().is_some()),
                |process| assert!(process.picked().is_some()),
                |process| process.sweep(),
                |process| assert_eq!(process.pool.stats().healthy, 1),
            ],
        );
        assert_eq!(process.pool.stats().keys[0].recovered, 1);
        process.assert_in_line();
    });
}
