//! What a limit still allows: a token bucket or a fixed window, in atomic words.
//!
//! A bucket is kept as GCRA keeps it: one word says when the bucket will be full. Time alone refills it, so no timer runs.
//! Only the learner of a limit changes a budget's settings, one at a time, while any thread takes from it. A pick that
//! meets new settings with an old word misjudges the level by what the settings changed; no unit that was taken is lost.

use std::time::Duration;

use super::nanos;
use crate::sync::atomic::{
    AtomicU64,
    Ordering::{Relaxed, SeqCst},
};

/// A window's end is kept in ticks of 2^24 ns, about 17 ms, modulo 2^32: clocks may count from 1970, or from a boot. It is
/// taken for the time closest to now, and no window is longer than half of that, about 400 days.
const TICK: u32 = 24;

/// The longest window, in ticks.
const LONGEST: u64 = (1 << 31) - 1;

/// `unit` of a budget that is not known, and so allows everything.
const UNKNOWN: u64 = 0;

/// `unit` of a window.
const WINDOW: u64 = u64::MAX;

/// 18 years in ns: nothing takes longer to come back.
const LATEST: u64 = 1 << 59;

/// Units of a bucket are kept in 1/256 ns.
const FRACTION: u32 = 8;

#[derive(Debug, Default)]
pub(crate) struct Budget {
    /// A bucket: when it is full, in ns. A window: its end in ticks, and in the lower half what is left.
    word: AtomicU64,
    /// A bucket: the time in which one unit comes back, in 1/256 ns. Otherwise `UNKNOWN` or `WINDOW`.
    unit: AtomicU64,
    /// A bucket: ns from empty to full. A window: its period in ticks, and in the lower half its limit.
    span: AtomicU64,
    /// All that was ever taken: the sequence number of a request.
    sent: AtomicU64,
}

/// A budget at one moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Standing {
    pub(crate) left: f64,
    /// How many units there are when it is full.
    pub(crate) limit: f64,
    /// When it is full by itself, in ns: of a window, when that ends.
    pub(crate) reset: u64,
    pub(crate) is_window: bool,
}

impl Budget {
    /// Takes so many units. Returns the sequence number, or when there are enough, in ns.
    ///
    /// A request that costs more than the budget ever holds goes when the budget is full.
    #[inline]
    pub(crate) fn take(&self, cost: u64, now: u64) -> Result<u64, u64> {
        let unit = self.unit.load(Relaxed);
        if unit != UNKNOWN {
            // A take that fails must not be counted, not even for a moment: others would get higher numbers.
            after_taking(unit, self.span.load(Relaxed), self.word.load(SeqCst), cost, now)?;
        }
        // Counted first: a learner that runs in between takes the request for one without an answer, and leaves less.
        let sequence = self.sent.fetch_add(cost, SeqCst) + cost;
        if unit == UNKNOWN {
            return Ok(sequence);
        }
        let span = self.span.load(Relaxed);
        let mut word = self.word.load(SeqCst);
        loop {
            match after_taking(unit, span, word, cost, now) {
                Ok(next) => match self.word.compare_exchange_weak(word, next, SeqCst, SeqCst) {
                    Ok(_) => return Ok(sequence),
                    Err(changed) => word = changed,
                },
                Err(when) => {
                    self.sent.fetch_sub(cost, SeqCst);
                    return Err(when);
                }
            }
        }
    }

    /// Takes back a [`take`](Self::take) of a request that was not sent.
    pub(crate) fn put_back(&self, cost: u64, taken_at: u64, now: u64) {
        self.add(cost as f64, taken_at, now);
        self.sent.fetch_sub(cost, SeqCst);
    }

    /// Counts a request that is sent although the budget has no room for it.
    pub(crate) fn take_anyway(&self, cost: u64, now: u64) -> u64 {
        self.add(-(cost as f64), now, now);
        self.sent.fetch_add(cost, SeqCst) + cost
    }

    /// Adds units of a request of that time, or removes them: a bucket may then be below zero. A window that began later
    /// stays as it is.
    pub(crate) fn add(&self, units: f64, taken_at: u64, now: u64) {
        let unit = self.unit.load(Relaxed);
        if unit == UNKNOWN {
            return;
        }
        let span = self.span.load(Relaxed);
        self.replace(|word| {
            if unit == WINDOW {
                let (end, left) = window_at(word, span, now);
                // End and period are rounded up.
                if (taken_at >> TICK) + 1 < end.saturating_sub(span >> 32) {
                    return packed(end, left);
                }
                packed(end, (left as f64 + units).clamp(0.0, lower(span) as f64) as u64)
            } else {
                (word.max(now) as f64 - units * in_ns(unit)).clamp(0.0, 4.0 * LATEST as f64) as u64
            }
        });
    }

    /// When there are so many units, in ns: `now` or earlier if there are.
    #[inline]
    pub(crate) fn when(&self, cost: u64, now: u64) -> u64 {
        let unit = self.unit.load(Relaxed);
        if unit == UNKNOWN {
            return 0;
        }
        after_taking(unit, self.span.load(Relaxed), self.word.load(SeqCst), cost, now).err().unwrap_or(0)
    }

    /// When the bucket is full or the window ends, in ns; `now` for a full or an unknown one.
    pub(crate) fn full_at(&self, now: u64) -> u64 {
        let word = self.word.load(SeqCst);
        match self.unit.load(Relaxed) {
            UNKNOWN => now,
            WINDOW => window_at(word, self.span.load(Relaxed), now).0 << TICK,
            _ => word.max(now),
        }
    }

    /// How many units are left; `None` if that is not known.
    pub(crate) fn level(&self, now: u64) -> Option<f64> {
        let (unit, span) = (self.unit.load(Relaxed), self.span.load(Relaxed));
        (unit != UNKNOWN).then(|| level(unit, span, self.word.load(SeqCst), now))
    }

    pub(crate) fn is_known(&self) -> bool {
        self.unit.load(Relaxed) != UNKNOWN
    }

    pub(crate) fn is_window(&self) -> bool {
        self.unit.load(Relaxed) == WINDOW
    }

    /// What is known of it; `None` if that is nothing.
    pub(crate) fn standing(&self, now: u64) -> Option<Standing> {
        let left = self.level(now)?;
        let (unit, span, word) = (self.unit.load(Relaxed), self.span.load(Relaxed), self.word.load(SeqCst));
        let (limit, reset) = if unit == WINDOW {
            (lower(span) as f64, window_at(word, span, now).0 << TICK)
        } else {
            // The unit is rounded.
            ((span as f64 / in_ns(unit.max(1)) * 1e3).round() / 1e3, word.max(now))
        };
        Some(Standing { left, limit, reset, is_window: unit == WINDOW })
    }

    /// A bucket is full when it holds so many units less than its size: others may still take those.
    pub(crate) fn keep_below_full(&self, units: f64, now: u64) {
        let unit = self.unit.load(Relaxed);
        if unit != UNKNOWN && unit != WINDOW {
            let units = units.min(self.span.load(Relaxed) as f64 / in_ns(unit));
            self.word.fetch_max(now.saturating_add((units * in_ns(unit)) as u64), SeqCst);
        }
    }

    /// How many units can be taken from now until then. What a window allows after its end does not count.
    pub(crate) fn supply(&self, now: u64, until: u64) -> f64 {
        let (unit, span) = (self.unit.load(Relaxed), self.span.load(Relaxed));
        match unit {
            UNKNOWN => f64::INFINITY,
            WINDOW => window_at(self.word.load(SeqCst), span, now).1 as f64,
            _ => {
                let more = until.saturating_sub(now) as f64 / in_ns(unit);
                (level(unit, span, self.word.load(SeqCst), now) + more).max(0.0)
            }
        }
    }

    /// Of a window: what is left, the time until it ends, its period, both in seconds, and its limit.
    pub(crate) fn known_window(&self, now: u64) -> Option<(f64, f64, f64, f64)> {
        if !self.is_window() {
            return None;
        }
        let span = self.span.load(Relaxed);
        let (end, left) = window_at(self.word.load(SeqCst), span, now);
        let seconds = |nanos: u64| nanos as f64 / 1e9;
        let ends_in = seconds((end << TICK).saturating_sub(now));
        Some((left as f64, ends_in, seconds((span >> 32) << TICK), lower(span) as f64))
    }

    #[inline]
    pub(crate) fn sent(&self) -> u64 {
        self.sent.load(SeqCst)
    }

    /// Allows everything again.
    pub(crate) fn forget(&self) {
        self.unit.store(UNKNOWN, SeqCst);
    }

    /// Makes this a bucket of that rate, in units per second, and size. `level` gets the level so far.
    ///
    /// Of concurrent takes, none is lost: `level` is asked again.
    pub(crate) fn set_bucket(&self, rate: f64, size: f64, now: u64, level_of: impl Fn(Option<f64>) -> f64) {
        let unit = (1e9 / rate).min(LATEST as f64 / size.max(1.0));
        let span = (size.max(1.0) * unit) as u64;
        let fixed = ((unit * f64::from(1 << FRACTION)) as u64).clamp(1, WINDOW - 1);
        let (unit_before, span_before) = (self.unit.load(Relaxed), self.span.load(Relaxed));
        if unit_before == WINDOW {
            self.forget();
        }
        self.replace(|word| {
            let before = match unit_before {
                UNKNOWN | WINDOW => None,
                unit => Some(level(unit, span_before, word, now)),
            };
            (now as f64 + span as f64 - level_of(before) * unit).clamp(0.0, 4.0 * LATEST as f64) as u64
        });
        // Mostly they stay as they are: to look costs less than to write.
        if span_before != span {
            self.span.store(span, SeqCst);
        }
        if self.unit.load(Relaxed) != fixed {
            self.unit.store(fixed, SeqCst);
        }
    }

    /// Makes this a window of that limit, which ends in ns of the clock, and then begins anew. `left` gets what was left of
    /// a window so far.
    pub(crate) fn set_window(
        &self,
        limit: f64,
        end: u64,
        period: Duration,
        now: u64,
        left_of: impl Fn(Option<f64>) -> f64,
    ) {
        // Up, so that no window allows more than it should.
        let ticks = nanos(period).div_ceil(1 << TICK).clamp(1, LONGEST);
        let limit = limit.clamp(0.0, f64::from(u32::MAX));
        let (unit_before, span_before) = (self.unit.load(Relaxed), self.span.load(Relaxed));
        if unit_before != WINDOW {
            self.forget();
        }
        let end = end.min(4 * LATEST).div_ceil(1 << TICK).min((now >> TICK) + LONGEST);
        self.replace(|word| {
            let before = (unit_before == WINDOW).then(|| window_at(word, span_before, now).1 as f64);
            packed(end, left_of(before).clamp(0.0, limit) as u64)
        });
        self.span.store(packed(ticks, limit as u64), SeqCst);
        self.unit.store(WINDOW, SeqCst);
    }

    /// A count of ticks as a time.
    pub(crate) fn tick(count: u64) -> u64 {
        count << TICK
    }

    /// The ticks of a time.
    pub(crate) fn ticks(time: u64) -> u64 {
        time >> TICK
    }

    /// When the window began, and when it ends, in ticks.
    #[inline]
    pub(crate) fn window(&self) -> (u64, u64) {
        let end = self.word.load(SeqCst) >> 32;
        (end.saturating_sub(self.span.load(Relaxed) >> 32), end)
    }

    /// Replaces the window that ends at `before` by one that ends at `end`, in ticks, unless another thread has. The next
    /// window is full, or has what is left of this one.
    pub(crate) fn roll(&self, before: u64, end: u64, period: u64, is_full: bool) {
        let limit = lower(self.span.load(Relaxed));
        let next = |word: u64| packed(end, if is_full { limit } else { lower(word) });
        let is_it = |word: u64| word >> 32 == before;
        let rolled = self.word.fetch_update(SeqCst, SeqCst, |word| is_it(word).then(|| next(word)));
        if rolled.is_ok() {
            self.span.store(packed(period, limit), SeqCst);
        }
    }

    fn replace(&self, next: impl Fn(u64) -> u64) {
        let _ = self.word.fetch_update(SeqCst, SeqCst, |word| Some(next(word)));
    }
}

/// The word after a take, or when there is enough.
#[inline]
fn after_taking(unit: u64, span: u64, word: u64, cost: u64, now: u64) -> Result<u64, u64> {
    if unit == WINDOW {
        let (end, left) = window_at(word, span, now);
        let is_full = left >= lower(span);
        if left < cost && !is_full {
            return Err(end << TICK);
        }
        return Ok(packed(end, left.saturating_sub(cost)));
    }
    let taken = ((u128::from(unit) * u128::from(cost)) >> FRACTION).min(u128::from(LATEST)) as u64;
    let base = word.max(now);
    let needed = taken.min(span);
    if base + needed > now + span { Err(base + needed - span) } else { Ok(base + taken) }
}

fn level(unit: u64, span: u64, word: u64, now: u64) -> f64 {
    if unit == WINDOW {
        return window_at(word, span, now).1 as f64;
    }
    ((now + span) as f64 - word.max(now) as f64) / in_ns(unit)
}

fn in_ns(unit: u64) -> f64 {
    unit as f64 / f64::from(1 << FRACTION)
}

/// The end of the window that `now` is in, in ticks, and what is left of it.
#[inline]
fn window_at(word: u64, span: u64, now: u64) -> (u64, u64) {
    let tick = now >> TICK;
    let ends_in = ((word >> 32) as u32).wrapping_sub(tick as u32) as i32;
    if ends_in > 0 {
        return (tick + ends_in as u64, lower(word));
    }
    let (passed, period) = (u64::from(ends_in.unsigned_abs()), (span >> 32).max(1));
    ((tick + period * (passed / period + 1)).saturating_sub(passed), lower(span))
}

/// Of the upper number, the lower half.
fn packed(upper: u64, lower: u64) -> u64 {
    upper << 32 | lower.min(u64::from(u32::MAX))
}

fn lower(word: u64) -> u64 {
    word & u64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn bucket(rate: f64, size: f64, level: f64) -> Budget {
        let budget = Budget::default();
        budget.set_bucket(rate, size, SECOND, |_| level);
        budget
    }

    fn window(limit: f64, left: f64, end: u64) -> Budget {
        let budget = Budget::default();
        budget.set_window(limit, end, Duration::from_secs(60), SECOND, |_| left);
        budget
    }

    /// As many as can be taken now.
    fn drain(budget: &Budget, now: u64) -> u32 {
        (0..1_000).take_while(|_| budget.take(1, now).is_ok()).count() as u32
    }

    #[test]
    fn unknown_budgets_allow_everything_and_count() {
        let budget = Budget::default();
        assert_eq!((budget.take(3, 0), budget.take(4, 0)), (Ok(3), Ok(7)));
        assert_eq!((budget.level(0), budget.when(100, 0)), (None, 0));
    }

    #[test]
    fn buckets_allow_their_burst_then_their_rate() {
        let budget = bucket(2.0, 10.0, 10.0);
        assert_eq!(drain(&budget, SECOND), 10);
        assert_eq!(budget.take(1, SECOND), Err(SECOND * 3 / 2));
        assert_eq!(budget.sent(), 10);
        assert_eq!(drain(&budget, SECOND * 3 / 2), 1);
        assert_eq!(drain(&budget, SECOND * 3), 3);
        assert_eq!(drain(&budget, SECOND * 100), 10);
    }

    #[test]
    fn costs_above_the_size_go_when_the_bucket_is_full() {
        let budget = bucket(1.0, 10.0, 9.0);
        assert_eq!(budget.take(25, SECOND), Err(SECOND * 2));
        assert!(budget.take(25, SECOND * 2).is_ok());
        assert_eq!(budget.level(SECOND * 2), Some(-15.0));
    }

    #[test]
    fn windows_allow_their_limit_and_begin_anew() {
        let budget = window(5.0, 2.0, SECOND * 10);
        assert_eq!(drain(&budget, SECOND), 2);
        let end = budget.take(1, SECOND).unwrap_err();
        assert!((SECOND * 10..SECOND * 10 + 20_000_000).contains(&end), "{end}");
        assert_eq!(drain(&budget, end), 5);
        assert_eq!(drain(&budget, end + SECOND * 59), 0);
        assert_eq!(drain(&budget, end + SECOND * 200), 5);
    }

    #[test]
    fn windows_pass_the_end_of_their_ticks() {
        let round = 1 << (32 + TICK);
        // Of a clock that counts from 1970, and of one that is about to begin another round.
        for now in [1_795_000_000 * SECOND, round - SECOND, round + SECOND, 3 * round - SECOND] {
            let budget = Budget::default();
            budget.set_window(5.0, now + SECOND * 10, Duration::from_secs(60), now, |_| 2.0);
            assert_eq!(drain(&budget, now), 2);
            let end = budget.take(1, now).unwrap_err();
            assert!((SECOND * 10..SECOND * 10 + 20_000_000).contains(&(end - now)), "{now}: {end}");
            assert_eq!((drain(&budget, end), drain(&budget, end + SECOND * 59)), (5, 0));
            budget.add(1.0, end, end + SECOND);
            assert_eq!(drain(&budget, end + SECOND), 1);
            assert_eq!(drain(&budget, end + SECOND * 200), 5);
        }
    }

    #[test]
    fn what_is_put_back_can_be_taken_again() {
        for budget in [bucket(1.0, 3.0, 3.0), window(3.0, 3.0, SECOND * 60)] {
            assert_eq!(drain(&budget, SECOND), 3);
            budget.put_back(2, SECOND, SECOND);
            assert_eq!((budget.sent(), drain(&budget, SECOND)), (1, 2));
        }
    }

    #[test]
    fn new_settings_keep_what_was_taken() {
        let budget = bucket(1.0, 10.0, 10.0);
        drain(&budget, SECOND);
        budget.set_bucket(4.0, 20.0, SECOND, |level| level.unwrap() + 3.0);
        assert_eq!(budget.level(SECOND), Some(3.0));
        budget.set_window(10.0, SECOND * 9, Duration::from_secs(60), SECOND, |left| left.unwrap_or(7.0));
        assert_eq!((budget.level(SECOND), budget.is_window()), (Some(7.0), true));
        budget.forget();
        assert_eq!(budget.level(SECOND), None);
    }

    #[test]
    fn budgets_know_when_they_are_full() {
        let bucket = bucket(2.0, 10.0, 4.0);
        assert_eq!((bucket.full_at(SECOND), bucket.full_at(SECOND * 9)), (SECOND * 4, SECOND * 9));
        let end = window(5.0, 2.0, SECOND * 10).full_at(SECOND);
        assert!((SECOND * 10..SECOND * 10 + 20_000_000).contains(&end), "{end}");
        assert_eq!(Budget::default().full_at(SECOND), SECOND);
    }

    #[test]
    fn threads_never_take_more_than_there_is() {
        for budget in [bucket(0.001, 500.0, 500.0), window(500.0, 500.0, SECOND * 60)] {
            let taken: u32 = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| drain(&budget, SECOND))).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).sum()
            });
            assert_eq!((taken, budget.sent()), (500, 500));
        }
    }

    #[test]
    fn a_learner_beside_takers_loses_no_take() {
        let budget = bucket(0.001, 1_000.0, 1_000.0);
        let taken: u32 = std::thread::scope(|scope| {
            let takers: Vec<_> = (0..3).map(|_| scope.spawn(|| drain(&budget, SECOND))).collect();
            for _ in 0..5_000 {
                budget.set_bucket(0.001, 1_000.0, SECOND, |level| level.unwrap());
            }
            takers.into_iter().map(|taker| taker.join().unwrap()).sum()
        });
        // Each change rounds the level to the ns, never to a whole unit.
        assert_eq!(taken, 1_000);
    }
}
