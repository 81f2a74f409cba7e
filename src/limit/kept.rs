//! What is left of a quota's window, for the time after a restart.

use std::time::Duration;

use super::{budget::Budget, limit_of_key::Limit, quota::Quota};

/// A window of a quota of which something was used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KeptWindow {
    /// Which of the pool's quotas.
    pub(crate) quota: u8,
    /// The whole of it: a quota that is configured otherwise by now begins anew.
    pub(crate) units: u32,
    pub(crate) left: u32,
    /// In ms since 1970.
    pub(crate) ends: u64,
}

/// A day's end is kept in whole seconds.
const SAME_DAY: u64 = 2_000;

impl Limit {
    /// The windows of quotas that are not whole. `wall` is `now` by the wall clock, in ms since 1970.
    pub(crate) fn kept(&self, now: u64, wall: u64) -> impl Iterator<Item = KeptWindow> {
        (0..).zip(self.quotas()).filter_map(move |(number, (quota, budget))| {
            let standing = quota.standing(budget, now).filter(|_| quota.is_window())?;
            let is_used = standing.left < standing.limit;
            is_used.then(|| KeptWindow {
                quota: number,
                units: standing.limit as u32,
                left: standing.left.max(0.0) as u32,
                ends: end(standing.reset, now, wall),
            })
        })
    }

    /// Takes from a new limit what was used of the windows that have not ended.
    pub(crate) fn restore(&self, windows: &[KeptWindow], now: u64, wall: u64) {
        for window in windows.iter().filter(|window| window.ends > wall) {
            if let Some((quota, budget)) = self.quotas().get(usize::from(window.quota)) {
                quota.restore(budget, window, now, wall);
            }
        }
    }
}

impl Quota {
    fn restore(&self, budget: &Budget, window: &KeptWindow, now: u64, wall: u64) {
        let Some(whole) = self.standing(budget, now).filter(|_| self.is_window()) else { return };
        if whole.limit as u32 != window.units {
            return;
        }
        let left = f64::from(window.left.min(window.units));
        if self.is_civil() {
            // Otherwise it resets at another time by now.
            if end(whole.reset, now, wall).abs_diff(window.ends) < SAME_DAY {
                self.add(budget, left - whole.limit, now, now);
            }
        } else {
            let ends_in = Duration::from_millis(window.ends - wall).min(self.period());
            let ends = now.saturating_add(super::nanos(ends_in));
            budget.set_window(whole.limit, ends, self.period(), now, |_| left);
        }
    }
}

fn end(reset: u64, now: u64, wall: u64) -> u64 {
    wall.saturating_add(reset.saturating_sub(now) / 1_000_000)
}
