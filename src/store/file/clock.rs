//! The file's own clock.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use crate::clock::Clock;

/// The clock that all deadlines in a file are read by.
///
/// While a process has the file open, it runs with the monotonic clock, so nobody can set it. While the file is closed, it
/// runs with the wall clock, but never backwards. So a wall clock that is set back, before or after a restart, makes no rest
/// longer than what was left of it, and one that is set forward ends rests early at a restart only.
#[derive(Clone, Debug)]
pub(super) struct FileClock {
    clock: Arc<dyn Clock>,
    opened_at: Duration,
    /// The file's time at that moment.
    then: Duration,
}

/// The file's time, and the wall clock beside it, both since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Moment {
    pub(super) file: Duration,
    pub(super) wall: Duration,
}

impl FileClock {
    /// The clock of a file whose last commit was at `last`; of a new file if there was none.
    pub(super) fn new(clock: Arc<dyn Clock>, last: Option<Moment>) -> Self {
        let (opened_at, wall) = (clock.now(), wall(&*clock));
        let then = match last {
            Some(last) => last.file.saturating_add(wall.saturating_sub(last.wall)),
            None => wall,
        };
        Self { clock, opened_at, then }
    }

    pub(super) fn now(&self) -> Duration {
        self.then.saturating_add(self.clock.now().saturating_sub(self.opened_at))
    }

    pub(super) fn moment(&self) -> Moment {
        Moment { file: self.now(), wall: wall(&*self.clock) }
    }
}

impl Moment {
    /// Whether the wall clock was set between this moment and another one.
    pub(super) fn was_set_before(self, later: Self) -> bool {
        const JITTER: Duration = Duration::from_secs(1);
        let passed = later.file.saturating_sub(self.file);
        self.wall.saturating_add(passed).abs_diff(later.wall) > JITTER
    }
}

fn wall(clock: &dyn Clock) -> Duration {
    since_1970(clock.wall())
}

fn since_1970(time: SystemTime) -> Duration {
    time.duration_since(UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;

    const HOUR: Duration = Duration::from_secs(3_600);

    fn at(hours: u32) -> SystemTime {
        UNIX_EPOCH + hours * HOUR
    }

    /// The hours that the file's clock gains over a restart that takes an hour, during which the wall clock is set so.
    fn gained(wall_at_the_restart: u32) -> Duration {
        let machine = ManualClock::new();
        machine.set_wall(at(100));
        let before = FileClock::new(Arc::new(machine.clone()), None).moment();
        machine.set_wall(at(wall_at_the_restart));
        FileClock::new(Arc::new(machine), Some(before)).now() - before.file
    }

    #[test]
    fn the_clock_follows_the_wall_while_closed() {
        assert_eq!(gained(101), HOUR);
        assert_eq!(gained(150), 50 * HOUR);
    }

    #[test]
    fn the_clock_never_goes_backwards_while_closed() {
        assert_eq!(gained(40), Duration::ZERO);
        assert_eq!(gained(0), Duration::ZERO);
    }

    #[test]
    fn the_clock_ignores_the_wall_while_open() {
        let machine = ManualClock::new();
        machine.set_wall(at(100));
        let clock = FileClock::new(Arc::new(machine.clone()), None);
        let before = clock.moment();
        for set_to in [40, 200] {
            machine.set_wall(at(set_to));
            assert_eq!(clock.now(), before.file);
            assert!(before.was_set_before(clock.moment()));
        }
        machine.set_wall(at(100));
        machine.advance(HOUR);
        assert_eq!(clock.now(), before.file + HOUR);
        assert!(!before.was_set_before(clock.moment()));
    }
}
