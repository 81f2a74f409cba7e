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

use std::{fmt, future::Future, pin::Pin, time::Duration};

use tokio::{sync::watch, time::Instant};

/// The future that [`Clock::sleep_until`] returns.
pub type Sleep = Pin<Box<dyn Future<Output = ()> + Send + Sync>>;

/// A monotonic clock.
pub trait Clock: fmt::Debug + Send + Sync + 'static {
    /// Returns the time since an arbitrary, fixed start. Never decreases.
    fn now(&self) -> Duration;

    /// Completes as soon as [`now`](Clock::now) reaches `deadline`, or at once if `deadline` has passed.
    fn sleep_until(&self, deadline: Duration) -> Sleep;
}

/// The machine's monotonic clock, read through `tokio::time`.
///
/// Under a paused tokio clock (`#[tokio::test(start_paused = true)]`), this clock is paused too.
#[derive(Clone, Copy, Debug)]
pub struct SystemClock {
    start: Instant,
}

impl SystemClock {
    /// Creates a clock that starts now, at zero.
    #[must_use]
    pub fn new() -> Self {
        Self { start: Instant::now() }
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
}

/// A clock that moves only by [`advance`](ManualClock::advance).
///
/// All clones show the same time.
#[derive(Clone, Debug, Default)]
pub struct ManualClock {
    now: watch::Sender<Duration>,
}

impl ManualClock {
    /// Creates a clock at zero.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Advances the clock and wakes every sleeper whose deadline has passed.
    pub fn advance(&self, by: Duration) {
        self.now.send_modify(|now| *now = now.saturating_add(by));
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Duration {
        *self.now.borrow()
    }

    fn sleep_until(&self, deadline: Duration) -> Sleep {
        // The sleeper owns a sender, so the channel cannot close while it sleeps.
        let clock = self.now.clone();
        Box::pin(async move {
            let _ = clock.subscribe().wait_for(|now| *now >= deadline).await;
        })
    }
}
