//! A set of slots that finds the next member after a slot in constant time.
//!
//! One bit per slot, and above every 64 words a summary word with one bit per word that is not empty: three levels reach
//! 262,144 slots. No operation locks or allocates. A search may miss a slot that another thread is inserting;
//! [`AtomicBitSet::scan_from`] reads every word, and misses no slot that was a member when it began.

use crate::sync::atomic::{AtomicU64, Ordering::SeqCst};

/// Fewer for loom and shuttle, so that a few slots are spread over three levels.
const BITS: usize = if cfg!(any(schedules = "loom", schedules = "shuttle")) { 2 } else { u64::BITS as usize };

#[derive(Debug)]
pub(crate) struct AtomicBitSet {
    /// `levels[0]` holds the slots; each further level summarises the one below; the last is one word.
    levels: Box<[Box<[AtomicU64]>]>,
}

impl AtomicBitSet {
    pub(crate) fn new(slots: usize) -> Self {
        let mut levels = Vec::new();
        let mut words = slots.div_ceil(BITS).max(1);
        loop {
            levels.push((0..words).map(|_| AtomicU64::new(0)).collect());
            if words == 1 {
                break;
            }
            words = words.div_ceil(BITS);
        }
        Self { levels: levels.into_boxed_slice() }
    }

    pub(crate) fn insert(&self, slot: usize) {
        let mut index = slot;
        for level in &self.levels {
            if level[index / BITS].fetch_or(bit(index), SeqCst) != 0 {
                // The word was not empty: every summary above it is set, or the thread that clears one looks at this
                // word again.
                return;
            }
            index /= BITS;
        }
    }

    #[inline]
    pub(crate) fn contains(&self, slot: usize) -> bool {
        self.levels[0].get(slot / BITS).is_some_and(|word| word.load(SeqCst) & bit(slot) != 0)
    }

    pub(crate) fn remove(&self, slot: usize) {
        let mut index = slot;
        for (depth, level) in self.levels.iter().enumerate() {
            let left = level[index / BITS].fetch_and(!bit(index), SeqCst) & !bit(index);
            if depth > 0 && self.levels[depth - 1][index].load(SeqCst) != 0 {
                // Another thread filled the word below between the two changes of this loop.
                self.summarise(depth, index);
                return;
            }
            if left != 0 {
                return;
            }
            index /= BITS;
        }
    }

    /// Sets the bit of `index` at `depth`, and its summaries.
    fn summarise(&self, depth: usize, mut index: usize) {
        for level in &self.levels[depth..] {
            level[index / BITS].fetch_or(bit(index), SeqCst);
            index /= BITS;
        }
    }

    /// The first member at or after `slot`, if it is in the same word.
    #[inline(always)]
    pub(crate) fn next_close_by(&self, slot: usize) -> Option<usize> {
        let word = self.levels[0].get(slot / BITS)?.load(SeqCst);
        let ahead = word & (u64::MAX << (slot % BITS));
        (ahead != 0).then(|| slot / BITS * BITS + ahead.trailing_zeros() as usize)
    }

    /// The first member at or after `slot`.
    pub(crate) fn next_from(&self, slot: usize) -> Option<usize> {
        let mut from = slot;
        loop {
            match self.search(from)? {
                Found::Slot(slot) => return Some(slot),
                Found::EmptyUntil(next) => from = next,
            }
        }
    }

    fn search(&self, slot: usize) -> Option<Found> {
        let mut index = slot;
        for (depth, level) in self.levels.iter().enumerate() {
            let word = index / BITS;
            let ahead = level.get(word)?.load(SeqCst) & (u64::MAX << (index % BITS));
            if ahead != 0 {
                return Some(self.descend(depth, word * BITS + ahead.trailing_zeros() as usize));
            }
            index = word + 1;
        }
        None
    }

    fn descend(&self, depth: usize, index: usize) -> Found {
        let mut index = index;
        for below in (0..depth).rev() {
            let word = self.levels[below][index].load(SeqCst);
            if word == 0 {
                return Found::EmptyUntil((index + 1) * BITS.pow(below as u32 + 1));
            }
            index = index * BITS + word.trailing_zeros() as usize;
        }
        Found::Slot(index)
    }

    /// The first member at or after `slot`, by every word instead of the summaries.
    pub(crate) fn scan_from(&self, slot: usize) -> Option<usize> {
        let first = slot / BITS;
        let words = self.levels[0].iter().enumerate().skip(first);
        words
            .map(|(word, bits)| {
                let mask = if word == first { u64::MAX << (slot % BITS) } else { u64::MAX };
                (word, bits.load(SeqCst) & mask)
            })
            .find(|(_, bits)| *bits != 0)
            .map(|(word, bits)| word * BITS + bits.trailing_zeros() as usize)
    }

    pub(crate) fn count(&self) -> usize {
        self.levels[0].iter().map(|word| word.load(SeqCst).count_ones() as usize).sum()
    }
}

enum Found {
    Slot(usize),
    /// A summary was out of date: nothing lies before this slot.
    EmptyUntil(usize),
}

#[inline]
fn bit(index: usize) -> u64 {
    1 << (index % BITS)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_answers_like_an_ordered_set(
            slots in 1usize..10_000,
            changes in prop::collection::vec((any::<bool>(), any::<prop::sample::Index>()), 0..300),
            asked in any::<prop::sample::Index>(),
        ) {
            let set = AtomicBitSet::new(slots);
            let mut model = BTreeSet::new();
            for (insert, slot) in changes {
                let slot = slot.index(slots);
                if insert { set.insert(slot); model.insert(slot); } else { set.remove(slot); model.remove(&slot); }
                prop_assert_eq!(set.next_from(slot) == Some(slot), insert);
            }
            let asked = asked.index(slots + 1);
            let expected = model.range(asked..).next().copied();
            prop_assert_eq!(set.next_from(asked), expected);
            prop_assert_eq!(set.scan_from(asked), expected);
            let is_close_by = |slot: &usize| slot / BITS == asked / BITS;
            prop_assert_eq!(set.next_close_by(asked), expected.filter(is_close_by));
            prop_assert_eq!(set.count(), model.len());
        }
    }

    #[test]
    fn the_last_slot_is_found_from_the_first() {
        let set = AtomicBitSet::new(262_144);
        assert_eq!(set.next_from(0), None);
        set.insert(262_143);
        assert_eq!(set.next_from(0), Some(262_143));
        set.remove(262_143);
        assert_eq!(set.next_from(0), None);
    }

    #[test]
    fn a_close_search_covers_only_the_same_word() {
        let set = AtomicBitSet::new(256);
        for slot in [70, 100, 127, 128] {
            set.insert(slot);
        }
        let found = [0, 63, 64, 71, 101, 127, 128, 129, 256].map(|slot| set.next_close_by(slot));
        assert_eq!(found, [None, None, Some(70), Some(100), Some(127), Some(127), Some(128), None, None]);
    }

    #[test]
    fn removal_clears_the_summaries_of_empty_words() {
        let set = AtomicBitSet::new(262_144);
        for slot in [0, 1, 64, 70_000, 262_143] {
            set.insert(slot);
        }
        for slot in [1, 0, 64, 70_000, 262_143] {
            set.remove(slot);
        }
        let summaries = set.levels[1..].iter().flatten();
        assert!(summaries.map(|word| word.load(SeqCst)).all(|word| word == 0));
    }

    #[test]
    fn a_stale_summary_hides_no_later_slot() {
        let set = AtomicBitSet::new(262_144);
        for slot in [3 * 64, 5 * 64, 64 * 64 * 2, 64 * 64 * 3] {
            set.insert(slot);
        }
        // What another thread sees in the middle of a removal.
        set.levels[0][3].store(0, SeqCst);
        assert_eq!(set.next_from(0), Some(5 * 64));
        set.levels[0][2 * 64].store(0, SeqCst);
        set.levels[1][2].store(0, SeqCst);
        assert_eq!(set.next_from(5 * 64 + 1), Some(64 * 64 * 3));
    }

    #[test]
    fn cleared_summaries_are_restored_on_every_level() {
        let set = AtomicBitSet::new(262_144);
        set.insert(70_001);
        for level in &set.levels[1..] {
            level.iter().for_each(|word| word.store(0, SeqCst));
        }
        set.summarise(1, 70_001 / 64);
        assert_eq!(set.next_from(0), Some(70_001));
    }

    #[test]
    fn inserts_survive_concurrent_removals_in_the_same_word() {
        const WORDS: usize = 1_000;
        let set = AtomicBitSet::new(WORDS * BITS);
        for _ in 0..200 {
            (0..WORDS).for_each(|word| set.insert(word * BITS + 1));
            std::thread::scope(|scope| {
                scope.spawn(|| (0..WORDS).rev().for_each(|word| set.remove(word * BITS + 1)));
                (0..WORDS).for_each(|word| set.insert(word * BITS));
            });
            let found = std::iter::successors(set.next_from(0), |slot| set.next_from(slot + 1));
            assert!(found.eq((0..WORDS).map(|word| word * BITS)));
            (0..WORDS).for_each(|word| set.remove(word * BITS));
        }
    }

    #[test]
    fn concurrent_changes_to_neighbours_lose_no_slot() {
        let set = AtomicBitSet::new(64 * 64);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let set = &set;
                scope.spawn(move || {
                    for round in 0..2_000 {
                        let slot = (round % 60) * 64 + thread;
                        set.insert(slot);
                        assert_eq!(set.scan_from(slot), Some(slot));
                        set.remove(slot);
                    }
                });
            }
        });
        assert_eq!(set.next_from(0), None);
        set.insert(64 * 64 - 1);
        assert_eq!(set.next_from(0), Some(64 * 64 - 1), "a summary was lost");
    }
}
