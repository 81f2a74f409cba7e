//! A quota that the user configured.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use super::{
    budget::{Budget, Standing},
    civil::{Civil, InvalidReset},
    nanos,
};

/// What a service allows a key: so many requests, or tokens, in a time.
///
/// By default a quota is a token bucket: it refills steadily, and holds as much as the service allows in a second, at
/// least 1. [`burst`](Self::burst) says how much it holds otherwise. [`window`](Self::window) makes it a fixed window, and
/// [`resets_at`](Self::resets_at) a day that begins at a time of day.
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
///     // and 1,500 requests a day, which begins at midnight in California
///     .quota(Quota::per_day(1_500).resets_at("00:00", "America/Los_Angeles"))
///     .build()?;
/// # let _ = pool;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub struct Quota {
    units: u32,
    period: Duration,
    burst: Option<u32>,
    is_window: bool,
    is_of_tokens: bool,
    resets: Option<Result<Arc<Civil>, InvalidReset>>,
}

impl Quota {
    const DAY: Duration = Duration::from_secs(24 * 60 * 60);

    const fn per(units: u32, seconds: u64) -> Self {
        let period = Duration::from_secs(seconds);
        Self { units, period, burst: None, is_window: false, is_of_tokens: false, resets: None }
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
        Self::per(units, Self::DAY.as_secs())
    }

    /// How many may be sent at once, after a pause. 0 counts as 1. A window has no burst.
    pub const fn burst(mut self, burst: u32) -> Self {
        self.burst = Some(burst);
        self
    }

    /// Counts tokens instead of requests: those that a request reserves or has used, see
    /// [`Traits::tokens`](crate::Traits::tokens).
    pub const fn tokens(mut self) -> Self {
        self.is_of_tokens = true;
        self
    }

    /// A fixed window: all of it comes back at once, each time the period has passed since the first request.
    pub const fn window(mut self) -> Self {
        self.is_window = true;
        self
    }

    /// A day that begins at a time of day in a time zone of the IANA database: all of the quota comes back then. Only for a
    /// quota [per day](Self::per_day), which has no burst.
    ///
    /// The time is `00:00` or `07:30:00`. Where clocks change, a day has 23 or 25 hours. A time that the change skips is
    /// later by the hour that is skipped, and of a time that comes twice the first one counts. The time zones are those of
    /// the system, or else those that this crate brings along.
    ///
    /// The day follows the wall clock, also if that is set while the pool runs: set forward over the time, the day begins;
    /// set back over it by an hour or less, it does not begin again; set back by more, the next day begins at the next such
    /// time by the new clock, and what is left stays. A process begins with the whole quota, unless the pool's store
    /// [keeps](crate::store::KeyStore::keep_quotas) what was left of it.
    ///
    /// [`KeyPoolBuilder::build`](crate::KeyPoolBuilder::build) reports a time, a zone or a quota that can't be used.
    ///
    /// ```
    /// use tower_key_rotation::{KeyPool, Quota};
    ///
    /// let quota = Quota::per_day(1_500).resets_at("00:00", "America/Los_Angles");
    /// let error = KeyPool::builder().quota(quota).build().unwrap_err();
    /// assert_eq!(
    ///     error.to_string(),
    ///     r#"a quota resets in the time zone "America/Los_Angles", which is not in the time zone database"#,
    /// );
    /// ```
    pub fn resets_at(mut self, time: impl AsRef<str>, zone: impl AsRef<str>) -> Self {
        let is_per_day = self.period == Self::DAY;
        let civil =
            if is_per_day { Civil::new(time.as_ref(), zone.as_ref()) } else { Err(InvalidReset::NotPerDay) };
        self.resets = Some(civil.map(Arc::new));
        self
    }

    /// The quota for one pool.
    ///
    /// # Errors
    ///
    /// If it resets at what is no time of day.
    pub(crate) fn of_a_pool(&self) -> Result<Self, InvalidReset> {
        let civil = self.resets.clone().transpose()?;
        let resets = civil.map(|civil| Ok(Arc::new(civil.of_another_pool())));
        Ok(Self { resets, ..self.clone() })
    }

    fn civil(&self) -> Option<&Civil> {
        self.resets.as_ref()?.as_deref().ok()
    }

    /// Whether it depends on the wall clock.
    pub(crate) fn is_civil(&self) -> bool {
        self.resets.is_some()
    }

    /// Notes that the wall clock shows `wall` at `now` of the pool's clock.
    pub(crate) fn set_wall(&self, wall: SystemTime, now: u64) {
        if let Some(civil) = self.civil() {
            civil.set_wall(wall, now);
        }
    }

    pub(crate) fn is_of_tokens(&self) -> bool {
        self.is_of_tokens
    }

    /// Whether all of it comes back at once.
    pub(crate) fn is_window(&self) -> bool {
        self.is_window || self.is_civil()
    }

    pub(super) fn period(&self) -> Duration {
        self.period
    }

    /// The most tokens in a period, or at once, if it is a quota of tokens.
    pub(crate) fn tokens_in_all(&self) -> Option<u64> {
        self.is_of_tokens.then_some(u64::from(self.units.max(self.burst.unwrap_or(0))))
    }

    /// What a request takes of it.
    #[inline]
    pub(crate) fn cost(&self, tokens: u64) -> u64 {
        if self.is_of_tokens { tokens } else { 1 }
    }

    /// The whole of it.
    pub(crate) fn full(&self, now: u64) -> Budget {
        let units = f64::from(self.units.max(1));
        if let Some(civil) = self.civil() {
            return civil.full(units, now);
        }
        let budget = Budget::default();
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

    // ---- its budget, whose time is the pool's clock, or the wall clock ----

    /// As [`Budget::take`], of a request's cost.
    #[inline]
    pub(crate) fn take(&self, budget: &Budget, tokens: u64, now: u64) -> Result<u64, u64> {
        let cost = self.cost(tokens);
        match self.civil() {
            None => budget.take(cost, now),
            Some(civil) => {
                budget.take(cost, civil.roll(budget, now)).map_err(|when| civil.in_pool_time(when, now))
            }
        }
    }

    /// As [`Budget::when`], of a request's cost.
    #[inline]
    pub(crate) fn when(&self, budget: &Budget, tokens: u64, now: u64) -> u64 {
        let cost = self.cost(tokens);
        match self.civil() {
            None => budget.when(cost, now),
            Some(civil) => match budget.when(cost, civil.roll(budget, now)) {
                0 => 0,
                when => civil.in_pool_time(when, now),
            },
        }
    }

    /// As [`Budget::standing`].
    pub(crate) fn standing(&self, budget: &Budget, now: u64) -> Option<Standing> {
        let standing = budget.standing(self.times(budget, now, now).1)?;
        let reset = self.civil().map_or(standing.reset, |civil| civil.in_pool_time(standing.reset, now));
        Some(Standing { reset, ..standing })
    }

    /// As [`Budget::put_back`], of a request's cost.
    pub(crate) fn put_back(&self, budget: &Budget, tokens: u64, taken_at: u64, now: u64) {
        let (taken_at, now) = self.times(budget, taken_at, now);
        budget.put_back(self.cost(tokens), taken_at, now);
    }

    /// As [`Budget::take_anyway`], of a request's cost.
    pub(crate) fn take_anyway(&self, budget: &Budget, tokens: u64, now: u64) -> u64 {
        budget.take_anyway(self.cost(tokens), self.times(budget, now, now).1)
    }

    /// As [`Budget::add`].
    pub(crate) fn add(&self, budget: &Budget, units: f64, taken_at: u64, now: u64) {
        let (taken_at, now) = self.times(budget, taken_at, now);
        budget.add(units, taken_at, now);
    }

    fn times(&self, budget: &Budget, taken_at: u64, now: u64) -> (u64, u64) {
        match self.civil() {
            None => (taken_at, now),
            Some(civil) => (civil.in_ticks(taken_at), civil.roll(budget, now)),
        }
    }
}
