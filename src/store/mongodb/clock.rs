//! What time it is for the server.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use ::mongodb::bson::DateTime;
use tokio::time::Instant;

/// What the server's clock said last, and when that was heard.
#[derive(Debug, Default)]
pub(super) struct ServerClock(Mutex<Option<(DateTime, Instant)>>);

impl ServerClock {
    /// An answer that was long on its way says less than one before it, unless that is far from it: then the clock
    /// was set, or this machine has slept.
    pub(super) fn heard(&self, said: DateTime, at: Instant) {
        const AT_MOST_LATE: i64 = 10_000;
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let late = last.map_or(0, |last| said_at(last, at).saturating_sub(said.timestamp_millis()));
        if !(1..AT_MOST_LATE).contains(&late) {
            *last = Some((said, at));
        }
    }

    /// What it said at a time that is so long ago, or a little less than that.
    pub(super) fn before(&self, age: Duration) -> Option<DateTime> {
        let last = (*self.0.lock().unwrap_or_else(PoisonError::into_inner))?;
        let age = i64::try_from(age.as_millis()).unwrap_or(i64::MAX);
        Some(DateTime::from_millis(said_at(last, Instant::now()).saturating_sub(age)))
    }
}

/// In milliseconds, what a clock says that said this then.
fn said_at((said, then): (DateTime, Instant), now: Instant) -> i64 {
    let since = i64::try_from(now.duration_since(then).as_millis()).unwrap_or(i64::MAX);
    said.timestamp_millis().saturating_add(since)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn said(seconds: i64) -> DateTime {
        DateTime::from_millis(seconds * 1_000)
    }

    #[tokio::test(start_paused = true)]
    async fn it_goes_on_from_what_was_said() {
        let clock = ServerClock::default();
        assert_eq!(clock.before(SECOND), None);
        clock.heard(said(100), Instant::now());
        tokio::time::advance(5 * SECOND).await;
        assert_eq!(clock.before(2 * SECOND), Some(said(103)));
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_was_long_on_its_way_does_not_put_it_back() {
        let clock = ServerClock::default();
        clock.heard(said(100), Instant::now());
        tokio::time::advance(5 * SECOND).await;
        clock.heard(said(102), Instant::now());
        assert_eq!(clock.before(Duration::ZERO), Some(said(105)));
        clock.heard(said(106), Instant::now());
        assert_eq!(clock.before(Duration::ZERO), Some(said(106)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_clock_that_was_set_back_is_followed() {
        let clock = ServerClock::default();
        clock.heard(said(1_000), Instant::now());
        clock.heard(said(100), Instant::now());
        assert_eq!(clock.before(Duration::ZERO), Some(said(100)));
    }
}
