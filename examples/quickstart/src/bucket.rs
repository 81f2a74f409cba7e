//! A token bucket: a burst at once, and then so many a second.

use std::time::{Duration, Instant};

pub(crate) struct TokenBucket {
    capacity: f64,
    per_second: f64,
    tokens: f64,
    filled_at: Instant,
}

/// What became of a request for a token.
pub(crate) struct Taken {
    pub(crate) granted: bool,
    /// Whole tokens that are left.
    pub(crate) remaining: u32,
    /// The time until the bucket is full again.
    pub(crate) reset: Duration,
}

impl TokenBucket {
    pub(crate) fn full(capacity: u32, per_second: u32) -> Self {
        let (capacity, per_second) = (f64::from(capacity), f64::from(per_second));
        Self { capacity, per_second, tokens: capacity, filled_at: Instant::now() }
    }

    pub(crate) fn take(&mut self) -> Taken {
        self.fill();
        let granted = self.tokens >= 1.0;
        if granted {
            self.tokens -= 1.0;
        }
        Taken {
            granted,
            remaining: self.tokens as u32,
            reset: Duration::from_secs_f64((self.capacity - self.tokens) / self.per_second),
        }
    }

    fn fill(&mut self) {
        let now = Instant::now();
        let gained = (now - self.filled_at).as_secs_f64() * self.per_second;
        self.tokens = (self.tokens + gained).min(self.capacity);
        self.filled_at = now;
    }
}
