//! The clock of a pool, replaceable in tests.
//!
//! Cooldowns, the 30-second sweep and all time limits use one [`Clock`] per pool, by default [`SystemClock`].
//! A test passes a [`ManualClock`] to [`KeyPoolBuilder::clock`](crate::KeyPoolBuilder::clock) and advances that
//! clock by hand. "2 minutes later" then takes no time, even in a test with real sockets.
//!
//! ```
//! use std::time::Duration;
//! use tower_key_rotation::{KeyPool, clock::ManualClock};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let clock = ManualClock::new();
//! let pool = KeyPool::builder()
//!     .key("alpha", "sk-1")
//!     .clock(clock.clone())
//!     .build()?;
//!
//! clock.advance(Duration::from_secs(120));
//! # let _ = pool;
//! # Ok(())
//! # }
//! ```

use std::{
    fmt,
    future::Future,
    pin::Pin,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::{sync::watch, time::Instant};

/// The future that [`Clock::sleep_until`] returns.
pub type Sleep = Pin<Box<dyn Future<Output = ()> + Send + Sync>>;

/// A monotonic clock, and the wall clock beside it.
pub trait Clock: fmt::Debug + Send + Sync + 'static {
    /// Returns the time since an arbitrary, fixed start. Never decreases.
    fn now(&self) -> Duration;

    /// Completes as soon as [`now`](Clock::now) reaches `deadline`, or at once if `deadline` has passed.
    fn sleep_until(&self, deadline: Duration) -> Sleep;

    /// Returns the wall clock's time, which somebody may set forward or back.
    ///
    /// Only quotas that [reset at a time of day](crate::Quota::resets_at) use it. By default it is the machine's.
    fn wall(&self) -> SystemTime {
        SystemTime::now()
    }

    /// Returns a sleep that needs no runtime, if this clock has one: for
    /// [`KeyPool::lease_blocking`](crate::KeyPool::lease_blocking). Otherwise the waiting thread sleeps for as long as is
    /// left until `deadline`, by the machine's clock.
    fn sleep_without_runtime(&self, deadline: Duration) -> Option<Sleep> {
        let _ = deadline;
        None
    }
}

/// The machine's monotonic clock, read through `tokio::time`.
///
/// Under a paused tokio clock (`#[tokio::test(start_paused = true)]`), this clock is paused too.
#[derive(Clone, Copy, Debug)]
pub struct SystemClock {
    start: Instant,
    /// The same moment on the machine's clock, which never pauses.
    machine_start: std::time::Instant,
}

impl SystemClock {
    /// Creates a clock that starts now, at zero.
    #[must_use]
    pub fn new() -> Self {
        Self { start: Instant::now(), machine_start: std::time::Instant::now() }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    fn sleep_until(&self, deadline: Duration) -> Sleep {
        Box::pin(tokio::time::sleep(deadline.saturating_sub(self.now())))
    }

    fn wall(&self) -> SystemTime {
        let (wall, ours, machine) = (SystemTime::now(), self.now(), self.machine_start.elapsed());
        // They differ under a paused clock only.
        let moved = wall.checked_add(ours.saturating_sub(machine));
        moved.and_then(|wall| wall.checked_sub(machine.saturating_sub(ours))).unwrap_or(wall)
    }
}

/// A clock that moves only by [`advance`](ManualClock::advance).
///
/// All clones show the same time. Its wall clock shows 1970-01-01T00:00:00Z at first, and moves along.
#[derive(Clone, Debug, Default)]
pub struct ManualClock {
    time: watch::Sender<Time>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Time {
    now: Duration,
    since_1970: Duration,
}

impl ManualClock {
    /// Creates a clock at zero.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Advances the clock and wakes every sleeper whose deadline has passed.
    pub fn advance(&self, by: Duration) {
        self.time.send_modify(|time| {
            time.now = time.now.saturating_add(by);
            time.since_1970 = time.since_1970.saturating_add(by);
        });
    }

    /// Sets the wall clock alone. A time before 1970 counts as 1970.
    pub fn set_wall(&self, wall: SystemTime) {
        let since_1970 = wall.duration_since(UNIX_EPOCH).unwrap_or_default();
        self.time.send_modify(|time| time.since_1970 = since_1970);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Duration {
        self.time.borrow().now
    }

    fn sleep_until(&self, deadline: Duration) -> Sleep {
        // The sleeper owns a sender, so the channel cannot close while it sleeps.
        let clock = self.time.clone();
        Box::pin(async move {
            let _ = clock.subscribe().wait_for(|time| time.now >= deadline).await;
        })
    }

    fn wall(&self) -> SystemTime {
        let since_1970 = self.time.borrow().since_1970;
        UNIX_EPOCH.checked_add(since_1970).unwrap_or(UNIX_EPOCH)
    }

    fn sleep_without_runtime(&self, deadline: Duration) -> Option<Sleep> {
        Some(self.sleep_until(deadline))
    }
}
