//! The keys that are in doubt, and when each is tried next: `refusals.rs` has the rules.
//!
//! A doubt is this process's own. The store hears of a confirmed one, as a rest that other processes and programs
//! understand.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, PoisonError},
};

use super::key::Key;
use crate::{
    key::KeyId,
    limit::{NEVER, Word},
    sync::{
        Mutex, MutexGuard,
        atomic::{
            AtomicU64,
            Ordering::{Relaxed, SeqCst},
        },
    },
};

/// Locked by refused requests and by those that may try a key. No other request takes the lock.
#[derive(Debug)]
pub(crate) struct Doubts {
    known: Mutex<Known>,
    /// When the first key may be tried by any request, in ms; [`NEVER`] if there is none.
    by_any: AtomicU64,
    /// The same for requests that another key would serve after a refusal.
    by_failover: AtomicU64,
}

/// Who may try a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trials {
    /// The request was refused already: it needs a key that serves.
    No,
    /// Keys that do not rest.
    OfSuspects,
    /// Another key serves the request if the one that it tries does not.
    OfAll,
}

impl Trials {
    pub(crate) fn with_failover(has_failover: bool) -> Self {
        if has_failover { Self::OfAll } else { Self::OfSuspects }
    }
}

#[derive(Debug, Default)]
pub(super) struct Known {
    doubts: HashMap<KeyId, Doubt>,
    by_any: BTreeSet<(u64, KeyId)>,
    by_failover: BTreeSet<(u64, KeyId)>,
    suspects: usize,
    /// Keys that serve again although the store has a rest of them.
    served: Vec<Arc<Key>>,
    /// Keys that requests may use now, or may no longer use.
    changed: Vec<Arc<Key>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Requests use the key. It was refused before, and its next refusal is judged by what happens until then.
    Noted,
    /// Requests pass over the key.
    Suspected,
    /// The key rests, since another one served the same request.
    Confirmed,
    /// The key rests for a time that the service did not name.
    Guessed,
}

/// What is known of one key.
#[derive(Debug)]
pub(super) struct Doubt {
    pub(super) key: Arc<Key>,
    pub(super) stage: Stage,
    /// The status of the last refusal.
    pub(super) status: u16,
    /// How many trials were begun since the key last served.
    pub(super) trials: u32,
    /// When the next trial may begin, in ms.
    pub(super) next: u64,
    /// The rest that this process has guessed.
    pub(super) guess: Word,
    /// How often the key had been picked at the refusal from which on refusals are counted, and their number after it.
    pub(super) picks: u64,
    pub(super) refusals: u64,
}

impl Doubt {
    pub(super) fn noted(key: &Arc<Key>, status: u16) -> Self {
        let picks = key.counts.requests.sum();
        let (stage, guess) = (Stage::Noted, Word::HEALTHY);
        Self { key: key.clone(), stage, status, trials: 0, next: NEVER, guess, picks, refusals: 0 }
    }

    /// Whether the key rests, and for as long as this process has guessed.
    pub(super) fn is_resting_by_guess(&self) -> bool {
        let state = self.key.state.load();
        !state.is_available() && state == self.guess.in_generation_of(state)
    }

    /// Whether requests must not use the key even if it does not rest.
    fn keeps_out(&self) -> bool {
        matches!(self.stage, Stage::Suspected | Stage::Confirmed)
    }
}

impl Doubts {
    pub(super) fn new() -> Self {
        let (by_any, by_failover) = (AtomicU64::new(NEVER), AtomicU64::new(NEVER));
        Self { known: Mutex::default(), by_any, by_failover }
    }

    /// Changes what is known. Also returns the keys that the indexes have to follow.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut Known) -> T) -> (T, Vec<Arc<Key>>) {
        let mut known = self.lock();
        let result = change(&mut known);
        let first = |trials: &BTreeSet<(u64, KeyId)>| trials.first().map_or(NEVER, |(next, _)| *next);
        self.by_any.store(first(&known.by_any), SeqCst);
        self.by_failover.store(first(&known.by_failover), SeqCst);
        (result, std::mem::take(&mut known.changed))
    }

    /// Looks at what is known. No doubt changes, so there is nothing to show to others.
    pub(super) fn look<T>(&self, look: impl FnOnce(&mut Known) -> T) -> T {
        look(&mut self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When the next trial may begin, in ms, if there is another one to come.
    #[inline]
    pub(super) fn next_trial(&self, has_failover: bool) -> u64 {
        let by_any = self.by_any.load(Relaxed);
        if has_failover { by_any.min(self.by_failover.load(Relaxed)) } else { by_any }
    }

    /// Whether a trial is to come.
    pub(super) fn has_any(&self) -> bool {
        self.by_any.load(SeqCst).min(self.by_failover.load(SeqCst)) != NEVER
    }
}

impl Known {
    /// Takes out what is known of a key object; to be put back, or forgotten.
    pub(super) fn take(&mut self, key: &Arc<Key>) -> Option<Doubt> {
        let doubt = self.take_id(&key.id)?;
        if Arc::ptr_eq(&doubt.key, key) {
            return Some(doubt);
        }
        // Of an object that had the same id.
        self.forget(doubt);
        None
    }

    fn take_id(&mut self, id: &KeyId) -> Option<Doubt> {
        let doubt = self.doubts.remove(id)?;
        let trial = (doubt.next, id.clone());
        self.by_any.remove(&trial);
        self.by_failover.remove(&trial);
        self.suspects -= usize::from(doubt.stage == Stage::Suspected);
        Some(doubt)
    }

    pub(super) fn put(&mut self, doubt: Doubt) {
        let id = doubt.key.id.clone();
        let trial = (doubt.next, id.clone());
        match doubt.stage {
            Stage::Noted => {}
            Stage::Suspected => _ = self.by_any.insert(trial),
            // Once its rest has ended, the key needs a trial to serve again.
            Stage::Confirmed if doubt.key.state.load().is_available() => _ = self.by_any.insert(trial),
            Stage::Confirmed | Stage::Guessed => _ = self.by_failover.insert(trial),
        }
        self.suspects += usize::from(doubt.stage == Stage::Suspected);
        self.keep_out(&doubt.key, doubt.keeps_out());
        self.doubts.insert(id, doubt);
    }

    /// Nothing is known of the key any more.
    pub(super) fn forget(&mut self, doubt: Doubt) {
        self.keep_out(&doubt.key, false);
    }

    fn keep_out(&mut self, key: &Arc<Key>, keeps_out: bool) {
        if key.set_in_doubt(keeps_out) {
            self.changed.push(key.clone());
        }
    }

    pub(super) fn suspects(&self) -> usize {
        self.suspects
    }

    /// What is known of a key, to look at.
    pub(super) fn get(&self, key: &Arc<Key>) -> Option<&Doubt> {
        self.doubts.get(&key.id).filter(|doubt| Arc::ptr_eq(&doubt.key, key))
    }

    /// All that is known, in any order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Doubt> {
        self.doubts.values()
    }

    /// The keys that are suspected, or were confirmed and no longer rest: the first ones to be tried.
    pub(super) fn out_of_service(&self, most: usize) -> Vec<Arc<Key>> {
        let keys = self.by_any.iter().take(most).filter_map(|(_, id)| self.doubts.get(id));
        keys.map(|doubt| doubt.key.clone()).collect()
    }

    /// The keys whose trial may begin by then, the first ones only.
    pub(super) fn due(&self, now: u64, has_failover: bool, most: usize) -> Vec<Arc<Key>> {
        let is_due = |(next, _): &&(u64, KeyId)| *next <= now;
        let by_failover = has_failover.then(|| self.by_failover.iter().take_while(is_due));
        let due = self.by_any.iter().take_while(is_due).chain(by_failover.into_iter().flatten());
        due.filter_map(|(_, id)| self.doubts.get(id)).map(|doubt| doubt.key.clone()).take(most).collect()
    }

    /// Forgets the keys that have left the pool.
    pub(super) fn retain(&mut self, is_held: impl Fn(&Arc<Key>) -> bool) {
        let gone = self.doubts.values().map(|doubt| doubt.key.clone()).filter(|key| !is_held(key));
        for key in gone.collect::<Vec<_>>() {
            if let Some(doubt) = self.take(&key) {
                self.forget(doubt);
            }
        }
    }

    /// The store is to end the rest of a key that serves.
    pub(super) fn note_served(&mut self, key: &Arc<Key>) {
        if !self.served.iter().any(|served| Arc::ptr_eq(served, key)) {
            self.served.push(key.clone());
        }
    }

    pub(super) fn take_served(&mut self) -> Vec<Arc<Key>> {
        std::mem::take(&mut self.served)
    }
}
