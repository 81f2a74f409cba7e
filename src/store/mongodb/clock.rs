//! An estimate of the server's time.
//!
//! Deadlines are dates of the server. A mark that is held up on its way must not get a later one for it, so the client
//! says the latest date that the mark may have. What is left of a date is computed here, since an answer may be held up,
//! too. Both use an upper bound of the server's time, which is too high by at most the time of the fastest command.

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

/// The sample that bounds the server's time most closely, or the last one that contradicts the others: then the server's
/// clock was set, or another server answers, or this machine has slept.
#[derive(Debug, Default)]
pub(super) struct ServerClock(Mutex<Option<Sample>>);

/// What the server's clock said at some time after a command was sent.
#[derive(Clone, Copy, Debug)]
struct Sample {
    said: i64,
    sent: Instant,
}

impl ServerClock {
    /// Takes a sample from an answer that has just been received. Returns whether the clock is ahead of what it could
    /// be by all that was known: then the bounds that [`latest`](Self::latest) gave were too low.
    pub(super) fn heard(&self, said: DateTime, sent: Instant) -> bool {
        let (now, sample) = (Instant::now(), Sample { said: said.timestamp_millis(), sent });
        let mut best = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = best.map(|known| known.latest(now));
        let is_ahead = known.is_some_and(|known| sample.said > known.saturating_add(SLACK));
        if is_ahead || known.is_none_or(|known| sample.latest(now) <= known) {
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
        let whole = |time: Duration| i64::try_from(time.as_millis()).unwrap_or(i64::MAX);
        let since = whole(at.saturating_duration_since(self.sent));
        let before = whole(self.sent.saturating_duration_since(at));
        self.said.saturating_add(since).saturating_add(since / DRIFT).saturating_sub(before)
    }
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

    fn latest(clock: &ServerClock) -> Option<u64> {
        clock.latest(Instant::now()).map(|time| time.as_secs())
    }

    #[tokio::test(start_paused = true)]
    async fn the_bound_moves_on_from_the_sample() {
        let clock = ServerClock::default();
        assert_eq!(latest(&clock), None);
        assert!(!answered_after(&clock, 100, Duration::ZERO).await);
        assert_eq!(latest(&clock), Some(100));
        advance(2 * SECOND).await;
        assert_eq!(clock.latest(Instant::now()), Some(102 * SECOND + Duration::from_millis(1)));
    }

    #[tokio::test(start_paused = true)]
    async fn delayed_answers_widen_no_bound() {
        let clock = ServerClock::default();
        answered_after(&clock, 100, Duration::ZERO).await;
        assert!(!answered_after(&clock, 102, 40 * SECOND).await);
        assert_eq!(latest(&clock), Some(140));
    }

    #[tokio::test(start_paused = true)]
    async fn a_closer_bound_replaces_a_wider_one() {
        let clock = ServerClock::default();
        answered_after(&clock, 100, 40 * SECOND).await;
        assert_eq!(latest(&clock), Some(140));
        answered_after(&clock, 101, SECOND).await;
        assert_eq!(latest(&clock), Some(102));
    }

    #[tokio::test(start_paused = true)]
    async fn clock_steps_are_followed_and_forward_ones_reported() {
        let clock = ServerClock::default();
        answered_after(&clock, 1_000, Duration::ZERO).await;
        assert!(!answered_after(&clock, 100, SECOND).await);
        assert_eq!(latest(&clock), Some(101));
        assert!(answered_after(&clock, 1_000, 5 * SECOND).await);
        assert_eq!(latest(&clock), Some(1_005));
    }
}
