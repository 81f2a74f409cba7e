//! Where the crate's time comes from.
//!
//! Everything that waits or expires asks one [`Clock`]: cooldowns, the 30-second sweep, its limit. A
//! program uses [`SystemClock`] without naming it. A test passes a [`ManualClock`] to
//! [`KeyPoolBuilder::clock`](crate::KeyPoolBuilder::clock) and moves it by hand, so that "2 minutes later"
//! takes no time, also where real sockets are involved.
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

/// What [`Clock::sleep_until`] returns.
pub type Sleep = Pin<Box<dyn Future<Output = ()> + Send + Sync>>;

/// A monotonic clock.
pub trait Clock: fmt::Debug + Send + Sync + 'static {
    /// The time since a start of the clock's own choosing. It never goes back.
    fn now(&self) -> Duration;

    /// Completes once [`now`](Clock::now) has reached `deadline`; at once where it already has.
    fn sleep_until(&self, deadline: Duration) -> Sleep;
}

/// The machine's monotonic clock, read through `tokio::time`.
///
/// Because it is tokio's, a paused tokio clock (`#[tokio::test(start_paused = true)]`) drives it too.
#[derive(Clone, Copy, Debug)]
pub struct SystemClock {
    start: Instant,
}

impl SystemClock {
    /// A clock that starts now.
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

/// A clock that stands still until [`advance`](ManualClock::advance) moves it. Clones share one time.
#[derive(Clone, Debug)]
pub struct ManualClock {
    now: watch::Sender<Duration>,
}

impl ManualClock {
    /// A clock that stands at zero.
    #[must_use]
    pub fn new() -> Self {
        Self { now: watch::Sender::new(Duration::ZERO) }
    }

    /// Moves the clock on and wakes every sleeper whose time has come.
    pub fn advance(&self, by: Duration) {
        self.now.send_modify(|now| *now = now.saturating_add(by));
    }
}

impl Default for ManualClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Duration {
        *self.now.borrow()
    }

    fn sleep_until(&self, deadline: Duration) -> Sleep {
        // The sleeper keeps the clock alive, so the channel cannot close under it.
        let clock = self.now.clone();
        Box::pin(async move {
            let _ = clock.subscribe().wait_for(|now| *now >= deadline).await;
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_sleeper_wakes_when_the_clock_reaches_its_deadline_and_not_before() {
        let clock = ManualClock::new();
        let mut sleeper = tokio_test::task::spawn(clock.sleep_until(Duration::from_secs(2)));
        assert!(sleeper.poll().is_pending());
        clock.advance(Duration::from_secs(1));
        assert!(sleeper.poll().is_pending());
        clock.advance(Duration::from_secs(1));
        assert!(sleeper.is_woken());
        assert!(sleeper.poll().is_ready());
    }

    #[tokio::test(start_paused = true)]
    async fn the_system_clock_follows_a_paused_tokio_clock() {
        let clock = SystemClock::new();
        clock.sleep_until(Duration::from_secs(120)).await;
        assert!(clock.now() >= Duration::from_secs(120));
    }
}
