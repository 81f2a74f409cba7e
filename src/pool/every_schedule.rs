//! Every schedule of two or three threads over the pool's atomics, with up to three preemptions, by `loom`.
//! CONTRIBUTING.md says how to run it.
//!
//! An index has two slots to a word or node here, so that a few keys are spread over three levels.

use std::{num::NonZeroU32, sync::Arc, time::Duration};

use futures_util::FutureExt;
use loom::{model::Builder, thread};

use super::{Head, KeyPool, KeyPoolBuilder, Lease, Trials, bitset::AtomicBitSet, deadlines::Deadlines};
use crate::{
    clock::ManualClock,
    key::{KeyId, KeySpec},
    limit::{AtomicWord, NEVER, Quota, Remaining, Rest, Resting, Status, Traits, Until, Word},
    store::{KeyStore, MemoryStore, Operation},
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

/// What is done to the set, and with which slot.
type Change = (fn(&AtomicBitSet, usize), usize);

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
#[test]
fn no_summary_is_lost_between_two_changes() {
    let insert = |slot| -> Change { (AtomicBitSet::insert, slot) };
    let remove = |slot| -> Change { (AtomicBitSet::remove, slot) };
    for (before, one, other, after) in [
        (&[3][..], insert(2), remove(3), &[2][..]),
        (&[5], insert(4), remove(5), &[4]),
        (&[5], insert(6), remove(5), &[6]),
        (&[3], insert(6), remove(3), &[6]),
        (&[], insert(4), insert(5), &[4, 5]),
        (&[], insert(4), insert(6), &[4, 6]),
        (&[4, 5], remove(4), remove(5), &[]),
        (&[4, 6], remove(4), remove(6), &[]),
        (&[4, 6, 7], remove(4), remove(6), &[7]),
    ] {
        model(move || {
            let set = set_of(before);
            at_once(&set, move |set| one.0(set, one.1), move |set| other.0(set, other.1));
            assert_members(&set, after);
        });
    }
}

#[test]
fn three_threads_changing_a_set_lose_no_slot() {
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
#[test]
fn a_scan_finds_an_inserted_slot_during_changes() {
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
            tree.correct_first_path(now);
            assert!(tree.earliest() > now, "nothing is due at {now}, and everybody looks");
        }
    }
}

/// Slots of one node, of two nodes below one, and of two of those.
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

#[test]
fn an_exact_search_finds_deadlines_during_updates() {
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

fn limited(generation: u64, seconds: u32) -> Word {
    let until = Until::After(SECOND * seconds);
    Word::new(generation, Some(Resting { until, reason: Rest::RateLimited }), Duration::ZERO)
}

#[test]
fn f10_concurrent_joins_lose_no_word() {
    model(|| {
        let state = Arc::new(AtomicWord::default());
        let join = |state: &Arc<AtomicWord>, word: Word| _ = state.update(|before| before.join(word));
        let longer = move |state: &Arc<AtomicWord>| join(state, limited(1, 9));
        let other = move |state: &Arc<AtomicWord>| {
            join(state, limited(0, 90));
            state.update(|before| before.with_disabled(true));
        };
        at_once(&state, longer, other);
        assert_eq!(state.load(), limited(1, 9).with_disabled(true));
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
    Lease::of(pool.engine().snapshot().keys()[key].clone())
}

fn mark(pool: &KeyPool, key: usize) {
    lease(pool, key).mark(Rest::RateLimited, None, 429);
}

fn reset(pool: &KeyPool, key: usize) {
    done(pool.reset(format!("key-{key}")));
}

/// What has nothing to wait for.
fn done<T, E: std::fmt::Debug>(future: impl Future<Output = Result<T, E>>) -> T {
    future.now_or_never().unwrap().unwrap()
}

/// Whatever the key's state was.
fn set_state(pool: &KeyPool, key: usize, state: Word) {
    let key = lease(pool, key).key;
    key.state.update(|_| state);
    pool.engine().refresh(&key);
}

/// A rest that has ended, and that nobody has noticed yet.
fn over() -> Word {
    limited(0, 1)
}

fn picked(pool: &KeyPool) -> Option<usize> {
    let lease = pool.engine().pick(Trials::OfAll)?;
    Some(pool.engine().snapshot().slot(lease.id()).unwrap())
}

fn assert_in_line(pool: &KeyPool) {
    pool.engine().snapshot().assert_in_line();
}

#[test]
fn concurrent_picks_use_each_key_once_per_round() {
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

#[test]
fn f07_a_mark_survives_a_concurrent_cooldown_expiry() {
    model(|| {
        let (pool, _) = pool_of(1);
        set_state(&pool, 0, over());
        at_once(&pool, |pool| mark(pool, 0), |pool| drop(pool.engine().pick(Trials::OfAll)));
        assert_in_line(&pool);
        assert_eq!(picked(&pool), None);
        assert_eq!(pool.next_return(), Some(COOLDOWN));
    });
}

#[test]
fn a_mark_during_a_reset_leaves_consistent_indexes() {
    model(|| {
        let (pool, _) = pool_of(2);
        set_state(&pool, 1, over());
        at_once(&pool, |pool| mark(pool, 1), |pool| reset(pool, 1));
        assert_in_line(&pool);
    });
}

/// What takes it back has not yet noticed the mark.
#[test]
fn a_pick_never_returns_a_key_marked_before() {
    model(|| {
        let (pool, _) = pool_of(1);
        set_state(&pool, 0, over());
        let mark_and_pick = |pool: &KeyPool| {
            mark(pool, 0);
            assert_eq!(picked(pool), None);
        };
        at_once(&pool, |pool| drop(pool.engine().pick(Trials::OfAll)), mark_and_pick);
    });
}

#[test]
fn pick_finds_the_key_that_stays_healthy() {
    model(|| {
        let (pool, clock) = pool_of(2);
        let rest_and_return = move |pool: &KeyPool| {
            mark(pool, 0);
            clock.advance(COOLDOWN);
            pool.engine().pick(Trials::OfAll);
        };
        let ask = |pool: &KeyPool| {
            assert!(pool.engine().pick(Trials::OfAll).is_some());
            assert_eq!(pool.next_return(), Some(Duration::ZERO));
        };
        at_once(&pool, rest_and_return, ask);
        assert_in_line(&pool);
    });
}

/// The mark takes the last key out of a word of the index, and tells the summary only when another one is there.
#[test]
fn pick_finds_the_reset_key_during_another_mark() {
    model(|| {
        let (pool, _) = pool_of(4);
        [0, 1, 3].into_iter().for_each(|key| mark(&pool, key));
        let come = |pool: &KeyPool| {
            reset(pool, 3);
            assert!(pool.engine().pick(Trials::OfAll).is_some());
        };
        at_once(&pool, |pool| mark(pool, 2), come);
        assert_in_line(&pool);
    });
}

/// An index says that it rests until whoever wrote that has looked at the state again.
#[test]
fn pick_finds_the_only_key_after_its_reset() {
    model(|| {
        let (pool, _) = pool_of(1);
        let come = |pool: &KeyPool| {
            reset(pool, 0);
            let key = pool.engine().pick(Trials::OfAll);
            let still_healthy = lease(pool, 0).key.state.load().is_available();
            assert!(key.is_some() || !still_healthy);
        };
        at_once(&pool, |pool| mark(pool, 0), come);
    });
}

/// It is healthy or due at each moment, and in an index all the while.
#[test]
fn pick_finds_a_key_while_it_changes_index() {
    for before in [Word::HEALTHY, over()] {
        model(move || {
            let (pool, _) = pool_of(1);
            set_state(&pool, 0, before);
            let rest_or_return = move |pool: &KeyPool| match before {
                Word::HEALTHY => set_state(pool, 0, over()),
                _ => drop(pool.engine().pick(Trials::OfAll)),
            };
            at_once(&pool, rest_or_return, |pool| assert!(pool.engine().pick(Trials::OfAll).is_some()));
            assert_in_line(&pool);
        });
    }
}

#[test]
fn next_return_is_known_whenever_a_pick_fails() {
    model(|| {
        let (pool, _) = pool_of(1);
        let ask = |pool: &KeyPool| {
            if pool.engine().pick(Trials::OfAll).is_none() {
                assert_eq!(pool.next_return(), Some(COOLDOWN));
            }
        };
        at_once(&pool, |pool| mark(pool, 0), ask);
        assert_eq!(pool.next_return(), Some(COOLDOWN));
        assert_in_line(&pool);
    });
}

// ---- keys in doubt ----

fn refuse(pool: &KeyPool, key: usize, status: u16) {
    lease(pool, key).refuse(status);
}

/// Another key served what that one refused.
fn confirm(pool: &KeyPool, key: usize) {
    pool.engine().confirm(&lease(pool, key).key, 401);
}

fn count(pool: &KeyPool, status: Status) -> usize {
    pool.stats().keys.iter().filter(|key| key.status == status).count()
}

#[test]
fn f37_concurrent_refusals_suspect_half_of_the_keys() {
    model(|| {
        let (pool, _) = pool_of(2);
        at_once(&pool, |pool| refuse(pool, 0, 401), |pool| refuse(pool, 1, 403));
        assert_in_line(&pool);
        assert_eq!((count(&pool, Status::Suspected), count(&pool, Status::Healthy)), (1, 1));
        assert!(picked(&pool).is_some());
    });
}

#[test]
fn f37_two_last_keys_are_never_revoked_at_once() {
    model(|| {
        let (pool, _) = pool_of(2);
        let revoke = |pool: &KeyPool, key: usize| lease(pool, key).mark(Rest::Revoked, None, 401);
        at_once(&pool, move |pool| revoke(pool, 0), move |pool| revoke(pool, 1));
        assert_in_line(&pool);
        assert_eq!(count(&pool, Status::Revoked), 1);
        assert!(pool.next_return().is_some());
    });
}

#[test]
fn f43_a_due_trial_goes_to_one_request() {
    model(|| {
        let (pool, clock) = pool_of(2);
        confirm(&pool, 0);
        clock.advance(60 * SECOND);
        let (ours, theirs) = at_once(&pool, picked, picked);
        let mut picked = [ours, theirs];
        picked.sort();
        assert_eq!(picked, [Some(0), Some(1)]);
    });
}

/// Whichever comes first, and whatever the indexes showed in between.
#[test]
fn f43_a_mark_survives_a_concurrent_trials_success() {
    model(|| {
        let (pool, _) = pool_of(2);
        confirm(&pool, 0);
        let limit = |pool: &KeyPool| lease(pool, 0).mark(Rest::RateLimited, Some(600 * SECOND), 429);
        at_once(&pool, |pool| lease(pool, 0).key.serves(), limit);
        assert_in_line(&pool);
        assert_eq!(pool.stats().keys[0].time_left, Some(600 * SECOND));
    });
}

#[test]
fn a_reset_during_a_refusal_leaves_consistent_indexes() {
    model(|| {
        let (pool, _) = pool_of(2);
        mark(&pool, 0);
        at_once(&pool, |pool| reset(pool, 0), |pool| refuse(pool, 0, 401));
        assert_in_line(&pool);
    });
}

/// Over a store that has the key.
fn pool_over_store() -> (KeyPool, MemoryStore) {
    let clock = ManualClock::new();
    let store = MemoryStore::with_clock(Arc::new(clock.clone()));
    let builder = KeyPool::builder().key("key-0", "sk-0").cooldown(COOLDOWN).clock(clock);
    (done(builder.open(store.clone())), store)
}

fn write(pool: &KeyPool) {
    done(pool.link().unwrap().clone().write_mark(lease(pool, 0).key));
}

/// The first mark is what makes a write begin while the second one is made.
#[test]
fn f08_a_mark_survives_a_concurrent_write_and_reload() {
    model(|| {
        let (pool, store) = pool_over_store();
        mark(&pool, 0);
        let write_and_reload = |pool: &KeyPool| {
            write(pool);
            done(pool.reload());
        };
        let exhaust = |pool: &KeyPool| lease(pool, 0).mark(Rest::Exhausted, None, 402);
        at_once(&pool, write_and_reload, exhaust);
        assert_eq!(pool.stats().exhausted, 1, "in memory");
        assert_in_line(&pool);
        write(&pool);
        let stored = done(store.load(None)).records.remove(0).standing.words;
        assert_eq!(stored.key.map(|resting| resting.reason), Some(Rest::Exhausted), "in the store");
    });
}

/// The mark belongs to the generation before the reset, or to the one after it, and to that in state and pending word.
#[test]
fn f09_marks_beside_a_loaded_reset_end_or_persist() {
    model(|| {
        let (pool, store) = pool_over_store();
        done(store.operate(lease(&pool, 0).id().clone(), Operation::Reset(None)));
        at_once(&pool, |pool| done(pool.reload()), |pool| mark(pool, 0));
        assert_in_line(&pool);
        let rests = pool.stats().rate_limited;
        write(&pool);
        let stored = done(store.load(None)).records.remove(0).standing.words;
        assert_eq!((pool.stats().rate_limited, stored.key.iter().count()), (rests, rests));
        assert_eq!(pool.stats().marks_waiting, 0);
    });
}

// ---- the limits of a scope ----

/// In a scope, with one unit a key. The limits exist already: `loom` does not see how `OnceLock` makes them.
fn pool_with_quota(keys: usize) -> KeyPool {
    let clock = ManualClock::new();
    let keys = (0..keys).map(|key| (format!("key-{key}"), format!("sk-{key}")));
    let quota = Quota::per_hour(1).burst(1);
    let pool = KeyPool::builder().keys(keys).quota(quota).clock(clock.clone()).build().unwrap();
    clock.advance(SECOND);
    let leases: Vec<_> =
        std::iter::from_fn(|| pool.engine().pick_for(&Traits::new(), Trials::OfAll).ok()).collect();
    leases.into_iter().for_each(Lease::put_back);
    pool
}

fn picked_in_scope(pool: &KeyPool) -> Option<usize> {
    let mut lease = pool.engine().pick_for(&Traits::new(), Trials::OfAll).ok()?;
    let slot = pool.engine().snapshot().slot(lease.id());
    // Answered: what it took is used.
    let said = Remaining::default();
    lease.settle(Head { is_limited: false, is_error: false, wait: None, said: &said });
    slot
}

/// With one preemption less: three threads have many schedules.
#[test]
fn picks_beside_a_refresh_take_each_unit_once() {
    let mut builder = Builder::new();
    builder.preemption_bound.get_or_insert(2);
    // Each of the three takes some hundred steps.
    builder.max_branches = 10_000;
    builder.check(|| {
        let pool = pool_with_quota(2);
        let refresher = thread::spawn({
            let pool = pool.clone();
            move || pool.engine().snapshot().scopes.each(|scoped| scoped.refresh_key(0))
        });
        let (ours, theirs) = at_once(&pool, picked_in_scope, picked_in_scope);
        refresher.join().unwrap();
        let mut all = [ours, theirs].into_iter().flatten().collect::<Vec<_>>();
        all.sort();
        assert_eq!(all, [0, 1]);
        assert_eq!(picked_in_scope(&pool), None);
    });
}

/// Whoever comes too late gets no key, and nothing is lost by its try.
#[test]
fn the_last_unit_of_a_scope_goes_to_one_pick() {
    model(|| {
        let pool = pool_with_quota(1);
        let (ours, theirs) = at_once(&pool, picked_in_scope, picked_in_scope);
        assert_eq!([ours, theirs].into_iter().flatten().collect::<Vec<_>>(), [0]);
        assert_eq!(picked_in_scope(&pool), None);
    });
}

/// A request that was not sent gives back its unit, and a pick after that finds it.
#[test]
fn a_unit_put_back_during_a_pick_is_found() {
    model(|| {
        let pool = pool_with_quota(1);
        let lease = pool.engine().pick_for(&Traits::new(), Trials::OfAll).unwrap();
        let put_back = thread::spawn(move || lease.put_back());
        let early = picked_in_scope(&pool);
        put_back.join().unwrap();
        assert_eq!(early.or_else(|| picked_in_scope(&pool)), Some(0));
        assert_eq!(picked_in_scope(&pool), None);
    });
}

/// One key for each pair of a weight and a limit of requests in flight.
fn pool_of_settings(settings: &[(u32, Option<u32>)]) -> KeyPool {
    let specs = (0..).zip(settings).map(|(number, (weight, most))| {
        let mut spec = KeySpec::new(KeyId::new(format!("key-{number}")).unwrap(), format!("sk-{number}"));
        spec.weight = NonZeroU32::new(*weight);
        spec.max_in_flight = most.and_then(NonZeroU32::new);
        spec
    });
    let pool = specs.fold(KeyPool::builder().clock(ManualClock::new()), KeyPoolBuilder::key_spec);
    let pool = pool.build().unwrap();
    // Makes the scope.
    pool.engine().pick_for(&Traits::new(), Trials::OfAll).unwrap().put_back();
    pool
}

/// Whether the pick comes before the end or after it, the next one finds the place.
#[test]
fn a_place_given_up_during_a_pick_is_found() {
    model(|| {
        let pool = pool_of_settings(&[(1, Some(1))]);
        let pick = |pool: &KeyPool| pool.engine().pick_for(&Traits::new(), Trials::OfAll).ok();
        let held = pick(&pool).unwrap();
        let ending = thread::spawn(move || drop(held));
        let early = pick(&pool);
        ending.join().unwrap();
        let lease = early.or_else(|| pick(&pool));
        assert!(lease.is_some() && pick(&pool).is_none());
    });
}

#[test]
fn the_last_place_goes_to_one_pick() {
    model(|| {
        let pool = pool_of_settings(&[(1, Some(1))]);
        let pick = |pool: &KeyPool| pool.engine().pick_for(&Traits::new(), Trials::OfAll).ok();
        let (ours, theirs) = at_once(&pool, pick, pick);
        assert!(ours.is_some() != theirs.is_some());
        drop((ours, theirs));
        assert!(pick(&pool).is_some());
    });
}

/// The turns of a key open and close one by one, but in the end all of them are as the key is.
#[test]
fn a_key_that_returns_has_all_its_turns() {
    model(|| {
        let pool = pool_of_settings(&[(2, None), (1, None)]);
        at_once(&pool, |pool| reset(pool, 0), |pool| mark(pool, 0));
        let turns = (0..3).map(|_| picked_in_scope(&pool)).filter(|slot| *slot == Some(0)).count();
        assert_eq!(turns, if pool.stats().rate_limited == 0 { 2 } else { 0 });
    });
}
