//! The entries of a store that can't be used as keys.

use std::{collections::BTreeMap, sync::PoisonError};

use crate::{
    key::KeyId,
    store::Unreadable,
    sync::{Mutex, MutexGuard},
};

/// Counts each entry by id and reason: ids may look alike. An entry is logged once, not at every load.
#[derive(Debug, Default)]
pub(super) struct Complaints(Mutex<Counts>);

type Counts = BTreeMap<(String, String), usize>;

impl Complaints {
    pub(super) fn update(&self, only: Option<&[KeyId]>, unreadable: Vec<Unreadable>) {
        let mut known = self.lock();
        let mut found = Counts::new();
        for Unreadable { id, reason } in unreadable {
            *found.entry((id, reason)).or_default() += 1;
        }
        for (entry, count) in &found {
            let (id, reason) = entry;
            for _ in known.get(entry).copied().unwrap_or_default()..*count {
                tracing::warn!(key = %id, %reason, "not used as a key");
            }
        }
        match only {
            None => *known = found,
            Some(ids) => {
                known.retain(|(id, _), _| ids.iter().all(|read| read.as_str() != id));
                known.extend(found);
            }
        }
    }

    pub(super) fn count(&self) -> usize {
        self.lock().values().sum()
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
