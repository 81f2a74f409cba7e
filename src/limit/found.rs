//! Finds a limit by refusals, where the service says nothing of what is left.
//!
//! Additive increase, multiplicative decrease: a refusal lowers the rate, each success raises it a little. Before the first
//! refusal nothing bounds the rate but the number of requests in flight, which grows with each success.

use super::{budget::Budget, known::Known};

/// A key of which nothing is known carries this many requests at once.
pub(crate) const FIRST_IN_FLIGHT: u32 = 4;

const MOST_IN_FLIGHT: u32 = 1 << 20;

/// The rate after a refusal, as a part of what was served.
const CUT: f64 = 0.7;

/// A success raises the rate by this part of the rate that was refused.
const GROW: f64 = 0.01;

#[derive(Debug, Default)]
pub(crate) struct Found {
    /// In requests per second; 0 until a refusal.
    rate: f64,
    /// The rate that was refused.
    refused_rate: f64,
    refused_at: f64,
    served: Served,
    /// Served since the last refusal that named a wait of a second or more.
    in_window: f64,
    /// Served in the window before that refusal.
    window: f64,
    window_end: f64,
    backoff: f64,
}

/// The rate of what was served, over two seconds or more.
#[derive(Debug, Default)]
struct Served {
    rate: f64,
    since: f64,
    count: f64,
}

impl Served {
    fn count(&mut self, more: f64, now: f64) {
        if self.since == 0.0 {
            self.since = now;
        }
        self.count += more;
        let passed = now - self.since;
        if passed > 2.0 {
            let rate = self.count / passed;
            self.rate = if self.rate == 0.0 { rate } else { 0.5 * (self.rate + rate) };
            (self.since, self.count) = (now, 0.0);
        }
    }
}

impl Served {
    /// The rate, or what is known of it before two seconds have passed.
    fn so_far(&self, now: f64) -> f64 {
        if self.rate > 0.0 { self.rate } else { self.count / (now - self.since).max(0.5) }
    }
}

impl Found {
    /// Counts an answer, whatever the service says.
    pub(crate) fn count(&mut self, is_limited: bool, now: f64) {
        self.served.count(if is_limited { 0.0 } else { 1.0 }, now);
        if !is_limited {
            self.backoff = 0.0;
        }
    }

    /// How long a key rests after a refusal that says nothing, in seconds.
    pub(crate) fn rest(&mut self, sent_at: f64) -> f64 {
        if sent_at >= self.refused_at {
            self.backoff = (self.backoff * 2.0).clamp(0.1, 60.0);
        }
        if self.rate > 0.0 { (1.0 / self.rate).min(60.0) * 0.5 + 0.05 } else { self.backoff }
    }

    /// How many requests may be in flight after an answer.
    pub(crate) fn cap(&mut self, cap: u32, is_limited: bool, wait: Option<f64>, sent_at: f64) -> u32 {
        let whole_window = wait.filter(|wait| *wait >= 1.0);
        match whole_window {
            Some(wait) if is_limited => {
                if sent_at > self.window_end {
                    (self.window, self.in_window) = (self.in_window, 0.0);
                    self.window_end = sent_at + wait;
                }
                ((self.window / 8.0) as u32).clamp(FIRST_IN_FLIGHT, MOST_IN_FLIGHT)
            }
            _ if is_limited => (cap / 2).max(1),
            _ if self.window_end == 0.0 || fastrand::u8(0..4) == 0 => (cap + 1).min(MOST_IN_FLIGHT),
            _ => cap,
        }
    }

    /// Adjusts the rate by an answer without headers.
    pub(crate) fn adjust(
        &mut self,
        budget: &Budget,
        is_limited: bool,
        wait: Option<f64>,
        sent_at: f64,
        now: f64,
    ) {
        if !is_limited {
            self.in_window += 1.0;
        }
        if wait.is_some() || self.window_end > 0.0 {
            // The service itself says when to go on.
            return;
        }
        let before = self.rate;
        if is_limited {
            if sent_at <= self.refused_at {
                // One cut for all requests that were on their way.
                return;
            }
            let served = self.served.so_far(now);
            self.refused_rate =
                if before == 0.0 { served.max(0.2) } else { before.min(served.max(before * 0.5) * 1.5) };
            self.rate = (self.refused_rate * CUT).max(0.02);
            self.refused_at = now;
        } else if before > 0.0 {
            let is_well_below = before < self.refused_rate * 0.95;
            let step = GROW * self.refused_rate * if is_well_below { 1.0 } else { 0.3 };
            let next = before + step / before.max(0.2);
            let next =
                if now - self.refused_at > 20.0 && !is_well_below { next.max(before * 1.05) } else { next };
            self.rate = next.min((2.0 * self.served.rate).max(self.refused_rate * CUT)).max(0.02);
        } else {
            return;
        }
        let size = (self.rate * 0.2).max(2.0);
        budget.set_bucket(self.rate, size, (now * 1e9) as u64, |level| {
            if before == 0.0 { 0.0 } else { level.unwrap_or(0.0).min(size) }
        });
    }

    /// What the next owner of the limit has to know.
    pub(crate) fn known(&self) -> Option<Known> {
        let (rate, refused_rate) = (self.rate as f32, self.refused_rate as f32);
        (rate > 0.0).then_some(Known::Found { rate, refused_rate })
    }

    /// Continues with what another process has found.
    pub(crate) fn take_over(&mut self, budget: &Budget, rate: f64, refused_rate: f64, now: u64) {
        if rate > 0.0 && refused_rate > 0.0 {
            (self.rate, self.refused_rate) = (rate, refused_rate);
            budget.set_bucket(rate, (rate * 0.2).max(2.0), now, |_| 0.0);
        }
    }

    /// Begins anew: what was found so far came from headers.
    pub(crate) fn forget(&mut self) {
        self.rate = 0.0;
    }
}
