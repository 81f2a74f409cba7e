//! What further attempts are paid from.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tower::retry::budget::Budget;

use crate::{clock::Clock, limit::nanos};

/// One further attempt for every five requests that went well, and ten more a second. Of either a hundred can be
/// saved up, so that a good hour does not pay for a storm in a bad one.
///
/// Tower's own `TpsBudget` reads a clock and takes a lock for each request that goes well; this one adds one to a
/// number.
#[derive(Debug)]
pub(super) struct EarnedBudget {
    clock: Arc<dyn Clock>,
    /// In fifths of an attempt.
    earned: AtomicU64,
    /// Up to when the attempts that time pays for have been spent, in nanoseconds; ten seconds ahead of the clock,
    /// so that those before its beginning are no negative number.
    spent_until: AtomicU64,
}

const PRICE: u64 = 5;
const MOST_EARNED: u64 = 100 * PRICE;
const PAID_BY_TIME_EVERY: u64 = nanos_of(Duration::from_millis(100));
/// Time pays for that long at most, and has done so in the beginning.
const TIME_COUNTS_FOR: u64 = nanos_of(Duration::from_secs(10));

const fn nanos_of(duration: Duration) -> u64 {
    duration.as_nanos() as u64
}

impl EarnedBudget {
    pub(super) fn new(clock: Arc<dyn Clock>) -> Self {
        let now = nanos(clock.now());
        Self { clock, earned: AtomicU64::new(0), spent_until: AtomicU64::new(now) }
    }

    fn spend_time(&self) -> bool {
        let now = nanos(self.clock.now());
        let limit = now.saturating_add(TIME_COUNTS_FOR);
        let spend = |spent: u64| {
            let spent = spent.max(now) + PAID_BY_TIME_EVERY;
            (spent <= limit).then_some(spent)
        };
        self.spent_until.fetch_update(Relaxed, Relaxed, spend).is_ok()
    }
}

impl Budget for EarnedBudget {
    #[inline]
    fn deposit(&self) {
        // Two at once may go one beyond the limit.
        if self.earned.load(Relaxed) < MOST_EARNED {
            self.earned.fetch_add(1, Relaxed);
        }
    }

    fn withdraw(&self) -> bool {
        // Time's first: it goes on paying by itself.
        let spend = |earned: u64| earned.checked_sub(PRICE);
        self.spend_time() || self.earned.fetch_update(Relaxed, Relaxed, spend).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;

    const SECOND: Duration = Duration::from_secs(1);

    fn budget() -> (EarnedBudget, ManualClock) {
        let clock = ManualClock::new();
        (EarnedBudget::new(Arc::new(clock.clone())), clock)
    }

    fn withdrawals(budget: &EarnedBudget) -> usize {
        (0..10_000).take_while(|_| budget.withdraw()).count()
    }

    #[test]
    fn it_begins_with_ten_seconds_worth_and_time_pays_for_ten_a_second() {
        let (budget, clock) = budget();
        assert_eq!(withdrawals(&budget), 100);
        clock.advance(SECOND / 10 - Duration::from_nanos(1));
        assert_eq!(withdrawals(&budget), 0);
        clock.advance(SECOND);
        assert_eq!(withdrawals(&budget), 10);
        clock.advance(1_000 * SECOND);
        assert_eq!(withdrawals(&budget), 100);
    }

    #[test]
    fn five_requests_that_go_well_pay_for_one_attempt_and_four_do_not() {
        let (budget, _) = budget();
        withdrawals(&budget);
        (0..4).for_each(|_| budget.deposit());
        assert_eq!(withdrawals(&budget), 0);
        budget.deposit();
        assert_eq!(withdrawals(&budget), 1);
    }

    #[test]
    fn a_good_hour_pays_for_a_hundred_attempts_and_no_more() {
        let (budget, _) = budget();
        (0..1_000_000).for_each(|_| budget.deposit());
        assert_eq!(withdrawals(&budget), 100 + 100);
    }

    #[test]
    fn threads_together_spend_no_more_than_there_is() {
        let (budget, _) = budget();
        (0..50).for_each(|_| budget.deposit());
        let spent: usize = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| withdrawals(&budget))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert_eq!(spent, 10 + 100);
    }
}
