//! A quota that the user configured.

use std::time::Duration;

use super::{budget::Budget, nanos};

/// What a service allows a key: so many requests, or tokens, in a time.
///
/// By default a quota is a token bucket: it refills steadily, and holds as much as the service allows in a second, at
/// least 1. [`burst`](Self::burst) says how much it holds otherwise. [`window`](Self::window) makes it a fixed window.
///
/// ```
/// use tower_key_rotation::{KeyPool, Quota};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let pool = KeyPool::builder()
///     .key("alpha", "sk-1")
///     // each key: 60 requests a minute, 10 of them at once, and 90,000 tokens a minute
///     .quota(Quota::per_minute(60).burst(10))
///     .quota(Quota::per_minute(90_000).tokens())
///     .build()?;
/// # let _ = pool;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Quota {
    units: u32,
    period: Duration,
    burst: Option<u32>,
    is_window: bool,
    is_of_tokens: bool,
}

impl Quota {
    const fn per(units: u32, seconds: u64) -> Self {
        let period = Duration::from_secs(seconds);
        Self { units, period, burst: None, is_window: false, is_of_tokens: false }
    }

    /// So many requests a second. 0 counts as 1.
    pub const fn per_second(units: u32) -> Self {
        Self::per(units, 1)
    }

    /// So many requests a minute. 0 counts as 1.
    pub const fn per_minute(units: u32) -> Self {
        Self::per(units, 60)
    }

    /// So many requests an hour. 0 counts as 1.
    pub const fn per_hour(units: u32) -> Self {
        Self::per(units, 60 * 60)
    }

    /// So many requests in 24 hours. 0 counts as 1.
    pub const fn per_day(units: u32) -> Self {
        Self::per(units, 24 * 60 * 60)
    }

    /// How many may be sent at once, after a pause. 0 counts as 1. A window has no burst.
    pub const fn burst(mut self, burst: u32) -> Self {
        self.burst = Some(burst);
        self
    }

    /// Counts tokens instead of requests: those that a request's [`Traits`](crate::Traits) name.
    pub const fn tokens(mut self) -> Self {
        self.is_of_tokens = true;
        self
    }

    /// A fixed window: all of it comes back at once, each time the period has passed since the first request.
    pub const fn window(mut self) -> Self {
        self.is_window = true;
        self
    }

    pub(crate) fn is_of_tokens(&self) -> bool {
        self.is_of_tokens
    }

    /// What a request takes of it.
    #[inline]
    pub(crate) fn cost(&self, tokens: u64) -> u64 {
        if self.is_of_tokens { tokens } else { 1 }
    }

    /// The whole of it.
    pub(crate) fn full(&self, now: u64) -> Budget {
        let budget = Budget::default();
        let units = f64::from(self.units.max(1));
        if self.is_window {
            let end = now.saturating_add(nanos(self.period));
            budget.set_window(units, end, self.period, now, |_| units);
        } else {
            let rate = units / self.period.as_secs_f64();
            let size = self.burst.map_or(rate.max(1.0), |burst| f64::from(burst.max(1)));
            budget.set_bucket(rate, size, now, |_| size);
        }
        budget
    }
}
