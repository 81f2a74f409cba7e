//! One pool and its store, and all that may happen to them at once, in schedules that `shuttle` chooses: at random,
//! and with priorities that change at a few random steps (PCT). CONTRIBUTING.md says how to run it.
//!
//! A failure names its schedule, which `shuttle::replay` plays again.

use std::{collections::BTreeMap, env, sync::Arc, time::Duration};

use shuttle::{
    future::{block_on, yield_now},
    thread,
};

use super::{KeyPool, Lease, Rest, Status};
use crate::{
    clock::ManualClock,
    key::{KeyId, Secret},
    store::{KeyRecord, KeyStore, Loaded, Mark, MemoryStore, Recovered, StoreFuture},
};

const SECOND: Duration = Duration::from_secs(1);
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
    fn load(&self) -> StoreFuture<'_, Loaded> {
        Box::pin(slowly(async { self.0.load().await }))
    }

    fn write(&self, mark: Mark) -> StoreFuture<'_, ()> {
        Box::pin(slowly(async { self.0.write(mark).await }))
    }

    fn recover(&self) -> StoreFuture<'_, Recovered> {
        Box::pin(slowly(async { self.0.recover().await }))
    }

    fn insert(&self, id: KeyId, secret: Secret) -> StoreFuture<'_, bool> {
        Box::pin(slowly(async { self.0.insert(id, secret).await }))
    }

    fn remove<'a>(&'a self, id: &'a KeyId) -> StoreFuture<'a, bool> {
        Box::pin(slowly(async { self.0.remove(id).await }))
    }

    fn reset<'a>(&'a self, id: &'a KeyId) -> StoreFuture<'a, bool> {
        Box::pin(slowly(async { self.0.reset(id).await }))
    }

    fn set_disabled<'a>(&'a self, id: &'a KeyId, disabled: bool) -> StoreFuture<'a, bool> {
        Box::pin(slowly(async move { self.0.set_disabled(id, disabled).await }))
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
        Lease(self.pool.inner.snapshot.load().get(id).unwrap().clone())
    }

    /// A response says that the key is to rest that long.
    fn mark(&self, id: &str, time: Duration) {
        self.pool.mark(&self.lease(id), Rest::RateLimited, Some(time), 429);
    }

    fn picked(&self) -> Option<String> {
        self.pool.pick().map(|lease| lease.id().to_string())
    }

    fn write_marks(&self) {
        block_on(self.pool.write_marks()).unwrap();
    }

    fn sweep(&self) {
        block_on(self.pool.sweep()).unwrap();
    }

    fn reload(&self) {
        block_on(self.pool.reload()).unwrap();
    }

    /// How long each key rests.
    fn rests(&self) -> BTreeMap<String, Option<Duration>> {
        let keys = self.pool.stats().keys;
        keys.into_iter().map(|key| (key.id.to_string(), key.time_left)).collect()
    }

    /// The same as the store has it.
    fn stored(&self) -> BTreeMap<String, Option<Duration>> {
        let left = |record: &KeyRecord| record.rest.and_then(|(_, left)| left);
        let records = block_on(self.store.0.load()).unwrap().records;
        records.iter().map(|record| (record.id.to_string(), left(record))).collect()
    }

    fn assert_in_line(&self) {
        self.pool.inner.snapshot.load_full().assert_in_line();
    }

    /// A last pass, when nobody does anything else any more.
    fn come_to_rest(&self) {
        self.assert_in_line();
        self.write_marks();
        self.sweep();
        self.reload();
        assert_eq!(self.pool.marks_waiting(), 0);
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

/// Broken once: where a write was taken for one of all that waits, and where every reload was believed, it failed.
#[test]
fn f08_no_reload_shortens_a_rest_that_the_store_did_not_know_of_yet() {
    in_many_schedules(|| {
        let process = Process::start();
        at_once(
            &process,
            [
                |process| {
                    process.mark("alpha", COOLDOWN);
                    process.mark("alpha", LONGER);
                    assert_eq!(process.picked().as_deref(), Some("beta"));
                },
                |process| {
                    process.write_marks();
                    process.write_marks();
                },
                |process| {
                    process.reload();
                    process.reload();
                },
            ],
        );
        assert_eq!(process.rests()["alpha"], Some(LONGER));
        process.come_to_rest();
        assert_eq!(process.stored()["alpha"], Some(LONGER));
    });
}

/// Broken once: where every due key was returned whatever its state, and where a mark changed the key's state before what
/// waits to be written, it failed.
#[test]
fn f07_a_sweep_leaves_the_mark_that_comes_as_an_older_one_ends() {
    in_many_schedules(|| {
        let process = Process::start();
        process.mark("alpha", COOLDOWN);
        process.write_marks();
        process.clock.advance(COOLDOWN);
        at_once(
            &process,
            [
                |process| process.mark("alpha", LONGER),
                |process| process.write_marks(),
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

/// Broken once: with a load and a store in `AtomicState::update`, it failed.
#[test]
fn f10_of_marks_at_once_the_longest_holds_in_memory_and_in_the_store() {
    in_many_schedules(|| {
        let process = Process::start();
        at_once(
            &process,
            [
                |process| process.mark("alpha", LONGER),
                |process| process.mark("alpha", 2 * COOLDOWN),
                |process| process.mark("alpha", COOLDOWN),
                |process| {
                    process.write_marks();
                    process.write_marks();
                },
            ],
        );
        assert_eq!(process.rests()["alpha"], Some(LONGER));
        process.come_to_rest();
        assert_eq!(process.stored()["alpha"], Some(LONGER));
    });
}

/// Broken once: where the store took older marks after a reset, it failed.
#[test]
fn f09_a_reset_wins_over_an_older_mark_that_another_process_still_holds() {
    in_many_schedules(|| {
        let here = Process::start();
        let there = Process::join(here.store.clone(), here.clock.clone());
        there.mark("alpha", LONGER);
        here.clock.advance(SECOND);
        let theirs = thread::spawn({
            let there = there.clone();
            move || {
                let reload = |there: &Process| there.reload();
                at_once(&there, [|there| there.write_marks(), reload]);
            }
        });
        at_once(
            &here,
            [|here| block_on(here.pool.reset("alpha")).unwrap(), |here| here.reload(), |here| here.sweep()],
        );
        theirs.join().unwrap();
        there.come_to_rest();
        here.come_to_rest();
        assert_eq!((here.rests()["alpha"], there.rests()["alpha"]), (None, None));
    });
}

/// All of it in one instant, so that no time says what came first.
/// Broken once: where a reset did not wait for a write under way, it failed.
#[test]
fn f09_a_reset_wins_over_a_mark_that_is_just_being_written() {
    in_many_schedules(|| {
        let process = Process::start();
        process.mark("alpha", LONGER);
        at_once(
            &process,
            [|process| process.write_marks(), |process| block_on(process.pool.reset("alpha")).unwrap()],
        );
        process.come_to_rest();
        assert_eq!(process.rests()["alpha"], None);
    });
}

/// Broken once: where a reset asked for news before its change, and where it did not write them again, it
/// failed.
#[test]
fn f09_a_mark_that_is_news_to_a_reset_outlives_it() {
    in_many_schedules(|| {
        let process = Process::start();
        process.mark("alpha", COOLDOWN);
        let reset = process.pool.reset_that_waits("alpha");
        process.clock.advance(SECOND);
        let reset = thread::spawn(|| block_on(reset).unwrap());
        at_once(
            &process,
            [
                |process| process.mark("alpha", LONGER),
                |process| process.write_marks(),
                |process| process.reload(),
            ],
        );
        reset.join().unwrap();
        assert_eq!(process.rests()["alpha"], Some(LONGER));
        process.come_to_rest();
        assert_eq!(process.stored()["alpha"], Some(LONGER));
    });
}

/// Broken once: where a reset left what waited to be written, and where it ended that after the key's state, it failed.
#[test]
fn f09_a_reset_leaves_no_more_than_what_was_said_since() {
    in_many_schedules(|| {
        let process = Process::start();
        process.mark("alpha", LONGER);
        process.clock.advance(SECOND);
        at_once(
            &process,
            [
                |process| block_on(process.pool.reset("alpha")).unwrap(),
                |process| {
                    process.clock.advance(SECOND);
                    process.mark("alpha", COOLDOWN);
                },
                |process| process.write_marks(),
                |process| process.reload(),
            ],
        );
        assert!(process.rests()["alpha"].is_none_or(|rest| rest <= COOLDOWN));
        process.come_to_rest();
        assert!(process.stored()["alpha"].is_none_or(|rest| rest <= COOLDOWN));
    });
}

/// Broken once: without the second change, by a reset or by `set_disabled`, it failed.
#[test]
fn what_an_operator_said_of_a_key_is_not_undone_by_a_reload_that_had_read_the_store_before() {
    in_many_schedules(|| {
        let process = Process::start();
        process.mark("alpha", LONGER);
        process.write_marks();
        at_once(
            &process,
            [
                |process| block_on(process.pool.reset("alpha")).unwrap(),
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

/// Broken once: where a reload brought in what it found of a key that is leaving, it failed.
#[test]
fn keys_come_and_go_while_others_are_marked_and_reloaded() {
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
/// Broken once: without `refresh_all` after the swap, it failed.
#[test]
fn a_mark_beside_a_change_of_the_set_is_in_the_indexes_of_the_new_one() {
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

/// Broken once: where a pick gave up as another thread took its turn, it failed.
#[test]
fn a_key_that_is_healthy_all_the_time_is_found_whatever_becomes_of_the_others() {
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

/// Broken once: where each look at a due key counted, it failed.
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
