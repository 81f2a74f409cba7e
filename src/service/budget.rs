//! The default retry budget.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tower::retry::budget::Budget;

use crate::{clock::Clock, limit::nanos};

/// A retry budget: 20 % of successful requests, plus 10 per second. Each share is capped at 100 retries, so that a good
/// hour does not pay for a storm in a bad one.
///
/// Tower's `TpsBudget` reads a clock and takes a lock for each successful request; this budget increments a number.
#[derive(Debug)]
pub(crate) struct EarnedBudget {
    clock: Arc<dyn Clock>,
    /// In fifths of a retry.
    earned: AtomicU64,
    /// The time up to which the retries per second have been spent, in nanoseconds. It runs ten seconds ahead of the
    /// clock, so that it starts at no negative number.
    spent_until: AtomicU64,
}

const PRICE: u64 = 5;
const MOST_EARNED: u64 = 100 * PRICE;
const PAID_BY_TIME_EVERY: u64 = nanos(Duration::from_millis(100));
/// The retries per second are saved up for that long at most. A new budget starts with all of them.
const TIME_COUNTS_FOR: u64 = nanos(Duration::from_secs(10));

impl EarnedBudget {
    pub(crate) fn new(clock: Arc<dyn Clock>) -> Self {
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
        // Two threads may exceed the cap by one.
        if self.earned.load(Relaxed) < MOST_EARNED {
            self.earned.fetch_add(1, Relaxed);
        }
    }

    fn withdraw(&self) -> bool {
        // The retries per second first: they come back by themselves.
        let spend = |earned: u64| earned.checked_sub(PRICE);
        self.spend_time() || self.earned.fetch_update(Relaxed, Relaxed, spend).is_ok()
    }
}
