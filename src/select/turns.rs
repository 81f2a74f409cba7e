//! The order in which keys of different weights take turns.

/// The most turns of so many keys.
fn most_turns(keys: usize) -> u64 {
    (16 * keys as u64).max(1 << 16)
}

/// One round of turns: each of the keys by its place, as often as its weight says, and evenly spread. `None` if all have the
/// same weight: then each has one turn, in their order.
///
/// Weights are divided by what they have in common. If they still add up to more than 65,536, and to more than 16 for each
/// key, they are scaled down, and so rounded; each key keeps one turn.
pub(crate) fn round_of(weights: &[u32]) -> Option<Vec<u32>> {
    let first = *weights.first()?;
    if weights.iter().all(|weight| *weight == first) {
        return None;
    }
    let turns = turns_of(weights);
    let mut order: Vec<u32> = (0..weights.len() as u32).collect();
    order.sort_by_key(|key| turns[*key as usize]);
    let mut round = Vec::with_capacity(turns.iter().sum::<u64>() as usize);
    for alike in order.chunk_by(|one, next| turns[*one as usize] == turns[*next as usize]) {
        // Keys of the same weight share the round evenly, or all of them would take their turns together.
        let count = turns[alike[0] as usize] * alike.len() as u64;
        let keys = (0..count).map(|turn| alike[(turn % alike.len() as u64) as usize]);
        round.extend((0..count).zip(keys).map(|(turn, key)| ((turn as f64 + 0.5) / count as f64, key)));
    }
    round.sort_by(|one, next| one.0.total_cmp(&next.0).then(one.1.cmp(&next.1)));
    Some(round.into_iter().map(|(_, key)| key).collect())
}

fn turns_of(weights: &[u32]) -> Vec<u64> {
    let common = weights.iter().copied().fold(0, greatest_common_divisor).max(1);
    let sum = weights.iter().map(|weight| u64::from(weight / common)).sum::<u64>();
    let most = most_turns(weights.len());
    let scaled = |weight: u32| match u64::from(weight / common) {
        turns if sum <= most => turns,
        turns => ((turns as f64 * most as f64 / sum as f64).round() as u64).max(1),
    };
    weights.iter().map(|weight| scaled(*weight)).collect()
}

fn greatest_common_divisor(one: u32, other: u32) -> u32 {
    if other == 0 { one } else { greatest_common_divisor(other, one % other) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text(weights: &[u32]) -> String {
        round_of(weights).unwrap().iter().map(|key| char::from(b'a' + *key as u8)).collect()
    }

    #[test]
    fn keys_of_one_weight_need_no_round() {
        for weights in [&[][..], &[1], &[7], &[1, 1, 1], &[5, 5]] {
            assert_eq!(round_of(weights), None);
        }
    }

    #[test]
    fn heavy_keys_are_spread_among_light_ones() {
        assert_eq!(text(&[3, 1]), "aaba");
        assert_eq!(text(&[1, 3]), "babb");
        assert_eq!(text(&[2, 4]), text(&[1, 2]));
        assert_eq!(text(&[4, 1, 1, 1, 1]), "abacadae");
        assert_eq!(text(&[6, 3, 1]), "abaabcaaba");
    }

    #[test]
    fn enormous_weights_are_rounded_and_no_key_is_lost() {
        let round = round_of(&[u32::MAX, 1, u32::MAX / 2]).unwrap();
        let count = |key| round.iter().filter(|turn| **turn == key).count();
        assert!(round.len() <= (1 << 16) + 3, "{}", round.len());
        assert_eq!(count(1), 1);
        let ratio = count(0) as f64 / count(2) as f64;
        assert!((1.999..2.001).contains(&ratio), "{ratio}");
    }

    proptest! {
        /// No stretch of turns has more of a key than its share, but for a few.
        #[test]
        fn every_stretch_of_a_round_is_fair(
            weights in prop::collection::vec(1u32..30, 2..12),
            from in any::<prop::sample::Index>(),
            length in 1usize..200,
        ) {
            let Some(round) = round_of(&weights) else { return Ok(()) };
            let common = weights.iter().copied().fold(0, greatest_common_divisor);
            let sum: u32 = weights.iter().sum();
            prop_assert_eq!(round.len() as u32, sum / common);
            let from = from.index(round.len());
            let stretch: Vec<_> = round.iter().cycle().skip(from).take(length).collect();
            for (key, weight) in weights.iter().enumerate() {
                let fair = length as f64 * f64::from(*weight) / f64::from(sum);
                let count = stretch.iter().filter(|turn| ***turn == key as u32).count() as f64;
                // Each other weight may shift a turn.
                prop_assert!((count - fair).abs() < 1.0 + weights.len() as f64, "key {key}: {count}, not {fair}");
            }
        }
    }
}
