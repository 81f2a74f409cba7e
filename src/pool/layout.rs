//! How the keys of a snapshot stand: in tiers, in quota groups, and on the ring of sessions.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
    ops::Range,
    sync::{Arc, OnceLock},
};

use super::key::Key;
use crate::select::Ring;

/// `group` of a key that has none.
const ALONE: u32 = u32::MAX;

#[derive(Debug)]
pub(crate) struct Layout {
    /// The slots of each tier, the preferred one first. There is one tier at least.
    tiers: Box<[Range<usize>]>,
    groups: Option<Groups>,
    ring: OnceLock<Ring>,
}

#[derive(Debug)]
struct Groups {
    of: Box<[u32]>,
    members: Vec<Vec<u32>>,
}

impl Layout {
    /// The keys must stand in the order of their tiers.
    pub(crate) fn new(keys: &[Arc<Key>]) -> Self {
        let mut tiers = Vec::new();
        let mut start = 0;
        for tier in keys.chunk_by(|one, next| one.tier() == next.tier()) {
            tiers.push(start..start + tier.len());
            start += tier.len();
        }
        if tiers.is_empty() {
            tiers.push(0..0);
        }
        Self { tiers: tiers.into(), groups: Groups::new(keys), ring: OnceLock::new() }
    }

    pub(crate) fn tiers(&self) -> &[Range<usize>] {
        &self.tiers
    }

    /// How many quota groups there are.
    pub(crate) fn groups(&self) -> usize {
        self.groups.as_ref().map_or(0, |groups| groups.members.len())
    }

    /// The quota group of a key, and its members' slots.
    #[inline]
    pub(crate) fn group_of(&self, slot: usize) -> Option<(usize, &[u32])> {
        let groups = self.groups.as_ref()?;
        let group = groups.of[slot];
        (group != ALONE).then(|| (group as usize, &*groups.members[group as usize]))
    }

    /// The slot that holds the limits of a key: that of the first member of its quota group.
    #[inline]
    pub(crate) fn leader(&self, slot: usize) -> usize {
        self.group_of(slot).map_or(slot, |(_, members)| members[0] as usize)
    }

    /// How many limits so many keys have.
    pub(crate) fn count_limits(&self, keys: usize) -> usize {
        let in_groups = self.groups.iter().flat_map(|groups| &groups.members).map(Vec::len).sum::<usize>();
        keys - in_groups + self.groups()
    }

    pub(crate) fn ring(&self, keys: &[Arc<Key>]) -> &Ring {
        self.ring.get_or_init(|| {
            Ring::new(keys.iter().map(|key| {
                let mut hasher = DefaultHasher::new();
                key.id.as_str().hash(&mut hasher);
                hasher.finish()
            }))
        })
    }
}

impl Groups {
    fn new(keys: &[Arc<Key>]) -> Option<Self> {
        let mut numbers: HashMap<&str, u32> = HashMap::new();
        let mut members: Vec<Vec<u32>> = Vec::new();
        let of = (0..).zip(keys).map(|(slot, key)| {
            let Some(name) = key.group() else { return ALONE };
            let group = *numbers.entry(name).or_insert_with(|| {
                members.push(Vec::new());
                members.len() as u32 - 1
            });
            members[group as usize].push(slot);
            group
        });
        let of = of.collect();
        (!members.is_empty()).then_some(Self { of, members })
    }
}
