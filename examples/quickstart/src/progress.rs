//! What one sees while it runs.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tower_key_rotation::KeyPool;

const TEMPLATE: &str = "{bar:50} {pos}/{len} succeeded, {elapsed}\n{msg}";

/// A bar on stderr, and a line about the keys. Without a terminal, nothing is shown.
pub(crate) struct Progress {
    bar: ProgressBar,
    pool: KeyPool,
}

impl Progress {
    pub(crate) fn new(requests: usize, pool: &KeyPool, hidden: bool) -> Self {
        let target = if hidden { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        let style = ProgressStyle::with_template(TEMPLATE).unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::with_draw_target(Some(requests as u64), target).with_style(style);
        Self { bar, pool: pool.clone() }
    }

    pub(crate) fn show(&self, succeeded: usize) {
        let stats = self.pool.stats();
        let limited: u64 = stats.keys.iter().map(|key| key.limited).sum();
        let (healthy, resting) = (stats.healthy, stats.rate_limited + stats.exhausted);
        self.bar.set_message(format!("{healthy} keys healthy, {resting} resting, {limited} × 429"));
        self.bar.set_position(succeeded as u64);
    }

    /// Leaves it as it was last.
    pub(crate) fn finish(&self, succeeded: usize) {
        self.show(succeeded);
        self.bar.abandon();
    }
}
