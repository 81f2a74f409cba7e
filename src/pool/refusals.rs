//! The rules of refusals that do not say whether they are about the key or about the request.
//!
//! 1. A refusal **suspects** its key: other requests pass over it. With failover, the request is the experiment: it goes on
//!    with another key. If that one refuses it in the same way, the request is the reason, and neither key is suspected
//!    any more. If that one serves it, the first key is **confirmed**: it rests.
//! 2. Without failover, other requests are the evidence. A key that has served others since its last refusal is not
//!    suspected, and if two keys refuse in the same way for the first time, neither is.
//! 3. Suspicion alone never takes out more than half of the keys, nor the last available one. It ends when no other key is
//!    available.
//! 4. A suspected or confirmed key serves again once one request has tried it with success: a **trial**. So does a key that
//!    rests for a time that this process has guessed. Trials of a key come one at a time, at intervals that double.
//!    Resting keys are tried by requests that have failover behind them, or if no key is available. A key is not tried
//!    while it rests for a time that the service, an operator or the store named.

use std::{sync::Arc, time::Duration};

use super::{
    doubts::{Doubt, Known, Stage},
    engine::Engine,
    key::Key,
};
use crate::{
    key::KeyId,
    limit::{NEVER, Rest, RestCause, Resting, Until, Word, millis},
    meter::Became,
    sync::atomic::Ordering::Relaxed,
};

/// The time from a refusal to the first trial of a suspected key.
const SUSPICION: Duration = Duration::from_secs(10);

/// The time to the first trial of a key that is confirmed, or rests for a guessed time.
const FIRST_TRIAL: Duration = Duration::from_secs(60);

/// The longest time between two trials.
const LONGEST_PAUSE: Duration = Duration::from_secs(600);

/// Refusals are counted anew once a key has been picked so often, and was not suspected.
const PICKS_COUNTED: u64 = 16;

/// The most keys that one request looks at for a trial.
const TRIED: usize = 8;

/// The most suspected keys that a refusal is compared with, and that an experiment avoids.
const COMPARED: usize = 64;

/// The most keys that are looked at to find those.
const LOOKED_AT: usize = 256;

impl Engine {
    /// Changes what is known of keys in doubt, and brings the indexes in line.
    fn in_doubts<T>(&self, change: impl FnOnce(&mut Known) -> T) -> T {
        let (result, changed) = self.doubts.change(change);
        let mut has_returned = false;
        for key in &changed {
            has_returned |= !key.is_in_doubt();
            self.refresh(key);
        }
        self.show_trials();
        if has_returned {
            self.wake_waiters();
        }
        result
    }

    /// Has picks look for trials, or no longer.
    pub(super) fn show_trials(&self) {
        loop {
            let has_any = self.doubts.has_any();
            let snapshot = self.snapshot();
            snapshot.show_trials(has_any);
            if self.doubts.has_any() == has_any && Arc::ptr_eq(&snapshot, &self.snapshot()) {
                return;
            }
        }
    }

    // ---- refusals ----

    /// A response refused the key, or the request.
    pub(super) fn suspect(&self, key: &Arc<Key>, http_status: u16) {
        key.counts.limited.fetch_add(1, Relaxed);
        key.set_last_status(http_status);
        // Before the lock: what it ends may be in doubt.
        self.return_expired(&self.snapshot());
        let is_suspected = self.in_doubts(|known| {
            let doubt = match known.take(key) {
                Some(doubt) => self.judge_again(known, doubt, http_status),
                None => self.judge_first(known, key, http_status),
            };
            let is_suspected = doubt.stage == Stage::Suspected;
            known.put(doubt);
            is_suspected
        });
        tracing::debug!(key = %key.id, http_status, is_suspected, "refused");
        self.wake_writer();
    }

    /// Judges the first refusal of a key.
    fn judge_first(&self, known: &mut Known, key: &Arc<Key>, http_status: u16) -> Doubt {
        let mut is_shared = false;
        for other in known.out_of_service(COMPARED) {
            let Some(mut doubt) = known.take(&other) else { continue };
            let is_first = doubt.stage == Stage::Suspected && doubt.refusals == 0;
            if is_first && doubt.status == http_status {
                is_shared = true;
                doubt.stage = Stage::Noted;
            }
            known.put(doubt);
        }
        let doubt = Doubt::noted(key, http_status);
        if !is_shared && self.may_suspect(known, key) { self.suspected(doubt) } else { doubt }
    }

    /// Judges a further refusal of a key.
    fn judge_again(&self, known: &Known, mut doubt: Doubt, http_status: u16) -> Doubt {
        let since = doubt.key.counts.requests.sum().saturating_sub(doubt.picks);
        if since == 0 {
            // It was sent before the last refusal.
            return doubt;
        }
        doubt.status = http_status;
        doubt.refusals += 1;
        match doubt.stage {
            // Its next trial is planned already.
            Stage::Suspected | Stage::Guessed => doubt,
            Stage::Confirmed => self.rests_longer(doubt, Rest::RateLimited),
            Stage::Noted if since <= 2 * doubt.refusals => {
                if self.may_suspect(known, &doubt.key) {
                    self.suspected(doubt)
                } else {
                    doubt
                }
            }
            // It served others in between.
            Stage::Noted => {
                if since >= PICKS_COUNTED {
                    (doubt.picks, doubt.refusals) = (doubt.picks + since, 0);
                }
                doubt
            }
        }
    }

    /// Whether suspicion may take out one more key.
    fn may_suspect(&self, known: &Known, key: &Arc<Key>) -> bool {
        let snapshot = self.snapshot();
        known.suspects() < snapshot.keys().len() / 2
            && snapshot.has_available_besides(std::slice::from_ref(key))
    }

    fn suspected(&self, doubt: Doubt) -> Doubt {
        self.config.meter.refusal(Became::Suspected);
        let next = self.millis_after(pause(Stage::Suspected, doubt.trials));
        tracing::info!(key = %doubt.key.id, http_status = doubt.status, "key suspected");
        Doubt { stage: Stage::Suspected, next, ..doubt }
    }

    /// Other keys refused the same request in the same way: it was the request's own fault.
    pub(crate) fn acquit<'a>(&self, keys: impl IntoIterator<Item = &'a Arc<Key>>) {
        self.in_doubts(|known| {
            for key in keys {
                let Some(mut doubt) = known.take(key) else { continue };
                if doubt.stage == Stage::Suspected {
                    tracing::debug!(key = %key.id, "key no longer suspected");
                    (doubt.stage, doubt.trials) = (Stage::Noted, 0);
                }
                known.put(doubt);
            }
        });
        self.config.meter.refusal(Became::Acquitted);
    }

    /// Another key served a request that this one refused.
    pub(crate) fn confirm(&self, key: &Arc<Key>, http_status: u16) {
        let is_new = self.in_doubts(|known| {
            let doubt = known.take(key);
            self.confirm_in(known, key, doubt, http_status, Rest::RateLimited)
        });
        if is_new {
            self.config.meter.refusal(Became::Confirmed);
            tracing::info!(key = %key.id, http_status, "another key serves what this one refuses: key rests");
        }
        self.wake_writer();
    }

    /// Returns whether the key is confirmed only now.
    fn confirm_in(
        &self,
        known: &mut Known,
        key: &Arc<Key>,
        doubt: Option<Doubt>,
        http_status: u16,
        reason: Rest,
    ) -> bool {
        let mut doubt = doubt.unwrap_or_else(|| Doubt::noted(key, http_status));
        let is_new = !matches!(doubt.stage, Stage::Confirmed | Stage::Guessed);
        if is_new {
            (doubt.stage, doubt.trials) = (Stage::Confirmed, 0);
            doubt.next = self.millis_after(pause(Stage::Confirmed, 0));
            doubt = self.rests_longer(doubt, reason);
        }
        known.put(doubt);
        is_new
    }

    /// Rests a key for that long, unless it rests for a time that somebody has named. Returns its rest.
    fn rest_by_guess(&self, doubt: &Doubt, time: Duration, reason: Rest) -> Option<Word> {
        let resting = Resting { until: Until::After(time), reason };
        let word = Word::new(0, Some(resting), self.now());
        let key = &doubt.key;
        let before = key.state.update(|state| {
            let is_guessed = state == doubt.guess.in_generation_of(state);
            if state.is_available() || is_guessed { state.join(word.in_generation_of(state)) } else { state }
        })?;
        key.set_cause(RestCause::Confirmed);
        self.config.meter.marked(reason);
        self.note_pending(key, word.in_generation_of(before));
        self.refresh(key);
        Some(word)
    }

    /// Takes a key out of service for good by `rest`, unless no other key is available: then it rests as a confirmed one
    /// does. To the store that is an exhausted key, so that a standby key replaces it.
    pub(super) fn revoke(&self, key: &Arc<Key>, http_status: u16, rest: impl FnOnce()) {
        self.return_expired(&self.snapshot());
        self.in_doubts(|known| {
            let doubt = known.take(key);
            // Under the lock: of two keys that are revoked at once, each could take the other one for available.
            if self.snapshot().has_available_besides(std::slice::from_ref(key)) {
                doubt.into_iter().for_each(|doubt| known.forget(doubt));
                return rest();
            }
            match doubt {
                Some(doubt) if doubt.stage == Stage::Confirmed => {
                    known.put(self.rests_longer(doubt, Rest::Exhausted))
                }
                doubt => _ = self.confirm_in(known, key, doubt, http_status, Rest::Exhausted),
            }
        });
        self.wake_writer();
    }

    /// A confirmed key rests beyond its next trial: if that succeeds, the rest ends for other processes, too, and they need
    /// not try the key themselves.
    fn rests_longer(&self, doubt: Doubt, reason: Rest) -> Doubt {
        let rest = 2 * pause(Stage::Confirmed, doubt.trials);
        let guess = self.rest_by_guess(&doubt, rest, reason).unwrap_or(doubt.guess);
        Doubt { guess, ..doubt }
    }

    /// A key rests for a time that the service did not name.
    pub(super) fn note_guess(&self, key: &Arc<Key>, guess: Word, http_status: u16) {
        self.in_doubts(|known| {
            let mut doubt = known.take(key).unwrap_or_else(|| Doubt::noted(key, http_status));
            if doubt.stage != Stage::Guessed {
                (doubt.stage, doubt.trials) = (Stage::Guessed, 0);
                doubt.next = self.millis_after(pause(Stage::Guessed, 0));
            }
            (doubt.guess, doubt.status) = (guess, http_status);
            known.put(doubt);
        });
    }

    /// A key that rests for a longer, guessed time is not tried before that.
    pub(super) fn put_trial_off(&self, key: &Arc<Key>, time: Duration) {
        self.in_doubts(|known| {
            if let Some(mut doubt) = known.take(key) {
                if doubt.stage == Stage::Guessed {
                    doubt.next = self.millis_after(time);
                }
                known.put(doubt);
            }
        });
    }

    /// Whatever was in doubt of a key: now somebody has said how it stands.
    pub(super) fn settle_doubt(&self, key: &Arc<Key>) {
        if self.doubts.has_any() {
            self.in_doubts(|known| {
                if let Some(doubt) = known.take(key).filter(|doubt| doubt.stage != Stage::Noted) {
                    known.forget(doubt);
                }
            });
        }
    }

    // ---- trials ----

    /// Gives a key to try to a request, if the request can `take` it. The caller has seen that one is due.
    #[cold]
    pub(super) fn begin_trial<T>(
        &self,
        now: u64,
        has_failover: bool,
        mut take: impl FnMut(&Arc<Key>) -> Option<T>,
    ) -> Option<T> {
        self.in_doubts(|known| {
            for key in known.due(now, has_failover, TRIED) {
                let Some(mut doubt) = known.take(&key) else { continue };
                let state = key.state.load();
                let is_out = doubt.stage != Stage::Guessed && state.is_available();
                if !is_out && !doubt.is_resting_by_guess() {
                    if doubt.stage == Stage::Guessed {
                        // The rest has ended, or another one took its place.
                        known.forget(doubt);
                    } else {
                        let until = Some(state.deadline()).filter(|deadline| *deadline != NEVER);
                        doubt.next = until.unwrap_or(0).max(self.millis_after(SUSPICION));
                        known.put(doubt);
                    }
                    continue;
                }
                let taken = take(&key);
                if taken.is_some() {
                    doubt.trials += 1;
                    // Planned before its answer: a request without an answer must not hold up the next trial.
                    doubt.next = now.saturating_add(millis(pause(doubt.stage, doubt.trials)));
                    tracing::debug!(key = %key.id, "key in doubt is tried");
                }
                known.put(doubt);
                if taken.is_some() {
                    return taken;
                }
            }
            None
        })
    }

    /// Has all suspected keys serve again: no other key is available. Returns whether there was any.
    #[cold]
    pub(super) fn end_suspicion(&self) -> bool {
        if self.doubts.next_trial(false) == NEVER {
            return false;
        }
        self.in_doubts(|known| {
            let mut has_any = false;
            for key in known.out_of_service(usize::MAX) {
                let Some(mut doubt) = known.take(&key) else { continue };
                if doubt.stage == Stage::Suspected && key.state.load().is_available() {
                    doubt.stage = Stage::Noted;
                    has_any = true;
                }
                known.put(doubt);
            }
            has_any
        })
    }

    /// The rest of a key has ended. A confirmed one waits for its trial, which any request may be now.
    pub(super) fn rest_has_ended(&self, key: &Arc<Key>) {
        if key.is_in_doubt() {
            self.in_doubts(|known| known.take(key).into_iter().for_each(|doubt| known.put(doubt)));
        }
    }

    /// A trial has succeeded: the key serves, here and in the store.
    pub(super) fn end_doubt(&self, key: &Arc<Key>) {
        let served = self.in_doubts(|known| {
            let Some(doubt) = known.take(key) else { return false };
            if doubt.stage == Stage::Noted {
                known.put(doubt);
                return false;
            }
            let guess = doubt.guess;
            let end = |word: Word| if word == guess.in_generation_of(word) { word.ended() } else { word };
            if guess != Word::HEALTHY {
                // Rests of scopes stay pending.
                key.pending
                    .update(|pending| end(pending.with_scopes(false)).with_scopes(pending.has_scopes()));
                let has_ended = key.state.update(end).is_some();
                if has_ended && self.has_store() {
                    known.note_served(key);
                }
            }
            known.forget(doubt);
            true
        });
        if served {
            key.counts.recovered.fetch_add(1, Relaxed);
            self.config.meter.refusal(Became::Recovered);
            tracing::info!(key = %key.id, "key serves again");
            self.refresh(key);
            self.wake_waiters();
            self.wake_writer();
        }
    }

    /// The keys whose rest the store is to end, since they serve.
    pub(crate) fn take_served(&self) -> Vec<Arc<Key>> {
        self.doubts.look(Known::take_served)
    }

    /// The store could not end them.
    pub(crate) fn put_served_back(&self, keys: impl IntoIterator<Item = Arc<Key>>) {
        self.doubts.look(|known| keys.into_iter().for_each(|key| known.note_served(&key)));
    }

    /// Forgets the keys that have left the pool.
    pub(super) fn forget_doubts_of_others(&self) {
        self.in_doubts(|known| known.retain(|key| self.snapshot().holds(key)));
    }

    /// Whether a key was refused lately, and is not known to have served since.
    pub(super) fn is_doubtful(&self, key: &Arc<Key>) -> bool {
        self.doubts.look(|known| known.get(key).is_some_and(is_doubtful))
    }

    /// Some keys that were refused lately, and are not known to have served since.
    pub(super) fn doubtful(&self) -> Vec<KeyId> {
        let doubtful = |known: &mut Known| {
            let some = known.iter().take(LOOKED_AT).filter(|doubt| is_doubtful(doubt));
            some.map(|doubt| doubt.key.id.clone()).take(COMPARED).collect()
        };
        self.doubts.look(doubtful)
    }

    /// The time until a key is tried, if one is to be.
    pub(super) fn next_trial_of(&self, key: &Arc<Key>) -> Option<Duration> {
        let next = |known: &mut Known| known.get(key).map(|doubt| doubt.next);
        let next = self.doubts.look(next).filter(|next| *next != NEVER)?;
        Some(Duration::from_millis(next).saturating_sub(self.now()))
    }

    /// The keys that the next requests try: those that do not rest.
    pub(super) fn due_for_trial(&self) -> Vec<Arc<Key>> {
        let now = self.millis();
        if self.doubts.next_trial(false) > now {
            return Vec::new();
        }
        let due = self.doubts.look(|known| known.due(now, false, TRIED));
        due.into_iter().filter(|key| key.state.load().is_available()).collect()
    }

    fn millis_after(&self, time: Duration) -> u64 {
        millis(self.now().saturating_add(time))
    }
}

fn is_doubtful(doubt: &Doubt) -> bool {
    let since = doubt.key.counts.requests.sum().saturating_sub(doubt.picks);
    doubt.stage != Stage::Noted || since <= 2 * doubt.refusals + 1
}

/// The time from the end of so many trials to the next one.
fn pause(stage: Stage, trials: u32) -> Duration {
    let first = match stage {
        Stage::Noted | Stage::Suspected => SUSPICION,
        Stage::Confirmed | Stage::Guessed => FIRST_TRIAL,
    };
    first.saturating_mul(1 << trials.min(10)).min(LONGEST_PAUSE)
}
