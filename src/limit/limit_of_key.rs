//! One limit: of a key, or of the keys of a quota group, in one scope.

use std::{sync::PoisonError, time::Duration};

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
    Mutex,
    atomic::{
        AtomicBool, AtomicU32, AtomicU64,
        Ordering::{Relaxed, SeqCst},
    },
};

/// What picks read and write comes first; what only answers need is behind the lock.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Limit {
    /// Closed until then, in ns of the pool's clock, whatever the budgets say.
    pub(super) rest: AtomicU64,
    /// Until the end of the response's body.
    in_flight: AtomicU32,
    /// At most so many requests in flight; 0 for any number.
    pub(super) cap: AtomicU32,
    /// The requests in flight that have the head of their response.
    with_head: AtomicU32,
    /// What the service allows, as it was learned.
    pub(super) requests: Budget,
    pub(super) tokens: Budget,
    /// What the user configured.
    pub(super) quotas: Box<[(Quota, Budget)]>,
    pub(super) learned: Mutex<Learned>,
    /// Another process owns the limit: closed here, but for tokens that it lends.
    pub(super) elsewhere: AtomicBool,
    /// Requests that were lent, and not sent yet as far as is known.
    pub(super) lent: AtomicU32,
}

#[derive(Debug, Default)]
pub(super) struct Learned {
    pub(super) requests: Estimate,
    pub(super) tokens: Option<Box<Estimate>>,
    pub(super) found: Found,
    /// The headers of this scope are ignored.
    pub(super) ignores_headers: bool,
}

impl Limit {
    /// A limit of a pool that learns, or one of quotas alone.
    pub(crate) fn new(quotas: &[Quota], learns: bool, now: u64) -> Self {
        Self {
            rest: AtomicU64::new(0),
            in_flight: AtomicU32::new(0),
            cap: AtomicU32::new(if learns && quotas.is_empty() { FIRST_IN_FLIGHT } else { 0 }),
            with_head: AtomicU32::new(0),
            requests: Budget::default(),
            tokens: Budget::default(),
            quotas: quotas.iter().map(|quota| (quota.clone(), quota.full(now))).collect(),
            learned: Mutex::default(),
            elsewhere: AtomicBool::new(false),
            lent: AtomicU32::new(0),
        }
    }

    /// Takes what a request costs from each budget. Returns what it took, or when there is room, in ns; [`NEVER`] if that is
    /// when another request has its answer.
    #[inline]
    pub(crate) fn take(&self, tokens: u64, now: u64) -> Result<Taken, u64> {
        if self.is_elsewhere() {
            return Err(NEVER);
        }
        let rest = self.rest.load(SeqCst);
        if rest > now {
            return Err(rest);
        }
        let in_flight = self.in_flight.fetch_add(1, SeqCst);
        let cap = self.cap.load(Relaxed);
        if cap != 0 && in_flight >= cap {
            self.in_flight.fetch_sub(1, SeqCst);
            return Err(NEVER);
        }
        self.take_from_budgets(tokens, now).inspect_err(|_| {
            self.in_flight.fetch_sub(1, SeqCst);
        })
    }

    #[inline]
    fn take_from_budgets(&self, tokens: u64, now: u64) -> Result<Taken, u64> {
        let sequence = self.requests.take(1, now)?;
        let mut token_sequence = 0;
        if tokens != 0 {
            token_sequence =
                self.tokens.take(tokens, now).inspect_err(|_| self.requests.put_back(1, now, now))?;
        }
        for (taken, (quota, budget)) in self.quotas.iter().enumerate() {
            if let Err(when) = quota.take(budget, tokens, now) {
                for (quota, budget) in &self.quotas[..taken] {
                    quota.put_back(budget, tokens, now, now);
                }
                self.requests.put_back(1, now, now);
                if tokens != 0 {
                    self.tokens.put_back(tokens, now, now);
                }
                return Err(when);
            }
        }
        Ok(Taken { at: now, tokens, sequence, token_sequence, is_probe: false })
    }

    /// Counts a request that is sent although there is no room for it.
    pub(crate) fn probe(&self, tokens: u64, now: u64) -> Taken {
        self.in_flight.fetch_add(1, SeqCst);
        for (quota, budget) in &self.quotas {
            quota.take_anyway(budget, tokens, now);
        }
        Taken {
            at: now,
            tokens,
            sequence: self.requests.take_anyway(1, now),
            token_sequence: self.tokens.take_anyway(tokens, now),
            is_probe: true,
        }
    }

    /// Gives back what a request took that was not sent.
    pub(crate) fn put_back(&self, taken: &Taken, now: u64) {
        self.requests.put_back(1, taken.at, now);
        if taken.tokens != 0 {
            self.tokens.put_back(taken.tokens, taken.at, now);
        }
        for (quota, budget) in &self.quotas {
            quota.put_back(budget, taken.tokens, taken.at, now);
        }
        self.in_flight.fetch_sub(1, SeqCst);
    }

    /// Ends a request of which nobody knows whether the service counted it.
    pub(crate) fn failed(&self) {
        self.in_flight.fetch_sub(1, SeqCst);
    }

    /// Whether the end of a request's body makes a difference: to a cap, or to the tokens that it reserved.
    pub(crate) fn lasts_until_the_end(&self, taken: &Taken) -> bool {
        taken.tokens != 0 || self.cap.load(Relaxed) != 0
    }

    /// Ends a request whose body has ended, or was dropped.
    pub(crate) fn body_ended(&self) {
        // In this order, or for a moment a request more would seem to have its answer.
        self.with_head.fetch_sub(1, SeqCst);
        self.in_flight.fetch_sub(1, SeqCst);
    }

    /// Replaces the tokens that a request counts for: those that it reserved, by those that it used.
    pub(crate) fn correct_tokens(&self, taken: &mut Taken, used: u64, now: u64) {
        if used == taken.tokens {
            return;
        }
        let by = taken.tokens as f64 - used as f64;
        for (quota, budget) in self.quotas.iter().filter(|(quota, _)| quota.is_of_tokens()) {
            quota.add(budget, by, taken.at, now);
        }
        if used > taken.tokens {
            // Taken now: an answer to an earlier request does not know of it.
            self.tokens.take_anyway(used - taken.tokens, now);
        } else {
            self.tokens.add(by, taken.at, now);
            let mut learned = self.learned.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(tokens) = &mut learned.tokens {
                tokens.not_counted(by);
            }
        }
        taken.tokens = used;
    }

    /// When the limit has room for a request of that many tokens, in ns; 0 if it has.
    #[inline]
    pub(crate) fn closed_until(&self, tokens: u64, now: u64) -> u64 {
        let cap = self.cap.load(Relaxed);
        if self.is_elsewhere() || (cap != 0 && self.in_flight.load(SeqCst) >= cap) {
            return NEVER;
        }
        let mut until = self.rest.load(SeqCst).max(self.requests.when(1, now));
        if tokens != 0 {
            until = until.max(self.tokens.when(tokens, now));
        }
        for (quota, budget) in &self.quotas {
            until = until.max(quota.when(budget, tokens, now));
        }
        if until > now { until } else { 0 }
    }

    /// When the learned budgets are full, in ns: what comes back later is lost.
    pub(crate) fn full_at(&self, now: u64) -> u64 {
        self.requests.full_at(now).max(self.tokens.full_at(now))
    }

    /// How many requests the budgets of requests allow now.
    pub(crate) fn room(&self, now: u64) -> f64 {
        let quotas = self.quotas.iter().filter(|(quota, _)| !quota.is_of_tokens());
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

    /// Ends the rest.
    pub(crate) fn reset(&self) {
        self.rest.store(0, SeqCst);
    }

    pub(crate) fn in_flight(&self) -> u32 {
        self.in_flight.load(SeqCst)
    }

    /// At most so many requests without an answer, as far as is known.
    pub(crate) fn most_in_flight(&self) -> Option<u32> {
        Some(self.cap.load(Relaxed)).filter(|cap| *cap != 0)
    }

    /// Why there is no room for a request of that many tokens, and until when, in ns: of several reasons, the one that lasts
    /// longest; the requests in flight are named only if there is no other reason.
    pub(crate) fn why_closed(&self, tokens: u64, now: u64) -> Option<(Closed, u64)> {
        let learned = [
            (Closed::Resting, self.rest.load(SeqCst)),
            (Closed::Budget(0), self.requests.when(1, now)),
            (Closed::Budget(1), if tokens == 0 { 0 } else { self.tokens.when(tokens, now) }),
        ];
        let quotas = (2..).zip(&self.quotas);
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
            (Unit::Tokens, of_tokens, self.tokens.standing(now)),
        ];
        let configured = self.quotas.iter().map(|(quota, budget)| {
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
        let learned = self.learned.lock().unwrap_or_else(PoisonError::into_inner);
        if learned.ignores_headers {
            return (Some(KnownBy::Distrusted), None);
        }
        let has_headers = learned.requests.last_level().is_some();
        let of_requests = if has_headers { KnownBy::Headers } else { KnownBy::Refusals };
        (
            Some(of_requests).filter(|_| self.requests.is_known()),
            Some(KnownBy::Headers).filter(|_| self.tokens.is_known()),
        )
    }

    /// How the limit is known: by the surest of its budgets, unless its headers are ignored.
    pub(crate) fn known_by(&self) -> Option<KnownBy> {
        let (of_requests, of_tokens) = self.known_by_answers();
        let by_quota = Some(KnownBy::Quota).filter(|_| !self.quotas.is_empty());
        of_tokens.or(of_requests).or(by_quota)
    }

    fn unanswered(&self) -> u32 {
        self.in_flight().saturating_sub(self.with_head.load(SeqCst))
    }

    /// Whether an answer proved that there is no room for a request now. A quota, and a rest that the service asked for, are
    /// never doubted.
    pub(crate) fn is_doubtful(&self, tokens: u64, now: u64) -> bool {
        let is_certain = self.rest.load(SeqCst) > now
            || self.quotas.iter().any(|(quota, budget)| quota.when(budget, tokens, now) > now);
        if is_certain {
            return false;
        }
        let learned = self.learned.lock().unwrap_or_else(PoisonError::into_inner);
        let is_short = |estimate: &Estimate, cost: f64| {
            estimate
                .last_level()
                .is_some_and(|(level, at, rate)| level + rate * (seconds(now) + 0.1 - at) < 0.75 * cost)
        };
        is_short(&learned.requests, 1.0)
            || learned.tokens.as_ref().is_some_and(|estimate| is_short(estimate, tokens as f64))
    }

    /// Notes that a request has its answer, without learning from it: its end, unless the body is waited for. A refused
    /// request was not counted by the service.
    pub(crate) fn answered(&self, taken: &Taken, is_limited: bool, has_body: bool, now: u64) {
        if has_body {
            self.with_head.fetch_add(1, SeqCst);
        } else {
            self.in_flight.fetch_sub(1, SeqCst);
        }
        if is_limited {
            for (quota, budget) in &self.quotas {
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
        let mut learned = self.learned.lock().unwrap_or_else(PoisonError::into_inner);
        let learned = &mut *learned;
        let caught = sharing.judge(said, taken, answered);
        if sharing.is_lying() && !learned.ignores_headers {
            self.ignore_headers(learned);
        }
        let has_headers = said.is_known() && !sharing.is_lying();
        learned.found.count(is_limited, now);
        if has_headers {
            self.observe(learned, taken, said, answered, sharing);
        }
        if is_limited {
            let rest = wait.or_else(|| (!has_headers).then(|| learned.found.rest(sent_at)));
            if let Some(rest) = rest {
                self.rest_until(now_nanos.saturating_add(wait_nanos(rest)));
            }
        }
        let cap = self.cap.load(SeqCst);
        if has_headers || self.requests.is_known() || self.tokens.is_known() {
            self.cap.store(0, SeqCst);
        } else if cap != 0 {
            self.cap.store(learned.found.cap(cap, is_limited, wait, sent_at), SeqCst);
        }
        // A 429 of a load balancer says nothing of what the service's headers said.
        if !has_headers && (learned.ignores_headers || learned.requests.last_level().is_none()) {
            learned.found.adjust(&self.requests, is_limited, wait, sent_at, now);
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
            learned.tokens.get_or_insert_default().observe(&self.tokens, &answer, sharing);
        }
    }

    fn ignore_headers(&self, learned: &mut Learned) {
        learned.ignores_headers = true;
        learned.found.forget();
        self.requests.forget();
        self.tokens.forget();
        if self.cap.load(SeqCst) == 0 {
            self.cap.store(FIRST_IN_FLIGHT, SeqCst);
        }
    }

    /// Ignores what was learned from headers, after another limit of the scope has caught them lying.
    pub(crate) fn distrust(&self) {
        let mut learned = self.learned.lock().unwrap_or_else(PoisonError::into_inner);
        if !learned.ignores_headers {
            self.ignore_headers(&mut learned);
        }
    }
}
