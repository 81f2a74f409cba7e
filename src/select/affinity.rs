//! The keys that a session prefers, in the same order each time.
//!
//! A session's candidates are the keys behind several hashes of the session. So a key that closes moves only its own
//! sessions, and spreads them over all others. The table behind the hashes is that of Maglev: each key has the same number
//! of entries, and when the set of keys changes, most entries stay.

/// How many keys a session tries before it takes whoever is next.
pub(crate) const CANDIDATES: usize = 8;

/// The fewest entries of a key of mean weight: with more of them, fewer other sessions move when a key comes or goes.
const ENTRIES: usize = 32;

/// In larger pools keys have a quarter of the entries, because to fill the table takes time.
const MANY_KEYS: usize = 10_000;

const FREE: u32 = u32::MAX;

#[derive(Debug)]
pub(crate) struct Preferences {
    /// The slot for each prefix of a hash. Empty without keys.
    table: Box<[u32]>,
    shift: u32,
}

/// A key whose entries are not all taken yet.
struct Filling {
    slot: u32,
    /// Its order of all entries: it takes the first of them that is free.
    next: usize,
    step: usize,
    left: usize,
}

impl Preferences {
    /// The preferences for keys with these hashes and weights.
    pub(crate) fn new(keys: impl Iterator<Item = (u64, u32)>) -> Self {
        let keys: Vec<_> = keys.collect();
        if keys.is_empty() {
            return Self { table: Box::default(), shift: 0 };
        }
        let entries = if keys.len() > MANY_KEYS { ENTRIES / 4 } else { ENTRIES };
        let size = (entries * keys.len()).next_power_of_two();
        let sum: f64 = keys.iter().map(|(_, weight)| f64::from(*weight)).sum();
        let filling = |(slot, (hash, weight)): (u32, &(u64, u32))| Filling {
            slot,
            next: mixed(*hash, 1) as usize,
            step: mixed(*hash, 2) as usize | 1,
            left: ((size as f64 * f64::from(*weight) / sum) as usize).max(1),
        };
        let mut table = vec![FREE; size].into_boxed_slice();
        let mut free = size;
        let mut take = |key: &mut Filling| {
            if free == 0 {
                return false;
            }
            while table[key.next % size] != FREE {
                key.next = key.next.wrapping_add(key.step);
            }
            table[key.next % size] = key.slot;
            free -= 1;
            key.left = key.left.saturating_sub(1);
            key.left > 0
        };
        let mut all: Vec<_> = (0..).zip(&keys).map(filling).collect();
        let mut unfinished: Vec<_> = all.iter_mut().collect();
        while !unfinished.is_empty() {
            unfinished.retain_mut(|key| take(key));
        }
        // What rounding left over.
        all.iter_mut().for_each(|key| _ = take(key));
        Self { table, shift: u64::BITS - size.trailing_zeros() }
    }

    /// The slots that a session prefers. A slot may come twice.
    #[inline]
    pub(crate) fn candidates(&self, session: u64) -> impl Iterator<Item = usize> {
        (1..=CANDIDATES as u64).map_while(move |choice| {
            let place = mixed(session, choice) >> self.shift;
            self.table.get(place as usize).map(|slot| *slot as usize)
        })
    }
}

/// Mixes a number into a hash, so that each of them gives another, evenly spread one.
#[inline]
fn mixed(hash: u64, number: u64) -> u64 {
    const PRIME: u64 = 0xd6e8_feb8_6659_fd93;
    let mut hash = hash ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for _ in 0..2 {
        hash = (hash ^ (hash >> 32)).wrapping_mul(PRIME);
    }
    hash ^ (hash >> 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn preferences(keys: u64) -> Preferences {
        Preferences::new((0..keys).map(|key| (mixed(key, 77), 1)))
    }

    fn first(preferences: &Preferences, session: u64) -> usize {
        preferences.candidates(mixed(session, 3)).next().unwrap()
    }

    #[test]
    fn without_keys_there_are_no_candidates() {
        assert_eq!(preferences(0).candidates(7).count(), 0);
    }

    #[test]
    fn sessions_prefer_the_same_keys_each_time() {
        let preferences = preferences(100);
        for session in 0..1_000 {
            assert!(preferences.candidates(session).eq(preferences.candidates(session)));
            assert!(preferences.candidates(session).all(|slot| slot < 100));
        }
    }

    #[test]
    fn each_key_has_as_many_entries() {
        for keys in [1, 2, 3, 10, 100, 1_000, 20_000] {
            let mut entries = vec![0_u32; keys as usize];
            preferences(keys).table.iter().for_each(|slot| entries[*slot as usize] += 1);
            let (fewest, most) = (entries.iter().min().unwrap(), entries.iter().max().unwrap());
            assert!(*fewest >= 8 && most - fewest <= 1, "{keys}: {fewest} to {most}");
        }
    }

    #[test]
    fn sessions_spread_evenly_over_keys() {
        let preferences = preferences(10);
        let mut sessions = [0_u32; 10];
        for session in 0..100_000 {
            sessions[first(&preferences, session)] += 1;
        }
        assert!(sessions.iter().all(|count| (9_500..10_500).contains(count)), "{sessions:?}");
    }

    #[test]
    fn a_new_key_moves_few_sessions() {
        let (before, after) = (preferences(100), preferences(101));
        let moved = (0..10_000).filter(|session| first(&before, *session) != first(&after, *session));
        let moved = moved.count();
        // 99 of them to the new key.
        assert!(moved < 500, "{moved}");
    }

    #[test]
    fn heavy_keys_get_more_sessions() {
        let weight = |key: u64| if key.is_multiple_of(2) { 3 } else { 1 };
        let preferences = Preferences::new((0..40).map(|key| (mixed(key, 77), weight(key))));
        let heavy = (0..100_000).filter(|session| first(&preferences, *session).is_multiple_of(2));
        let ratio = heavy.count() as f64 / 100_000.0;
        assert!((0.70..0.80).contains(&ratio), "{ratio}");
    }

    #[test]
    fn a_closed_key_moves_only_its_own_sessions() {
        let preferences = preferences(20);
        let chosen = |session, closed| preferences.candidates(session).find(|slot| Some(*slot) != closed);
        let mut moved_to = std::collections::BTreeSet::new();
        for session in 0..10_000 {
            let before = chosen(session, None);
            let after = chosen(session, Some(3));
            if before == Some(3) {
                moved_to.insert(after);
            } else {
                assert_eq!(before, after);
            }
        }
        assert!(moved_to.len() >= 18, "{moved_to:?}");
    }
}
