//! Every schedule of a few threads over one budget, with up to three preemptions, by `loom`.

use std::sync::Arc;

use loom::{model::Builder, thread};

use super::budget::Budget;

const SECOND: u64 = 1_000_000_000;

fn model(test: impl Fn() + Send + Sync + 'static) {
    let mut builder = Builder::new();
    // `LOOM_MAX_PREEMPTIONS` says otherwise.
    builder.preemption_bound.get_or_insert(3);
    builder.check(test);
}

fn bucket(level: f64) -> Arc<Budget> {
    let budget = Budget::default();
    // A unit comes back in 1,000 s: time plays no part.
    budget.set_bucket(0.001, 3.0, SECOND, |_| level);
    Arc::new(budget)
}

fn taker(budget: &Arc<Budget>) -> thread::JoinHandle<bool> {
    let budget = budget.clone();
    thread::spawn(move || budget.take(1, SECOND).is_ok())
}

/// How many units two threads take while this thread learns, and how many are left to take afterwards.
fn taken_and_left(budget: &Arc<Budget>, learn: impl FnOnce(&Budget)) -> (u32, u32) {
    let takers = [taker(budget), taker(budget)];
    learn(budget);
    let taken = takers.into_iter().map(|taker| u32::from(taker.join().unwrap())).sum();
    (taken, (0..10).take_while(|_| budget.take(1, SECOND).is_ok()).count() as u32)
}

#[test]
fn a_learner_beside_two_takers_loses_no_take() {
    for level in [1.0, 2.0, 3.0] {
        model(move || {
            let budget = bucket(level);
            let learn = |budget: &Budget| budget.set_bucket(0.001, 3.0, SECOND, |level| level.unwrap());
            let (taken, left) = taken_and_left(&budget, learn);
            assert_eq!((taken + left, budget.sent()), (level as u32, u64::from(level as u32)));
        });
    }
}

/// A request in flight was counted at the service: the learner may not give its unit out again.
#[test]
fn a_learner_sees_each_take_in_the_level_or_the_count() {
    model(|| {
        let budget = bucket(2.0);
        // The service says that two are left after the first request, which is the answered one: none so far.
        let learn = |budget: &Budget| {
            budget.set_bucket(0.001, 3.0, SECOND, |_| 2.0 - budget.sent() as f64);
        };
        let (taken, left) = taken_and_left(&budget, learn);
        assert!(taken + left <= 2, "{taken} and {left} of 2");
    });
}

#[test]
fn refunds_beside_takes_lose_no_unit() {
    model(|| {
        let budget = bucket(2.0);
        let put_back = |budget: &Budget| {
            if budget.take(1, SECOND).is_ok() {
                budget.put_back(1, SECOND, SECOND);
            }
        };
        let (taken, left) = taken_and_left(&budget, put_back);
        assert_eq!((taken + left, budget.sent()), (2, 2));
    });
}

#[test]
fn a_window_gives_its_last_unit_out_once() {
    model(|| {
        let budget = Budget::default();
        let minute = std::time::Duration::from_secs(60);
        budget.set_window(3.0, SECOND * 60, minute, SECOND, |_| 1.0);
        let budget = Arc::new(budget);
        let learn = |budget: &Budget| {
            budget.set_window(3.0, SECOND * 60, minute, SECOND, |left| left.unwrap());
        };
        let (taken, left) = taken_and_left(&budget, learn);
        assert_eq!(taken + left, 1);
    });
}
