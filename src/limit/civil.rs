//! Days that begin at a time of day in a time zone.
//!
//! A wall clock may be set while the pool runs, so a day's end is kept as a time of that clock, in seconds since 1970.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use jiff::{
    Timestamp,
    civil::{Date, Time},
    tz::TimeZone,
};

use super::budget::Budget;

const SECOND: u64 = 1_000_000_000;

/// A clock that is set back by no more than this, in seconds, across the beginning of a day does not begin the day again.
const SET_BACK: u64 = 60 * 60;

/// Why a quota can't be reset at a time of day.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum InvalidReset {
    #[error("a quota resets at {0:?}, which is not a time of day such as 00:00 or 07:30:00")]
    Time(String),
    #[error("a quota resets in the time zone {0:?}, which is not in the time zone database")]
    Zone(String),
    #[error("a quota resets at a time of day, but is not per day")]
    NotPerDay,
}

#[derive(Debug)]
pub(crate) struct Civil {
    time: Time,
    zone: TimeZone,
    /// The wall clock, less the pool's clock, in ns; modulo 2^64.
    ahead: AtomicU64,
}

impl Civil {
    pub(crate) fn new(time: &str, zone: &str) -> Result<Self, InvalidReset> {
        let not_a_time = || InvalidReset::Time(time.to_owned());
        let time: Time = time.parse().map_err(|_| not_a_time())?;
        if time.subsec_nanosecond() != 0 {
            return Err(not_a_time());
        }
        let zone = TimeZone::get(zone).map_err(|_| InvalidReset::Zone(zone.to_owned()))?;
        Ok(Self { time, zone, ahead: AtomicU64::new(0) })
    }

    /// The same days by another pool's clock.
    pub(crate) fn of_another_pool(&self) -> Self {
        Self { time: self.time, zone: self.zone.clone(), ahead: AtomicU64::new(0) }
    }

    /// Notes that the wall clock shows `wall` at `now` of the pool's clock.
    pub(crate) fn set_wall(&self, wall: SystemTime, now: u64) {
        self.ahead.store(since_1970(wall).wrapping_sub(now), Relaxed);
    }

    fn wall_at(&self, now: u64) -> u64 {
        now.wrapping_add(self.ahead.load(Relaxed))
    }

    /// A time of the pool's clock as budgets of civil days count it: a tick is a second since 1970.
    pub(crate) fn in_ticks(&self, now: u64) -> u64 {
        Budget::tick(self.wall_at(now) / SECOND)
    }

    /// The beginning of a tick by the pool's clock: no earlier than `now`.
    pub(crate) fn in_pool_time(&self, time: u64, now: u64) -> u64 {
        let wall = Budget::ticks(time).saturating_mul(SECOND);
        now.saturating_add(wall.saturating_sub(self.wall_at(now)))
    }

    /// The whole of a budget for the day that `now` is in.
    pub(crate) fn full(&self, units: f64, now: u64) -> Budget {
        let budget = Budget::default();
        let time = self.in_ticks(now);
        let (begin, end) = self.day_of(Budget::ticks(time));
        let period = Duration::from_nanos(Budget::tick(end - begin));
        budget.set_window(units, Budget::tick(end), period, time, |_| units);
        budget
    }

    /// Begins another day if the one of the budget is over. Returns the time in ticks.
    ///
    /// The clock may have been set back since the day began. If by more than an hour, the next day begins when the clock
    /// says so: a day that began too early must not keep the quota from the next one. If by less, the day began all the
    /// same: it does not begin again.
    #[inline]
    pub(crate) fn roll(&self, budget: &Budget, now: u64) -> u64 {
        let time = self.in_ticks(now);
        let second = Budget::ticks(time);
        let (begin, end) = budget.window();
        let is_over = second >= end;
        if is_over || second + SET_BACK < begin {
            self.roll_to_day_of(second, budget, end, is_over);
        }
        time
    }

    #[cold]
    fn roll_to_day_of(&self, second: u64, budget: &Budget, end: u64, is_over: bool) {
        let (begin, next) = self.day_of(second);
        budget.roll(end, next, next - begin, is_over);
    }

    /// When the day after the one of a second begins, in seconds since 1970.
    pub(crate) fn next_day(&self, second: u64) -> u64 {
        self.day_of(second).1
    }

    /// When the day of a second began, and when the next one does.
    fn day_of(&self, second: u64) -> (u64, u64) {
        self.try_day_of(second).unwrap_or((second, second + 24 * 60 * 60))
    }

    /// `None` beyond the years that a calendar has.
    fn try_day_of(&self, second: u64) -> Option<(u64, u64)> {
        let now = Timestamp::from_second(i64::try_from(second).ok()?).ok()?;
        let today = self.zone.to_datetime(now).date();
        let mut begin = self.begin_of(today.yesterday().ok()?)?;
        let mut date = today;
        loop {
            let next = self.begin_of(date)?;
            if next > second {
                return Some((begin, next));
            }
            begin = next;
            date = date.tomorrow().ok()?;
        }
    }

    /// A time that a date does not have is later by the hour that was skipped; of one that it has twice, the first counts.
    fn begin_of(&self, date: Date) -> Option<u64> {
        let begin = self.zone.to_ambiguous_timestamp(date.to_datetime(self.time)).compatible().ok()?;
        Some(begin.as_second().max(0) as u64)
    }
}

impl PartialEq for Civil {
    fn eq(&self, other: &Self) -> bool {
        self.time == other.time && self.zone == other.zone
    }
}

impl Eq for Civil {}

/// In ns. A clock that shows a year before 1970 counts as 1970.
fn since_1970(wall: SystemTime) -> u64 {
    super::nanos(wall.duration_since(UNIX_EPOCH).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: u64 = 60 * 60;
    const MONOTONIC: u64 = 5 * SECOND;

    fn at(time: &str) -> u64 {
        time.parse::<Timestamp>().unwrap().as_second() as u64
    }

    fn pacific(time: &str) -> Civil {
        Civil::new(time, "America/Los_Angeles").unwrap()
    }

    /// A budget of days that begin at midnight in California, on a clock whose wall clock shows `wall` seconds since 1970.
    struct Day {
        civil: Civil,
        budget: Budget,
        now: u64,
    }

    impl Day {
        fn new(units: f64, wall: &str) -> Self {
            let civil = pacific("00:00");
            civil.set_wall(UNIX_EPOCH + Duration::from_secs(at(wall)), MONOTONIC);
            let budget = civil.full(units, MONOTONIC);
            Self { civil, budget, now: MONOTONIC }
        }

        fn set_wall(&self, wall: &str) {
            self.civil.set_wall(UNIX_EPOCH + Duration::from_secs(at(wall)), self.now);
        }

        fn pass(&mut self, seconds: u64) {
            self.now += seconds * SECOND;
        }

        /// As many as can be taken now, and when there is more, in seconds from now.
        fn drain(&self) -> (u32, f64) {
            for taken in 0.. {
                let time = self.civil.roll(&self.budget, self.now);
                if let Err(when) = self.budget.take(1, time) {
                    return (taken, (self.civil.in_pool_time(when, self.now) - self.now) as f64 / 1e9);
                }
            }
            unreachable!()
        }
    }

    #[test]
    fn days_follow_the_zone_over_a_whole_year() {
        let civil = pacific("00:00");
        let (mut second, end) = (at("2026-01-01T08:00:00Z"), at("2027-01-01T08:00:00Z"));
        let mut days = Vec::new();
        while second < end {
            let (begin, next) = civil.day_of(second);
            // The last second of a day is in that day, and the first one of the next day is not.
            assert_eq!((begin, civil.day_of(next - 1)), (second, (begin, next)));
            days.push((next - begin) / HOUR);
            second = next;
        }
        assert_eq!((second, days.len()), (end, 365));
        let other = days.iter().enumerate().filter(|(_, hours)| **hours != 24);
        // 8 March, when clocks go forward, and 1 November, when they go back.
        assert_eq!(other.collect::<Vec<_>>(), [(66, &23), (304, &25)]);
    }

    #[test]
    fn skipped_and_repeated_times_reset_once() {
        let skipped = pacific("02:30").day_of(at("2026-03-08T00:00:00-08:00"));
        assert_eq!(skipped.1, at("2026-03-08T03:30:00-07:00"));
        let repeated = pacific("01:30").day_of(at("2026-11-01T01:29:59-07:00"));
        assert_eq!(repeated.1, at("2026-11-01T01:30:00-07:00"));
        // The second 01:30 of that date is in the day that the first one began.
        let after = pacific("01:30").day_of(at("2026-11-01T01:30:00-08:00"));
        assert_eq!(after, (repeated.1, at("2026-11-02T01:30:00-08:00")));
    }

    #[test]
    fn the_quota_comes_back_at_the_exact_second() {
        // Three hours before midnight, on the day before clocks go forward, and an hour before they do.
        let mut day = Day::new(5.0, "2026-03-07T21:00:00-08:00");
        assert_eq!(day.drain(), (5, 3.0 * 3_600.0));
        day.now += 3 * HOUR * SECOND - 1;
        assert_eq!(day.drain(), (0, 1e-9));
        day.now += 1;
        assert_eq!(day.drain(), (5, 23.0 * 3_600.0));
        day.pass(23 * HOUR);
        assert_eq!(day.drain(), (5, 24.0 * 3_600.0));
    }

    #[test]
    fn the_day_of_25_hours_has_one_quota() {
        let mut day = Day::new(5.0, "2026-11-01T00:00:00-07:00");
        assert_eq!(day.drain(), (5, 25.0 * 3_600.0));
        day.pass(24 * HOUR);
        assert_eq!(day.drain(), (0, 3_600.0));
        day.pass(HOUR);
        assert_eq!(day.drain().0, 5);
    }

    #[test]
    fn an_idle_week_leaves_one_quota() {
        let mut day = Day::new(5.0, "2026-11-27T12:00:00-08:00");
        day.drain();
        day.pass(7 * 24 * HOUR);
        assert_eq!(day.drain(), (5, 12.0 * 3_600.0));
    }

    #[test]
    fn a_wall_clock_set_forward_loses_no_day() {
        // The clock was wrong by nearly a day when the process began.
        let mut day = Day::new(5.0, "2026-11-29T00:00:01-08:00");
        assert_eq!(day.drain().0, 5);
        day.set_wall("2026-11-29T23:59:59-08:00");
        assert_eq!(day.drain(), (0, 1.0));
        day.pass(1);
        assert_eq!(day.drain(), (5, 24.0 * 3_600.0));
        day.set_wall("2027-06-01T12:00:00-07:00");
        assert_eq!(day.drain(), (5, 12.0 * 3_600.0));
    }

    #[test]
    fn a_wall_clock_set_back_a_little_doubles_no_day() {
        for set_back in ["2026-11-29T23:59:58-08:00", "2026-11-29T23:00:00-08:00"] {
            let mut day = Day::new(5.0, "2026-11-29T12:00:00-08:00");
            day.pass(12 * HOUR);
            assert_eq!(day.drain().0, 5);
            day.set_wall(set_back);
            assert_eq!(day.drain().0, 0);
            day.set_wall("2026-11-30T00:00:00-08:00");
            assert_eq!(day.drain(), (0, 24.0 * 3_600.0));
        }
    }

    #[test]
    fn a_wall_clock_set_back_by_more_loses_no_day() {
        let mut day = Day::new(5.0, "2031-01-01T12:00:00-08:00");
        assert_eq!(day.drain().0, 5);
        day.set_wall("2026-11-29T22:00:00-08:00");
        assert_eq!(day.drain(), (0, 2.0 * 3_600.0));
        day.pass(2 * HOUR);
        assert_eq!(day.drain(), (5, 24.0 * 3_600.0));
    }

    #[test]
    fn a_day_gives_nothing_back_to_the_next_one() {
        for (hours, left) in [(1, 2), (3, 0)] {
            let mut day = Day::new(5.0, "2026-11-29T21:00:00-08:00");
            let taken_at = day.now;
            day.pass(hours * HOUR);
            day.drain();
            day.budget.put_back(2, day.civil.in_ticks(taken_at), day.civil.roll(&day.budget, day.now));
            assert_eq!(day.drain().0, left, "after {hours} hours");
        }
    }

    #[test]
    fn threads_begin_a_day_once() {
        let mut day = Day::new(500.0, "2026-11-29T12:00:00-08:00");
        for _ in 0..50 {
            day.pass(24 * HOUR);
            let day = &day;
            let taken: u32 = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| day.drain().0)).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).sum()
            });
            assert_eq!(taken, 500);
        }
    }

    #[test]
    fn times_beyond_the_calendar_do_not_panic() {
        let civil = pacific("00:00");
        for wall in [0, 1, u64::MAX / SECOND, u64::from(u32::MAX)] {
            civil.set_wall(UNIX_EPOCH + Duration::from_secs(wall), MONOTONIC);
            let budget = civil.full(5.0, MONOTONIC);
            assert!(budget.take(1, civil.roll(&budget, MONOTONIC)).is_ok(), "{wall}");
        }
    }

    #[test]
    fn unusable_times_and_zones_are_named() {
        let why = |time, zone| Civil::new(time, zone).unwrap_err();
        for time in ["", "midnight", "24:00", "00:00:00.5"] {
            assert_eq!(why(time, "UTC"), InvalidReset::Time(time.to_owned()));
        }
        for zone in ["", "California", "../../etc/passwd"] {
            assert_eq!(why("00:00", zone), InvalidReset::Zone(zone.to_owned()));
        }
    }

    /// A container may have no time zone database.
    #[test]
    fn the_crate_brings_the_zones_along() {
        let zones = jiff::tz::TimeZoneDatabase::bundled();
        assert!(
            ["America/Los_Angeles", "Europe/Berlin", "Asia/Kathmandu"]
                .iter()
                .all(|zone| zones.get(zone).is_ok())
        );
    }
}
