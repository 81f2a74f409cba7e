//! What holds in every order in which threads may run, and whatever they may see of each other: `loom` tries them
//! all, as long as no more than three times a thread is stopped where it could go on. CONTRIBUTING.md says how to
//! run it.
//!
//! An index has two slots to a word or node here, so that a few keys are spread over three levels.

use std::{sync::Arc, time::Duration};

use futures_util::FutureExt;
use loom::{model::Builder, thread};

use super::{
    KeyPool, Lease, NEVER, Rest, Snapshot,
    bitset::AtomicBitSet,
    deadlines::Deadlines,
    state::{AtomicState, State},
};
use crate::{
    clock::ManualClock,
    store::{KeyStore, Mark, MemoryStore},
};

const SECOND: Duration = Duration::from_secs(1);
const COOLDOWN: Duration = Duration::from_secs(120);

fn model(test: impl Fn() + Send + Sync + 'static) {
    let mut builder = Builder::new();
    // `LOOM_MAX_PREEMPTIONS` says otherwise.
    builder.preemption_bound.get_or_insert(3);
    builder.check(test);
}

/// Runs both at once, until both are done.
fn at_once<T, A, B>(
    shared: &T,
    one: impl FnOnce(&T) -> A + 'static,
    other: impl FnOnce(&T) -> B + 'static,
) -> (A, B)
where
    T: Clone + 'static,
    A: 'static,
    B: 'static,
{
    let (its, others) = (shared.clone(), shared.clone());
    let (one, other) = (thread::spawn(move || one(&its)), thread::spawn(move || other(&others)));
    (one.join().unwrap(), other.join().unwrap())
}

// ---- the set of available slots ----

#[derive(Clone, Copy, Debug)]
enum Change {
    Insert(usize),
    Remove(usize),
}

impl Change {
    fn make(self, set: &AtomicBitSet) {
        match self {
            Self::Insert(slot) => set.insert(slot),
            Self::Remove(slot) => set.remove(slot),
        }
    }
}

/// Fails where a summary says that there is nothing although there is something.
fn assert_members(set: &AtomicBitSet, members: &[usize]) {
    for from in 0..8 {
        let next = members.iter().copied().find(|slot| *slot >= from);
        assert_eq!((set.next_from(from), set.scan_from(from)), (next, next), "from {from}");
    }
}

fn set_of(members: &[usize]) -> Arc<AtomicBitSet> {
    let set = AtomicBitSet::new(8);
    members.iter().for_each(|slot| set.insert(*slot));
    Arc::new(set)
}

/// Slots of one word, of two words below one summary, and of two summaries; none of them in the first word, which a
/// search looks at whatever a summary says.
/// Broken once: where `remove` did not look at the word below again, it failed.
#[test]
fn no_summary_is_lost_between_two_changes() {
    use Change::{Insert, Remove};
    for (before, one, other, after) in [
        (&[3][..], Insert(2), Remove(3), &[2][..]),
        (&[5], Insert(4), Remove(5), &[4]),
        (&[5], Insert(6), Remove(5), &[6]),
        (&[3], Insert(6), Remove(3), &[6]),
        (&[], Insert(4), Insert(5), &[4, 5]),
        (&[], Insert(4), Insert(6), &[4, 6]),
        (&[4, 5], Remove(4), Remove(5), &[]),
        (&[4, 6], Remove(4), Remove(6), &[]),
        (&[4, 6, 7], Remove(4), Remove(6), &[7]),
    ] {
        model(move || {
            let set = set_of(before);
            at_once(&set, move |set| one.make(set), move |set| other.make(set));
            assert_members(&set, after);
        });
    }
}

/// Broken once: like the one before.
#[test]
fn a_set_that_three_threads_change_at_once_loses_none() {
    model(|| {
        let set = set_of(&[5]);
        let remove = thread::spawn({
            let set = set.clone();
            move || set.remove(5)
        });
        at_once(&set, |set| set.insert(4), |set| set.insert(6));
        remove.join().unwrap();
        assert_members(&set, &[4, 6]);
    });
}

/// While a summary is wrong, too.
/// Broken once: where the scan went by summaries, it failed.
#[test]
fn a_slot_that_was_inserted_is_found_by_a_scan_whatever_changes_beside_it() {
    model(|| {
        let set = set_of(&[5]);
        let go_and_come = |set: &Arc<AtomicBitSet>| {
            set.remove(5);
            set.insert(5);
        };
        let insert = |set: &Arc<AtomicBitSet>| {
            set.insert(4);
            assert_eq!(set.scan_from(0), Some(4));
        };
        at_once(&set, go_and_come, insert);
        assert_members(&set, &[4, 5]);
    });
}

// ---- the tree of deadlines ----

fn tree_of(deadlines: &[u64]) -> Arc<Deadlines> {
    let tree = Deadlines::new(8);
    deadlines.iter().enumerate().for_each(|(slot, deadline)| tree.set(slot, *deadline));
    Arc::new(tree)
}

/// Fails where the tree doesn't lead to each deadline in its time, or can't be brought to know the earliest.
fn assert_deadlines(tree: &Deadlines, deadlines: &[u64]) {
    let earliest = deadlines.iter().copied().min().unwrap_or(NEVER);
    assert!(tree.earliest() <= earliest, "a deadline is overlooked");
    assert!(tree.earliest_for_certain() <= earliest, "a deadline is overlooked for certain");
    for now in 0..9 {
        let due = deadlines.iter().position(|deadline| *deadline <= now);
        assert_eq!(tree.next_due(0, now), due, "at {now}");
        if due.is_none() {
            tree.put_first_path_right(now);
            assert!(tree.earliest() > now, "nothing is due at {now}, and everybody looks");
        }
    }
}

/// Slots of one node, of two nodes below one, and of two of those.
/// Broken once: without the last `fetch_min` of `raise`, it failed.
#[test]
fn no_deadline_is_overlooked_between_two_changes() {
    const SOON: u64 = 3;
    const LATER: u64 = 5;
    for (before, one, other, after) in [
        (&[SOON, NEVER][..], (0, NEVER), (1, LATER), &[NEVER, LATER][..]),
        (&[SOON, NEVER, NEVER], (0, NEVER), (2, LATER), &[NEVER, NEVER, LATER]),
        (&[SOON, NEVER, NEVER, NEVER, NEVER], (0, NEVER), (4, LATER), &[NEVER, NEVER, NEVER, NEVER, LATER]),
        (&[SOON, LATER], (0, NEVER), (1, NEVER), &[NEVER, NEVER]),
        (&[SOON, NEVER, LATER], (0, NEVER), (2, NEVER), &[NEVER, NEVER, NEVER]),
        (&[SOON, SOON, LATER], (0, LATER), (1, NEVER), &[LATER, NEVER, LATER]),
        (&[NEVER, NEVER], (0, LATER), (1, SOON), &[LATER, SOON]),
    ] {
        model(move || {
            let tree = tree_of(before);
            at_once(&tree, move |tree| tree.set(one.0, one.1), move |tree| tree.set(other.0, other.1));
            assert_deadlines(&tree, after);
        });
    }
}

/// Broken once: where the root was believed, it failed; where nodes were not told what was found, it went round
/// for ever.
#[test]
fn who_would_give_up_knows_of_a_deadline_that_others_are_just_moving_around() {
    for slot in [1, 2] {
        model(move || {
            let tree = tree_of(&[3, NEVER, NEVER]);
            let clear = |tree: &Arc<Deadlines>| tree.set(0, NEVER);
            let set = move |tree: &Arc<Deadlines>| {
                tree.set(slot, 5);
                // It comes to know without the other thread, which may have been stopped.
                while tree.earliest() > 5 {
                    assert!(tree.earliest_for_certain() <= 5);
                }
            };
            at_once(&tree, clear, set);
        });
    }
}

// ---- a key's state ----

fn limited(seconds: u32) -> State {
    State::resting(Rest::RateLimited, Some(SECOND * seconds))
}

/// Broken once: with a load and a store in `update`, it failed.
#[test]
fn f10_of_marks_at_once_the_longest_holds_and_an_operators_word_stands() {
    model(|| {
        let state = Arc::new(AtomicState::new(State::HEALTHY));
        let mark = |state: &Arc<AtomicState>, mark: State| _ = state.update(|before| before.later(mark));
        let longer = move |state: &Arc<AtomicState>| mark(state, limited(9));
        let shorter = move |state: &Arc<AtomicState>| {
            mark(state, limited(5));
            state.update(|before| before.disabled(true));
        };
        at_once(&state, longer, shorter);
        assert_eq!(state.load(), limited(9).disabled(true));
    });
}

// ---- the pool ----

fn pool_of(keys: usize) -> (KeyPool, ManualClock) {
    let clock = ManualClock::new();
    let keys = (0..keys).map(|key| (format!("key-{key}"), format!("sk-{key}")));
    let pool = KeyPool::builder().keys(keys).cooldown(COOLDOWN).clock(clock.clone()).build().unwrap();
    clock.advance(SECOND);
    (pool, clock)
}

fn lease(pool: &KeyPool, key: usize) -> Lease {
    Lease(pool.inner.snapshot.load().keys()[key].clone())
}

fn mark(pool: &KeyPool, key: usize) {
    pool.mark(&lease(pool, key), Rest::RateLimited, None, 429);
}

fn reset(pool: &KeyPool, key: usize) {
    done(pool.reset(format!("key-{key}")));
}

/// What has nothing to wait for.
fn done<T, E: std::fmt::Debug>(future: impl Future<Output = Result<T, E>>) -> T {
    future.now_or_never().unwrap().unwrap()
}

/// Whatever the key's state was.
fn set_state(pool: &KeyPool, key: usize, state: State) {
    let key = lease(pool, key).0;
    key.state.update(|_| state);
    pool.refresh(&key);
}

/// A rest that has ended, and that nobody has noticed yet.
fn over() -> State {
    limited(1)
}

fn picked(pool: &KeyPool) -> Option<usize> {
    let lease = pool.pick()?;
    Some(pool.inner.snapshot.load().slot(lease.id()).unwrap())
}

fn assert_in_line(pool: &KeyPool) {
    let snapshot: Arc<Snapshot> = pool.inner.snapshot.load_full();
    snapshot.assert_in_line();
}

/// Broken once: with a plain store of the cursor, two threads had the same two keys.
#[test]
fn picks_at_once_give_each_key_one_turn_in_a_round() {
    for resting in [None, Some(1)] {
        model(move || {
            let (pool, _) = pool_of(5);
            resting.into_iter().for_each(|key| mark(&pool, key));
            let two = |pool: &KeyPool| [picked(pool).unwrap(), picked(pool).unwrap()];
            let (ours, theirs) = at_once(&pool, two, two);
            assert!(ours.is_sorted() && theirs.is_sorted(), "out of turn: {ours:?} {theirs:?}");
            let mut all = [ours, theirs].concat();
            all.sort();
            assert_eq!(all, (0..5).filter(|key| Some(*key) != resting).take(4).collect::<Vec<_>>());
            assert_eq!(picked(&pool), Some(if resting.is_some() { 0 } else { 4 }));
        });
    }
}

/// Broken once: without the second look at the state, and where every due key was returned whatever its state,
/// it failed.
#[test]
fn f07_a_mark_beside_the_return_of_an_ended_rest_holds_and_the_indexes_agree() {
    model(|| {
        let (pool, _) = pool_of(1);
        set_state(&pool, 0, over());
        at_once(&pool, |pool| mark(pool, 0), |pool| drop(pool.pick()));
        assert_in_line(&pool);
        assert_eq!(picked(&pool), None);
        assert_eq!(pool.next_return(), Some(COOLDOWN));
    });
}

/// Broken once: without the second look at the state, it failed.
#[test]
fn a_mark_beside_a_reset_leaves_indexes_that_agree() {
    model(|| {
        let (pool, _) = pool_of(2);
        set_state(&pool, 1, over());
        at_once(&pool, |pool| mark(pool, 1), |pool| reset(pool, 1));
        assert_in_line(&pool);
    });
}

/// What takes it back has not yet noticed the mark.
/// Broken once: where a pick trusted the index, it failed.
#[test]
fn a_key_that_rested_before_a_pick_began_is_not_handed_out() {
    model(|| {
        let (pool, _) = pool_of(1);
        set_state(&pool, 0, over());
        let mark_and_pick = |pool: &KeyPool| {
            mark(pool, 0);
            assert_eq!(picked(pool), None);
        };
        at_once(&pool, |pool| drop(pool.pick()), mark_and_pick);
    });
}

/// Broken once: where a pick gave up as another thread took its turn, it failed.
#[test]
fn nobody_says_no_key_while_one_is_healthy_all_the_time() {
    model(|| {
        let (pool, clock) = pool_of(2);
        let rest_and_return = move |pool: &KeyPool| {
            mark(pool, 0);
            clock.advance(COOLDOWN);
            pool.pick();
        };
        let ask = |pool: &KeyPool| {
            assert!(pool.pick().is_some());
            assert_eq!(pool.next_return(), Some(Duration::ZERO));
        };
        at_once(&pool, rest_and_return, ask);
        assert_in_line(&pool);
    });
}

/// The mark takes the last key out of a word of the index, and tells the summary only when another one is there.
/// Broken once: without `scan_from`, it went round for ever.
#[test]
fn nobody_says_no_key_after_one_came_back_beside_one_that_goes() {
    model(|| {
        let (pool, _) = pool_of(4);
        [0, 1, 3].into_iter().for_each(|key| mark(&pool, key));
        let come = |pool: &KeyPool| {
            reset(pool, 3);
            assert!(pool.pick().is_some());
        };
        at_once(&pool, |pool| mark(pool, 2), come);
        assert_in_line(&pool);
    });
}

/// An index says that it rests until whoever wrote that has looked at the state again.
/// Broken once: without a look at the states, it failed; where the key that was found was not put into the
/// index, it went round for ever.
#[test]
fn nobody_says_no_key_after_the_only_one_came_back() {
    model(|| {
        let (pool, _) = pool_of(1);
        let come = |pool: &KeyPool| {
            reset(pool, 0);
            let key = pool.pick();
            let still_healthy = lease(pool, 0).0.state.load() == State::HEALTHY;
            assert!(key.is_some() || !still_healthy);
        };
        at_once(&pool, |pool| mark(pool, 0), come);
    });
}

/// It is healthy or due at each moment, and in an index all the while.
/// Broken once: with the two indexes written in the other order, it failed, and only where no refreshes were
/// counted: either is enough.
#[test]
fn nobody_says_no_key_while_the_only_one_rests_and_is_due_again() {
    for before in [State::HEALTHY, over()] {
        model(move || {
            let (pool, _) = pool_of(1);
            set_state(&pool, 0, before);
            let rest_or_return = move |pool: &KeyPool| match before {
                State::HEALTHY => set_state(pool, 0, over()),
                _ => drop(pool.pick()),
            };
            at_once(&pool, rest_or_return, |pool| assert!(pool.pick().is_some()));
            assert_in_line(&pool);
        });
    }
}

/// Broken once: like the one before.
#[test]
fn who_finds_no_key_knows_when_one_is_back() {
    model(|| {
        let (pool, _) = pool_of(1);
        let ask = |pool: &KeyPool| {
            if pool.pick().is_none() {
                assert_eq!(pool.next_return(), Some(COOLDOWN));
            }
        };
        at_once(&pool, |pool| mark(pool, 0), ask);
        assert_eq!(pool.next_return(), Some(COOLDOWN));
        assert_in_line(&pool);
    });
}

/// Over a store that has the key.
fn pool_over_store() -> (KeyPool, MemoryStore, ManualClock) {
    let clock = ManualClock::new();
    let store = MemoryStore::with_clock(Arc::new(clock.clone()));
    let builder = KeyPool::builder().key("key-0", "sk-0").cooldown(COOLDOWN).clock(clock.clone());
    (done(builder.open(store.clone())), store, clock)
}

fn write(pool: &KeyPool, store: &MemoryStore) {
    done(pool.clone().write_mark(lease(pool, 0).0, Arc::new(store.clone())));
}

fn reload(pool: &KeyPool) {
    done(pool.reload());
}

/// The first mark is what makes a write begin while the second one is made.
/// Broken once: where the key's state changed before what waits to be written, and where a write was taken for one of
/// all that waits, it failed.
#[test]
fn f08_a_mark_beside_a_write_and_a_reload_is_not_lost() {
    model(|| {
        let (pool, store, _) = pool_over_store();
        mark(&pool, 0);
        let write_and_reload = {
            let store = store.clone();
            move |pool: &KeyPool| {
                write(pool, &store);
                reload(pool);
            }
        };
        let exhaust = |pool: &KeyPool| pool.mark(&lease(pool, 0), Rest::Exhausted, None, 402);
        at_once(&pool, write_and_reload, exhaust);
        assert_eq!(pool.stats().exhausted, 1, "in memory");
        assert_in_line(&pool);
        write(&pool, &store);
        reload(&pool);
        assert_eq!(pool.stats().exhausted, 1, "in the store");
    });
}

/// Broken once: where reloads were not numbered, and where every one was believed, it failed.
#[test]
fn f08_a_reload_beside_a_mark_and_its_write_leaves_it() {
    model(|| {
        let (pool, store, _) = pool_over_store();
        let mark_and_write = move |pool: &KeyPool| {
            mark(pool, 0);
            write(pool, &store);
        };
        at_once(&pool, reload, mark_and_write);
        assert_eq!(pool.stats().rate_limited, 1);
        assert_in_line(&pool);
    });
}

/// The mark is for less than what was known, so that the key's state does not tell of it.
/// Broken once: where a reload did not look at what waits after its change, it failed.
#[test]
fn f08_a_reload_that_ends_a_rest_leaves_the_shorter_one_of_a_mark_beside_it() {
    model(|| {
        let (pool, store, _) = pool_over_store();
        let key = lease(&pool, 0).0;
        let long = Mark::new(key.id.clone(), key.secret(), Rest::Exhausted, None);
        done(store.write(long));
        reload(&pool);
        done(store.reset(&key.id));
        at_once(&pool, reload, |pool| mark(pool, 0));
        assert_eq!(pool.stats().healthy, 0);
        assert_in_line(&pool);
    });
}

/// The reset was asked for before the mark, and has to wait for its turn until then.
/// Broken once: where a mark did not look again at what waits to be written, it failed.
#[test]
fn f09_a_mark_that_is_written_before_the_key_rests_by_it_outlives_the_end_of_a_reset() {
    model(|| {
        let (pool, store, clock) = pool_over_store();
        let reset = pool.reset_that_waits("key-0");
        clock.advance(SECOND);
        let write_and_end_reset = {
            let store = store.clone();
            move |pool: &KeyPool| {
                write(pool, &store);
                done(reset);
            }
        };
        at_once(&pool, write_and_end_reset, |pool| mark(pool, 0));
        assert_eq!(pool.stats().rate_limited, 1, "in memory");
        write(&pool, &store);
        reload(&pool);
        assert_eq!(pool.stats().rate_limited, 1, "in the store");
    });
}
