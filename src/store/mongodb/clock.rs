//! An estimate of the server's time.
//!
//! Deadlines are dates of the server. A mark that is held up on its way must not get a later one for it, so the client
//! says the latest date that the mark may have; and what is left of a date is reckoned here, since an answer may be
//! held up, too. Both need an upper bound of the server's time: one that is too low would end rests early.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use ::mongodb::bson::DateTime;
use tokio::time::Instant;

/// The two clocks may differ in speed by one part in so many.
const DRIFT: i64 = 2_000;

/// Differences below so many milliseconds do not mean that a clock was set.
const SLACK: i64 = 50;

/// The best of the samples that were taken. It is replaced by one that bounds the time more closely, or contradicts
/// it: then the server's clock was set, or another server answers, or this machine has slept.
#[derive(Debug, Default)]
pub(super) struct ServerClock(Mutex<Option<Sample>>);

/// What the server's clock said at some time between a command and its answer.
#[derive(Clone, Copy, Debug)]
struct Sample {
    said: i64,
    sent: Instant,
    received: Instant,
}

impl ServerClock {
    /// Takes a sample from an answer that has just been received. Returns whether the clock is ahead of what it could
    /// be by all that was known: then the bounds that [`latest`](Self::latest) gave were too low.
    pub(super) fn heard(&self, said: DateTime, sent: Instant) -> bool {
        let sample = Sample { said: said.timestamp_millis(), sent, received: Instant::now() };
        let mut best = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(known) = *best else {
            *best = Some(sample);
            return false;
        };
        let is_ahead = sample.said > known.latest(sample.received) + SLACK;
        let is_behind = sample.said < known.earliest(sent) - SLACK;
        if is_ahead || is_behind || sample.uncertainty() <= known.uncertainty() + known.drift(sample.received)
        {
            *best = Some(sample);
        }
        is_ahead
    }

    /// The latest that the server's clock may show at that moment, since the epoch.
    pub(super) fn latest(&self, at: Instant) -> Option<Duration> {
        let sample = (*self.0.lock().unwrap_or_else(PoisonError::into_inner))?;
        Some(Duration::from_millis(sample.latest(at).max(0).unsigned_abs()))
    }
}

impl Sample {
    fn latest(&self, at: Instant) -> i64 {
        self.said.saturating_add(millis(self.sent, at)).saturating_add(self.drift(at))
    }

    fn earliest(&self, at: Instant) -> i64 {
        self.said.saturating_add(millis(self.received, at)).saturating_sub(self.drift(at))
    }

    fn uncertainty(&self) -> i64 {
        millis(self.sent, self.received)
    }

    fn drift(&self, at: Instant) -> i64 {
        millis(self.received, at).max(0) / DRIFT
    }
}

/// Below zero if the second moment is before the first one.
fn millis(from: Instant, to: Instant) -> i64 {
    let whole = |time: Duration| i64::try_from(time.as_millis()).unwrap_or(i64::MAX);
    if to >= from { whole(to - from) } else { -whole(from - to) }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn said(seconds: i64) -> DateTime {
        DateTime::from_millis(seconds * 1_000)
    }

    async fn answered_after(clock: &ServerClock, seconds: i64, time: Duration) -> bool {
        let sent = Instant::now();
        advance(time).await;
        clock.heard(said(seconds), sent)
    }

    fn latest(clock: &ServerClock) -> Option<Duration> {
        clock.latest(Instant::now())
    }

    #[tokio::test(start_paused = true)]
    async fn the_bound_moves_on_from_the_sample() {
        let clock = ServerClock::default();
        assert_eq!(latest(&clock), None);
        assert!(!answered_after(&clock, 100, Duration::ZERO).await);
        assert_eq!(latest(&clock), Some(100 * SECOND));
        advance(2 * SECOND).await;
        assert_eq!(latest(&clock), Some(102 * SECOND + Duration::from_millis(1)));
    }

    #[tokio::test(start_paused = true)]
    async fn delayed_answers_widen_no_bound() {
        let clock = ServerClock::default();
        answered_after(&clock, 100, Duration::ZERO).await;
        assert!(!answered_after(&clock, 102, 40 * SECOND).await);
        assert_eq!(latest(&clock).unwrap().as_secs(), 140);
    }

    #[tokio::test(start_paused = true)]
    async fn a_closer_bound_replaces_a_wider_one() {
        let clock = ServerClock::default();
        answered_after(&clock, 100, 40 * SECOND).await;
        assert_eq!(latest(&clock), Some(140 * SECOND));
        answered_after(&clock, 101, SECOND).await;
        assert_eq!(latest(&clock), Some(102 * SECOND));
    }

    #[tokio::test(start_paused = true)]
    async fn clock_steps_are_followed_and_forward_ones_reported() {
        let clock = ServerClock::default();
        answered_after(&clock, 1_000, Duration::ZERO).await;
        assert!(!answered_after(&clock, 100, SECOND).await);
        assert_eq!(latest(&clock), Some(101 * SECOND));
        assert!(answered_after(&clock, 1_000, 5 * SECOND).await);
        assert_eq!(latest(&clock), Some(1_005 * SECOND));
    }
}
