//! The pool in memory: the keys, their states, and the indexes over them.
//!
//! Nothing here knows the store. Marks that it is to have wait in each key's `pending` word.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, PoisonError, Weak},
    time::Duration,
};

use arc_swap::{ArcSwap, Guard};
use tokio::{
    runtime::Handle,
    sync::{Notify, futures::Notified},
};

use super::{
    doubts::{Doubts, Trials},
    kept::Kept,
    key::{Home, Key, UsableKey},
    lease::Lease,
    scoped::{Limiting, Regrouping},
    scopes::{Pending, Scopes},
    snapshot::Snapshot,
    source::Source,
};
use crate::{
    clock::Clock,
    key::{KeyId, hosts::Hosts, inject::Inject},
    limit::{Cooldowns, NEVER, Quota, Rest, RestCause, Resting, Scope, Until, Word, Words, millis, nanos},
    meter::{Counted, Meter},
    store::{Recovered, Standing},
    sync::{
        Mutex,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{Relaxed, SeqCst},
        },
    },
};

/// A pool of fewer keys is regrouped within a request.
const FEW_KEYS: usize = 64;

/// The most keys that an experiment passes over for one that was not refused lately.
const COMPARED: usize = 16;

/// How long a pool is not regrouped again, for each key: a hundred times what it takes.
const REGROUPED_FOR: Duration = Duration::from_micros(100);

/// What the keys of a pool have in common.
#[derive(Debug)]
pub(crate) struct Config {
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) inject: Inject,
    pub(crate) hosts: Hosts,
    pub(crate) cooldowns: Cooldowns,
    pub(crate) meter: Arc<Meter>,
    /// Learns what the service allows.
    pub(crate) learns: bool,
    pub(crate) quotas: Vec<Quota>,
    /// The first key with room serves, not the next one in turn.
    pub(crate) fills_first: bool,
    pub(crate) sources: Vec<Arc<Source>>,
}

pub(crate) struct Engine {
    snapshot: ArcSwap<Snapshot>,
    /// Held while the set of keys is replaced.
    editing: Mutex<()>,
    pub(super) doubts: Doubts,
    pub(super) limiting: Arc<Limiting>,
    /// Whether requests without traits need more than the next key in turn.
    chooses: AtomicBool,
    pub(crate) config: Config,
    /// Wakes waiters for a key when one comes back before its cooldown ends.
    returned: Notify,
    /// Wakes the writer. `None` without a store: then no mark is kept for one.
    pending: Option<Notify>,
    /// The picks of keys that have left the pool.
    gone_picks: AtomicU64,
    this: Weak<Self>,
}

/// What a new generation ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Resets {
    Key,
    Scope,
}

/// Rests that the store does not have yet.
pub(crate) struct Unwritten {
    pub(crate) words: Words,
    word: Word,
    scopes: Vec<Pending>,
}

impl Engine {
    pub(crate) fn new(keys: Vec<UsableKey>, config: Config, has_store: bool) -> Arc<Self> {
        Arc::new_cyclic(|this: &Weak<Self>| {
            let key = |key: UsableKey| Arc::new(key.healthy_in(this.clone()));
            let snapshot = Snapshot::new(keys.into_iter().map(key).collect(), None);
            let limiting = Limiting {
                clock: config.clock.clone(),
                cooldowns: config.cooldowns,
                learns: config.learns,
                has_store,
                quotas: config.quotas.iter().cloned().map(Arc::new).collect(),
                kept: Kept::default(),
                scopes: Scopes::default(),
                fills_first: config.fills_first,
                regrouping: Regrouping::default(),
                renewed: Mutex::new(None),
                meter: config.meter.clone(),
            };
            Self {
                chooses: AtomicBool::new(limiting.chooses() || snapshot.has_choices()),
                limiting: Arc::new(limiting),
                snapshot: ArcSwap::from_pointee(snapshot),
                editing: Mutex::new(()),
                doubts: Doubts::new(),
                config,
                returned: Notify::new(),
                pending: has_store.then(Notify::new),
                gone_picks: AtomicU64::new(0),
                this: this.clone(),
            }
        })
    }

    /// Whether the pool learns what the service allows.
    pub(crate) fn learns(&self) -> bool {
        self.limiting.learns
    }

    pub(crate) fn snapshot(&self) -> Guard<Arc<Snapshot>> {
        self.snapshot.load()
    }

    pub(super) fn now(&self) -> Duration {
        self.config.clock.now()
    }

    pub(super) fn millis(&self) -> u64 {
        millis(self.now())
    }

    pub(super) fn has_store(&self) -> bool {
        self.pending.is_some()
    }

    // ---- picks ----

    /// Whether requests without traits need more than [`pick`](Self::pick).
    #[inline(always)]
    pub(crate) fn chooses(&self) -> bool {
        self.chooses.load(Relaxed)
    }

    /// The next key in turn, or one that is due for a trial.
    #[inline(always)]
    pub(crate) fn pick(&self, trials: Trials) -> Option<Lease> {
        let lease = self.take_turn(trials)?;
        lease.key.counts.requests.add(1);
        Some(lease)
    }

    /// The same, not inlined: a second copy would make the usual way of a request longer.
    #[cold]
    #[inline(never)]
    pub(crate) fn pick_apart(&self) -> Option<Lease> {
        self.pick(Trials::OfSuspects)
    }

    /// The next key in turn that is none of these. They lose their turn.
    pub(crate) fn pick_besides(&self, tried: &[Arc<Key>], trials: Trials) -> Option<Lease> {
        // Each of them can be in the way once, and more often only if other threads pick at the same time.
        self.pick_that(2 * tried.len(), trials, |key| !is_one_of(key, tried))
    }

    /// The same for an experiment: a key that was not refused lately, if one comes soon.
    pub(crate) fn pick_to_compare(&self, tried: &[Arc<Key>]) -> Option<Lease> {
        let is_good = |key: &Arc<Key>| !is_one_of(key, tried) && !self.is_doubtful(key);
        let good = self.pick_that(2 * tried.len() + COMPARED, Trials::No, is_good);
        good.or_else(|| self.pick_besides(tried, Trials::No))
    }

    fn pick_that(
        &self,
        passed_over: usize,
        trials: Trials,
        suits: impl Fn(&Arc<Key>) -> bool,
    ) -> Option<Lease> {
        for _ in 0..=passed_over {
            let lease = self.take_turn(trials)?;
            if suits(&lease.key) {
                lease.key.counts.requests.add(1);
                return Some(lease);
            }
        }
        None
    }

    #[inline(always)]
    fn take_turn(&self, trials: Trials) -> Option<Lease> {
        let snapshot = self.snapshot.load();
        loop {
            if let Some(now) = self.return_expired(&snapshot)
                && let Some(lease) = self.trial(now, trials)
            {
                return Some(lease);
            }
            if let Some(key) = snapshot.pick() {
                return Some(Lease::of(key.clone()));
            }
            if self.end_suspicion() {
                continue;
            }
            let now = self.millis();
            if trials != Trials::No
                && let Some(lease) = self.trial(now, Trials::OfAll)
            {
                return Some(lease);
            }
            if snapshot.earliest_for_certain() > now {
                return None;
            }
        }
    }

    /// A key in doubt that is due for a trial.
    #[inline]
    fn trial(&self, now: u64, trials: Trials) -> Option<Lease> {
        if trials == Trials::No || self.doubts.next_trial(trials == Trials::OfAll) > now {
            return None;
        }
        self.begin_trial(now, trials == Trials::OfAll, |key| Some(Lease::of(key.clone()).into_trial()))
    }

    pub(crate) fn has_available(&self) -> bool {
        let snapshot = self.snapshot.load();
        let now = self.return_expired(&snapshot);
        snapshot.has_available() || now.is_some_and(|now| self.has_key_in_doubt(now))
    }

    /// Whether a key comes from the pool although none is available: one that is due for a trial, or suspected.
    #[cold]
    fn has_key_in_doubt(&self, now: u64) -> bool {
        self.doubts.next_trial(true) <= now || self.end_suspicion()
    }

    /// Whether a key other than these is available.
    pub(crate) fn has_available_besides(&self, tried: &[Arc<Key>]) -> bool {
        let snapshot = self.snapshot.load();
        self.return_expired(&snapshot);
        snapshot.has_available_besides(tried)
    }

    pub(crate) fn count_available(&self) -> usize {
        self.snapshot.load().count_available()
    }

    /// The time until a key can be picked.
    pub(crate) fn next_return(&self) -> Option<Duration> {
        if self.has_available() {
            return Some(Duration::ZERO);
        }
        let trial = self.doubts.next_trial(true);
        self.time_until(self.snapshot.load().earliest_for_certain().min(trial))
    }

    /// The time until the next resting key is back, whether others are available or not.
    pub(crate) fn next_end_of_a_rest(&self) -> Option<Duration> {
        self.time_until(self.snapshot.load().next_deadline())
    }

    fn time_until(&self, deadline: u64) -> Option<Duration> {
        (deadline != NEVER).then(|| Duration::from_millis(deadline).saturating_sub(self.now()))
    }

    pub(crate) fn returned(&self) -> Notified<'_> {
        self.returned.notified()
    }

    // ---- the end of rests ----

    /// Returns keys to service whose cooldown has ended. Returns the time in ms if a key rests or is to be tried.
    #[inline]
    pub(super) fn return_expired(&self, snapshot: &Snapshot) -> Option<u64> {
        // While nothing is cooling, no clock is read.
        if snapshot.earliest() == NEVER { None } else { self.return_expired_at(snapshot, self.millis()) }
    }

    #[inline]
    pub(super) fn return_expired_at(&self, snapshot: &Snapshot, now: u64) -> Option<u64> {
        let earliest = snapshot.earliest();
        if earliest <= now {
            snapshot.return_expired(now, |key| self.has_returned(key, snapshot));
        }
        (earliest != NEVER).then_some(now)
    }

    /// Returns all keys to service whose cooldown has ended.
    pub(crate) fn return_all_expired(&self) -> Recovered {
        let snapshot = self.snapshot.load();
        let now = self.millis();
        let (mut count, mut ids) = (0, Vec::new());
        for _ in 0..=snapshot.keys().len() {
            if snapshot.earliest() > now {
                break;
            }
            snapshot.return_expired(now, |key| {
                self.has_returned(key, &snapshot);
                count += 1;
                if ids.len() <= Recovered::NAMED_AT_MOST {
                    ids.push(key.id.clone());
                }
            });
        }
        self.limiting.scopes.drop_ended(self.now());
        Recovered::new(count, ids)
    }

    fn has_returned(&self, key: &Arc<Key>, snapshot: &Snapshot) {
        key.counts.recovered.fetch_add(1, Relaxed);
        tracing::debug!(key = %key.id, "cooldown over");
        self.rest_has_ended(key);
        if !std::ptr::eq(snapshot, Arc::as_ptr(&self.snapshot.load())) {
            self.refresh(key);
        }
    }

    /// Brings the indexes in line with the state of a key, in the snapshot that is in use when this returns.
    pub(crate) fn refresh(&self, key: &Arc<Key>) {
        loop {
            let snapshot = self.snapshot.load();
            snapshot.refresh(key);
            if Arc::ptr_eq(&snapshot, &self.snapshot.load()) {
                return;
            }
        }
    }

    // ---- marks ----

    fn resting(&self, reason: Rest, hint: Option<Duration>) -> Resting {
        let cooldown = self.config.cooldowns.how_long(reason, hint);
        Resting { until: cooldown.map_or(Until::Reset, Until::After), reason }
    }

    /// Rests a key, unless it rests for longer. Returns the rest, if the key has it now.
    ///
    /// The state and the pending word grow in any order: whoever reads either joins it, so that nothing can be taken back.
    fn rest(&self, key: &Arc<Key>, reason: Rest, hint: Option<Duration>, http_status: u16) -> Option<Word> {
        let resting = self.resting(reason, hint);
        let marked = Word::new(0, Some(resting), self.now());
        let in_state = |state: Word| state.join(marked.in_generation_of(state));
        // A rest for no longer than the key's is a part of that: the store has it, or it is pending.
        let before = key.state.update(in_state)?;
        let is_said = hint.is_some() || reason == Rest::Revoked;
        key.set_cause(if is_said { RestCause::Service } else { RestCause::Guessed });
        self.note_pending(key, marked.in_generation_of(before));
        self.refresh(key);
        self.wake_writer();
        self.config.meter.marked(reason);
        let cooldown_ms = resting.until.left().map(|cooldown| cooldown.as_millis() as u64);
        if before.is_available() {
            tracing::info!(key = %key.id, cooldown_ms, ?reason, http_status, "key rests");
        } else {
            tracing::debug!(key = %key.id, cooldown_ms, ?reason, http_status, "key rests longer");
        }
        Some(marked)
    }

    /// The store is to have the rest.
    pub(super) fn note_pending(&self, key: &Key, word: Word) {
        if self.has_store() {
            key.pending.update(|pending| pending.join(word));
        }
    }

    pub(crate) fn wake_writer(&self) {
        if let Some(pending) = &self.pending {
            pending.notify_one();
        }
    }

    /// Completes when a mark is pending; never without a store.
    pub(crate) async fn mark_pending(&self) {
        match &self.pending {
            Some(pending) => pending.notified().await,
            None => std::future::pending().await,
        }
    }

    /// What the store is to be told of a key. What has ended, and what belongs to an older generation, is dropped.
    pub(crate) fn unwritten(&self, key: &Arc<Key>) -> Option<Unwritten> {
        let word = key.pending.load();
        if word == Word::HEALTHY {
            return None;
        }
        let (now, generation) = (self.now(), key.state.load().generation());
        let resting = |word: Word| word.resting(now).filter(|_| word.generation() == generation);
        let scopes = if word.has_scopes() { self.limiting.scopes.pending(key) } else { Vec::new() };
        let left = scopes.iter().filter_map(|(scope, word)| Some((scope.clone(), resting(*word)?)));
        let words = Words { generation, key: resting(word), scopes: left.collect() };
        let unwritten = Unwritten { words, word, scopes };
        if unwritten.words.key.is_none() && unwritten.words.scopes.is_empty() {
            self.is_written(key, &unwritten);
            return None;
        }
        Some(unwritten)
    }

    /// The store has these rests. What was marked meanwhile stays pending.
    pub(crate) fn is_written(&self, key: &Arc<Key>, Unwritten { word, scopes, .. }: &Unwritten) {
        if word.has_scopes() {
            self.limiting.scopes.acknowledge(key, *word, scopes);
        } else {
            key.pending.replace(*word, Word::HEALTHY);
        }
    }

    // ---- what the store says ----

    pub(crate) fn store_failed(&self, operation: Counted) {
        self.config.meter.store_failed(operation);
    }

    /// Joins the words of the store into a key.
    pub(crate) fn join(&self, key: &Arc<Key>, words: &Words) {
        self.take_in(key, words, None, Resets::Key);
    }

    /// Joins the words of a reset that was made here, of the key or of one scope.
    pub(crate) fn apply_reset(
        &self,
        key: &Arc<Key>,
        words: &Words,
        disabled: Option<bool>,
        scope: Option<&Scope>,
    ) {
        self.take_in(key, words, disabled, if scope.is_some() { Resets::Scope } else { Resets::Key });
        self.reset_limits(key, scope);
    }

    fn reset_limits(&self, key: &Arc<Key>, only: Option<&Scope>) {
        self.snapshot.load().scopes.each(|scoped| {
            if only.is_none_or(|scope| scoped.common.name_of_rests() == *scope) {
                scoped.in_newest(|newest| newest.reset(key));
            }
        });
    }

    /// The rests of other keys that rest the limits of this one, too: those of its quota group, in all scopes or in one.
    pub(super) fn rests_of_group(&self, key: &Arc<Key>, only: Option<&Scope>) -> Vec<(Arc<Key>, Scope)> {
        let snapshot = self.snapshot.load();
        let group = snapshot.slot(&key.id).and_then(|slot| snapshot.layout().group_of(slot));
        let members = group.into_iter().flat_map(|(_, members)| members);
        let others = members.map(|slot| &snapshot.keys()[*slot as usize]).filter(|other| other.id != key.id);
        let rests = others
            .flat_map(|other| self.scopes_of(other).into_keys().map(move |scope| (other.clone(), scope)));
        rests.filter(|(_, scope)| only.is_none_or(|only| only == scope)).collect()
    }

    /// Joins the words of the store, and takes from it whether the key is disabled. Only for what was read or done while
    /// no operator's change was under way, or an older answer could undo that.
    pub(crate) fn apply(&self, key: &Arc<Key>, standing: &Standing) {
        self.take_in(key, &standing.words, Some(standing.disabled), Resets::Key);
    }

    pub(crate) fn set_disabled(&self, key: &Arc<Key>, disabled: bool) {
        if key.state.update(|state| state.with_disabled(disabled)).is_some() {
            self.has_changed(key);
        }
    }

    /// Joins what the store says of a key beside loads. Returns whether that was all there is to do: if not, the key has
    /// to be loaded.
    pub(crate) fn hear(&self, id: &KeyId, standing: &Standing) -> bool {
        let snapshot = self.snapshot.load();
        let known = snapshot.get(id.as_str()).filter(|key| key.born() == Some(standing.born));
        let Some(key) = known else { return false };
        self.join(key, &standing.words);
        key.state.load().is_disabled() == standing.disabled
    }

    fn take_in(&self, key: &Arc<Key>, words: &Words, disabled: Option<bool>, resets: Resets) {
        let now = self.now();
        let word = Word::new(words.generation, words.key, now);
        let changed = key.state.update(|state| {
            let joined = state.join(word);
            disabled.map_or(joined, |disabled| joined.with_disabled(disabled))
        });
        let longer = self.limiting.scopes.join(key, words, now, || self.snapshot.load().holds(key));
        for (scope, until) in longer {
            self.rest_limit(key, &scope, until);
        }
        if let Some(before) = changed {
            drop_older_pending(key);
            if before.is_available() {
                key.set_cause(RestCause::Store);
            }
            if before.generation() < key.state.load().generation() {
                self.settle_doubt(key);
            }
            // After the reset of one scope, the operation itself ends the rest of that scope's limit.
            if before.generation() < key.state.load().generation() && resets == Resets::Key {
                self.reset_limits(key, None);
            }
            self.has_changed(key);
        }
    }

    /// Closes the limit of a key in a scope until then, in ms. A scope that no request uses yet has no limits: it looks for
    /// rests when it is made.
    fn rest_limit(&self, key: &Arc<Key>, scope: &Scope, until: u64) {
        if let Some(scoped) = self.snapshot.load().scopes.of_rests(scope) {
            scoped.in_newest(|newest| newest.rest(key, until));
        }
    }

    /// A rest that came while a new snapshot was built may have closed a limit of the old one.
    fn rest_limits_again(&self, snapshot: &Snapshot) {
        let is_in_use = |scope: &Scope| snapshot.scopes.of_rests(scope).is_some();
        for (key, scope, until) in self.limiting.scopes.all(self.now(), is_in_use) {
            self.rest_limit(&key, &scope, until);
        }
    }

    fn has_changed(&self, key: &Arc<Key>) {
        self.refresh(key);
        self.wake_waiters();
    }

    pub(super) fn wake_waiters(&self) {
        self.returned.notify_waiters();
    }

    /// All that is known of a key's limits.
    pub(crate) fn words(&self, key: &Arc<Key>) -> Words {
        let state = key.state.load();
        Words { generation: state.generation(), key: state.resting(self.now()), scopes: self.scopes_of(key) }
    }

    pub(crate) fn scopes_of(&self, key: &Arc<Key>) -> BTreeMap<Scope, Resting> {
        self.limiting.scopes.of(key, key.state.load().generation(), self.now())
    }

    // ---- the set of keys ----

    pub(crate) fn new_key(&self, key: UsableKey) -> Arc<Key> {
        Arc::new(key.healthy_in(self.this.clone()))
    }

    /// Replaces the keys by what `next` makes of them, if anything. Keys that stay are the same objects, so that requests
    /// in flight still mark them.
    pub(crate) fn edit(&self, next: impl FnOnce(&Snapshot) -> Option<Vec<Arc<Key>>>) {
        let _one_at_a_time = self.editing.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.snapshot.load_full();
        let Some(keys) = next(&before) else { return };
        let after = Arc::new(Snapshot::new(keys, Some(&before)));
        self.chooses.store(self.limiting.chooses() || after.has_choices(), Relaxed);
        self.snapshot.store(after.clone());
        // A change that came while the new snapshot was built went into the indexes of the old one.
        after.refresh_all();
        self.rest_limits_again(&after);
        self.limiting.scopes.retain(|key| after.holds(key));
        self.forget_doubts_of_others();
        self.wake_waiters();
    }

    fn regroup_now(&self) {
        self.edit(|before| before.has_other_groups().then(|| before.keys().to_vec()));
    }

    pub(crate) fn remove(&self, id: &KeyId) {
        let mut removed = None;
        self.edit(|before| {
            removed = Some(before.get(id.as_str())?.clone());
            Some(before.keys().iter().filter(|key| key.id != *id).cloned().collect())
        });
        self.count_out(removed);
    }

    /// Puts the same key with another secret in the place of one, or back into the pool. `note` is called before any load
    /// can look at the keys.
    pub(super) fn renew(&self, old: &Arc<Key>, with: UsableKey, note: impl FnOnce()) {
        let (new, was_refused) = old.renewed(with);
        let new = Arc::new(new);
        let set_renewed =
            |renewed| *self.limiting.renewed.lock().unwrap_or_else(PoisonError::into_inner) = renewed;
        self.edit(|before| {
            note();
            let slot = before.slot(&old.id);
            let mut keys = before.keys().to_vec();
            match slot {
                Some(slot) if Arc::ptr_eq(&keys[slot], old) => keys[slot] = new.clone(),
                Some(_) => return None,
                None => keys.push(new.clone()),
            }
            self.limiting.scopes.rename(old, &new);
            set_renewed(Some((old.clone(), new.clone())));
            Some(keys)
        });
        set_renewed(None);
        if was_refused && self.has_store() {
            self.put_served_back([new]);
        }
        self.wake_writer();
    }

    /// Takes a key out of the pool that may come back, if it is still there. Its picks stay its own.
    pub(super) fn suspend(&self, key: &Arc<Key>) {
        self.edit(|before| {
            before.get(key.id.as_str()).filter(|held| Arc::ptr_eq(held, key))?;
            Some(before.keys().iter().filter(|held| !Arc::ptr_eq(held, key)).cloned().collect())
        });
    }

    /// Gives a key another id, if that is free. What is known of the key stays known.
    pub(crate) fn rename(&self, id: &KeyId, to: &KeyId) {
        self.edit(|before| {
            let slot = before.slot(id).filter(|_| before.slot(to).is_none())?;
            let mut keys = before.keys().to_vec();
            let renamed = Arc::new(keys[slot].renamed(to.clone()));
            self.limiting.scopes.rename(&keys[slot], &renamed);
            keys[slot] = renamed;
            Some(keys)
        });
    }

    /// Keeps the picks of keys that have left the pool. Called after they left, or a scrape could count them twice.
    pub(crate) fn count_out(&self, gone: impl IntoIterator<Item = Arc<Key>>) {
        for key in gone {
            self.gone_picks.fetch_add(key.counts.requests.sum(), Relaxed);
        }
    }

    /// How often keys were picked, those included that have left the pool.
    #[cfg(feature = "metrics")]
    pub(crate) fn picks(&self) -> u64 {
        let snapshot = self.snapshot.load();
        let here: u64 = snapshot.keys().iter().map(|key| key.counts.requests.sum()).sum();
        here.wrapping_add(self.gone_picks.load(Relaxed))
    }
}

fn is_one_of(key: &Arc<Key>, keys: &[Arc<Key>]) -> bool {
    keys.iter().any(|other| Arc::ptr_eq(other, key))
}

/// Marks do not outlive a reset.
fn drop_older_pending(key: &Key) {
    let generation = key.state.load().generation();
    key.pending.update(|word| if word.generation() < generation { Word::HEALTHY } else { word });
}

impl Home for Engine {
    fn mark(&self, key: &Arc<Key>, reason: Rest, hint: Option<Duration>, http_status: u16) {
        self.ask_sources(key, http_status);
        key.counts.limited.fetch_add(1, Relaxed);
        key.set_last_status(http_status);
        match reason {
            Rest::RateLimited => _ = self.rest(key, reason, hint, http_status),
            Rest::Exhausted => {
                match (self.rest(key, reason, hint, http_status), hint) {
                    (Some(guess), None) => self.note_guess(key, guess, http_status),
                    (Some(_), Some(_)) => self.settle_doubt(key),
                    // The time that the service names ends before the guess.
                    (None, Some(hint)) => self.put_trial_off(key, hint),
                    (None, None) => {}
                }
            }
            Rest::Revoked => self.revoke(key, http_status, || _ = self.rest(key, reason, hint, http_status)),
        }
    }

    fn rest_in_scope(&self, key: &Arc<Key>, scope: &Scope, reason: Rest, rest: Option<Duration>) {
        let generation = key.state.load().generation();
        let resting = Resting { until: rest.map_or(Until::Reset, Until::After), reason };
        let word = Word::new(generation, Some(resting), self.now());
        let is_current = || self.snapshot.load().holds(key);
        if self.limiting.scopes.mark(key, scope, word, self.has_store(), is_current) {
            let cooldown_ms = rest.map(|rest| rest.as_millis() as u64);
            tracing::debug!(key = %key.id, %scope, cooldown_ms, ?reason, "scope rests");
            if self.has_store() {
                self.refresh(key);
                self.wake_writer();
            }
        }
    }

    fn refuse(&self, key: &Arc<Key>, http_status: u16) {
        self.ask_sources(key, http_status);
        self.suspect(key, http_status);
    }

    fn serves(&self, key: &Arc<Key>) {
        self.end_doubt(key);
    }

    fn has_room(&self, key: &Arc<Key>) {
        loop {
            let snapshot = self.snapshot.load();
            snapshot.refresh_in_scopes(key);
            if Arc::ptr_eq(&snapshot, &self.snapshot.load()) {
                return;
            }
        }
    }

    fn regroup(&self) {
        let Regrouping { is_due, not_before } = &self.limiting.regrouping;
        let keys = self.snapshot.load().keys().len();
        let (now, earliest) = (nanos(self.now()), not_before.load(Relaxed));
        let pause = if keys < FEW_KEYS { Duration::ZERO } else { REGROUPED_FOR * keys as u32 };
        let next = now.saturating_add(nanos(pause));
        if now < earliest || not_before.compare_exchange(earliest, next, Relaxed, Relaxed).is_err() {
            return;
        }
        // Before the keys are read: what changes afterwards is due again.
        is_due.store(false, SeqCst);
        let pool = self.this.upgrade().filter(|_| keys >= FEW_KEYS);
        match (Handle::try_current(), pool) {
            (Ok(runtime), Some(pool)) => drop(runtime.spawn_blocking(move || pool.regroup_now())),
            _ => self.regroup_now(),
        }
    }
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("keys", &self.snapshot.load().keys().len()).finish_non_exhaustive()
    }
}
