//! How a limit works: a token bucket, a fixed window, or a day.
//!
//! Times are seconds since the start of the run, as everywhere in this benchmark.

/// Smaller differences are rounding errors.
const ROUNDING: f64 = 1e-9;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Limit {
    size: f64,
    refill: Refill,
    /// The units that remained after the last request, and when that was.
    left: f64,
    at: f64,
}

/// How units come back.
#[derive(Clone, Copy, Debug)]
enum Refill {
    /// Steadily, so many per second.
    Bucket { rate: f64 },
    /// All at once, whenever the period has passed. One window begins at `phase`.
    Window { period: f64, phase: f64 },
    /// All at once, at each of these times.
    Days { begin: &'static [f64] },
}

impl Limit {
    /// Creates a full bucket.
    pub(crate) fn bucket(per_minute: f64, burst: f64) -> Self {
        Self::full(burst, Refill::Bucket { rate: per_minute / 60.0 })
    }

    /// Creates windows of which one begins at `phase`.
    pub(crate) fn window(size: f64, period: f64, phase: f64) -> Self {
        Self::full(size, Refill::Window { period, phase })
    }

    /// Creates days that begin at these times. The last day does not end.
    pub(crate) fn days(size: f64, begin: &'static [f64]) -> Self {
        Self::full(size, Refill::Days { begin })
    }

    fn full(size: f64, refill: Refill) -> Self {
        Self { size, refill, left: size, at: 0.0 }
    }

    /// Returns the remaining units. They are negative after a request whose cost was not known in advance.
    pub(crate) fn left(&self, now: f64) -> f64 {
        match self.refill {
            Refill::Bucket { rate } => (self.left + (now - self.at) * rate).min(self.size),
            _ if self.ends(self.at) <= now => self.size,
            _ => self.left,
        }
    }

    pub(crate) fn take(&mut self, cost: f64, now: f64) {
        (self.left, self.at) = (self.left(now) - cost, now);
    }

    /// Returns the time until the limit has room for `cost`. A cost above the limit's size needs a full limit.
    pub(crate) fn wait(&self, cost: f64, now: f64) -> f64 {
        let missing = cost.min(self.size) - self.left(now);
        match self.refill {
            _ if missing <= ROUNDING => 0.0,
            Refill::Bucket { rate } => missing / rate,
            _ => self.reset(now),
        }
    }

    /// Returns the time until the limit is full.
    pub(crate) fn reset(&self, now: f64) -> f64 {
        match self.refill {
            Refill::Bucket { rate } => (self.size - self.left(now)) / rate,
            _ => self.ends(now) - now,
        }
    }

    /// Returns when the window or day of that time ends.
    fn ends(&self, at: f64) -> f64 {
        match self.refill {
            Refill::Bucket { .. } => at,
            Refill::Window { period, phase } => phase + (((at - phase) / period).floor() + 1.0) * period,
            Refill::Days { begin } => {
                begin.iter().copied().find(|begin| *begin > at).unwrap_or(f64::INFINITY)
            }
        }
    }

    /// Returns the whole units that remain, as services report them.
    pub(crate) fn remaining(&self, now: f64) -> u64 {
        (self.left(now) + ROUNDING).max(0.0) as u64
    }

    /// Returns the units of a full limit.
    pub(crate) fn size(&self) -> f64 {
        self.size
    }

    /// Returns the units per second that the limit allows in the long run.
    pub(crate) fn rate(&self) -> f64 {
        match self.refill {
            Refill::Bucket { rate } => rate,
            Refill::Window { period, .. } => self.size / period,
            Refill::Days { .. } => self.size / (24.0 * 60.0 * 60.0),
        }
    }
}
