//! One limit: of a key, or of the keys of a quota group, in one scope.

use std::{
    sync::{Arc, OnceLock, PoisonError},
    time::Duration,
};

use super::{
    budget::{Budget, Standing},
    estimate::{self, Estimate},
    found::{FIRST_IN_FLIGHT, Found},
    left::Remaining,
    quota::Quota,
    sharing::Sharing,
    standing::{BudgetStats, Closed, KnownBy, Unit},
    taken::{Answered, Taken, seconds, wait_nanos},
    word::NEVER,
};
use crate::sync::{
    Mutex, MutexGuard,
    atomic::{
        AtomicU32, AtomicU64,
        Ordering::{Relaxed, SeqCst},
    },
};

/// In the word of a limit's cap: another process owns the limit. It is closed here, but for tokens that the owner lends.
const ELSEWHERE: u32 = 1 << 31;

/// What picks read and write comes first. What few limits have, and what only answers need, is made on first use.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Limit {
    /// Closed until then, in ns of the pool's clock, whatever the budgets say.
    pub(super) rest: AtomicU64,
    /// At most so many requests in flight; 0 for any number. And [`ELSEWHERE`].
    cap: AtomicU32,
    /// How many requests have ended, with the body of the response; wraps. All others that the budget of requests has
    /// counted are in flight.
    pub(super) ended: AtomicU32,
    /// What the service allows, as it was learned. Counts each request, also while nothing is known.
    pub(super) requests: Budget,
    more: OnceLock<Box<More>>,
    learned: Mutex<Option<Box<Learned>>>,
    /// The requests in flight that have the head of their response.
    with_head: AtomicU32,
    /// Requests that were lent, and not sent yet as far as is known.
    pub(super) lent: AtomicU32,
}

/// Budgets beside the one of requests.
#[derive(Debug, Default)]
struct More {
    /// What the service allows, as it was learned.
    tokens: Budget,
    /// What the user configured.
    quotas: Box<[(Arc<Quota>, Budget)]>,
}

#[derive(Debug, Default)]
pub(super) struct Learned {
    pub(super) requests: Estimate,
    beside: Option<Box<Beside>>,
}

/// What most services need not be asked for: they limit requests, and say what is left of them.
#[derive(Debug, Default)]
struct Beside {
    tokens: Option<Estimate>,
    /// Made by the first answer without headers.
    found: Option<Found>,
    /// The headers of this scope are ignored.
    ignores_headers: bool,
}

impl Learned {
    pub(super) fn ignores_headers(&self) -> bool {
        self.beside.as_ref().is_some_and(|beside| beside.ignores_headers)
    }

    /// Whether headers have said what is left, and are believed.
    pub(super) fn follows_headers(&self) -> bool {
        !self.ignores_headers() && self.requests.last_level().is_some()
    }

    pub(super) fn tokens(&mut self) -> Option<&mut Estimate> {
        self.beside.as_mut()?.tokens.as_mut()
    }

    pub(super) fn found(&mut self) -> &mut Found {
        self.beside.get_or_insert_default().found.get_or_insert_default()
    }

    pub(super) fn known_found(&mut self) -> Option<&mut Found> {
        self.beside.as_mut()?.found.as_mut()
    }
}

impl Limit {
    /// A limit of a pool that learns, or one of quotas alone.
    pub(crate) fn new(quotas: &[Arc<Quota>], learns: bool, now: u64) -> Self {
        let more = OnceLock::new();
        if !quotas.is_empty() {
            let quotas = quotas.iter().map(|quota| (quota.clone(), quota.full(now))).collect();
            let _ = more.set(Box::new(More { quotas, ..More::default() }));
        }
        Self {
            rest: AtomicU64::new(0),
            cap: AtomicU32::new(if learns && quotas.is_empty() { FIRST_IN_FLIGHT } else { 0 }),
            ended: AtomicU32::new(0),
            requests: Budget::default(),
            more,
            learned: Mutex::default(),
            with_head: AtomicU32::new(0),
            lent: AtomicU32::new(0),
        }
    }

    #[inline]
    pub(super) fn quotas(&self) -> &[(Arc<Quota>, Budget)] {
        self.more.get().map_or(&[], |more| &more.quotas)
    }

    /// The budget of tokens, made on first use.
    fn tokens(&self) -> &Budget {
        &self.more.get_or_init(Box::default).tokens
    }

    #[inline]
    pub(super) fn known_tokens(&self) -> Option<&Budget> {
        self.more.get().map(|more| &more.tokens)
    }

    pub(super) fn lock_learned(&self) -> MutexGuard<'_, Option<Box<Learned>>> {
        self.learned.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether another process owns the limit.
    #[inline]
    pub(crate) fn is_elsewhere(&self) -> bool {
        self.cap.load(Relaxed) & ELSEWHERE != 0
    }

    pub(crate) fn set_elsewhere(&self, is_elsewhere: bool) {
        if is_elsewhere {
            self.cap.fetch_or(ELSEWHERE, SeqCst);
        } else {
            self.cap.fetch_and(!ELSEWHERE, SeqCst);
        }
    }

    pub(super) fn cap(&self) -> u32 {
        self.cap.load(SeqCst) & !ELSEWHERE
    }

    pub(super) fn set_cap(&self, cap: u32) {
        let _ = self.cap.fetch_update(SeqCst, SeqCst, |before| Some(before & ELSEWHERE | cap));
    }

    /// Whether there is a cap, and as many requests in flight; or another process owns the limit.
    #[inline]
    pub(super) fn is_full(&self) -> bool {
        let cap = self.cap.load(Relaxed);
        cap != 0 && (cap & ELSEWHERE != 0 || self.in_flight() >= cap)
    }

    /// Takes what a request costs from each budget. Returns what it took, or when there is room, in ns; [`NEVER`] if that is
    /// when another request has its answer.
    #[inline]
    pub(crate) fn take(&self, tokens: u64, now: u64) -> Result<Taken, u64> {
        let rest = self.rest.load(SeqCst);
        if rest > now {
            return Err(rest);
        }
        if self.is_full() {
            return Err(NEVER);
        }
        let taken = self.take_from_budgets(tokens, now)?;
        let cap = self.cap.load(Relaxed);
        if cap != 0 && self.in_flight_up_to(taken.sequence) > cap {
            // Other threads took the last places at the same time.
            self.put_back(&taken, now);
            return Err(NEVER);
        }
        Ok(taken)
    }

    #[inline]
    fn take_from_budgets(&self, tokens: u64, now: u64) -> Result<Taken, u64> {
        let sequence = self.requests.take(1, now)?;
        let mut token_sequence = 0;
        if tokens != 0 {
            token_sequence =
                self.tokens().take(tokens, now).inspect_err(|_| self.requests.put_back(1, now, now))?;
        }
        let quotas = self.quotas();
        for (taken, (quota, budget)) in quotas.iter().enumerate() {
            if let Err(when) = quota.take(budget, tokens, now) {
                for (quota, budget) in &quotas[..taken] {
                    quota.put_back(budget, tokens, now, now);
                }
                self.requests.put_back(1, now, now);
                if tokens != 0 {
                    self.tokens().put_back(tokens, now, now);
                }
                return Err(when);
            }
        }
        Ok(Taken { at: now, tokens, sequence, token_sequence, is_probe: false })
    }

    /// Counts a request that is sent although there is no room for it.
    pub(crate) fn probe(&self, tokens: u64, now: u64) -> Taken {
        for (quota, budget) in self.quotas() {
            quota.take_anyway(budget, tokens, now);
        }
        Taken {
            at: now,
            tokens,
            sequence: self.requests.take_anyway(1, now),
            token_sequence: if tokens == 0 { 0 } else { self.tokens().take_anyway(tokens, now) },
            is_probe: true,
        }
    }

    /// Gives back what a request took that was not sent.
    pub(crate) fn put_back(&self, taken: &Taken, now: u64) {
        if taken.tokens != 0 {
            self.tokens().put_back(taken.tokens, taken.at, now);
        }
        for (quota, budget) in self.quotas() {
            quota.put_back(budget, taken.tokens, taken.at, now);
        }
        // Last: the request is in flight until then.
        self.requests.put_back(1, taken.at, now);
    }

    /// Ends a request of which nobody knows whether the service counted it.
    pub(crate) fn failed(&self) {
        self.ended.fetch_add(1, SeqCst);
    }

    /// Whether the end of a request's body makes a difference: to a cap, or to the tokens that it reserved.
    pub(crate) fn lasts_until_the_end(&self, taken: &Taken) -> bool {
        taken.tokens != 0 || self.cap() != 0
    }

    /// Ends a request whose body has ended, or was dropped.
    pub(crate) fn body_ended(&self) {
        // In this order, or for a moment a request more would seem to have its answer.
        self.with_head.fetch_sub(1, SeqCst);
        self.ended.fetch_add(1, SeqCst);
    }

    /// Replaces the tokens that a request counts for: those that it reserved, by those that it used.
    pub(crate) fn correct_tokens(&self, taken: &mut Taken, used: u64, now: u64) {
        if used == taken.tokens {
            return;
        }
        let by = taken.tokens as f64 - used as f64;
        for (quota, budget) in self.quotas().iter().filter(|(quota, _)| quota.is_of_tokens()) {
            quota.add(budget, by, taken.at, now);
        }
        if used > taken.tokens {
            // Taken now: an answer to an earlier request does not know of it.
            self.tokens().take_anyway(used - taken.tokens, now);
        } else if let Some(tokens) = self.known_tokens() {
            tokens.add(by, taken.at, now);
            if let Some(tokens) = self.lock_learned().as_mut().and_then(|learned| learned.tokens()) {
                tokens.not_counted(by);
            }
        }
        taken.tokens = used;
    }

    /// When the limit has room for a request of that many tokens, in ns; 0 if it has.
    #[inline]
    pub(crate) fn closed_until(&self, tokens: u64, now: u64) -> u64 {
        if self.is_full() {
            return NEVER;
        }
        let mut until = self.rest.load(SeqCst).max(self.requests.when(1, now));
        if let Some(budget) = self.known_tokens().filter(|_| tokens != 0) {
            until = until.max(budget.when(tokens, now));
        }
        for (quota, budget) in self.quotas() {
            until = until.max(quota.when(budget, tokens, now));
        }
        if until > now { until } else { 0 }
    }

    /// When the learned budgets are full, in ns: what comes back later is lost.
    pub(crate) fn full_at(&self, now: u64) -> u64 {
        let tokens = self.known_tokens().map_or(0, |budget| budget.full_at(now));
        self.requests.full_at(now).max(tokens)
    }

    /// How many requests the budgets of requests allow now.
    pub(crate) fn room(&self, now: u64) -> f64 {
        let quotas = self.quotas().iter().filter(|(quota, _)| !quota.is_of_tokens());
        let budgets = quotas.map(|(_, budget)| budget).chain([&self.requests]);
        budgets.filter_map(|budget| budget.level(now)).fold(f64::INFINITY, f64::min)
    }

    /// Closes the limit until then, or longer.
    pub(crate) fn rest_until(&self, until: u64) {
        self.rest.fetch_max(until, SeqCst);
    }

    /// Until when it is closed, whatever the budgets say.
    pub(crate) fn rests_until(&self) -> u64 {
        self.rest.load(SeqCst)
    }

    /// Ends the rest, or has it end then.
    pub(crate) fn reset(&self, until: u64) {
        self.rest.store(until, SeqCst);
    }

    /// Never too many: one that ends meanwhile does not count.
    #[inline]
    pub(crate) fn in_flight(&self) -> u32 {
        self.in_flight_up_to(self.requests.sent())
    }

    #[inline]
    fn in_flight_up_to(&self, sequence: u64) -> u32 {
        let in_flight = (sequence as u32).wrapping_sub(self.ended.load(SeqCst)) as i32;
        in_flight.max(0) as u32
    }

    /// At most so many requests without an answer, as far as is known.
    pub(crate) fn most_in_flight(&self) -> Option<u32> {
        Some(self.cap()).filter(|cap| *cap != 0)
    }

    /// Why there is no room for a request of that many tokens, and until when, in ns: of several reasons, the one that lasts
    /// longest; the requests in flight are named only if there is no other reason.
    pub(crate) fn why_closed(&self, tokens: u64, now: u64) -> Option<(Closed, u64)> {
        let of_tokens = self.known_tokens().filter(|_| tokens != 0);
        let learned = [
            (Closed::Resting, self.rest.load(SeqCst)),
            (Closed::Budget(0), self.requests.when(1, now)),
            (Closed::Budget(1), of_tokens.map_or(0, |budget| budget.when(tokens, now))),
        ];
        let quotas = (2..).zip(self.quotas());
        let quotas =
            quotas.map(|(at, (quota, budget))| (Closed::Budget(at), quota.when(budget, tokens, now)));
        let reasons = learned.into_iter().chain(quotas).filter(|(_, until)| *until > now);
        if let Some(longest) = reasons.max_by_key(|(_, until)| *until) {
            return Some(longest);
        }
        let (in_flight, most) = (self.in_flight(), self.most_in_flight()?);
        (in_flight >= most).then_some((Closed::InFlight { in_flight, most }, NEVER))
    }

    /// What is left of each budget that is known, with its number in [`Closed::Budget`].
    pub(crate) fn budgets(&self, now: u64) -> Vec<(usize, BudgetStats)> {
        let (of_requests, of_tokens) = self.known_by_answers();
        let learned = [
            (Unit::Requests, of_requests, self.requests.standing(now)),
            (Unit::Tokens, of_tokens, self.known_tokens().and_then(|budget| budget.standing(now))),
        ];
        let configured = self.quotas().iter().map(|(quota, budget)| {
            let unit = if quota.is_of_tokens() { Unit::Tokens } else { Unit::Requests };
            (unit, Some(KnownBy::Quota), quota.standing(budget, now))
        });
        let stats = |(unit, known_by, standing): (Unit, Option<KnownBy>, Option<Standing>)| {
            let (known_by, Standing { left, limit, reset, is_window }) = (known_by?, standing?);
            let resets_in = Duration::from_nanos(reset.saturating_sub(now));
            Some(BudgetStats { unit, known_by, left, limit, resets_in, is_window })
        };
        let all = learned.into_iter().chain(configured).map(stats).enumerate();
        all.filter_map(|(at, stats)| Some((at, stats?))).collect()
    }

    /// How the budgets of requests and of tokens are known. A limit whose headers are ignored has the first one alone.
    fn known_by_answers(&self) -> (Option<KnownBy>, Option<KnownBy>) {
        let learned = self.lock_learned();
        let learned = learned.as_ref();
        if learned.is_some_and(|learned| learned.ignores_headers()) {
            return (Some(KnownBy::Distrusted), None);
        }
        let has_headers = learned.is_some_and(|learned| learned.requests.last_level().is_some());
        let of_requests = if has_headers { KnownBy::Headers } else { KnownBy::Refusals };
        (
            Some(of_requests).filter(|_| self.requests.is_known()),
            Some(KnownBy::Headers).filter(|_| self.known_tokens().is_some_and(Budget::is_known)),
        )
    }

    /// How the limit is known: by the surest of its budgets, unless its headers are ignored.
    pub(crate) fn known_by(&self) -> Option<KnownBy> {
        let (of_requests, of_tokens) = self.known_by_answers();
        let by_quota = Some(KnownBy::Quota).filter(|_| !self.quotas().is_empty());
        of_tokens.or(of_requests).or(by_quota)
    }

    fn unanswered(&self) -> u32 {
        self.in_flight().saturating_sub(self.with_head.load(SeqCst))
    }

    /// Whether an answer proved that there is no room for a request now. A quota, and a rest that the service asked for, are
    /// never doubted.
    pub(crate) fn is_doubtful(&self, tokens: u64, now: u64) -> bool {
        let is_certain = self.rest.load(SeqCst) > now
            || self.quotas().iter().any(|(quota, budget)| quota.when(budget, tokens, now) > now);
        if is_certain {
            return false;
        }
        let mut learned = self.lock_learned();
        let Some(learned) = &mut *learned else { return false };
        let is_short = |estimate: &Estimate, cost: f64| {
            estimate
                .last_level()
                .is_some_and(|(level, at, rate)| level + rate * (seconds(now) + 0.1 - at) < 0.75 * cost)
        };
        is_short(&learned.requests, 1.0)
            || learned.tokens().is_some_and(|estimate| is_short(estimate, tokens as f64))
    }

    /// Notes that a request has its answer, without learning from it: its end, unless the body is waited for. A refused
    /// request was not counted by the service.
    pub(crate) fn answered(&self, taken: &Taken, is_limited: bool, has_body: bool, now: u64) {
        if has_body {
            self.with_head.fetch_add(1, SeqCst);
        } else {
            self.ended.fetch_add(1, SeqCst);
        }
        if is_limited {
            for (quota, budget) in self.quotas() {
                quota.add(budget, quota.cost(taken.tokens) as f64, taken.at, now);
            }
        }
    }

    /// Learns from the answer of a request: its end, unless the body is waited for. Returns whether the headers of the scope
    /// are ignored from now on.
    pub(crate) fn learn(
        &self,
        taken: &Taken,
        said: &Remaining,
        answered: Answered,
        sharing: &mut Sharing,
    ) -> bool {
        let Answered { is_limited, has_body, wait, now: now_nanos, .. } = answered;
        let (now, sent_at) = (seconds(now_nanos), seconds(taken.at));
        let wait = wait.map(|wait| wait.as_secs_f64());
        self.answered(taken, is_limited, has_body, now_nanos);
        let mut learned = self.lock_learned();
        let learned = learned.get_or_insert_default();
        let caught = sharing.judge(said, taken, answered);
        if sharing.is_lying() && !learned.ignores_headers() {
            self.ignore_headers(learned);
        }
        let has_headers = said.is_known() && !sharing.is_lying();
        if !has_headers {
            learned.found();
        }
        if let Some(found) = learned.known_found() {
            found.count(is_limited, now);
        }
        if has_headers {
            self.observe(learned, taken, said, answered, sharing);
        }
        if is_limited {
            let rest = wait.or_else(|| (!has_headers).then(|| learned.found().rest(sent_at)));
            if let Some(rest) = rest {
                self.rest_until(now_nanos.saturating_add(wait_nanos(rest)));
            }
        }
        let cap = self.cap();
        if cap != 0 {
            let is_known = self.requests.is_known() || self.known_tokens().is_some_and(Budget::is_known);
            let is_needed = !has_headers && !is_known;
            self.set_cap(if is_needed { learned.found().cap(cap, is_limited, wait, sent_at) } else { 0 });
        }
        // A 429 of a load balancer says nothing of what the service's headers said.
        if !has_headers && !learned.follows_headers() {
            learned.found().adjust(&self.requests, is_limited, wait, sent_at, now);
        }
        caught
    }

    fn observe(
        &self,
        learned: &mut Learned,
        taken: &Taken,
        said: &Remaining,
        answered: Answered,
        sharing: &mut Sharing,
    ) {
        let tokens = taken.tokens as f64;
        let is_out = |left: Option<super::left::Left>, cost: f64| {
            left.is_some_and(|left| left.remaining < 2.0 * cost.max(1.0))
        };
        let answer = |left, cost, sequence, may_be_other, is_requests| estimate::Answer {
            left,
            cost,
            sequence,
            sent_at: seconds(taken.at),
            now: seconds(answered.now),
            is_limited: answered.is_limited,
            wait: answered.wait.map(|wait| wait.as_secs_f64()),
            may_be_other,
            in_flight: if is_requests { f64::from(self.unanswered()) } else { 0.0 },
            lent: if is_requests { f64::from(self.lent.load(SeqCst)) } else { 0.0 },
            per_request: if is_requests { 1.0 } else { tokens.max(1.0) },
            keys: answered.keys.max(1) as f64,
            waiting: answered.waiting as f64 / answered.keys.max(1) as f64,
            is_requests,
        };
        if let Some(left) = said.requests {
            let answer = answer(left, 1.0, taken.sequence, is_out(said.tokens, tokens), true);
            learned.requests.observe(&self.requests, &answer, sharing);
        }
        if let Some(left) = said.tokens.filter(|_| taken.tokens != 0) {
            let answer = answer(left, tokens, taken.token_sequence, is_out(said.requests, 1.0), false);
            let beside = learned.beside.get_or_insert_default();
            beside.tokens.get_or_insert_default().observe(self.tokens(), &answer, sharing);
        }
    }

    fn ignore_headers(&self, learned: &mut Learned) {
        let beside = learned.beside.get_or_insert_default();
        beside.ignores_headers = true;
        beside.found.get_or_insert_default().forget();
        self.requests.forget();
        if let Some(tokens) = self.known_tokens() {
            tokens.forget();
        }
        if self.cap() == 0 {
            self.set_cap(FIRST_IN_FLIGHT);
        }
    }

    /// Learns from headers again. Until the next answer, what was found by refusals counts.
    pub(crate) fn trust(&self) {
        if let Some(beside) = self.lock_learned().as_mut().and_then(|learned| learned.beside.as_mut()) {
            beside.ignores_headers = false;
        }
    }

    /// Ignores what was learned from headers, after another limit of the scope has caught them lying.
    pub(crate) fn distrust(&self) {
        let mut learned = self.lock_learned();
        let learned = learned.get_or_insert_default();
        if !learned.ignores_headers() {
            self.ignore_headers(learned);
        }
    }
}
