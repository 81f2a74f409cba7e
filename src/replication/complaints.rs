//! The entries of a store that can't be used as keys.

use std::{collections::BTreeMap, sync::PoisonError};

use crate::{
    key::KeyId,
    store::Unreadable,
    sync::{Mutex, MutexGuard},
};

/// More new entries than that are one line in the log.
const FEW: usize = 100;

/// The ids that such a line names.
const NAMED: usize = 3;

/// Counts each entry by id and reason: ids may look alike. An entry is logged once, not at every load, and many new ones
/// together.
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
        let is_new = |entry: &(String, String), count: usize| {
            count.saturating_sub(known.get(entry).copied().unwrap_or_default())
        };
        let new =
            || found.iter().map(|(entry, count)| (entry, is_new(entry, *count))).filter(|(_, new)| *new > 0);
        let count: usize = new().map(|(_, new)| new).sum();
        if count > FEW {
            let keys: Vec<_> = new().map(|((id, _), _)| id).take(NAMED).collect();
            let reason = new().next().map_or("", |((_, reason), _)| reason);
            tracing::warn!(count, first = ?keys, reason_of_the_first = %reason, "not used as keys");
        } else {
            for ((id, reason), new) in new() {
                (0..new).for_each(|_| tracing::warn!(key = %id, %reason, "not used as a key"));
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
