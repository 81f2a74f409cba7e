//! How a limit works: a token bucket or a fixed window.
//!
//! Times are seconds since the start of the run, as everywhere in this benchmark.

/// Smaller differences are rounding errors.
const ROUNDING: f64 = 1e-9;

#[derive(Clone, Copy, Debug)]
pub(crate) enum Limit {
    /// Refills steadily. `level` is what it held at `at`.
    Bucket { rate: f64, burst: f64, level: f64, at: f64 },
    /// Resets as a whole. `used` is what was taken from the window with this number.
    Window { limit: f64, period: f64, phase: f64, used: f64, number: f64 },
}

impl Limit {
    /// Creates a full bucket.
    pub(crate) fn bucket(per_minute: f64, burst: f64) -> Self {
        Self::Bucket { rate: per_minute / 60.0, burst, level: burst, at: 0.0 }
    }

    /// Creates windows of which one begins at `phase`.
    pub(crate) fn window(limit: f64, period: f64, phase: f64) -> Self {
        Self::Window { limit, period, phase, used: 0.0, number: f64::NEG_INFINITY }
    }

    /// Returns what remains. It can be negative after a cost that was not known in advance.
    pub(crate) fn left(&self, now: f64) -> f64 {
        match *self {
            Self::Bucket { rate, burst, level, at } => (level + (now - at) * rate).min(burst),
            Self::Window { limit, used, number, .. } if number == self.window_at(now) => limit - used,
            Self::Window { limit, .. } => limit,
        }
    }

    pub(crate) fn take(&mut self, cost: f64, now: f64) {
        let left_now = self.left(now) - cost;
        let current = self.window_at(now);
        match self {
            Self::Bucket { level, at, .. } => (*level, *at) = (left_now, now),
            Self::Window { limit, used, number, .. } => (*used, *number) = (*limit - left_now, current),
        }
    }

    /// Returns the time until `cost` can be taken. A cost above the limit can be taken when the limit is full.
    pub(crate) fn wait(&self, cost: f64, now: f64) -> f64 {
        let missing = cost.min(self.size()) - self.left(now);
        match *self {
            _ if missing <= ROUNDING => 0.0,
            Self::Bucket { rate, .. } => missing / rate,
            Self::Window { .. } => self.reset(now),
        }
    }

    /// Returns the time until the limit is full.
    pub(crate) fn reset(&self, now: f64) -> f64 {
        match *self {
            Self::Bucket { rate, burst, .. } => (burst - self.left(now)) / rate,
            Self::Window { period, phase, .. } => phase + (self.window_at(now) + 1.0) * period - now,
        }
    }

    /// Returns the whole units that remain, as services report them.
    pub(crate) fn remaining(&self, now: f64) -> u64 {
        (self.left(now) + ROUNDING).max(0.0) as u64
    }

    /// Returns what a full limit holds.
    pub(crate) fn size(&self) -> f64 {
        match *self {
            Self::Bucket { burst, .. } => burst,
            Self::Window { limit, .. } => limit,
        }
    }

    /// Returns what the limit allows per second in the long run.
    pub(crate) fn rate(&self) -> f64 {
        match *self {
            Self::Bucket { rate, .. } => rate,
            Self::Window { limit, period, .. } => limit / period,
        }
    }

    fn window_at(&self, now: f64) -> f64 {
        match *self {
            Self::Bucket { .. } => 0.0,
            Self::Window { period, phase, .. } => ((now - phase) / period).floor(),
        }
    }
}
