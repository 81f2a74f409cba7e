//! The keys that a session prefers, in the same order each time.
//!
//! Consistent hashing: each key stands at several points of a ring, and a session's candidates are the keys behind several
//! hashes of the session. So a key that closes moves only its own sessions, and spreads them over all others.

/// How many keys a session tries before it takes whoever is next.
const CANDIDATES: u64 = 8;

/// How often a key of mean weight stands on the ring: the arcs become more even.
const POINTS: u64 = 8;

#[derive(Debug)]
pub(crate) struct Ring {
    /// Points and their slots, in order.
    points: Box<[(u64, u32)]>,
    /// For each prefix of a hash, the first point that may be behind it.
    first: Box<[u32]>,
    shift: u32,
}

impl Ring {
    /// A ring of keys with these hashes and weights.
    pub(crate) fn new(keys: impl Iterator<Item = (u64, u32)> + Clone) -> Self {
        let weights = keys.clone().map(|(_, weight)| f64::from(weight));
        let (count, sum) = weights.fold((0.0, 0.0), |(count, sum), weight| (count + 1.0, sum + weight));
        let points_of = |(slot, (hash, weight)): (u32, (u64, u32))| {
            let points = (POINTS as f64 * f64::from(weight) * count / sum).round().max(1.0) as u64;
            (1..=points).map(move |point| (mixed(hash, point), slot))
        };
        let mut points: Vec<_> = (0..).zip(keys).flat_map(points_of).collect();
        points.sort_unstable();
        let bits = (usize::BITS - points.len().leading_zeros()).max(1);
        let shift = u64::BITS - bits;
        let mut next = 0;
        let first = (0..1_usize << bits)
            .map(|prefix| {
                while points.get(next).is_some_and(|(hash, _)| ((hash >> shift) as usize) < prefix) {
                    next += 1;
                }
                next as u32
            })
            .collect();
        Self { points: points.into(), first, shift }
    }

    /// The slots that a session prefers. A slot may come twice.
    #[inline]
    pub(crate) fn candidates(&self, session: u64) -> impl Iterator<Item = usize> {
        (1..=CANDIDATES).map_while(move |choice| self.behind(mixed(session, choice)))
    }

    #[inline]
    fn behind(&self, hash: u64) -> Option<usize> {
        let from = self.first[(hash >> self.shift) as usize] as usize;
        let behind = self.points[from..].iter().find(|(point, _)| *point >= hash);
        behind.or(self.points.first()).map(|(_, slot)| *slot as usize)
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

    fn ring(keys: u64) -> Ring {
        Ring::new((0..keys).map(|key| (mixed(key, 77), 1)))
    }

    #[test]
    fn an_empty_ring_has_no_candidates() {
        assert_eq!(ring(0).candidates(7).count(), 0);
    }

    #[test]
    fn sessions_prefer_the_same_keys_each_time() {
        let ring = ring(100);
        for session in 0..1_000 {
            assert!(ring.candidates(session).eq(ring.candidates(session)));
            assert!(ring.candidates(session).all(|slot| slot < 100));
        }
    }

    #[test]
    fn sessions_spread_evenly_over_keys() {
        let ring = ring(10);
        let mut sessions = [0_u32; 10];
        for session in 0..100_000 {
            sessions[ring.candidates(mixed(session, 3)).next().unwrap()] += 1;
        }
        // The arcs of 8 points a key differ; the spread of the sessions of a closed key does not show them.
        assert!(sessions.iter().all(|count| (4_000..20_000).contains(count)), "{sessions:?}");
    }

    #[test]
    fn heavy_keys_get_more_sessions() {
        let ring = Ring::new((0..40).map(|key| (mixed(key, 77), if key % 2 == 0 { 3 } else { 1 })));
        let heavy = (0..100_000).filter(|session| {
            let first = ring.candidates(mixed(*session, 3)).next().unwrap();
            first.is_multiple_of(2)
        });
        let ratio = heavy.count() as f64 / 100_000.0;
        assert!((0.70..0.80).contains(&ratio), "{ratio}");
    }

    #[test]
    fn a_closed_key_moves_only_its_own_sessions() {
        let ring = ring(20);
        let chosen = |session, closed| ring.candidates(session).find(|slot| Some(*slot) != closed);
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
