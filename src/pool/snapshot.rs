//! The keys of a pool at one moment, and indexes over their states.
//!
//! A key's own state is the truth. The indexes say where to look: each change of a state is followed by
//! [`Snapshot::refresh`], and whoever finds a key through an index checks its state.

use std::{
    hash::{BuildHasher, RandomState},
    ops::Range,
    sync::Arc,
};

use hashbrown::HashTable;

use super::{
    bitset::AtomicBitSet, deadlines::Deadlines, key::Key, layout::Layout, organisation::Organisation,
    scopes_in_use::ScopesInUse,
};
use crate::{
    key::KeyId,
    limit::NEVER,
    sync::atomic::{
        AtomicU64, AtomicUsize,
        Ordering::{Relaxed, SeqCst},
    },
};

/// The deadline that stands for trials. It never comes.
const TRIALS: u64 = NEVER - 1;

/// The most keys that one pick returns to service: bounds the time a single request can spend on it.
const EXPIRED_PER_PICK: usize = 16;

#[derive(Debug)]
pub(crate) struct Snapshot {
    keys: Arc<[Arc<Key>]>,
    by_id: SlotsById,
    available: AtomicBitSet,
    /// Of each slot, and behind them of none: that last one has a deadline while a key is to be tried. So a pick need not
    /// load anything more to know that nothing rests and nothing is to be tried.
    cooling: Deadlines,
    pending: AtomicBitSet,
    cursor: Cursor,
    /// How many refreshes of slots have begun, and have ended.
    begun: AtomicU64,
    ended: AtomicU64,
    layout: Arc<Layout>,
    pub(super) scopes: ScopesInUse,
}

/// Every pick writes the cursor, so nothing that every pick reads may be on its cache line, nor on the one that
/// processors fetch with it.
#[derive(Debug)]
#[repr(align(128))]
struct Cursor(AtomicUsize);

impl Snapshot {
    /// Continues the turn of `before`: keys that stay must be in the same order as there, and new ones behind them.
    pub(crate) fn new(mut keys: Vec<Arc<Key>>, before: Option<&Self>) -> Self {
        keys.sort_by_key(|key| key.tier());
        for (slot, key) in keys.iter().enumerate() {
            key.set_slot(slot);
        }
        let keys: Arc<[Arc<Key>]> = keys.into();
        let named = before.and_then(|before| before.organisations_of(&keys));
        let layout = Arc::new(Layout::new(&keys, named));
        let snapshot = Self {
            scopes: ScopesInUse::new(keys.clone(), layout.clone(), before.map(|before| &before.scopes)),
            layout,
            by_id: SlotsById::new(&keys),
            available: AtomicBitSet::new(keys.len()),
            cooling: Deadlines::new(keys.len() + 1),
            pending: AtomicBitSet::new(keys.len()),
            cursor: Cursor(AtomicUsize::new(0)),
            begun: AtomicU64::new(0),
            ended: AtomicU64::new(0),
            keys,
        };
        if let Some(before) = before {
            let had_their_turn = before.keys.iter().take(before.cursor.0.load(Relaxed));
            let stay = had_their_turn.filter(|key| snapshot.slot(&key.id).is_some()).count();
            snapshot.cursor.0.store(stay, Relaxed);
        }
        snapshot.refresh_all();
        snapshot
    }

    /// The organisations of the next snapshot's keys, if any is known.
    fn organisations_of(&self, keys: &[Arc<Key>]) -> Option<Box<[Organisation]>> {
        self.layout.named(0)?;
        let holds = |key: &Arc<Key>, slot: &usize| Arc::ptr_eq(&self.keys[*slot], key);
        let slot_of = |key: &Arc<Key>| self.slot(&key.id).filter(|slot| holds(key, slot));
        let known = |key| self.layout.named(slot_of(key)?).map(Organisation::copied);
        Some(keys.iter().map(|key| known(key).unwrap_or_default()).collect())
    }

    /// Whether keys differ in what they may serve: they have tiers, quota groups, weights or limits of
    /// requests in flight.
    pub(crate) fn has_choices(&self) -> bool {
        let layout = &self.layout;
        layout.tiers().len() > 1 || layout.groups() > 0 || layout.has_weights() || layout.has_caps()
    }

    /// Whether any key has a limit of requests in flight.
    pub(crate) fn has_caps(&self) -> bool {
        self.layout.has_caps()
    }

    /// Whether the keys belong to other quota groups by now.
    pub(crate) fn has_other_groups(&self) -> bool {
        self.layout.has_other_groups(&self.keys)
    }

    /// Brings the indexes of all scopes in line with a key that has room for another request in flight.
    pub(crate) fn refresh_in_scopes(&self, key: &Arc<Key>) {
        match self.slot_of(key) {
            Some(slot) => self.scopes.each(|scoped| scoped.refresh_key(slot)),
            // It was renamed: another object shares its limit.
            None => self.scopes.each(|scoped| scoped.refresh_all()),
        }
    }

    pub(crate) fn keys(&self) -> &[Arc<Key>] {
        &self.keys
    }

    pub(super) fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The slot at which the next pick begins to look.
    pub(super) fn turn(&self) -> usize {
        self.begin_from(self.cursor.0.load(Relaxed))
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
        // The usual case: the next key is close by, and no other thread picks at this moment.
        if let Some(slot) = self.available.next_close_by(self.begin_from(cursor))
            && let Some(key) = self.take(cursor, slot)
            && key.state.load().is_available()
        {
            return Some(key);
        }
        self.pick_slow()
    }

    fn pick_slow(&self) -> Option<&Arc<Key>> {
        loop {
            let cursor = self.cursor.0.load(Relaxed);
            let slot = self.next_available(self.begin_from(cursor))?;
            let Some(key) = self.take(cursor, slot) else { continue };
            if key.is_available() {
                return Some(key);
            }
            self.refresh_slot(slot);
        }
    }

    /// Behind the last key the round begins again, unless keys were added there meanwhile.
    #[inline(always)]
    fn begin_from(&self, cursor: usize) -> usize {
        if cursor < self.keys.len() { cursor } else { 0 }
    }

    /// Moves the cursor behind the key that is picked, not behind its own slot: so every available key gets the same
    /// share, whatever rests between them.
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

    pub(crate) fn count_available(&self) -> usize {
        self.available.count()
    }

    /// Whether a key other than these is available.
    pub(crate) fn has_available_besides(&self, keys: &[Arc<Key>]) -> bool {
        let next = |slot: &usize| self.available.next_from(slot + 1);
        std::iter::successors(self.available.next_from(0), next).any(|slot| {
            let key = &self.keys[slot];
            key.is_available() && !keys.iter().any(|other| Arc::ptr_eq(other, key))
        })
    }

    /// The earliest deadline of a resting key, or one that never comes if a key is to be tried.
    #[inline]
    pub(crate) fn earliest(&self) -> u64 {
        self.cooling.earliest()
    }

    /// Says whether a key is to be tried.
    pub(crate) fn show_trials(&self, has_any: bool) {
        self.cooling.set(self.keys.len(), if has_any { TRIALS } else { NEVER });
    }

    /// The earliest deadline, also while another thread moves one back.
    pub(crate) fn next_deadline(&self) -> u64 {
        match self.cooling.earliest_for_certain() {
            TRIALS => NEVER,
            deadline => deadline,
        }
    }

    /// The earliest deadline before a caller gives up; zero if a key is available.
    ///
    /// While another thread refreshes a slot, this reads every key's state, and refreshes the first key's slot itself:
    /// the caller's next look must not depend on a thread that may be descheduled.
    pub(crate) fn earliest_for_certain(&self) -> u64 {
        let ended = self.ended.load(SeqCst);
        if self.has_available() {
            return 0;
        }
        let earliest = self.next_deadline();
        if self.begun.load(SeqCst) == ended {
            return earliest;
        }
        let due = |slot: usize| match &self.keys[slot] {
            key if key.is_available() => 0,
            key => key.state.load().deadline(),
        };
        let Some((first, slot)) = (0..self.keys.len()).map(|slot| (due(slot), slot)).min() else {
            return NEVER;
        };
        self.refresh_slot(slot);
        first
    }

    /// Returns a bounded number of keys to service whose cooldown has ended, and calls `returned` with each.
    pub(crate) fn return_expired(&self, now: u64, mut returned: impl FnMut(&Arc<Key>)) {
        // A clock may show any time, but trials are no key's deadline.
        let now = now.min(TRIALS - 1);
        // From the cursor on: a key whose turn it is must come back before the cursor passes it.
        let cursor = self.cursor.0.load(Relaxed);
        for _ in 0..EXPIRED_PER_PICK {
            let due = self.cooling.next_due(cursor, now).or_else(|| self.cooling.next_due(0, now));
            let Some(slot) = due else { return self.cooling.correct_first_path(now) };
            let key = &self.keys[slot];
            let expired = key.state.update(|state| if state.is_over(now) { state.ended() } else { state });
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

    pub(crate) fn holds(&self, key: &Arc<Key>) -> bool {
        self.slot_of(key).is_some()
    }

    fn slot_of(&self, key: &Arc<Key>) -> Option<usize> {
        let holds = |slot: &usize| self.keys.get(*slot).is_some_and(|held| Arc::ptr_eq(held, key));
        Some(key.slot()).filter(holds).or_else(|| self.slot(&key.id).filter(holds))
    }

    fn refresh_slot(&self, slot: usize) {
        let key = &self.keys[slot];
        self.begun.fetch_add(1, SeqCst);
        loop {
            let (state, is_in_doubt) = (key.state.load(), key.is_in_doubt());
            // For a moment a key is in both indexes rather than in neither: a pick that finds it nowhere gives up.
            if state.is_available() && !is_in_doubt {
                self.available.insert(slot);
                self.cooling.set(slot, state.deadline());
            } else {
                self.cooling.set(slot, state.deadline());
                self.available.remove(slot);
            }
            if key.has_pending() {
                self.pending.insert(slot);
            }
            // Two refreshes of one slot may overlap; the one that wrote last must look again.
            if (key.state.load(), key.is_in_doubt()) == (state, is_in_doubt) {
                break;
            }
        }
        self.ended.fetch_add(1, SeqCst);
        self.scopes.each(|scoped| scoped.refresh_key(slot));
    }

    /// Takes the next key in these slots that has a pending mark.
    pub(crate) fn take_pending(&self, slots: Range<usize>) -> Option<(usize, &Arc<Key>)> {
        let slot = self.pending.next_from(slots.start).filter(|slot| *slot < slots.end)?;
        self.pending.remove(slot);
        Some((slot, &self.keys[slot]))
    }

    pub(crate) fn count_pending(&self) -> usize {
        self.keys.iter().filter(|key| key.has_pending()).count()
    }

    /// Fails if an index and the states disagree while no thread changes them.
    #[cfg(all(test, any(schedules = "loom", schedules = "shuttle")))]
    pub(crate) fn assert_in_line(&self) {
        let slots_of = |next: &dyn Fn(usize) -> Option<usize>| {
            std::iter::successors(next(0), |slot| next(slot + 1)).collect::<Vec<_>>()
        };
        let slots_where = |holds: &dyn Fn(&Key) -> bool| {
            (0..self.keys.len()).filter(|slot| holds(&self.keys[*slot])).collect::<Vec<_>>()
        };
        let deadline = |key: &Key| key.state.load().deadline();
        for time in self.keys.iter().map(|key| deadline(key)).chain([TRIALS - 1]) {
            let due = slots_where(&|key| deadline(key) <= time);
            // Without the slot behind the keys.
            let next_due = |slot| self.cooling.next_due(slot, time).filter(|slot| *slot < self.keys.len());
            assert_eq!(slots_of(&next_due), due, "due at {time}");
        }
        assert!(self.keys.iter().all(|key| self.earliest() <= deadline(key)), "a deadline is overlooked");
        let available = slots_where(&|key| key.is_available());
        assert_eq!(slots_of(&|slot| self.available.next_from(slot)), available, "available");
        let pending = slots_where(&|key| key.has_pending());
        let indexed = slots_of(&|slot| self.pending.next_from(slot));
        assert!(pending.iter().all(|slot| indexed.contains(slot)), "a pending mark is in no index");
    }
}

/// The slot of each id. The keys hold the ids themselves.
#[derive(Debug)]
struct SlotsById {
    slots: HashTable<u32>,
    hasher: RandomState,
}

impl SlotsById {
    /// All ids must be different.
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
    use crate::{
        key::{KeySpec, inject::Inject},
        limit::{Rest, Resting, Until, Word},
        pool::{Engine, key::UsableKey},
    };

    fn snapshot(ids: &[&str]) -> Snapshot {
        let key = |id: &&str| {
            let spec = KeySpec::new(KeyId::new(id).unwrap(), "sk");
            let key = UsableKey::new(&spec, &Inject::bearer()).unwrap();
            Arc::new(key.healthy_in(Weak::<Engine>::new()))
        };
        Snapshot::new(ids.iter().map(key).collect(), None)
    }

    #[test]
    fn keys_of_one_weight_leave_no_choice() {
        let has_choices = |weights: &[u32]| {
            let key = |(number, weight): (usize, &u32)| {
                let mut spec = KeySpec::new(KeyId::new(format!("key-{number}")).unwrap(), "sk");
                spec.weight = std::num::NonZeroU32::new(*weight);
                let key = UsableKey::new(&spec, &Inject::bearer()).unwrap();
                Arc::new(key.healthy_in(Weak::<Engine>::new()))
            };
            Snapshot::new(weights.iter().enumerate().map(key).collect(), None).has_choices()
        };
        assert!(!has_choices(&[1, 1, 1]) && !has_choices(&[3, 3]) && has_choices(&[3, 1]));
    }

    fn resting() -> Word {
        let until = Until::After(Duration::from_secs(120));
        Word::new(0, Some(Resting { until, reason: Rest::RateLimited }), Duration::ZERO)
    }

    #[test]
    fn resting_keys_are_never_picked_by_stale_indexes() {
        let snapshot = snapshot(&["alpha", "beta"]);
        snapshot.keys()[0].state.update(|_| resting());
        for _ in 0..3 {
            assert_eq!(snapshot.pick().unwrap().id.as_str(), "beta");
        }
        snapshot.keys()[1].state.update(|_| resting());
        assert!(snapshot.pick().is_none());
    }

    #[test]
    fn states_decide_about_keys_during_a_refresh() {
        let snapshot = snapshot(&["alpha"]);
        snapshot.keys()[0].state.update(|_| resting());
        // What another thread sees between the writes to the two indexes.
        snapshot.available.remove(0);
        assert_eq!(snapshot.earliest_for_certain(), NEVER);
        snapshot.begun.fetch_add(1, SeqCst);
        assert_eq!(snapshot.earliest_for_certain(), resting().deadline());
        snapshot.keys()[0].state.update(|_| Word::HEALTHY);
        assert_eq!(snapshot.earliest_for_certain(), 0);
    }
}
