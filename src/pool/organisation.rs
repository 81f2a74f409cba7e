//! The organisation that a key belongs to, as the service's responses name it.

use crate::sync::atomic::{AtomicU64, Ordering::SeqCst};

/// The lower bits count how often the name has changed.
const CHANGES: u64 = 3;

/// A name that changed too often: behind such a key there are several organisations.
const VARIES: u64 = u64::MAX;

/// A hash of the name, so that a key needs 8 bytes for it, whatever the service sends.
#[derive(Debug, Default)]
pub(crate) struct Organisation(AtomicU64);

impl Organisation {
    /// 0 if no response has named one, or if the name keeps changing.
    pub(crate) fn get(&self) -> u64 {
        match self.0.load(SeqCst) {
            VARIES => 0,
            word => word & !CHANGES,
        }
    }

    pub(crate) fn copied(&self) -> Self {
        Self(AtomicU64::new(self.0.load(SeqCst)))
    }

    /// Notes the name in a response, which is not 0. Returns whether [`get`](Self::get) has changed.
    pub(crate) fn set(&self, name: u64) -> bool {
        let name = (name & !CHANGES).max(CHANGES + 1);
        let next = |word: u64| match word {
            VARIES => None,
            0 => Some(name),
            word if word & !CHANGES == name => None,
            word if word & CHANGES == CHANGES => Some(VARIES),
            word => Some(name | ((word & CHANGES) + 1)),
        };
        self.0.fetch_update(SeqCst, SeqCst, next).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [u64; 2] = [1, 1 << 20];

    #[test]
    fn a_name_counts_until_another_comes() {
        let organisation = Organisation::default();
        assert_eq!(organisation.get(), 0);
        assert!(organisation.set(NAMES[0]) && !organisation.set(NAMES[0]));
        let first = organisation.get();
        assert!(first != 0 && organisation.set(NAMES[1]) && organisation.get() != first);
        assert!(organisation.set(NAMES[0]));
        assert_eq!(organisation.get(), first);
    }

    #[test]
    fn names_that_keep_changing_are_none() {
        let organisation = Organisation::default();
        let changes = (0..100).filter(|number| organisation.set(NAMES[number % 2])).count();
        assert_eq!((changes, organisation.get()), (5, 0));
    }
}
