//! The keys of a snapshot as the requests of one scope see them.
//!
//! A key is open to them while it does not rest, and while its limit in the scope has room. As in a snapshot, an index says
//! where to look, and key and limit are the truth: each change is followed by [`Scoped::refresh_limit`] or [`Scoped::refresh_key`].

use std::{
    ops::Range,
    sync::{Arc, OnceLock, PoisonError, Weak},
    time::{Duration, UNIX_EPOCH},
};

use super::{
    bitset::AtomicBitSet,
    borrowing::Borrowing,
    deadlines::Deadlines,
    in_flight::InFlight,
    kept::{Kept, wall_millis},
    key::Key,
    layout::Layout,
    scopes::Scopes,
    waiting::Waiting,
};
use crate::{
    clock::Clock,
    key::KeyId,
    lending::{Origin, Token, name_of},
    limit::{Cap, Cooldowns, Limit, NEVER, Quota, Rest, Scope, Sharing, Taken, nanos},
    meter::Meter,
    select::CANDIDATES,
    sync::{
        Mutex, MutexGuard,
        atomic::{
            AtomicBool, AtomicU64, AtomicUsize,
            Ordering::{Relaxed, SeqCst},
        },
    },
};

/// The most keys that one pick opens: bounds the time a single request can spend on it.
const OPENED_PER_PICK: usize = 16;

/// The most keys that have room, but not enough for this request, that one pick tries.
const TOO_SMALL_PER_PICK: usize = 64;

/// Of so many keys in turn, the one that is full first is picked, if the limits are of different sizes.
const CHOICES: usize = 3;
/// The most keys that are looked at for a probe.
const PROBED: usize = 64;
/// The tokens of a request of which nothing is known, where tokens are limited.
const FIRST_GUESS: u64 = 1_000;

/// What a request demands of a key.
#[derive(Debug, Default)]
pub(crate) struct Demand<'a> {
    pub(crate) tokens: u64,
    pub(crate) session: Option<u64>,
    pub(crate) only: Option<&'a KeyId>,
    pub(crate) avoid: &'a [KeyId],
}

impl Demand<'_> {
    /// Whether the request may be sent with that key.
    fn allows(&self, key: &Key) -> bool {
        self.only.is_none_or(|id| key.id == *id) && !self.avoid.contains(&key.id)
    }
}

/// How the limits of a pool are made.
#[derive(Debug)]
pub(crate) struct Limiting {
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) cooldowns: Cooldowns,
    /// Learns what the service allows.
    pub(crate) learns: bool,
    /// Other processes may use the same keys.
    pub(crate) has_store: bool,
    pub(crate) quotas: Vec<Arc<Quota>>,
    /// What is left of their windows by the last process.
    pub(crate) kept: Kept,
    /// The rests of scopes that are worth sharing.
    pub(super) scopes: Scopes,
    /// The first key with room serves, not the next one in turn.
    pub(crate) fills_first: bool,
    pub(crate) regrouping: Regrouping,
    /// While the set of keys is replaced: a key, and the one that goes on in its place with another secret.
    pub(crate) renewed: Mutex<Option<(Arc<Key>, Arc<Key>)>>,
    pub(crate) meter: Arc<Meter>,
}

/// When keys are grouped by the organisations that responses name.
#[derive(Debug, Default)]
pub(crate) struct Regrouping {
    /// A key may belong to another group than the newest snapshot says.
    pub(super) is_due: AtomicBool,
    /// Not before that time, in ns.
    pub(super) not_before: AtomicU64,
}

impl Limiting {
    fn renewed(&self, key: &Arc<Key>) -> Option<Arc<Key>> {
        let renewed = self.renewed.lock().unwrap_or_else(PoisonError::into_inner);
        renewed.as_ref().filter(|(old, _)| Arc::ptr_eq(old, key)).map(|(_, new)| new.clone())
    }

    pub(crate) fn is_on(&self) -> bool {
        self.learns || !self.quotas.is_empty()
    }

    /// Whether requests need more than the next key in turn, whatever the keys are.
    pub(crate) fn chooses(&self) -> bool {
        self.is_on() || self.fills_first
    }

    /// Notes the wall clock for the quotas that depend on it. Returns how far it is ahead of the pool's clock, in ns modulo
    /// 2^64; 0 if no quota does.
    pub(crate) fn read_wall(&self) -> u64 {
        if !self.quotas.iter().any(|quota| quota.is_civil()) {
            return 0;
        }
        // In this order: a thread that is descheduled in between must not begin a day early.
        let (wall, now) = (self.clock.wall(), nanos(self.clock.now()));
        self.quotas.iter().for_each(|quota| quota.set_wall(wall, now));
        nanos(wall.duration_since(UNIX_EPOCH).unwrap_or_default()).wrapping_sub(now)
    }
}

/// What outlives a snapshot: the queue of a scope, and what is known of all its limits.
#[derive(Debug, Default)]
pub(crate) struct Common {
    scope: Option<Scope>,
    pub(crate) waiting: Waiting,
    pub(crate) borrowing: Borrowing,
    pub(crate) sharing: Mutex<Sharing>,
    pub(crate) probing: Mutex<Probing>,
    /// Whether the limits of the scope are of different sizes.
    pub(crate) is_mixed: AtomicBool,
    /// The scope in the newest snapshot, once one has been replaced.
    newest: Mutex<Weak<Scoped>>,
    /// The tokens of a usual request: a key with less left is closed.
    usual_tokens: AtomicU64,
    /// The tokens that a request used, on average, of those whose use was recorded; 0 if there was none.
    used_tokens: AtomicU64,
    /// What a request reserves while nothing better is known; 0 if tokens are not limited.
    guessed_tokens: AtomicU64,
    /// The largest limit of tokens: a usual request takes no more. 0 if tokens are not limited.
    token_limit: AtomicU64,
    /// In seconds of the pool's clock.
    last_used: AtomicU64,
    /// Refusals that pacing failed to avoid.
    refused: AtomicU64,
}

impl Common {
    pub(crate) fn of(scope: Option<Scope>, quotas: &[Arc<Quota>]) -> Self {
        let common = Self { scope, ..Self::default() };
        quotas
            .iter()
            .filter_map(|quota| quota.tokens_in_all())
            .for_each(|limit| common.tokens_are_limited(limit));
        common
    }

    /// What a request without an estimate reserves.
    pub(crate) fn unestimated_tokens(&self) -> u64 {
        let known = [&self.used_tokens, &self.usual_tokens, &self.guessed_tokens];
        known.into_iter().map(|tokens| tokens.load(Relaxed)).find(|tokens| *tokens != 0).unwrap_or(0)
    }

    /// A request may use so many tokens at most.
    pub(crate) fn tokens_are_limited(&self, limit: u64) {
        let guess = FIRST_GUESS.min(limit / 10).max(1);
        let before = self.guessed_tokens.load(Relaxed);
        if before == 0 || guess < before {
            self.guessed_tokens.store(guess, Relaxed);
        }
        if self.token_limit.load(Relaxed) < limit {
            let limit = limit.max(self.token_limit.fetch_max(limit, Relaxed));
            // Those that were noted before.
            self.usual_tokens.fetch_min(limit, Relaxed);
            self.used_tokens.fetch_min(limit, Relaxed);
        }
    }

    /// A request has used so many tokens.
    pub(crate) fn note_used(&self, tokens: u64) {
        self.note(&self.used_tokens, tokens);
    }

    /// Moves an average towards a value. One huge request moves it a little: keys that have room for many usual requests must
    /// not seem closed.
    fn note(&self, average: &AtomicU64, tokens: u64) {
        let (before, limit) = (average.load(Relaxed), self.token_limit.load(Relaxed));
        let tokens = if limit == 0 { tokens } else { tokens.min(limit) };
        let next = match before {
            0 => tokens,
            before => (before * 15 + tokens.min((before * 4).max(FIRST_GUESS))) / 16,
        };
        if next != before {
            average.store(next, Relaxed);
        }
    }

    pub(crate) fn scope(&self) -> Option<&Scope> {
        self.scope.as_ref()
    }

    /// What the scope is called where rests are listed.
    pub(super) fn name_of_rests(&self) -> Scope {
        self.scope.clone().unwrap_or_else(Scope::none)
    }

    pub(crate) fn refused(&self) -> u64 {
        self.refused.load(Relaxed)
    }

    /// What other processes call the scope.
    pub(crate) fn name(&self) -> u64 {
        name_of(self.scope.as_ref().map_or("", Scope::as_str))
    }

    pub(crate) fn lock_sharing(&self) -> MutexGuard<'_, Sharing> {
        self.sharing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// When a request may be sent although nothing should be left.
#[derive(Debug)]
pub(crate) struct Probing {
    /// In ns; 0 before the first request waited.
    next: u64,
    /// In seconds. It grows fourfold with each refusal, and halves with each success.
    interval: f64,
}

impl Probing {
    /// When the next probe may be sent, if not now. The processes that share a scope probe no more than one would.
    pub(crate) fn not_before(&mut self, now: u64, processes: usize) -> Option<u64> {
        if self.next == 0 {
            self.next = now + spread(self.interval, processes);
        }
        if now < self.next {
            return Some(self.next);
        }
        self.next = now + spread(self.interval.max(2.0), processes);
        None
    }

    pub(crate) fn next(&self) -> u64 {
        self.next
    }

    /// Other processes have doubts: the next probe comes soon.
    pub(crate) fn hurry(&mut self, now: u64) {
        self.next = self.next.min(now + seconds(self.interval.min(2.0)));
    }

    /// A probe has its answer.
    pub(crate) fn answered(&mut self, was_refused: bool, now: u64, processes: usize) {
        self.interval =
            if was_refused { (self.interval * 4.0).min(120.0) } else { (self.interval * 0.5).max(0.5) };
        self.next = now + spread(self.interval, processes);
    }
}

/// Where several processes probe, each waits at random for as many times as long, on average.
fn spread(interval: f64, processes: usize) -> u64 {
    match processes.saturating_sub(1) {
        0 => seconds(interval),
        others => seconds(interval * (1.0 + 2.0 * others as f64 * fastrand::f64())),
    }
}

fn seconds(seconds: f64) -> u64 {
    (seconds * 1e9) as u64
}

impl Default for Probing {
    fn default() -> Self {
        Self { next: 0, interval: 2.0 }
    }
}

#[derive(Debug)]
pub(crate) struct Scoped {
    pub(super) keys: Arc<[Arc<Key>]>,
    pub(super) layout: Arc<Layout>,
    /// The turns of keys that are open.
    open: AtomicBitSet,
    /// When a closed key is to be looked at again, in ns.
    due: Deadlines,
    /// Those of a quota group belong to its first key.
    limits: Box<[OnceLock<Arc<Limit>>]>,
    /// One for each tier, among its turns.
    cursors: Box<[Cursor]>,
    /// Whose turn it is in each quota group.
    members: Box<[AtomicUsize]>,
    pub(crate) common: Arc<Common>,
    limiting: Arc<Limiting>,
    /// How many refreshes have begun, and have ended.
    begun: AtomicU64,
    ended: AtomicU64,
    /// Whether another snapshot has replaced this one's.
    is_replaced: AtomicBool,
    /// How far the wall clock was ahead when the index was last brought in line with it.
    wall_ahead: AtomicU64,
}

#[derive(Debug, Default)]
#[repr(align(128))]
struct Cursor(AtomicUsize);

impl Scoped {
    pub(crate) fn new(
        keys: Arc<[Arc<Key>]>,
        layout: Arc<Layout>,
        common: Arc<Common>,
        limiting: Arc<Limiting>,
    ) -> Self {
        let now = nanos(limiting.clock.now());
        // Processes that start together must not all begin with the same key.
        let is_shared = limiting.learns && limiting.has_store;
        let first = |tier: &Range<usize>| {
            let from = if is_shared && !tier.is_empty() { fastrand::usize(tier.clone()) } else { tier.start };
            Cursor(AtomicUsize::new(from))
        };
        let scoped = Self {
            open: AtomicBitSet::new(layout.count_turns(keys.len())),
            due: Deadlines::new(keys.len()),
            limits: keys.iter().map(|_| OnceLock::new()).collect(),
            cursors: (0..layout.tiers().len()).map(|tier| first(layout.turns_of_tier(tier))).collect(),
            members: (0..layout.groups()).map(|_| AtomicUsize::new(0)).collect(),
            begun: AtomicU64::new(0),
            ended: AtomicU64::new(0),
            is_replaced: AtomicBool::new(false),
            wall_ahead: AtomicU64::new(limiting.read_wall()),
            keys,
            layout,
            common,
            limiting,
        };
        (0..scoped.keys.len()).for_each(|slot| scoped.refresh_slot(slot, now));
        scoped
    }

    /// The same scope over the next snapshot's keys. Keys that stay keep their limits.
    pub(crate) fn moved_to(&self, keys: Arc<[Arc<Key>]>, layout: Arc<Layout>) -> Arc<Self> {
        let now = self.now();
        let next = Self::new(keys, layout, self.common.clone(), self.limiting.clone());
        self.pass_limits_to(&next);
        for (tier, (cursor, before)) in next.cursors.iter().zip(&self.cursors).enumerate() {
            let before = before.0.load(Relaxed);
            if self.layout.has_weights() || next.layout.has_weights() {
                // As far in the round as before; rounded at random, or some keys would lose a turn each time.
                let (turns, next_turns) = (self.layout.turns_of_tier(tier), next.layout.turns_of_tier(tier));
                let passed = before.saturating_sub(turns.start) as f64 / turns.len().max(1) as f64;
                let passed = (passed * next_turns.len() as f64 + fastrand::f64()) as usize;
                cursor.0.store(next_turns.start + passed, Relaxed);
                continue;
            }
            let stay = self.keys.iter().take(before).filter(|key| next.slot_of(key).is_some());
            cursor.0.store(stay.count(), Relaxed);
        }
        (0..next.keys.len()).for_each(|slot| next.refresh_slot(slot, now));
        let next = Arc::new(next);
        *self.common.newest.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(&next);
        self.is_replaced.store(true, SeqCst);
        next
    }

    /// Keys that stay keep their limits, and those whose organisation is known now share that of their group.
    fn pass_limits_to(&self, next: &Self) {
        let passes = if next.layout.has_organisations() { &[true, false][..] } else { &[true] };
        for of_members in passes {
            for (slot, key) in self.keys.iter().enumerate() {
                let Some(limit) = self.known_limit(slot) else { continue };
                let renewed = || next.slot_of(&self.limiting.renewed(key)?);
                let Some(there) = next.slot_of(key).or_else(renewed) else { continue };
                let (before, after) = (self.layout.organisation(slot), next.layout.organisation(there));
                let is_member = before == after;
                // The limit of another organisation stays with its other keys.
                if is_member != *of_members || (!is_member && before != 0) {
                    continue;
                }
                let shared = &next.limits[next.layout.leader(there)];
                if shared.set(limit.clone()).is_err()
                    && !is_member
                    && let Some(shared) = shared.get()
                {
                    shared.rest_until(limit.rests_until());
                }
            }
        }
    }

    /// Calls `then` with the same scope in the newest snapshot.
    pub(crate) fn in_newest<T>(&self, then: impl FnOnce(&Self) -> T) -> T {
        if !self.is_replaced.load(SeqCst) {
            return then(self);
        }
        let newest = self.common.newest.lock().unwrap_or_else(PoisonError::into_inner).upgrade();
        then(newest.as_deref().unwrap_or(self))
    }

    pub(crate) fn key(&self, slot: usize) -> &Arc<Key> {
        &self.keys[slot]
    }

    pub(crate) fn slot_of(&self, key: &Arc<Key>) -> Option<usize> {
        let holds = |slot: &usize| self.keys.get(*slot).is_some_and(|held| Arc::ptr_eq(held, key));
        Some(key.slot()).filter(holds).or_else(|| self.keys.iter().position(|held| Arc::ptr_eq(held, key)))
    }

    /// A key of that limit, if there is one.
    pub(crate) fn slot_of_limit(&self, limit: &Arc<Limit>) -> Option<usize> {
        let is_it = |slot: &usize| self.known_limit(*slot).is_some_and(|known| Arc::ptr_eq(known, limit));
        (0..self.keys.len()).find(is_it)
    }

    /// The longest wait that a service may ask for.
    pub(crate) fn longest_wait(&self) -> Duration {
        self.limiting.cooldowns.longest_hint
    }

    /// The limit of a key, made on first use.
    #[inline]
    pub(crate) fn limit(&self, slot: usize, now: u64) -> &Arc<Limit> {
        let leader = self.layout.leader(slot);
        self.limits[leader].get_or_init(|| self.new_limit(leader, now))
    }

    fn new_limit(&self, leader: usize, now: u64) -> Arc<Limit> {
        let limit = Limit::new(&self.limiting.quotas, self.limiting.learns, now);
        if !self.limiting.kept.is_empty()
            && let Some(name) = self.layout.names(&self.keys).of(leader)
        {
            let windows = self.limiting.kept.take(self.common.name(), name);
            limit.restore(&windows, now, wall_millis(&*self.limiting.clock));
        }
        Arc::new(limit)
    }

    /// The limit of a key, if there is one.
    #[inline]
    pub(crate) fn known_limit(&self, slot: usize) -> Option<&Arc<Limit>> {
        self.limits[self.layout.leader(slot)].get()
    }

    /// How many limits share the traffic.
    pub(crate) fn count_limits(&self) -> usize {
        self.layout.count_limits(self.keys.len())
    }

    /// Groups a key with others of the organisation that a response names.
    pub(crate) fn note_organisation(&self, key: &Arc<Key>, organisation: u64) {
        let is_due = &self.limiting.regrouping.is_due;
        let is_news = self.in_newest(|newest| {
            let slot = newest.slot_of(key).filter(|_| key.group().is_none());
            slot.is_some_and(|slot| newest.layout.name_organisation(slot, organisation, newest.keys.len()))
        });
        if is_news {
            is_due.store(true, SeqCst);
        }
        if is_due.load(Relaxed) {
            key.regroup();
        }
    }

    pub(crate) fn learns(&self) -> bool {
        self.limiting.learns
    }

    pub(crate) fn fills_first(&self) -> bool {
        self.limiting.fills_first
    }

    pub(crate) fn now(&self) -> u64 {
        nanos(self.limiting.clock.now())
    }

    pub(crate) fn scope(&self) -> Option<&str> {
        self.common.scope.as_ref().map(Scope::as_str)
    }

    /// How long a limit rests after a refusal that the pool does not learn from.
    pub(crate) fn cooldown(&self, reason: Rest, wait: Option<Duration>) -> Option<Duration> {
        self.limiting.cooldowns.how_long(reason, wait)
    }

    /// Whether no request used the scope since then, in seconds, and none is waiting or in flight.
    pub(crate) fn is_idle(&self, since: u64) -> bool {
        let in_flight = || {
            (0..self.keys.len()).filter_map(|slot| self.known_limit(slot)).any(|limit| limit.in_flight() > 0)
        };
        self.common.last_used.load(Relaxed) < since && !self.common.waiting.has_any() && !in_flight()
    }

    // ---- for explanations ----

    /// Whether the next pick finds a key in the index, which it brings up to date first. If not, when it looks at the key
    /// again, in ns.
    pub(super) fn in_index(&self, slot: usize, now: u64) -> Result<(), u64> {
        let due = self.due.of(slot);
        let is_there = self.is_open(slot) || due <= now && self.closed_until(slot, now) == 0;
        if is_there { Ok(()) } else { Err(due) }
    }

    /// The limits in use.
    pub(super) fn limits(&self) -> impl Iterator<Item = &Arc<Limit>> {
        self.limits.iter().filter_map(OnceLock::get)
    }

    /// Counts a refusal, if pacing should have avoided it.
    pub(crate) fn count_refused(&self) {
        if self.limiting.is_on() {
            self.common.refused.fetch_add(1, Relaxed);
            self.limiting.meter.refused_in(self.common.scope());
        }
    }

    /// The turn at which the next pick in a tier begins to look.
    pub(super) fn turn(&self, tier: usize) -> usize {
        self.cursors[tier].0.load(Relaxed)
    }

    /// Whose turn it is in a quota group.
    pub(super) fn turn_of_member(&self, group: usize) -> usize {
        self.members[group].load(Relaxed)
    }

    // ---- picks ----

    /// The next key in turn that has room, or when the first one has, in ns; [`NEVER`] if no key opens by itself.
    pub(crate) fn pick(&self, demand: &Demand<'_>, now: u64) -> Result<Picked, u64> {
        self.note_use(now);
        if self.common.borrowing.is_on() { self.pick_shared(demand, now) } else { self.pick_own(demand, now) }
    }

    /// A key of a scope that other processes use, too: with a token, or with room in a limit that this process owns.
    #[cold]
    fn pick_shared(&self, demand: &Demand<'_>, now: u64) -> Result<Picked, u64> {
        let of_session = demand.session.filter(|_| demand.only.is_none());
        let of_session = || of_session.and_then(|session| self.pick_for_session(session, demand, now));
        let picked = match self.pick_preferred(demand, now).or_else(of_session) {
            Some(picked) => picked,
            None => match self.take_token(&(0..self.keys.len()), demand, now) {
                Ok(picked) => picked,
                // The next token may be of any limit.
                Err(_) if demand.only.is_some() => {
                    self.pick_elsewhere(demand, now).unwrap_or_else(|| self.pick_own(demand, now))?
                }
                Err(token_at) => self.pick_own(demand, now).map_err(|until| until.min(token_at))?,
            },
        };
        self.common.borrowing.count_served();
        Ok(picked)
    }

    /// A key of any tier but the last one: spare keys serve only while none of them has room.
    fn pick_preferred(&self, demand: &Demand<'_>, now: u64) -> Option<Picked> {
        let (_, preferred) = self.layout.tiers().split_last().filter(|_| demand.only.is_none())?;
        preferred.iter().enumerate().find_map(|(tier, slots)| {
            self.open_due(tier, slots, now);
            let turns = self.layout.turns_of_tier(tier);
            let session = demand.session.filter(|_| self.next_open(turns.start, turns).is_some());
            let of_session = session.and_then(|session| self.pick_for_session(session, demand, now));
            of_session
                .or_else(|| self.take_token(slots, demand, now).ok())
                .or_else(|| self.pick_in_tier(tier, slots, demand, now).ok())
        })
    }

    fn take_token(&self, slots: &Range<usize>, demand: &Demand<'_>, now: u64) -> Result<Picked, u64> {
        let mut slot = None;
        let token = self.common.borrowing.lock_stock().take(now, |token| {
            slot =
                self.member_for(token.limit, slots, demand).filter(|slot| self.is_usable(token, *slot, now));
            slot.is_some()
        });
        let token = token.map_err(|later| later.unwrap_or(NEVER))?;
        let slot = slot.ok_or(NEVER)?;
        let Ok(place) = self.enter(slot, now) else {
            match token.origin {
                // Not into the stock, which is empty for good if the scope is shared no more.
                Origin::Here(limit, taken) => limit.not_sent(&taken, now),
                Origin::Lender { .. } => self.common.borrowing.lock_stock().add(token),
            }
            return Err(NEVER);
        };
        if demand.tokens != 0 {
            self.common.borrowing.uses(&token, demand.tokens);
            self.note_tokens(demand.tokens);
        }
        Ok(match token.origin {
            Origin::Here(limit, mut taken) => {
                limit.is_spent();
                limit.correct_tokens(&mut taken, demand.tokens, now);
                taken.at = now;
                Picked { slot, taken: Some(taken), place, token: None }
            }
            Origin::Lender { .. } => {
                let taken = Taken::of_a_loan(demand.tokens, now);
                Picked { slot, taken: Some(taken), place, token: Some(Box::new(token)) }
            }
        })
    }

    /// A rest counts for tokens, too, which were set aside or lent before it began.
    fn is_usable(&self, token: &Token, slot: usize, now: u64) -> bool {
        let known = self.known_limit(slot);
        let is_it = match &token.origin {
            Origin::Lender { .. } => true,
            // The key may have another limit since: that of its organisation.
            Origin::Here(limit, _) => known.is_some_and(|known| Arc::ptr_eq(known, limit)),
        };
        is_it && known.is_none_or(|limit| limit.rests_until() <= now)
    }

    /// The key of a limit whose turn it is, and which may serve the request.
    fn member_for(&self, limit: u32, slots: &Range<usize>, demand: &Demand<'_>) -> Option<usize> {
        let leader = self.layout.names(&self.keys).slot(limit)?;
        let may_serve = |slot: &usize| {
            let key = &self.keys[*slot];
            slots.contains(slot) && key.is_available() && !self.is_full(*slot) && demand.allows(key)
        };
        let Some((group, members)) = self.layout.group_of(leader) else {
            return Some(leader).filter(may_serve);
        };
        let turn = self.members[group].fetch_add(1, Relaxed);
        (0..members.len()).map(|next| members[(turn + next) % members.len()] as usize).find(may_serve)
    }

    /// Whether a key is available that has this one's limit.
    pub(super) fn has_available_member(&self, slot: usize) -> bool {
        let is_available = |slot: usize| self.keys[slot].is_available();
        match self.layout.group_of(slot) {
            Some((_, members)) => members.iter().any(|member| is_available(*member as usize)),
            None => is_available(slot),
        }
    }

    /// A request that only one key may serve does not wait for a token of this very key: its owner sees what it takes. It
    /// waits only while the service said so to another such request.
    fn pick_elsewhere(&self, demand: &Demand<'_>, now: u64) -> Option<Result<Picked, u64>> {
        let id = demand.only?;
        let slot = self.keys.iter().position(|key| key.id == *id)?;
        let limit = self.limit(slot, now);
        if !limit.is_elsewhere() || !self.keys[slot].state.load().is_available() {
            return None;
        }
        if limit.rests_until() > now {
            return Some(Err(limit.rests_until()));
        }
        let place = self.enter(slot, now).ok()?;
        Some(Ok(Picked { slot, taken: Some(limit.take_anyway(demand.tokens, now)), place, token: None }))
    }

    fn pick_own(&self, demand: &Demand<'_>, now: u64) -> Result<Picked, u64> {
        if let Some(id) = demand.only {
            let slot = self.keys.iter().position(|key| key.id == *id).ok_or(NEVER)?;
            return self.take(slot, demand, now).map_err(|full| full.until);
        }
        if let Some(picked) = demand.session.and_then(|session| self.pick_for_session(session, demand, now)) {
            return Ok(picked);
        }
        let mut earliest = NEVER;
        for (tier, slots) in self.layout.tiers().iter().enumerate() {
            match self.pick_in_tier(tier, slots, demand, now) {
                Ok(picked) => return Ok(picked),
                Err(until) => earliest = earliest.min(until),
            }
        }
        if demand.avoid.is_empty() {
            return Err(earliest.min(self.earliest_for_certain(now)));
        }
        // The tries may have gone to keys that are avoided.
        self.take_first(0..self.keys.len(), usize::MAX, demand, now).map_err(|until| until.min(earliest))
    }

    /// The first of these keys that has room, of as many as may serve the request.
    fn take_first(
        &self,
        slots: Range<usize>,
        most: usize,
        demand: &Demand<'_>,
        now: u64,
    ) -> Result<Picked, u64> {
        let may_serve = |slot: &usize| {
            let key = &self.keys[*slot];
            !key.is_in_doubt() && demand.allows(key)
        };
        let mut earliest = NEVER;
        for slot in slots.filter(may_serve).take(most) {
            match self.take(slot, demand, now) {
                Ok(picked) => return Ok(picked),
                Err(full) => earliest = earliest.min(full.until),
            }
        }
        Err(earliest)
    }

    fn pick_in_tier(
        &self,
        tier: usize,
        slots: &Range<usize>,
        demand: &Demand<'_>,
        now: u64,
    ) -> Result<Picked, u64> {
        if self.limiting.fills_first {
            self.pick_first_of_tier(tier, slots, demand, now)
        } else {
            self.pick_of_tier(tier, slots, demand, now)
        }
    }

    fn pick_of_tier(
        &self,
        tier: usize,
        slots: &Range<usize>,
        demand: &Demand<'_>,
        now: u64,
    ) -> Result<Picked, u64> {
        let mut too_small = NEVER;
        let mut tries = 0;
        let turns = self.layout.turns_of_tier(tier);
        // With weights, the turns are in another order than the keys; and with limits of different sizes, a pick compares
        // open keys.
        let has_weights = self.layout.has_weights();
        let opens_due = has_weights || self.common.is_mixed.load(Relaxed);
        if opens_due {
            self.open_due(tier, slots, now);
        }
        while tries < TOO_SMALL_PER_PICK.min(turns.len()) {
            let cursor = self.cursors[tier].0.load(Relaxed);
            let from = if turns.contains(&cursor) { cursor } else { turns.start };
            let is_any_due = !opens_due && self.due.earliest() <= now;
            let due = if is_any_due { self.next_due(from, slots, now) } else { None };
            if let Some(due) = due.filter(|due| self.layout.group_of(*due).is_some()) {
                // The members of its group take turns.
                self.refresh_limit(due, now);
                continue;
            }
            // One that is due is taken as it is: opened first, it would mostly be closed again at once.
            let order = |turn: &usize| if *turn < from { *turn + turns.end } else { *turn };
            let open = if due == Some(from) { None } else { self.next_open(from, turns) };
            let Some(turn) = open.into_iter().chain(due).min_by_key(order) else { break };
            let taken = self.cursors[tier].0.compare_exchange(cursor, turn + 1, Relaxed, Relaxed);
            if taken.is_err() {
                continue;
            }
            let turn = self.first_full(turn, turns, now);
            let slot = self.turn_in_group(self.layout.slot_of_turn(turn), slots);
            if demand.avoid.contains(&self.keys[slot].id) {
                tries += 1;
                continue;
            }
            match self.take(slot, demand, now) {
                Ok(picked) => return Ok(picked),
                Err(full) if full.is_closed => {}
                Err(full) => {
                    too_small = too_small.min(full.until);
                    tries += 1;
                }
            }
        }
        if tries > 0 && has_weights {
            // All the turns may have been those of one heavy key.
            return self
                .take_first(slots.clone(), TOO_SMALL_PER_PICK, demand, now)
                .map_err(|until| until.min(too_small));
        }
        Err(too_small)
    }

    fn pick_first_of_tier(
        &self,
        tier: usize,
        slots: &Range<usize>,
        demand: &Demand<'_>,
        now: u64,
    ) -> Result<Picked, u64> {
        self.open_due(tier, slots, now);
        let next_open = |from: usize| match self.layout.has_weights() {
            false => self.open.next_from(from).filter(|slot| *slot < slots.end),
            // The turns are in another order.
            true => (from..slots.end).find(|slot| self.is_open(*slot)),
        };
        let mut too_small = NEVER;
        let mut tries = 0;
        let mut from = slots.start;
        while tries < TOO_SMALL_PER_PICK
            && let Some(slot) = next_open(from)
        {
            from = slot + 1;
            if demand.avoid.contains(&self.keys[slot].id) {
                continue;
            }
            match self.take(slot, demand, now) {
                Ok(picked) => return Ok(picked),
                Err(full) if full.is_closed => {}
                Err(full) => {
                    too_small = too_small.min(full.until);
                    tries += 1;
                }
            }
        }
        Err(too_small)
    }

    /// The next turn, or of the next few the one whose key is full first. In strict turn, large limits would be full, and
    /// lose what comes back, while small ones are used up. Weights say themselves whose turn it is.
    #[inline]
    fn first_full(&self, turn: usize, turns: &Range<usize>, now: u64) -> usize {
        if !self.common.is_mixed.load(Relaxed) || self.layout.has_weights() {
            return turn;
        }
        let full_at = |turn: usize| {
            self.known_limit(self.layout.slot_of_turn(turn)).map_or(now, |limit| limit.full_at(now))
        };
        let (mut chosen, mut earliest, mut next) = (turn, full_at(turn), turn);
        for _ in 1..CHOICES {
            let Some(open) = self.next_open(next + 1, turns).filter(|open| *open != turn) else { break };
            if full_at(open) < earliest {
                (chosen, earliest) = (open, full_at(open));
            }
            next = open;
        }
        chosen
    }

    #[inline]
    fn next_open(&self, from: usize, turns: &Range<usize>) -> Option<usize> {
        let within = |turn: &usize| *turn < turns.end;
        self.open
            .next_close_by(from)
            .filter(within)
            .or_else(|| self.open.next_from(from).filter(within))
            .or_else(|| self.open.next_from(turns.start).filter(within))
    }

    fn pick_for_session(&self, session: u64, demand: &Demand<'_>, now: u64) -> Option<Picked> {
        let mut tiers = self.layout.tiers().iter().enumerate();
        let (_, best) = tiers.find(|(tier, slots)| {
            self.open_due(*tier, slots, now);
            let turns = self.layout.turns_of_tier(*tier);
            self.next_open(turns.start, turns).is_some()
        })?;
        let suits = |slot: &usize| {
            best.contains(slot) && self.is_open(*slot) && !demand.avoid.contains(&self.keys[*slot].id)
        };
        let mut candidates = self.layout.preferences(&self.keys).candidates(session);
        let take = |slot: usize| self.take(slot, demand, now).ok();
        if let Some(picked) = candidates.next().filter(suits).and_then(take) {
            return Some(picked);
        }
        // First where most is left, or other sessions would lose their keys to this one.
        let mut others = [(0.0, 0); CANDIDATES - 1];
        let mut count = 0;
        for (other, slot) in others.iter_mut().zip(candidates.filter(suits)) {
            *other = (self.known_limit(slot).map_or(f64::INFINITY, |limit| limit.room(now)), slot);
            count += 1;
        }
        let others = &mut others[..count];
        others.sort_by(|(room, _), (other, _)| other.total_cmp(room));
        others.iter().find_map(|(_, slot)| take(*slot))
    }

    /// The members of a quota group take turns, or the first one would serve all that its group may.
    #[inline]
    fn turn_in_group(&self, slot: usize, tier: &Range<usize>) -> usize {
        let Some((group, _)) = self.layout.group_of(slot) else { return slot };
        let members = self.layout.round_of_group(group);
        let turn = self.members[group].fetch_add(1, Relaxed);
        let in_turn = (0..members.len()).map(|next| members[(turn + next) % members.len()] as usize);
        let is_open = |member: &usize| tier.contains(member) && self.is_open(*member);
        in_turn.into_iter().find(is_open).unwrap_or(slot)
    }

    /// A key in doubt, if it has room for the request.
    pub(super) fn take_to_try(&self, key: &Arc<Key>, demand: &Demand<'_>, now: u64) -> Option<Picked> {
        let slot = self.slot_of(key)?;
        if demand.allows(key) && !self.is_full(slot) {
            self.take_of_limit(slot, demand, now).ok()
        } else {
            None
        }
    }

    #[inline]
    fn take(&self, slot: usize, demand: &Demand<'_>, now: u64) -> Result<Picked, Full> {
        let key = &self.keys[slot];
        if !key.state.load().is_available() || self.is_full(slot) {
            self.refresh_slot(slot, now);
            let limit = self.known_limit(slot).map_or(0, |limit| limit.closed_until(demand.tokens, now));
            return Err(Full { until: self.key_closed_until(slot, now).max(limit), is_closed: true });
        }
        self.take_of_limit(slot, demand, now)
    }

    #[inline]
    fn take_of_limit(&self, slot: usize, demand: &Demand<'_>, now: u64) -> Result<Picked, Full> {
        let limit = if self.limiting.is_on() { Some(self.limit(slot, now)) } else { self.known_limit(slot) };
        let Some(limit) = limit else {
            let place = self.enter(slot, now)?;
            if !self.is_open(slot) {
                self.refresh_slot(slot, now);
            }
            return Ok(Picked { slot, taken: None, place, token: None });
        };
        let taken = limit.take(demand.tokens, now).map_err(|until| {
            self.refresh_limit(slot, now);
            // Another budget may take longer.
            let until = until.max(limit.closed_until(demand.tokens, now));
            Full { until, is_closed: !self.is_open(slot) }
        })?;
        // Last: a place that is given up wakes others.
        let place = self.enter(slot, now).inspect_err(|_| {
            limit.put_back(&taken, now);
            // Another pick may have found the limit closed in between.
            self.refresh_limit(slot, now);
            self.common.waiting.look_again();
        })?;
        if demand.tokens != 0 {
            self.note_tokens(demand.tokens);
        }
        // The key may have been due, not open.
        if !self.is_open(slot) || limit.closed_until(self.usual_tokens(), now) != 0 {
            self.refresh_limit(slot, now);
        }
        Ok(Picked { slot, taken: Some(taken), place, token: None })
    }

    /// Counts a request among those in flight with its key, if that has a limit of them.
    #[inline]
    fn enter(&self, slot: usize, now: u64) -> Result<Option<InFlight>, Full> {
        let key = &self.keys[slot];
        if !self.layout.has_caps() || key.cap().is_none() {
            return Ok(None);
        }
        let place = InFlight::enter(key);
        if self.is_full(slot) {
            self.refresh_slot(slot, now);
        }
        place.map(Some).ok_or(Full { until: NEVER, is_closed: true })
    }

    /// Whether a key has as many requests in flight as it may.
    #[inline]
    fn is_full(&self, slot: usize) -> bool {
        self.layout.has_caps() && self.keys[slot].cap().is_some_and(Cap::is_full)
    }

    #[inline]
    pub(super) fn usual_tokens(&self) -> u64 {
        self.common.usual_tokens.load(Relaxed)
    }

    #[inline]
    fn note_use(&self, now: u64) {
        let second = now / 1_000_000_000;
        if self.common.last_used.load(Relaxed) != second {
            self.common.last_used.store(second, Relaxed);
            self.follow_wall_clock();
        }
    }

    /// The index knows when a day ends by the pool's clock. If the wall clock was set, or runs faster, that is another time.
    fn follow_wall_clock(&self) {
        let (before, ahead) = (self.wall_ahead.load(Relaxed), self.limiting.read_wall());
        let moved = ahead.wrapping_sub(before) as i64;
        if moved.unsigned_abs() >= 1_000_000_000 {
            self.wall_ahead.store(ahead, Relaxed);
            self.refresh_all();
            self.common.waiting.look_again();
        }
    }

    fn note_tokens(&self, tokens: u64) {
        self.common.note(&self.common.usual_tokens, tokens);
    }

    /// A key that has no room as far as is known, for a request that finds out whether that is so.
    pub(crate) fn probe(&self, demand: &Demand<'_>, now: u64) -> Option<Picked> {
        let far = now + 300_000_000;
        let keys = self.keys.len().max(1);
        // Of limits that processes share, this one owns few.
        let is_shared = self.common.borrowing.is_on();
        let (from, tries) = if is_shared { (fastrand::usize(0..keys), PROBED.min(keys)) } else { (0, 8) };
        let any = |next: usize| if is_shared { (from + next) % keys } else { fastrand::usize(0..keys) };
        let slot = (0..tries).map(any).find(|slot| {
            let Some(limit) = self.limits.get(self.layout.leader(*slot)).and_then(OnceLock::get) else {
                return false;
            };
            let key = &self.keys[*slot];
            let until = limit.closed_until(demand.tokens, now);
            demand.allows(key)
                && key.is_available()
                && !self.is_full(*slot)
                && until > far
                && until != NEVER
                && limit.is_doubtful(demand.tokens, now)
        })?;
        let place = self.enter(slot, now).ok()?;
        let limit = self.limit(slot, now);
        let taken = limit.probe(demand.tokens, now);
        self.refresh_limit(slot, now);
        Some(Picked { slot, taken: Some(taken), place, token: None })
    }

    // ---- the indexes ----

    #[inline]
    fn open_due(&self, tier: usize, slots: &Range<usize>, now: u64) {
        if self.due.earliest() > now {
            return;
        }
        let cursor = self.cursors[tier].0.load(Relaxed);
        let is_turn = self.layout.turns_of_tier(tier).contains(&cursor);
        let cursor = if is_turn { self.layout.slot_of_turn(cursor) } else { slots.start };
        for _ in 0..OPENED_PER_PICK {
            match self.next_due(cursor, slots, now) {
                Some(slot) => self.refresh_slot(slot, now),
                None => return,
            }
        }
    }

    /// The next key in turn whose deadline has passed.
    #[inline]
    fn next_due(&self, from: usize, slots: &Range<usize>, now: u64) -> Option<usize> {
        let within = |slot: &usize| slots.contains(slot);
        let due = self.due.next_due(from, now).filter(within);
        let due = due.or_else(|| self.due.next_due(slots.start, now).filter(within));
        if due.is_none() {
            self.due.correct_first_path(now);
        }
        due
    }

    /// Brings the index in line with all keys of a limit.
    #[inline]
    pub(crate) fn refresh_limit(&self, slot: usize, now: u64) {
        match self.layout.group_of(slot) {
            Some((_, members)) => members.iter().for_each(|member| self.refresh_slot(*member as usize, now)),
            None => self.refresh_slot(slot, now),
        }
    }

    /// Brings the index in line with all keys.
    pub(crate) fn refresh_all(&self) {
        (0..self.keys.len()).for_each(|slot| self.refresh_slot(slot, self.now()));
    }

    /// Ends the rest of a key's limit: an operator has reset the key, or this scope of it. The limit goes on to rest for
    /// what is known of other keys of its quota group.
    pub(crate) fn reset(&self, key: &Arc<Key>) {
        let Some(slot) = self.slot_of(key) else { return };
        if let Some(limit) = self.known_limit(slot) {
            limit.reset(self.known_rest(slot));
            // One that began in between.
            limit.rest_until(self.known_rest(slot));
            self.refresh_limit(slot, self.now());
            self.common.waiting.look_again();
        }
    }

    /// Closes the limit of a key until then, in ms, or longer.
    pub(super) fn rest(&self, key: &Arc<Key>, until: u64) {
        if let Some(slot) = self.slot_of(key) {
            let now = self.now();
            self.limit(slot, now).rest_until(until.saturating_mul(1_000_000));
            self.refresh_limit(slot, now);
        }
    }

    /// Closes the limits of all keys that are known to rest in this scope.
    pub(super) fn take_rests(&self) {
        let now = self.limiting.clock.now();
        for (key, until) in self.limiting.scopes.resting_in(&self.common.name_of_rests(), now) {
            self.rest(&key, until);
        }
    }

    /// Until when the limit of a key is known to rest, in ns; 0 if it is not.
    fn known_rest(&self, slot: usize) -> u64 {
        let (name, now) = (self.common.name_of_rests(), self.limiting.clock.now());
        self.limiting.scopes.limit_rests_until((&self.keys, &self.layout), slot, &name, now)
    }

    /// Brings the index in line with a key whose rest has changed.
    pub(crate) fn refresh_key(&self, slot: usize) {
        self.refresh_slot(slot, self.now());
        self.common.waiting.look_again();
    }

    fn refresh_slot(&self, slot: usize, now: u64) {
        let mut until = self.closed_until(slot, now);
        // The usual cases after an answer. Whoever is just changing the key looks again.
        if if self.is_open(slot) { until == 0 } else { until != 0 && self.due.of(slot) == until } {
            return;
        }
        self.begun.fetch_add(1, SeqCst);
        loop {
            // For a moment a key is in both rather than in neither: a pick that finds it nowhere gives up.
            if until == 0 {
                let closed = self.layout.turns_of(slot).filter(|turn| !self.open.contains(*turn));
                closed.for_each(|turn| self.open.insert(turn));
                self.due.set(slot, NEVER);
            } else {
                self.due.set(slot, until);
                let open = self.layout.turns_of(slot).filter(|turn| self.open.contains(*turn));
                open.for_each(|turn| self.open.remove(turn));
            }
            // Two refreshes of one slot may overlap; the one that wrote last must look again.
            let before = std::mem::replace(&mut until, self.closed_until(slot, now));
            if before == until {
                break;
            }
        }
        self.ended.fetch_add(1, SeqCst);
    }

    #[inline]
    fn is_open(&self, slot: usize) -> bool {
        self.open.contains(self.layout.a_turn_of(slot))
    }

    /// When a key has room for a usual request, in ns; 0 if it has.
    #[inline]
    fn closed_until(&self, slot: usize, now: u64) -> u64 {
        let limit = self.known_limit(slot).map_or(0, |limit| limit.closed_until(self.usual_tokens(), now));
        self.key_closed_until(slot, now).max(limit)
    }

    /// When a key has room, whatever its limit says, in ns; 0 if it has.
    #[inline]
    fn key_closed_until(&self, slot: usize, now: u64) -> u64 {
        if self.is_full(slot) { NEVER } else { key_until(&self.keys[slot], now) }
    }

    /// The earliest time at which a key opens, before a caller gives up.
    ///
    /// While another thread refreshes a slot, this looks at every key: the caller's next look must not depend on a thread
    /// that may be descheduled.
    fn earliest_for_certain(&self, now: u64) -> u64 {
        let ended = self.ended.load(SeqCst);
        let earliest = self.due.earliest_for_certain();
        if self.begun.load(SeqCst) == ended {
            return earliest;
        }
        (0..self.keys.len()).map(|slot| self.closed_until(slot, now).max(now + 1)).min().unwrap_or(NEVER)
    }

    /// Ignores the headers of the whole scope.
    pub(crate) fn distrust(&self, now: u64) {
        for slot in 0..self.keys.len() {
            if let Some(limit) = self.known_limit(slot) {
                limit.distrust();
                self.refresh_slot(slot, now);
            }
        }
    }

    /// Learns from the headers of the scope again.
    pub(crate) fn trust(&self) {
        self.limits().for_each(|limit| limit.trust());
    }

    pub(crate) fn lock_sharing(&self) -> MutexGuard<'_, Sharing> {
        self.common.lock_sharing()
    }

    pub(crate) fn lock_probing(&self) -> MutexGuard<'_, Probing> {
        self.common.probing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A key for a request.
#[derive(Debug)]
pub(crate) struct Picked {
    pub(crate) slot: usize,
    /// What the request takes of the key's limit; `None` if the key has none yet.
    pub(crate) taken: Option<Taken>,
    /// Its place among the requests in flight, if the key has a limit of them.
    pub(crate) place: Option<InFlight>,
    /// The token of another process that the request uses. Boxed: most requests use none.
    pub(crate) token: Option<Box<Token>>,
}

/// Why a key that seemed open serves no request.
struct Full {
    until: u64,
    /// Whether it is closed for usual requests, too.
    is_closed: bool,
}

/// When a key comes back by itself, in ns; 0 if it serves. A key in doubt comes back by a trial.
#[inline]
fn key_until(key: &Key, now: u64) -> u64 {
    let state = key.state.load();
    if state.is_available() {
        return if key.is_in_doubt() { NEVER } else { 0 };
    }
    match state.deadline() {
        NEVER => NEVER,
        // The engine ends the rest before the pick; until then, the key is due.
        deadline => (deadline * 1_000_000).max(now + 1),
    }
}
