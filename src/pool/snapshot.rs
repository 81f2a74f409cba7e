//! The keys of a pool at one moment, and indexes over their states.
//!
//! A key's own state is the truth. `available` and `cooling` only say where to look: each change of a state
//! is followed by [`Snapshot::refresh`], and who comes to a key through an index checks the state itself.

use std::{
    hash::{BuildHasher, RandomState},
    ops::Range,
    sync::Arc,
};

use hashbrown::HashTable;

use super::{bitset::AtomicBitSet, deadlines::Deadlines, key::Key};
use crate::{
    key::KeyId,
    limit::{NEVER, State},
    sync::atomic::{
        AtomicU64, AtomicUsize,
        Ordering::{Relaxed, SeqCst},
    },
};

/// The most keys that one pick returns to service: bounds the time a single request can spend on it.
const EXPIRED_PER_PICK: usize = 16;

#[derive(Debug)]
pub(crate) struct Snapshot {
    keys: Box<[Arc<Key>]>,
    by_id: SlotsById,
    available: AtomicBitSet,
    cooling: Deadlines,
    unwritten: AtomicBitSet,
    cursor: Cursor,
    /// How often slots have begun, and have ended, to be refreshed.
    begun: AtomicU64,
    ended: AtomicU64,
}

/// Every pick writes it, so nothing that every pick reads may stand on its cache line, nor on the one that
/// processors fetch with it.
#[derive(Debug)]
#[repr(align(128))]
struct Cursor(AtomicUsize);

impl Snapshot {
    /// Goes on with the turn where `before` stood: keys that stay have to stand in the same order as there, and
    /// new ones behind them.
    pub(crate) fn new(keys: Vec<Arc<Key>>, before: Option<&Self>) -> Self {
        let snapshot = Self {
            by_id: SlotsById::new(&keys),
            available: AtomicBitSet::new(keys.len()),
            cooling: Deadlines::new(keys.len()),
            unwritten: AtomicBitSet::new(keys.len()),
            cursor: Cursor(AtomicUsize::new(0)),
            begun: AtomicU64::new(0),
            ended: AtomicU64::new(0),
            keys: keys.into(),
        };
        if let Some(before) = before {
            let had_their_turn = before.keys.iter().take(before.cursor.0.load(Relaxed));
            let stay = had_their_turn.filter(|key| snapshot.slot(&key.id).is_some()).count();
            snapshot.cursor.0.store(stay, Relaxed);
        }
        for (slot, key) in snapshot.keys.iter().enumerate() {
            key.set_slot(slot);
        }
        snapshot.refresh_all();
        snapshot
    }

    pub(crate) fn keys(&self) -> &[Arc<Key>] {
        &self.keys
    }

    pub(crate) fn get(&self, id: &str) -> Option<&Arc<Key>> {
        self.by_id.find(id, &self.keys).map(|slot| &self.keys[slot])
    }

    pub(crate) fn slot(&self, id: &KeyId) -> Option<usize> {
        self.by_id.find(id.as_str(), &self.keys)
    }

    /// The next available key in turn.
    #[inline(always)]
    pub(crate) fn pick(&self) -> Option<&Arc<Key>> {
        let cursor = self.cursor.0.load(Relaxed);
        // Most often it is close by, and nobody else picks just now.
        if let Some(slot) = self.available.next_close_by(self.begin_from(cursor))
            && let Some(key) = self.take(cursor, slot)
            && key.state.load() == State::HEALTHY
        {
            return Some(key);
        }
        self.pick_however_long_it_takes()
    }

    fn pick_however_long_it_takes(&self) -> Option<&Arc<Key>> {
        loop {
            let cursor = self.cursor.0.load(Relaxed);
            let slot = self.next_available(self.begin_from(cursor))?;
            let Some(key) = self.take(cursor, slot) else { continue };
            if key.state.load() == State::HEALTHY {
                return Some(key);
            }
            self.refresh_slot(slot);
        }
    }

    /// Behind the last key the round begins anew; unless keys have been added there meanwhile.
    #[inline(always)]
    fn begin_from(&self, cursor: usize) -> usize {
        if cursor < self.keys.len() { cursor } else { 0 }
    }

    /// Passes the turn to the key behind the one that is picked, not behind the one that was asked for: every
    /// available key gets its share, whatever rests between them.
    #[inline(always)]
    fn take(&self, cursor: usize, slot: usize) -> Option<&Arc<Key>> {
        let taken = self.cursor.0.compare_exchange(cursor, slot + 1, Relaxed, Relaxed);
        taken.is_ok().then(|| &self.keys[slot])
    }

    #[inline]
    fn next_available(&self, cursor: usize) -> Option<usize> {
        self.available.next_from(cursor).or_else(|| self.first_available())
    }

    fn first_available(&self) -> Option<usize> {
        self.available.next_from(0).or_else(|| self.available.scan_from(0))
    }

    pub(crate) fn has_available(&self) -> bool {
        self.first_available().is_some()
    }

    #[cfg(feature = "failover")]
    pub(crate) fn count_available(&self) -> usize {
        self.available.count()
    }

    /// When the first resting key is due back, at the earliest.
    #[inline]
    pub(crate) fn earliest(&self) -> u64 {
        self.cooling.earliest()
    }

    /// The same, without the moment in which another thread moves a deadline back.
    pub(crate) fn next_deadline(&self) -> u64 {
        self.cooling.earliest_for_certain()
    }

    /// The same for those who would otherwise give up; zero where a key is available after all. It looks at
    /// every key's state where another thread is just bringing the indexes in line with one, and does so itself
    /// with the first key: who looks again needs not wait for that thread, which may have been stopped.
    pub(crate) fn earliest_for_certain(&self) -> u64 {
        let ended = self.ended.load(SeqCst);
        if self.has_available() {
            return 0;
        }
        let earliest = self.next_deadline();
        if self.begun.load(SeqCst) == ended {
            return earliest;
        }
        let due = |slot: usize| match self.keys[slot].state.load() {
            State::HEALTHY => 0,
            state => state.deadline(),
        };
        let Some((first, slot)) = (0..self.keys.len()).map(|slot| (due(slot), slot)).min() else {
            return NEVER;
        };
        self.refresh_slot(slot);
        first
    }

    /// Returns a bounded number of keys whose cooldown has ended, and says which.
    pub(crate) fn return_expired(&self, now: u64, mut returned: impl FnMut(&Arc<Key>)) {
        // From the cursor on, so that a key whose turn it is has come back before it is passed over.
        let cursor = self.cursor.0.load(Relaxed);
        for _ in 0..EXPIRED_PER_PICK {
            let due = self.cooling.next_due(cursor, now).or_else(|| self.cooling.next_due(0, now));
            let Some(slot) = due else { return self.cooling.put_first_path_right(now) };
            let key = &self.keys[slot];
            let expired = key.state.update(|state| if state.is_over(now) { State::HEALTHY } else { state });
            self.refresh_slot(slot);
            if expired.is_some() {
                returned(key);
            }
        }
    }

    /// Brings the indexes in line with the state of a key, if this snapshot has it.
    pub(crate) fn refresh(&self, key: &Arc<Key>) {
        if let Some(slot) = self.slot_of(key) {
            self.refresh_slot(slot);
        }
    }

    pub(crate) fn refresh_all(&self) {
        (0..self.keys.len()).for_each(|slot| self.refresh_slot(slot));
    }

    fn slot_of(&self, key: &Arc<Key>) -> Option<usize> {
        let holds = |slot: &usize| self.keys.get(*slot).is_some_and(|held| Arc::ptr_eq(held, key));
        Some(key.slot()).filter(holds).or_else(|| self.slot(&key.id).filter(holds))
    }

    fn refresh_slot(&self, slot: usize) {
        let key = &self.keys[slot];
        self.begun.fetch_add(1, SeqCst);
        loop {
            let state = key.state.load();
            // A key is in both indexes for a moment rather than in neither: who finds it nowhere gives up.
            if state == State::HEALTHY {
                self.available.insert(slot);
                self.cooling.set(slot, state.deadline());
            } else {
                self.cooling.set(slot, state.deadline());
                self.available.remove(slot);
            }
            if key.unwritten.waits() {
                self.unwritten.insert(slot);
            }
            // Two refreshes of one slot may overlap; the one that wrote last still has to look.
            if key.state.load() == state {
                break;
            }
        }
        self.ended.fetch_add(1, SeqCst);
    }

    /// Takes the next key in these places of which a mark waits.
    pub(crate) fn take_unwritten(&self, slots: Range<usize>) -> Option<(usize, &Arc<Key>)> {
        let slot = self.unwritten.next_from(slots.start).filter(|slot| *slot < slots.end)?;
        self.unwritten.remove(slot);
        Some((slot, &self.keys[slot]))
    }

    pub(crate) fn count_unwritten(&self) -> usize {
        self.keys.iter().filter(|key| key.unwritten.waits()).count()
    }

    /// Fails where an index does not say what the states say, while nobody changes one.
    #[cfg(all(test, any(schedules = "loom", schedules = "shuttle")))]
    pub(crate) fn assert_in_line(&self) {
        let slots_of = |next: &dyn Fn(usize) -> Option<usize>| {
            std::iter::successors(next(0), |slot| next(slot + 1)).collect::<Vec<_>>()
        };
        let slots_where = |holds: &dyn Fn(&Key) -> bool| {
            (0..self.keys.len()).filter(|slot| holds(&self.keys[*slot])).collect::<Vec<_>>()
        };
        let deadline = |key: &Key| key.state.load().deadline();
        for time in self.keys.iter().map(|key| deadline(key)).chain([NEVER - 1]) {
            let due = slots_where(&|key| deadline(key) <= time);
            assert_eq!(slots_of(&|slot| self.cooling.next_due(slot, time)), due, "due at {time}");
        }
        assert!(self.keys.iter().all(|key| self.earliest() <= deadline(key)), "a deadline is overlooked");
        let healthy = slots_where(&|key| key.state.load() == State::HEALTHY);
        assert_eq!(slots_of(&|slot| self.available.next_from(slot)), healthy, "available");
        let waiting = slots_where(&|key| key.unwritten.waits());
        let unwritten = slots_of(&|slot| self.unwritten.next_from(slot));
        assert!(waiting.iter().all(|slot| unwritten.contains(slot)), "a mark waits, and nobody knows");
    }
}

/// Which key an id is: an index into the keys, which hold the ids.
#[derive(Debug)]
struct SlotsById {
    slots: HashTable<u32>,
    hasher: RandomState,
}

impl SlotsById {
    /// Ids are taken to be all different: a pool sees to that.
    fn new(keys: &[Arc<Key>]) -> Self {
        let hasher = RandomState::new();
        let hash = |slot: &u32| hasher.hash_one(keys[*slot as usize].id.as_str());
        let mut slots = HashTable::with_capacity(keys.len());
        for slot in 0..keys.len() as u32 {
            slots.insert_unique(hash(&slot), slot, hash);
        }
        Self { slots, hasher }
    }

    fn find(&self, id: &str, keys: &[Arc<Key>]) -> Option<usize> {
        let is_it = |slot: &u32| keys[*slot as usize].id.as_str() == id;
        self.slots.find(self.hasher.hash_one(id), is_it).map(|slot| *slot as usize)
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Weak, time::Duration};

    use super::*;
    use crate::{key::inject::Inject, limit::Rest, pool::key::UsableKey};

    fn snapshot(ids: &[&str]) -> Snapshot {
        let key =
            |id: &&str| UsableKey::new(KeyId::new(id).unwrap(), &"sk".into(), &Inject::bearer()).unwrap();
        Snapshot::new(ids.iter().map(|id| key(id).healthy_in(Weak::new())).collect(), None)
    }

    #[test]
    fn a_key_whose_state_has_changed_is_not_picked_although_the_index_does_not_know_it_yet() {
        let snapshot = snapshot(&["alpha", "beta"]);
        let resting = State::resting(Rest::RateLimited, Some(Duration::from_secs(120)));
        snapshot.keys()[0].state.update(|_| resting);
        for _ in 0..3 {
            assert_eq!(snapshot.pick().unwrap().id.as_str(), "beta");
        }
        snapshot.keys()[1].state.update(|_| resting);
        assert!(snapshot.pick().is_none());
    }

    #[test]
    fn who_would_give_up_goes_by_the_states_of_keys_while_one_is_being_refreshed() {
        let snapshot = snapshot(&["alpha"]);
        let resting = State::resting(Rest::RateLimited, Some(Duration::from_secs(120)));
        snapshot.keys()[0].state.update(|_| resting);
        // What another thread sees that comes between the two indexes.
        snapshot.available.remove(0);
        assert_eq!(snapshot.earliest_for_certain(), NEVER);
        snapshot.begun.fetch_add(1, SeqCst);
        assert_eq!(snapshot.earliest_for_certain(), resting.deadline());
        snapshot.keys()[0].state.update(|_| State::HEALTHY);
        assert_eq!(snapshot.earliest_for_certain(), 0);
    }

    #[test]
    fn a_mark_is_taken_out_of_the_places_that_are_asked_for_only() {
        let snapshot = snapshot(&["alpha", "beta"]);
        snapshot.keys()[1].unwritten.extend(State::resting(Rest::Revoked, None));
        snapshot.refresh_slot(1);
        assert!(snapshot.take_unwritten(0..1).is_none());
        assert_eq!(snapshot.take_unwritten(0..2).map(|(slot, _)| slot), Some(1));
        assert!(snapshot.take_unwritten(0..2).is_none());
    }

    #[test]
    fn a_key_is_found_by_its_id_and_no_other_is() {
        let snapshot = snapshot(&["alpha", "beta"]);
        assert_eq!(snapshot.get("beta").unwrap().id.as_str(), "beta");
        assert!(snapshot.get("gamma").is_none());
    }
}
