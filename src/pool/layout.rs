//! How the keys of a snapshot stand: in tiers, in quota groups, and which of them sessions prefer.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
    ops::Range,
    sync::{Arc, OnceLock},
};

use super::{key::Key, organisation::Organisation};
use crate::{
    lending::name_of,
    select::{Preferences, round_of},
};

/// `group` of a key that has none.
const ALONE: u32 = u32::MAX;

#[derive(Debug)]
pub(crate) struct Layout {
    /// The slots of each tier, the preferred one first. There is one tier at least.
    tiers: Box<[Range<usize>]>,
    groups: Option<Groups>,
    /// The organisation of each key, as responses have named it so far. Made with the first name.
    named: OnceLock<Box<[Organisation]>>,
    /// The same as it was when the groups were made. Empty if there was none.
    organisations: Box<[u64]>,
    /// `None` if the keys of each tier have one weight: then a key has one turn, which is its slot.
    turns: Option<Turns>,
    /// Whether any key has a limit of requests in flight.
    has_caps: bool,
    preferences: OnceLock<Preferences>,
    names: OnceLock<Names>,
}

/// What other processes call the limits.
#[derive(Debug)]
pub(crate) struct Names {
    /// The slots that hold a limit, each with the limit's name.
    limits: Vec<(usize, u64)>,
    /// By the lower half of the name.
    slots: HashMap<u32, usize>,
}

/// The turns of a round, tier by tier.
#[derive(Debug)]
struct Turns {
    /// The slot of each turn.
    slots: Box<[u32]>,
    /// The turns of each tier.
    tiers: Box<[Range<usize>]>,
    /// The turns of each slot, one slot after the other.
    of_slots: Box<[u32]>,
    /// Where those of each slot begin; and behind the last one.
    first: Box<[u32]>,
}

#[derive(Debug)]
struct Groups {
    of: Box<[u32]>,
    members: Vec<Vec<u32>>,
    /// The order in which the members take turns, where their weights differ.
    rounds: Vec<Option<Vec<u32>>>,
}

impl Layout {
    /// The keys must stand in the order of their tiers. `named` are their organisations, if any is known.
    pub(crate) fn new(keys: &[Arc<Key>], named: Option<Box<[Organisation]>>) -> Self {
        let mut tiers = Vec::new();
        let mut start = 0;
        for tier in keys.chunk_by(|one, next| one.tier() == next.tier()) {
            tiers.push(start..start + tier.len());
            start += tier.len();
        }
        if tiers.is_empty() {
            tiers.push(0..0);
        }
        let turns = Turns::new(keys, &tiers);
        let has_caps = keys.iter().any(|key| key.cap().is_some());
        let named = named.map_or_else(OnceLock::new, OnceLock::from);
        let organisations = organisations_of(keys, &named);
        let groups = Groups::new(keys, &organisations);
        Self {
            tiers: tiers.into(),
            groups,
            named,
            organisations,
            turns,
            has_caps,
            preferences: OnceLock::new(),
            names: OnceLock::new(),
        }
    }

    /// Whether the keys belong to other quota groups by now.
    pub(crate) fn has_other_groups(&self, keys: &[Arc<Key>]) -> bool {
        let now = Groups::new(keys, &organisations_of(keys, &self.named));
        now.as_ref().map(|groups| &groups.of) != self.groups.as_ref().map(|groups| &groups.of)
    }

    /// Notes the organisation of one of so many keys. Returns whether it is another than before.
    pub(crate) fn name_organisation(&self, slot: usize, name: u64, keys: usize) -> bool {
        let named = self.named.get_or_init(|| (0..keys).map(|_| Organisation::default()).collect());
        named[slot].set(name)
    }

    /// The organisation of a key, as responses have named it so far, if any organisation is known.
    pub(crate) fn named(&self, slot: usize) -> Option<&Organisation> {
        self.named.get()?.get(slot)
    }

    /// Whether responses have named the organisation of any key.
    pub(crate) fn has_organisations(&self) -> bool {
        !self.organisations.is_empty()
    }

    /// The organisation of a key; 0 if it is not known.
    pub(crate) fn organisation(&self, slot: usize) -> u64 {
        self.organisations.get(slot).copied().unwrap_or(0)
    }

    pub(crate) fn tiers(&self) -> &[Range<usize>] {
        &self.tiers
    }

    /// Whether keys of a tier have different weights.
    pub(crate) fn has_weights(&self) -> bool {
        self.turns.is_some()
    }

    /// Whether any key has a limit of requests in flight.
    #[inline]
    pub(crate) fn has_caps(&self) -> bool {
        self.has_caps
    }

    /// How many turns a round of so many keys has.
    pub(crate) fn count_turns(&self, keys: usize) -> usize {
        self.turns.as_ref().map_or(keys, |turns| turns.slots.len())
    }

    /// The turns of a tier.
    #[inline]
    pub(crate) fn turns_of_tier(&self, tier: usize) -> &Range<usize> {
        self.turns.as_ref().map_or(&self.tiers[tier], |turns| &turns.tiers[tier])
    }

    /// Whose turn it is.
    #[inline]
    pub(crate) fn slot_of_turn(&self, turn: usize) -> usize {
        self.turns.as_ref().map_or(turn, |turns| turns.slots[turn] as usize)
    }

    /// The turns of a key.
    #[inline]
    pub(crate) fn turns_of(&self, slot: usize) -> impl Iterator<Item = usize> {
        let (alone, several) = match &self.turns {
            None => (Some(slot), &[][..]),
            Some(turns) => (None, turns.of(slot)),
        };
        alone.into_iter().chain(several.iter().map(|turn| *turn as usize))
    }

    /// One of the turns of a key.
    #[inline]
    pub(crate) fn a_turn_of(&self, slot: usize) -> usize {
        self.turns.as_ref().map_or(slot, |turns| turns.of(slot)[0] as usize)
    }

    /// The members of a quota group, as often and in the order in which they take turns.
    pub(crate) fn round_of_group(&self, group: usize) -> &[u32] {
        self.groups
            .as_ref()
            .map_or(&[], |groups| groups.rounds[group].as_deref().unwrap_or(&groups.members[group]))
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

    /// The names do not depend on the organisations that this process knows: another one may know fewer or more.
    pub(crate) fn names(&self, keys: &[Arc<Key>]) -> &Names {
        self.names.get_or_init(|| {
            let own_name = |slot: usize| name_of(&format!("key {}", keys[slot].id.as_str()));
            let name = |slot: usize| match (self.group_of(slot), keys[slot].group()) {
                (Some(_), Some(group)) => name_of(&format!("group {group}")),
                (Some((_, members)), None) => {
                    let first = members.iter().min_by_key(|member| &keys[**member as usize].id);
                    own_name(first.map_or(slot, |member| *member as usize))
                }
                (None, _) => own_name(slot),
            };
            let leaders = (0..keys.len()).filter(|slot| self.leader(*slot) == *slot);
            let limits: Vec<_> = leaders.map(|slot| (slot, name(slot))).collect();
            // A process that does not know the group lends tokens of its keys.
            let members = (0..keys.len()).filter(|slot| self.group_of(*slot).is_some());
            let of_members = members.map(|slot| (own_name(slot) as u32, self.leader(slot)));
            let slots = of_members.chain(limits.iter().map(|(slot, name)| (*name as u32, *slot))).collect();
            Names { limits, slots }
        })
    }

    pub(crate) fn preferences(&self, keys: &[Arc<Key>]) -> &Preferences {
        self.preferences.get_or_init(|| {
            Preferences::new(keys.iter().map(|key| {
                let mut hasher = DefaultHasher::new();
                key.id.as_str().hash(&mut hasher);
                (hasher.finish(), key.weight())
            }))
        })
    }
}

/// Of keys that have no configured group.
fn organisations_of(keys: &[Arc<Key>], named: &OnceLock<Box<[Organisation]>>) -> Box<[u64]> {
    let Some(named) = named.get() else { return Box::default() };
    let of = |(key, named): (&Arc<Key>, &Organisation)| if key.group().is_some() { 0 } else { named.get() };
    keys.iter().zip(named).map(of).collect()
}

/// What the keys of a group have in common.
#[derive(PartialEq, Eq, Hash)]
enum Common<'a> {
    Name(&'a str),
    Organisation(u64),
}

impl Names {
    pub(crate) fn limits(&self) -> &[(usize, u64)] {
        &self.limits
    }

    /// The name of the limit that a slot holds.
    pub(crate) fn of(&self, slot: usize) -> Option<u64> {
        let at = self.limits.binary_search_by_key(&slot, |(slot, _)| *slot).ok()?;
        Some(self.limits[at].1)
    }

    /// The slot of a limit, by the lower half of its name.
    pub(crate) fn slot(&self, limit: u32) -> Option<usize> {
        self.slots.get(&limit).copied()
    }
}

impl Groups {
    fn new(keys: &[Arc<Key>], organisations: &[u64]) -> Option<Self> {
        let mut sizes: HashMap<u64, u32> = HashMap::new();
        organisations.iter().for_each(|organisation| *sizes.entry(*organisation).or_default() += 1);
        // A key that shares its organisation with no other one is in no group.
        let organisation_of = |slot: u32| {
            let organisation = *organisations.get(slot as usize)?;
            (organisation != 0 && sizes[&organisation] > 1).then_some(Common::Organisation(organisation))
        };
        let mut numbers: HashMap<Common<'_>, u32> = HashMap::new();
        let mut members: Vec<Vec<u32>> = Vec::new();
        let of = (0..).zip(keys).map(|(slot, key)| {
            let common = key.group().map(Common::Name).or_else(|| organisation_of(slot));
            let Some(common) = common else { return ALONE };
            let group = *numbers.entry(common).or_insert_with(|| {
                members.push(Vec::new());
                members.len() as u32 - 1
            });
            members[group as usize].push(slot);
            group
        });
        let of = of.collect();
        let round = |members: &Vec<u32>| {
            let weights: Vec<_> = members.iter().map(|slot| keys[*slot as usize].weight()).collect();
            Some(round_of(&weights)?.into_iter().map(|member| members[member as usize]).collect())
        };
        let rounds = members.iter().map(round).collect();
        (!members.is_empty()).then_some(Self { of, members, rounds })
    }
}

impl Turns {
    /// `None` if the keys of each tier have one weight.
    fn new(keys: &[Arc<Key>], tiers: &[Range<usize>]) -> Option<Self> {
        let round = |tier: &Range<usize>| {
            let weights: Vec<_> = keys[tier.clone()].iter().map(|key| key.weight()).collect();
            round_of(&weights)
        };
        let rounds: Vec<_> = tiers.iter().map(round).collect();
        if rounds.iter().all(Option::is_none) {
            return None;
        }
        let mut slots = Vec::new();
        let mut turns_of_tiers = Vec::new();
        for (tier, round) in tiers.iter().zip(rounds) {
            let begin = slots.len();
            match round {
                Some(round) => slots.extend(round.into_iter().map(|place| tier.start as u32 + place)),
                None => slots.extend(tier.clone().map(|slot| slot as u32)),
            }
            turns_of_tiers.push(begin..slots.len());
        }
        let mut of_slots: Vec<u32> = (0..slots.len() as u32).collect();
        of_slots.sort_by_key(|turn| slots[*turn as usize]);
        let first = (0..=keys.len() as u32)
            .map(|slot| of_slots.partition_point(|turn| slots[*turn as usize] < slot) as u32);
        let first = first.collect();
        Some(Self { slots: slots.into(), tiers: turns_of_tiers.into(), of_slots: of_slots.into(), first })
    }

    #[inline]
    fn of(&self, slot: usize) -> &[u32] {
        &self.of_slots[self.first[slot] as usize..self.first[slot + 1] as usize]
    }
}
