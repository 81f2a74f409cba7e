//! What is left of the quotas' windows, on its way through a store to the next process.

use std::{
    collections::BTreeMap,
    sync::PoisonError,
    time::{Duration, UNIX_EPOCH},
};

use crate::{
    clock::Clock,
    limit::KeptWindow,
    sync::{Mutex, MutexGuard},
};

/// The first byte. What begins with another one is of a version that this one can't read.
const VERSION: u8 = 1;

/// What the last process kept, by the names of scope and limit.
#[derive(Debug, Default)]
pub(crate) struct Kept(Mutex<Windows>);

pub(super) type Windows = BTreeMap<(u64, u64), Vec<KeptWindow>>;

impl Kept {
    /// Takes in what was kept.
    pub(super) fn fill(&self, bytes: &[u8]) {
        *self.lock() = decode(bytes).unwrap_or_default();
    }

    pub(super) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// What was kept of a limit, once: if the limit is made again, it begins anew.
    pub(super) fn take(&self, scope: u64, limit: u64) -> Vec<KeptWindow> {
        self.lock().remove(&(scope, limit)).unwrap_or_default()
    }

    /// What nobody has taken yet, and has not ended.
    pub(super) fn all(&self, wall: u64) -> Windows {
        let mut windows = self.lock();
        windows.retain(|_, windows| {
            windows.retain(|window| window.ends > wall);
            !windows.is_empty()
        });
        windows.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Windows> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The wall clock, in ms since 1970.
pub(super) fn wall_millis(clock: &dyn Clock) -> u64 {
    let since_1970: Duration = clock.wall().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX)
}

pub(super) fn encode(windows: &Windows) -> Vec<u8> {
    let mut bytes = vec![VERSION];
    for ((scope, limit), windows) in windows {
        for KeptWindow { quota, units, left, ends } in windows {
            bytes.extend(scope.to_le_bytes());
            bytes.extend(limit.to_le_bytes());
            bytes.push(*quota);
            bytes.extend(units.to_le_bytes());
            bytes.extend(left.to_le_bytes());
            bytes.extend(ends.to_le_bytes());
        }
    }
    bytes
}

fn decode(bytes: &[u8]) -> Option<Windows> {
    let mut bytes = bytes.strip_prefix(&[VERSION])?;
    let mut windows = Windows::new();
    while !bytes.is_empty() {
        let name = (u64::from_le_bytes(array(&mut bytes)?), u64::from_le_bytes(array(&mut bytes)?));
        let [quota] = array(&mut bytes)?;
        windows.entry(name).or_default().push(KeptWindow {
            quota,
            units: u32::from_le_bytes(array(&mut bytes)?),
            left: u32::from_le_bytes(array(&mut bytes)?),
            ends: u64::from_le_bytes(array(&mut bytes)?),
        });
    }
    Some(windows)
}

fn array<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (array, rest) = bytes.split_first_chunk::<N>()?;
    *bytes = rest;
    Some(*array)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_read_as_they_were_written() {
        let window = KeptWindow { quota: 1, units: 100, left: 40, ends: 1_900_000_000_000 };
        let windows: Windows = [((1, 2), vec![window, window]), ((3, u64::MAX), vec![window])].into();
        assert_eq!(decode(&encode(&windows)), Some(windows.clone()));
        let bytes = encode(&windows);
        assert_eq!(decode(&bytes[..bytes.len() - 1]), None);
        assert_eq!(decode(&[2]), None);
    }
}
