//! Names as numbers, and the owner of a limit. All processes must agree on both, whatever they were built with.

/// Returns a number for the name of a key, a quota group or a scope.
pub(crate) fn name_of(text: &str) -> u64 {
    // FNV-1a: the standard library's hash may change with its version.
    let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    mixed(hash)
}

/// Returns the owner of a limit: the process with the highest hash. So a process that joins or leaves moves only the
/// limits that it gets or had.
pub(crate) fn owner(members: &[u64], scope: u64, limit: u64) -> Option<u64> {
    let place = mixed(scope ^ limit.rotate_left(32));
    members.iter().copied().max_by_key(|member| (mixed(place ^ member), *member))
}

fn mixed(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn names_are_the_same_in_every_build() {
        assert_eq!((name_of(""), name_of("key-1")), (0xf52a_15e9_a9b5_e89b, 0x3803_edeb_4f44_5d66));
        assert_ne!(name_of("key-1"), name_of("key-2"));
    }

    #[test]
    fn owners_share_limits_evenly() {
        let members: Vec<u64> = (0..10).map(|member| name_of(&format!("process {member}"))).collect();
        let mut owned = BTreeMap::new();
        for limit in 0..3_000 {
            *owned.entry(owner(&members, 7, name_of(&format!("key-{limit}")))).or_insert(0) += 1;
        }
        assert_eq!(owned.len(), 10);
        assert!(owned.values().all(|owned| (200..400).contains(owned)), "{owned:?}");
    }

    #[test]
    fn a_process_that_leaves_moves_only_its_limits() {
        let members = [11, 22, 33];
        for limit in (0..200).map(|limit| name_of(&format!("key-{limit}"))) {
            let before = owner(&members, 7, limit).unwrap();
            let after = owner(&members[..2], 7, limit).unwrap();
            assert!(before == after || before == 33);
        }
        assert_eq!(owner(&[], 7, 1), None);
    }
}
