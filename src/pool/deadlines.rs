//! The deadlines of resting slots in milliseconds, and the earliest of them in constant time.
//!
//! A tree of minima over a row of deadlines, 8 to a node: six levels of nodes reach 262,144 slots. A node may be
//! earlier than the earliest deadline below it; a search that finds nothing due there corrects it and continues. A node
//! may be later only while another thread corrects it, which [`Deadlines::earliest_for_certain`] takes into account.

use crate::{
    limit::NEVER,
    sync::atomic::{AtomicU64, Ordering::SeqCst},
};

/// A cache line. Larger nodes take longer: each change of a deadline reads all of a node, twice.
///
/// Fewer for loom and shuttle, so that a few slots are spread over three levels.
const FANOUT: usize = if cfg!(any(schedules = "loom", schedules = "shuttle")) { 2 } else { 8 };

/// The deadlines of slots side by side, or of nodes. Aligned, to be read from one cache line.
#[derive(Debug)]
#[repr(align(64))]
struct Node([AtomicU64; FANOUT]);

#[derive(Debug)]
pub(crate) struct Deadlines {
    /// `levels[0]` holds the slots' own deadlines; each further level the minima of the one below; the root is
    /// the minimum of the last.
    levels: Box<[Box<[Node]>]>,
    slots: usize,
    root: AtomicU64,
    /// How many corrections of nodes have begun, and have ended.
    begun: AtomicU64,
    ended: AtomicU64,
}

impl Deadlines {
    pub(crate) fn new(slots: usize) -> Self {
        let mut levels = Vec::new();
        let mut nodes = slots.max(1);
        loop {
            let node = |_| Node(std::array::from_fn(|_| AtomicU64::new(NEVER)));
            levels.push((0..nodes.div_ceil(FANOUT)).map(node).collect());
            if nodes <= FANOUT {
                break;
            }
            nodes = nodes.div_ceil(FANOUT);
        }
        Self {
            levels: levels.into_boxed_slice(),
            slots,
            root: AtomicU64::new(NEVER),
            begun: AtomicU64::new(0),
            ended: AtomicU64::new(0),
        }
    }

    /// The earliest deadline, or one before it, except while another thread moves one back; [`NEVER`] without any.
    #[inline]
    pub(crate) fn earliest(&self) -> u64 {
        self.root.load(SeqCst)
    }

    /// The same without the exception, before a caller gives up. While another thread corrects a node, this reads every
    /// slot, and lowers the nodes to what it finds: the caller's next look must not depend on a thread that may be
    /// descheduled.
    pub(crate) fn earliest_for_certain(&self) -> u64 {
        let ended = self.ended.load(SeqCst);
        let earliest = self.earliest();
        if self.begun.load(SeqCst) == ended {
            return earliest;
        }
        let deadlines = self.levels[0].iter().flat_map(|node| &node.0).map(|deadline| deadline.load(SeqCst));
        let Some((earliest, slot)) = deadlines.zip(0..).min() else { return NEVER };
        self.lower(slot, earliest);
        earliest
    }

    /// The deadline of a slot.
    pub(crate) fn of(&self, slot: usize) -> u64 {
        self.at(0, slot).load(SeqCst)
    }

    pub(crate) fn set(&self, slot: usize, deadline: u64) {
        let before = self.at(0, slot).swap(deadline, SeqCst);
        if deadline > before {
            self.raise_path(slot, before);
        } else {
            self.lower(slot, deadline);
        }
    }

    fn lower(&self, slot: usize, deadline: u64) {
        let mut index = slot;
        for depth in 1..=self.levels.len() {
            index /= FANOUT;
            self.at(depth, index).fetch_min(deadline, SeqCst);
        }
    }

    /// Moves the nodes above a slot up that stood at its deadline before. All others stand at another slot's.
    fn raise_path(&self, slot: usize, before: u64) {
        self.begun.fetch_add(1, SeqCst);
        let mut index = slot;
        for depth in 1..=self.levels.len() {
            index /= FANOUT;
            if self.at(depth, index).load(SeqCst) < before {
                break;
            }
            self.raise(depth, index);
        }
        self.ended.fetch_add(1, SeqCst);
    }

    /// A slot's deadline, or the minimum of a node: `depth` is the level, and one more for the root.
    #[inline]
    fn at(&self, depth: usize, index: usize) -> &AtomicU64 {
        self.levels.get(depth).map_or(&self.root, |level| &level[index / FANOUT].0[index % FANOUT])
    }

    /// The first slot at or after `slot` whose deadline is at or before `now`.
    pub(crate) fn next_due(&self, slot: usize, now: u64) -> Option<usize> {
        let mut from = slot;
        loop {
            match self.search(from, now)? {
                // Behind the last slot, nodes are filled up.
                Found::Slot(slot) => return (slot < self.slots).then_some(slot),
                Found::NothingUntil(next) => from = next,
            }
        }
    }

    /// Corrects what a search from the first slot never reaches: the first node of each level, and the root. Two threads
    /// that move deadlines of one node back at once can leave it early.
    pub(crate) fn correct_first_path(&self, now: u64) {
        if self.earliest() <= now {
            self.correct(1, 0);
        }
    }

    /// Searches the rest of a node's children, then the rest of the nodes beside it, and so on upwards.
    fn search(&self, slot: usize, now: u64) -> Option<Found> {
        let mut index = slot;
        for (depth, level) in self.levels.iter().enumerate() {
            let node = level.get(index / FANOUT)?;
            let mut rest = index % FANOUT..FANOUT;
            if let Some(child) = rest.find(|child| node.0[*child].load(SeqCst) <= now) {
                return Some(self.descend(depth, index / FANOUT * FANOUT + child, now));
            }
            index = index / FANOUT + 1;
        }
        None
    }

    fn descend(&self, depth: usize, index: usize, now: u64) -> Found {
        let mut index = index;
        for depth in (1..=depth).rev() {
            match self.children(depth, index).iter().position(|deadline| deadline.load(SeqCst) <= now) {
                Some(child) => index = index * FANOUT + child,
                None => {
                    self.correct(depth, index);
                    return Found::NothingUntil((index + 1) * FANOUT.pow(depth as u32));
                }
            }
        }
        Found::Slot(index)
    }

    /// Moves a node, and those above it, up to the minimum of its children.
    fn correct(&self, depth: usize, mut index: usize) {
        self.begun.fetch_add(1, SeqCst);
        for depth in depth..=self.levels.len() {
            self.raise(depth, index);
            index /= FANOUT;
        }
        self.ended.fetch_add(1, SeqCst);
    }

    fn raise(&self, depth: usize, index: usize) {
        let node = self.at(depth, index);
        loop {
            let before = node.load(SeqCst);
            let minimum = self.minimum(depth, index);
            let is_raised = minimum > before;
            if is_raised && node.compare_exchange(before, minimum, SeqCst, SeqCst).is_err() {
                continue;
            }
            // A child may have been lowered after it was read and before the exchange.
            let again = self.minimum(depth, index);
            if !is_raised || again < minimum {
                node.fetch_min(again, SeqCst);
            }
            break;
        }
    }

    #[inline]
    fn minimum(&self, depth: usize, index: usize) -> u64 {
        self.children(depth, index).iter().fold(NEVER, |minimum, deadline| minimum.min(deadline.load(SeqCst)))
    }

    #[inline]
    fn children(&self, depth: usize, index: usize) -> &[AtomicU64; FANOUT] {
        &self.levels[depth - 1][index].0
    }
}

enum Found {
    Slot(usize),
    /// A node was earlier than anything below it: nothing is due before this slot.
    NothingUntil(usize),
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn earliest_deadline_and_due_slots_match_a_model(
            slots in 1usize..9_000,
            changes in prop::collection::vec((any::<prop::sample::Index>(), prop::option::of(0u64..1_000)), 1..200),
            now in 0u64..1_000,
            asked in any::<prop::sample::Index>(),
        ) {
            let deadlines = Deadlines::new(slots);
            let mut model = vec![NEVER; slots];
            for (slot, deadline) in changes {
                let (slot, deadline) = (slot.index(slots), deadline.unwrap_or(NEVER));
                deadlines.set(slot, deadline);
                model[slot] = deadline;
                let earliest = model.iter().copied().min().unwrap_or(NEVER);
                prop_assert_eq!((deadlines.earliest(), deadlines.earliest_for_certain()), (earliest, earliest));
            }
            let asked = asked.index(slots + 1);
            let due = (asked..slots).find(|slot| model[*slot] <= now);
            prop_assert_eq!(deadlines.next_due(asked, now), due);
            while let Some(slot) = deadlines.next_due(0, now) {
                prop_assert!(model[slot] <= now);
                deadlines.set(slot, NEVER);
                model[slot] = NEVER;
            }
            prop_assert!(model.iter().all(|deadline| *deadline > now));
        }
    }

    #[test]
    fn searches_correct_nodes_that_were_left_early() {
        let deadlines = Deadlines::new(24);
        // What a thread leaves that read the minimum before another one cleared the slot.
        deadlines.root.fetch_min(5, SeqCst);
        assert_eq!((deadlines.earliest(), deadlines.next_due(0, 9)), (5, None));
        deadlines.correct_first_path(9);
        assert_eq!(deadlines.earliest(), NEVER);
    }

    #[test]
    fn an_exact_search_finds_deadlines_missing_from_nodes() {
        let deadlines = Deadlines::new(24);
        deadlines.set(5, 7);
        // What another thread sees while the root is being put right.
        deadlines.begun.fetch_add(1, SeqCst);
        deadlines.root.store(NEVER, SeqCst);
        assert_eq!((deadlines.earliest(), deadlines.earliest_for_certain()), (NEVER, 7));
    }

    #[test]
    fn a_deadline_survives_concurrent_clears_beside_it() {
        let deadlines = Deadlines::new(64 * 64);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let deadlines = &deadlines;
                scope.spawn(move || {
                    for round in 0..2_000u64 {
                        let slot = (round as usize % 60) * 64 + thread;
                        deadlines.set(slot, round + 1);
                        assert!(deadlines.earliest_for_certain() <= round + 1);
                        deadlines.set(slot, NEVER);
                    }
                });
            }
        });
        assert_eq!(deadlines.next_due(0, NEVER - 1), None);
        deadlines.correct_first_path(NEVER - 1);
        assert_eq!(deadlines.earliest(), NEVER);
    }
}
