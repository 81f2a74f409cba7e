//! A token bucket: a burst at once, and then so many a second.

use std::time::{Duration, Instant};

pub(crate) struct TokenBucket {
    capacity: f64,
    per_second: f64,
    tokens: f64,
    filled_at: Instant,
}

/// What became of a request for a token.
#[derive(Debug)]
pub(crate) struct Taken {
    pub(crate) granted: bool,
    /// Whole tokens that are left.
    pub(crate) remaining: u32,
    /// The time until the bucket is full again.
    pub(crate) reset: Duration,
    /// The time until there is a token.
    pub(crate) wait: Duration,
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
            reset: self.time_until(self.capacity),
            wait: self.time_until(1.0),
        }
    }

    fn time_until(&self, tokens: f64) -> Duration {
        Duration::from_secs_f64((tokens - self.tokens).max(0.0) / self.per_second)
    }

    fn fill(&mut self) {
        let now = Instant::now();
        let gained = (now - self.filled_at).as_secs_f64() * self.per_second;
        self.tokens = (self.tokens + gained).min(self.capacity);
        self.filled_at = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bucket of 20 tokens, which fills at 10 a second and holds that many.
    fn bucket(tokens: f64) -> TokenBucket {
        TokenBucket { tokens, ..TokenBucket::full(20, 10) }
    }

    #[test]
    fn bursts_empty_the_bucket_and_name_the_wait() {
        let mut bucket = bucket(20.0);
        assert_eq!((0..30).filter(|_| bucket.take().granted).count(), 20);
        let refused = bucket.take();
        assert!(!refused.granted && refused.remaining == 0, "{refused:?}");
        assert!((0.0..=0.1).contains(&refused.wait.as_secs_f64()), "{refused:?}");
    }

    #[test]
    fn remaining_and_reset_describe_the_same_level() {
        for level in [0.0, 0.4, 1.0, 7.3, 19.6, 20.0] {
            let mut bucket = bucket(level);
            let taken = bucket.take();
            let by_reset = 20.0 - taken.reset.as_secs_f64() * 10.0;
            assert!((by_reset - bucket.tokens).abs() < 1e-6, "{level}: {taken:?}");
            assert_eq!(taken.remaining, (by_reset + 1e-6) as u32, "{level}: {taken:?}");
            assert_eq!(taken.granted, level >= 1.0);
        }
    }
}
