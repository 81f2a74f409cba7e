//! The status history of a key over the last 15 minutes.

use std::{collections::VecDeque, time::Duration};

use serde::Serialize;
use tower_key_rotation::Status;

/// Time span of a history.
pub(super) const KEPT: Duration = Duration::from_secs(15 * 60);

/// Maximum number of changes per key. It bounds the memory of 10,000 keys that change all the time.
const MOST_CHANGES: usize = 512;

/// Status changes, oldest first; never empty.
pub(super) struct History(VecDeque<Change>);

/// A status and its beginning.
struct Change {
    status: Status,
    at: Duration,
}

/// A serialized status, which lasts until the next one.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct Since {
    status: Status,
    ms_ago: u64,
}

impl History {
    pub(super) fn beginning(now: Duration, status: Status) -> Self {
        Self(VecDeque::from([Change { status, at: now }]))
    }

    /// Records the current status.
    pub(super) fn note(&mut self, now: Duration, status: Status) {
        if self.0.back().is_none_or(|last| last.status != status) {
            self.0.push_back(Change { status, at: now });
        }
        while self.0.len() > MOST_CHANGES || self.0.get(1).is_some_and(|next| next.at + KEPT <= now) {
            self.0.pop_front();
        }
    }

    pub(super) fn seen_from(&self, now: Duration) -> Vec<Since> {
        let since =
            |change: &Change| Since { status: change.status, ms_ago: millis(now.saturating_sub(change.at)) };
        self.0.iter().map(since).collect()
    }
}

pub(super) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    fn shown(history: &History, now: Duration) -> Vec<(Status, u64)> {
        history.seen_from(now).into_iter().map(|since| (since.status, since.ms_ago)).collect()
    }

    #[test]
    fn a_status_that_lasts_is_kept_once() {
        let mut history = History::beginning(MINUTE, Status::Healthy);
        history.note(2 * MINUTE, Status::Healthy);
        history.note(3 * MINUTE, Status::RateLimited);
        history.note(4 * MINUTE, Status::RateLimited);
        assert_eq!(shown(&history, 5 * MINUTE), [(Status::Healthy, 240_000), (Status::RateLimited, 120_000)]);
    }

    #[test]
    fn history_drops_periods_that_ended_15_minutes_ago() {
        let mut history = History::beginning(Duration::ZERO, Status::Healthy);
        history.note(MINUTE, Status::RateLimited);
        history.note(3 * MINUTE, Status::Healthy);
        history.note(17 * MINUTE, Status::Healthy);
        assert_eq!(
            shown(&history, 17 * MINUTE),
            [(Status::RateLimited, 16 * 60_000), (Status::Healthy, 14 * 60_000)]
        );
        history.note(18 * MINUTE, Status::Healthy);
        assert_eq!(shown(&history, 18 * MINUTE), [(Status::Healthy, 15 * 60_000)]);
    }

    #[test]
    fn history_keeps_the_newest_512_changes_per_key() {
        let mut history = History::beginning(Duration::ZERO, Status::Healthy);
        for number in 1..=1_000 {
            let status = if number % 2 == 0 { Status::Healthy } else { Status::RateLimited };
            history.note(Duration::from_millis(number), status);
        }
        let shown = shown(&history, Duration::from_secs(1));
        assert_eq!((shown.len(), shown[0].1, shown[511]), (512, 511, (Status::Healthy, 0)));
    }
}
