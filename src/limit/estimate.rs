//! Learns one budget from what responses say is left of it.
//!
//! The rate of a bucket is an interval that each answer narrows. The level is this process's own count, unless the answer
//! proves it wrong: setting the level from each header would count requests in flight twice or not at all, and whole
//! seconds would move it by a minute's worth of requests.

use std::time::Duration;

use super::{
    budget::Budget,
    left::{Kind, Left},
    sharing::{Alike, Sharing},
};

/// Requests that were sent within this many seconds may reach the service in another order.
const REORDERED: f64 = 0.05;

/// How fast a rate that is known to lie between two others moves to where the levels put it, in seconds.
const RATE_SETTLES_IN: f64 = 20.0;

/// An answer, as one budget sees it. Times are seconds of the pool's clock.
pub(crate) struct Answer {
    pub(crate) left: Left,
    pub(crate) cost: f64,
    /// The request's number: what was taken up to it.
    pub(crate) sequence: u64,
    pub(crate) sent_at: f64,
    pub(crate) now: f64,
    pub(crate) is_limited: bool,
    /// How long a refusal says to wait.
    pub(crate) wait: Option<f64>,
    /// Whether the refusal may be another budget's.
    pub(crate) may_be_other: bool,
    /// Requests without an answer, of a budget of requests.
    pub(crate) in_flight: f64,
    /// Requests that other processes may still send.
    pub(crate) lent: f64,
    /// What a unit is in requests: 1, or the tokens of this request.
    pub(crate) per_request: f64,
    /// How many limits share a scope's traffic.
    pub(crate) keys: f64,
    /// How many requests of this process wait, for each limit.
    pub(crate) waiting: f64,
    /// Whether this is the budget of requests.
    pub(crate) is_requests: bool,
}

/// The level that the newest answer proved.
#[derive(Clone, Copy, Debug)]
struct Observed {
    at: f64,
    level: f32,
    was_full: bool,
}

/// Every limit has one: all but times, and sequence numbers, is kept in half the bits.
#[derive(Debug, Default)]
pub(crate) struct Estimate {
    last: Option<Observed>,
    /// The newest request with an answer: older ones say nothing new.
    seen: u64,
    voted_reset: f64,
    window_end: f64,
    /// The rate lies in between, in units per second; 0 if nothing is known.
    low: f32,
    high: f32,
    /// The most likely rate, by the levels of many answers; 0 if there were none.
    within: f32,
    limit: f32,
    /// What this process took since `last`, up to `seen`, less what the service did not count: what was refused, and what
    /// was reserved beyond its use.
    own: f32,
    /// What other processes use, in units per second; below 0 if more came back than expected.
    foreign: f32,
    voted_remaining: f32,
    period: f32,
    /// Above 1: the reset stands still while less is left, so this is a window.
    votes: i8,
    /// How often more came back than the rate allows.
    too_slow: u8,
    /// The rate comes from levels, because the resets are wrong.
    by_levels: bool,
}

impl Estimate {
    /// The level that an answer proved, at its time of sending, and how fast it rises.
    pub(crate) fn last_level(&self) -> Option<(f64, f64, f64)> {
        self.last.map(|last| (f64::from(last.level), last.at, self.rate()))
    }

    /// The size of a bucket, and the interval of its rate; `None` if nothing is known.
    pub(crate) fn rate_interval(&self) -> Option<Alike> {
        let [limit, low, high] = [self.limit, self.low, self.high].map(f64::from);
        (high > 0.0).then_some(Alike { limit, low, high })
    }

    /// Continues with what another process knew of a bucket some seconds ago.
    pub(crate) fn take_over(&mut self, budget: &Budget, known: Alike, level: f64, passed: f64, now: u64) {
        let Alike { limit, low, high } = known;
        if !(limit > 0.0 && high > 0.0 && low <= high) {
            return;
        }
        let (seen, votes) = (budget.sent(), self.votes);
        // At most so much was taken.
        let own = seen as f32;
        let [size, low, high] = [limit, low, high].map(|number| number as f32);
        *self = Self { low, high, limit: size, seen, own, votes, ..Self::default() };
        let rate = self.rate();
        budget.set_bucket(rate, limit, now, |_| (level + rate * passed).min(limit));
    }

    /// Corrects what was taken: so much of it the service did not count.
    pub(crate) fn not_counted(&mut self, by: f64) {
        self.own -= by as f32;
    }

    pub(crate) fn observe(&mut self, budget: &Budget, answer: &Answer, sharing: &mut Sharing) {
        if answer.is_limited {
            self.own -= answer.cost as f32;
        }
        if answer.sequence < self.seen {
            return;
        }
        self.own += (answer.sequence - self.seen) as f32;
        self.seen = answer.sequence;
        if answer.left.limit as f32 != self.limit {
            *self = Self {
                limit: answer.left.limit as f32,
                seen: self.seen,
                // Of the first limit, all; of a changed one, at most so much was taken.
                own: if self.limit == 0.0 { self.own } else { self.seen as f32 },
                foreign: self.foreign,
                votes: self.votes,
                ..Self::default()
            };
        }
        if self.is_window(answer) {
            self.observe_window(budget, answer, sharing);
        } else {
            self.observe_bucket(budget, answer, sharing);
        }
    }

    fn observed(&mut self, answer: &Answer, level: f64, was_full: bool) {
        self.last = Some(Observed { at: answer.sent_at, level: level as f32, was_full });
        self.own = 0.0;
    }

    /// A bucket's reset moves away with each request; a window's stands still.
    fn is_window(&mut self, answer: &Answer) -> bool {
        let Left { remaining, reset, resolution, kind, .. } = answer.left;
        if let Some(kind) = kind {
            return kind == Kind::Window;
        }
        let reset_at = answer.sent_at + reset.as_secs_f64();
        let fell = remaining < f64::from(self.voted_remaining) - 0.5;
        if self.voted_reset > 0.0 && answer.sent_at < self.voted_reset && fell {
            let tolerance = resolution.as_secs_f64().max(0.05) + 0.02 * reset.as_secs_f64();
            let stands = (reset_at - self.voted_reset).abs() < tolerance;
            self.votes = (self.votes + if stands { 1 } else { -1 }).clamp(-4, 4);
        }
        if self.voted_reset == 0.0 || fell || answer.sent_at > self.voted_reset {
            self.voted_reset = reset_at;
            self.voted_remaining = remaining as f32;
        }
        self.votes > 1
    }

    fn observe_window(&mut self, budget: &Budget, answer: &Answer, sharing: &mut Sharing) {
        let Left { limit, remaining, reset, .. } = answer.left;
        let end = answer.sent_at + reset.as_secs_f64();
        let moved = end - self.window_end;
        // Only an answer after its end shows the next window. A window is no shorter than what is left of it.
        if self.window_end > 0.0 && moved > 0.5 && answer.sent_at + 0.5 >= self.window_end {
            let shortest = if self.period == 0.0 { moved } else { f64::from(self.period).min(moved) };
            self.period = shortest.max(reset.as_secs_f64()) as f32;
        }
        let is_same = moved.abs() < 2.0;
        self.window_end = end;
        let usual = [60.0, 3_600.0, 86_400.0].into_iter().find(|period| reset.as_secs_f64() <= period * 1.01);
        let period =
            if self.period > 0.0 { self.period.into() } else { usual.unwrap_or(reset.as_secs_f64()) };
        if let Some(last) = self.last.filter(|_| is_same) {
            let own = f64::from(self.own);
            let foreign = f64::from(last.level) - own - remaining;
            sharing.used(own / answer.per_request, foreign / answer.per_request, answer.now);
        }
        let not_counted = if answer.is_limited { answer.cost } else { 0.0 };
        let now = (answer.now * 1e9) as u64;
        let end = (end * 1e9) as u64;
        budget.set_window(limit, end, Duration::from_secs_f64(period.max(0.001)), now, |own| {
            let after = budget.sent().saturating_sub(answer.sequence) as f64;
            let most = remaining - (after - not_counted).max(0.0);
            let left = match own.filter(|_| is_same) {
                Some(own) => own.max(remaining - after.max(answer.in_flight)).min(most),
                None => most,
            };
            if sharing.is_shared() { left.min(sharing.part_of_window(remaining - after)) } else { left }
        });
        self.observed(answer, remaining, true);
    }

    fn observe_bucket(&mut self, budget: &Budget, answer: &Answer, sharing: &mut Sharing) {
        let times = (answer.left.reset.as_secs_f64(), answer.left.resolution.as_secs_f64());
        self.narrow_rate(answer, times, sharing);
        let rate = self.rate();
        if rate == 0.0 {
            // Full, and never used: the level is known, the rate is not.
            return;
        }
        let limit = answer.left.limit;
        let (low, high) = self.level_at_service(answer, times, rate);
        let level = 0.5 * (low + high);
        if self.is_overtaken(answer, rate, level) {
            return;
        }
        let is_full = level > limit - 1.0 - 1e-9 && limit > 1.5;
        self.compare_with_last(answer, rate, level, is_full, sharing);
        self.observed(answer, level, is_full);
        self.adjust_guard(answer, rate, level, sharing);
        if sharing.is_shared() {
            sharing.adjust(
                level / answer.per_request,
                limit / answer.per_request,
                answer.keys,
                answer.waiting,
                answer.now,
            );
        }
        let now = (answer.now * 1e9) as u64;
        let since = answer.now - answer.sent_at - sharing.guard;
        let share = sharing.share();
        let reserve = sharing.reserve(limit / answer.per_request, answer.waiting) * answer.per_request;
        // Processes that each saved up a whole burst would send all of them at once.
        let size = (share * (limit - reserve)).max(1.0);
        budget.set_bucket(rate * share, size, now, |own| {
            let after = budget.sent().saturating_sub(answer.sequence) as f64;
            let unanswered = after.max(answer.in_flight);
            if sharing.is_shared() {
                let at_most = high - after - reserve + rate * share * since;
                let at_least = share * (low - unanswered - reserve).max(0.0);
                return own.unwrap_or(at_least).max(at_least).min(at_most).min(limit);
            }
            let at_most = high + rate * since - after.max(answer.lent);
            let at_least = low + rate * since - unanswered;
            own.unwrap_or(at_least).max(at_least).min(at_most).min(limit)
        });
    }

    /// Whether the service decided on the last answer after this one: a bucket does not rise faster than its rate.
    fn is_overtaken(&self, answer: &Answer, rate: f64, level: f64) -> bool {
        self.last.is_some_and(|last| {
            let passed = answer.sent_at - last.at;
            passed < REORDERED && level > f64::from(last.level) + rate * passed
        })
    }

    /// Between `(used - 1) / reset` and `used / reset`, in each answer.
    fn narrow_rate(&mut self, answer: &Answer, (reset, resolution): (f64, f64), sharing: &mut Sharing) {
        let limit = answer.left.limit;
        let used = limit - answer.left.remaining;
        if reset > 0.0 && used > 0.0 && !self.by_levels {
            let high = (used / (reset - resolution).max(reset * 0.5)) as f32;
            let low = ((used - 1.0).max(0.0) / reset) as f32;
            let contradicts = low > self.high * 1.05 || high < self.low * 0.95;
            if self.high == 0.0 || contradicts {
                (self.low, self.high) = (low, high);
            } else {
                self.high = self.high.min(high);
                self.low = self.low.max(low).min(self.high);
            }
        }
        // A refusal says when there is one, and when there are all: that is the rate.
        if let Some(wait) = answer.wait.filter(|_| answer.is_limited)
            && !self.by_levels
            && resolution < 0.1
            && !answer.may_be_other
            && reset > wait + 0.5
            && limit > answer.cost
        {
            let exact = ((limit - answer.cost) / (reset - wait)) as f32;
            if exact > self.low * 0.97 && exact < self.high * 1.03 {
                (self.low, self.high) = (exact * 0.9999, exact * 1.0001);
            }
        }
        if answer.is_requests && self.high > 0.0 && !self.by_levels {
            self.learn_from_others(sharing);
        }
        // With others, a refusal says little of the rate: a token may have been used too early.
        let is_alone = !sharing.is_shared() && !sharing.is_by_messages();
        if answer.is_limited && answer.is_requests && self.low > 0.0 && is_alone {
            self.high = self.low.max(self.high - 0.25 * (self.high - self.low));
            if self.by_levels {
                self.high *= 0.97;
                self.low = self.high;
            }
        }
    }

    fn learn_from_others(&mut self, sharing: &mut Sharing) {
        let Some(mine) = self.rate_interval() else { return };
        let known = sharing.alike;
        match known {
            Some(other) if other.limit == mine.limit && other.low < mine.high && other.high > mine.low => {
                if other.high - other.low > mine.high - mine.low {
                    sharing.alike = Some(mine);
                } else {
                    self.low = self.low.max(other.low as f32);
                    self.high = self.high.min(other.high as f32);
                }
            }
            None => sharing.alike = Some(mine),
            Some(other) if other.limit != mine.limit => {
                sharing.is_mixed = true;
                if mine.low > 0.8 * mine.high {
                    sharing.alike = Some(mine);
                }
            }
            Some(_) => {}
        }
    }

    fn rate(&self) -> f64 {
        let (low, high) = (f64::from(self.low), f64::from(self.high));
        if high == 0.0 {
            0.0
        } else if low > 0.6 * high {
            let within = f64::from(self.within);
            if within > 0.0 { within.clamp(low, high) } else { 0.5 * (low + high) }
        } else {
            high.min(low.max(high * 0.75))
        }
    }

    /// What was left at the service when it answered: between the number that it said, rounded down, and the one above; and
    /// by the reset, to its resolution.
    fn level_at_service(&self, answer: &Answer, (reset, resolution): (f64, f64), rate: f64) -> (f64, f64) {
        let Left { limit, remaining, .. } = answer.left;
        let is_known = self.high < self.low * 1.1 && !self.by_levels;
        let (mut low, mut high) = if is_known {
            let within = |level: f64| level.clamp(remaining, remaining + 0.999);
            (within(limit - reset * rate), within(limit - (reset - resolution).max(0.0) * rate))
        } else {
            (remaining, remaining + 0.999)
        };
        if let Some(wait) = answer.wait.filter(|_| answer.is_limited && !answer.may_be_other) {
            let cost = answer.cost.min(limit);
            low = (cost - wait * rate).clamp(0.0, cost);
            high = (low + resolution * rate).min(cost);
        }
        if high - low < 0.02 { (low, low) } else { (low, high) }
    }

    /// What others used since the last answer, and whether the rate fits.
    fn compare_with_last(
        &mut self,
        answer: &Answer,
        rate: f64,
        level: f64,
        is_full: bool,
        sharing: &mut Sharing,
    ) {
        let unit = answer.per_request;
        let (own, limit) = (f64::from(self.own), f64::from(self.limit));
        let is_plenty = Sharing::is_plenty(level / unit, limit / unit);
        let last = match self.last {
            Some(last) if !last.was_full && !is_full => last,
            None if !is_full => {
                // No bucket holds more than its limit: what this process did not take of it, others did.
                let foreign = (limit - own - level).max(0.0);
                return sharing.used_of_bucket(own / unit, foreign / unit, is_plenty, answer.now);
            }
            _ => {
                if is_full {
                    self.foreign *= 0.9;
                }
                return;
            }
        };
        let passed = answer.sent_at - last.at;
        if passed <= 0.02 {
            return;
        }
        let expected = (f64::from(last.level) + rate * passed).min(limit);
        let used_by_others = expected - own - level;
        if !sharing.is_shared() {
            // Nobody else takes anything, so the rate is wrong by what seems to be used or to come back.
            self.within = ((rate - used_by_others / RATE_SETTLES_IN) as f32).clamp(self.low, self.high);
        }
        let bound = 3.0 * own.max(1.0) + rate * passed;
        sharing.used_of_bucket(own / unit, used_by_others.clamp(-bound, bound) / unit, is_plenty, answer.now);
        let foreign = (used_by_others / passed).clamp(-rate, rate * 2.0);
        // Tokens that were lent are used later, so what is left may seem to grow too fast for a while.
        let is_too_slow = foreign < -0.2 * rate && !sharing.is_by_messages();
        self.too_slow = if is_too_slow { self.too_slow + 1 } else { self.too_slow.saturating_sub(1) };
        if self.too_slow > 6 {
            self.high = rate as f32 - self.foreign.min(0.0);
            self.low = self.high;
            self.too_slow = 0;
            self.by_levels = true;
        }
        let before = f64::from(self.foreign);
        self.foreign = (before + (1.0 - (-passed / 10.0).exp()) * (foreign - before)) as f32;
    }

    /// A refusal that came a moment too early shows how much later the service counts.
    fn adjust_guard(&self, answer: &Answer, rate: f64, level: f64, sharing: &mut Sharing) {
        if !(answer.is_limited && answer.is_requests) {
            sharing.guard *= 0.9999;
            return;
        }
        let early = (1.0 - level) / rate;
        if early < 0.1 && f64::from(self.foreign) < 0.05 * rate {
            sharing.guard = (sharing.guard + early.max(0.002)).min(0.1);
        }
    }
}
