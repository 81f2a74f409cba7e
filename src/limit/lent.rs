//! A limit that several processes use through a store: one of them owns it, and lends tokens of it to the others.

use super::{
    budget::Budget,
    known::Known,
    left::Remaining,
    limit_of_key::{Learned, Limit},
    sharing::{Alike, Sharing},
    taken::{Answered, Taken, seconds},
    word::NEVER,
};
use crate::sync::atomic::Ordering::SeqCst;

/// An owner that has seen no answer for so long asks for reports, in seconds.
const HEARD_OF: f64 = 3.0;

impl Limit {
    /// Returns how many requests of so many tokens the limit allows from now until then.
    pub(crate) fn supply(&self, tokens: u64, now: u64, until: u64) -> f64 {
        if self.rest() > until || self.is_full() {
            return 0.0;
        }
        if !self.requests.is_known() && self.quotas().is_empty() {
            // One after the other, until an answer says more.
            return if self.in_flight() == 0 { 1.0 } else { 0.0 };
        }
        let of_tokens = self.known_tokens().filter(|_| tokens != 0);
        let of_tokens = of_tokens.map(|budget| budget.supply(now, until) / tokens as f64);
        let of_quotas = self
            .quotas()
            .iter()
            .map(|(quota, budget)| budget.supply(now, until) / quota.cost(tokens).max(1) as f64);
        let least = of_quotas.chain(of_tokens).fold(self.requests.supply(now, until), f64::min);
        if least.is_finite() { least } else { 0.0 }
    }

    /// Returns when the next request may be lent, in ns; [`NEVER`] if that is not known.
    pub(crate) fn next_to_lend(&self, tokens: u64, now: u64) -> u64 {
        let is_unknown = !self.requests.is_known() && self.quotas().is_empty();
        if self.is_elsewhere() || (is_unknown && self.in_flight() > 0) {
            return NEVER;
        }
        match self.closed_until(tokens, now) {
            0 => now,
            later if self.refills_steadily() => later,
            // What is not there yet cannot be taken out of a window.
            _ => NEVER,
        }
    }

    fn refills_steadily(&self) -> bool {
        let quotas = self.quotas().iter().map(|(_, budget)| budget);
        !quotas.chain([&self.requests]).chain(self.known_tokens()).any(Budget::is_window)
    }

    /// Takes out what a request costs that is sent later, and perhaps by another process.
    pub(crate) fn lend(&self, tokens: u64, now: u64) -> Taken {
        self.lent.fetch_add(1, SeqCst);
        self.take_anyway(tokens, now)
    }

    /// Takes what a request costs, whether it is there or not.
    pub(crate) fn take_anyway(&self, tokens: u64, now: u64) -> Taken {
        Taken { is_probe: false, ..self.probe(tokens, now) }
    }

    /// A lent request has been sent, or never will be.
    pub(crate) fn is_spent(&self) {
        let _ = self.lent.fetch_update(SeqCst, SeqCst, |lent| lent.checked_sub(1));
    }

    /// The service refills its bucket only when requests are sent, not when they are lent: what is lent and the rest are
    /// never more than the bucket holds.
    pub(crate) fn hold_back_lent(&self, now: u64) {
        let lent = self.lent.load(SeqCst);
        if lent > 0 {
            self.requests.keep_below_full(lent.into(), now);
        }
    }

    /// Puts back what was lent and not used.
    pub(crate) fn give_back(&self, taken: &Taken, now: u64) {
        self.requests.add(1.0, taken.at, now);
        if let Some(tokens) = self.known_tokens() {
            tokens.add(taken.tokens as f64, taken.at, now);
        }
        // The numbers of later requests stay, so this counts as a request that the service refused.
        self.answered(taken, true, false, now);
        let mut learned = self.lock_learned();
        let Some(learned) = &mut *learned else { return };
        learned.requests.not_counted(1.0);
        if let Some(estimate) = learned.tokens() {
            estimate.not_counted(taken.tokens as f64);
        }
    }

    /// Ends a request for which this process set a token aside, and which it does not send.
    pub(crate) fn not_sent(&self, taken: &Taken, now: u64) {
        self.is_spent();
        self.give_back(taken, now);
    }

    /// A lent request has ended, and nobody says how.
    pub(crate) fn settle(&self, taken: &Taken, now: u64) {
        self.answered(taken, false, false, now);
    }

    /// Learns from the answer of a request that was settled before the answer came.
    pub(crate) fn learn_late(
        &self,
        taken: &Taken,
        said: &Remaining,
        answered: Answered,
        sharing: &mut Sharing,
    ) -> bool {
        // What it learns from ends the request, which has ended already.
        self.ended.fetch_sub(1, SeqCst);
        self.learn(taken, said, answered, sharing)
    }

    /// Whether what is left of the limit is known from headers.
    pub(crate) fn is_known_from_headers(&self) -> bool {
        self.lock_learned().as_deref().is_some_and(Learned::follows_headers)
    }

    /// Whether the owner has to hear of the next answers: headers are not known, or were last seen a while ago.
    pub(crate) fn wants_reports(&self, now: u64) -> bool {
        let learned = self.lock_learned();
        learned.as_deref().is_none_or(|learned| {
            let seen_at = learned.requests.last_level().map(|(_, at, _)| at);
            learned.ignores_headers() || seen_at.is_none_or(|at| seconds(now) - at > HEARD_OF)
        })
    }

    /// Returns what the next owner has to know.
    pub(crate) fn known(&self, now: u64) -> Option<Known> {
        let mut learned = self.lock_learned();
        let level = self.requests.level(now)? as f32;
        if let Some((left, ends_in, period, size)) = self.requests.known_window(now) {
            let [size, left, ends_in, period] = [size, left, ends_in, period].map(|number| number as f32);
            return Some(Known::Window { size, left, ends_in, period });
        }
        let learned = learned.as_mut()?;
        match learned.requests.rate_interval() {
            Some(Alike { limit, low, high }) if !learned.ignores_headers() => {
                Some(Known::Bucket { size: limit as f32, low: low as f32, high: high as f32, level })
            }
            _ => learned.known_found()?.known(),
        }
    }

    /// Becomes the owner, with what the owner before knew at that time. If that is not known, nothing is left as far as
    /// this process knows, and the rate is the one that it has learned itself, or that of another key.
    pub(crate) fn take_over(&self, known: Option<(Known, u64)>, alike: Option<Alike>, now: u64) {
        let mut learned = self.lock_learned();
        let learned = learned.get_or_insert_default();
        match known {
            Some((Known::Window { size, left, ends_in, period }, at)) => {
                let [left, ends_in, period] = [left, ends_in, period].map(f64::from);
                let end = at.saturating_add((ends_in * 1e9) as u64);
                let period = std::time::Duration::try_from_secs_f64(period.max(0.001)).unwrap_or_default();
                self.requests.set_window(f64::from(size), end, period, now, |_| left);
            }
            Some((Known::Found { rate, refused_rate }, _)) => {
                learned.found().take_over(&self.requests, rate.into(), refused_rate.into(), now);
            }
            Some((Known::Bucket { size, low, high, level }, at)) => {
                let [limit, low, high, level] = [size, low, high, level].map(f64::from);
                let passed = now.saturating_sub(at) as f64 / 1e9;
                learned.requests.take_over(&self.requests, Alike { limit, low, high }, level, passed, now);
            }
            None => {
                let before = learned.requests.rate_interval().filter(|_| !self.requests.is_window());
                if let Some(rate) = before.or(alike.filter(|_| !self.requests.is_known()))
                    && !learned.ignores_headers()
                {
                    learned.requests.take_over(&self.requests, rate, 0.0, 0.0, now);
                }
            }
        }
        if self.requests.is_known() {
            self.set_cap(0);
        }
        self.set_elsewhere(false);
    }

    fn rest(&self) -> u64 {
        self.rest.load(SeqCst)
    }
}
