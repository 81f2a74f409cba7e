//! The adaptive retry mode of the AWS SDKs: a token bucket for all requests of a process, whose rate follows CUBIC.
//!
//! It reads no headers and knows no limits: keys take turns. The bucket does nothing until the first 429. A request has 3
//! attempts, with exponential backoff and jitter.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use http::StatusCode;
use tokio::{sync::Mutex, time::sleep};

use super::{Client, peer};
use crate::upstream::Upstream;

const ATTEMPTS: i32 = 3;
const LONGEST_BACKOFF: f64 = 20.0;

// The constants of the SDKs.
const BETA: f64 = 0.7;
const SCALE: f64 = 0.4;
const SMOOTHING: f64 = 0.8;
const LEAST_RATE: f64 = 0.5;
const LEAST_CAPACITY: f64 = 1.0;

#[derive(Default)]
struct RateLimiter {
    // The token bucket.
    enabled: bool,
    rate: f64,
    capacity: f64,
    level: f64,
    refilled_at: f64,
    // The measured rate: responses in each half second, smoothed.
    measured: f64,
    half_second: f64,
    responses: f64,
    // CUBIC.
    rate_at_429: f64,
    last_429: f64,
}

impl RateLimiter {
    /// Takes a token, or returns the time until there is one.
    fn take(&mut self, now: f64) -> Result<(), Duration> {
        if !self.enabled {
            return Ok(());
        }
        self.refill(now);
        if self.level < 1.0 {
            // At least a tick of the timer: the sum of refills is rounded.
            return Err(Duration::from_secs_f64(((1.0 - self.level) / self.rate).max(0.001)));
        }
        self.level -= 1.0;
        Ok(())
    }

    fn refill(&mut self, now: f64) {
        self.level = (self.level + (now - self.refilled_at) * self.rate).min(self.capacity);
        self.refilled_at = now;
    }

    fn respond(&mut self, limited: bool, now: f64) {
        self.measure(now);
        let rate = if limited { self.decrease(now) } else { self.increase(now) };
        let rate = rate.min(2.0 * self.measured);
        self.refill(now);
        self.rate = rate.max(LEAST_RATE);
        self.capacity = rate.max(LEAST_CAPACITY);
        self.level = self.level.min(self.capacity);
    }

    fn measure(&mut self, now: f64) {
        let half_second = (now * 2.0).floor() / 2.0;
        self.responses += 1.0;
        if half_second > self.half_second {
            let rate = self.responses / (half_second - self.half_second);
            self.measured = rate * SMOOTHING + self.measured * (1.0 - SMOOTHING);
            self.responses = 0.0;
            self.half_second = half_second;
        }
    }

    fn decrease(&mut self, now: f64) -> f64 {
        self.rate_at_429 = if self.enabled { self.measured.min(self.rate) } else { self.measured };
        self.last_429 = now;
        self.enabled = true;
        self.rate_at_429 * BETA
    }

    fn increase(&self, now: f64) -> f64 {
        let back_after = (self.rate_at_429 * (1.0 - BETA) / SCALE).cbrt();
        SCALE * (now - self.last_429 - back_after).powi(3) + self.rate_at_429
    }
}

#[derive(Default)]
struct Process {
    limiter: std::sync::Mutex<RateLimiter>,
    /// The queue for tokens: the holder of the lock is the first in it.
    queue: Mutex<()>,
    turn: AtomicUsize,
}

impl Process {
    async fn token(&self, upstream: &Upstream) {
        let _first = self.queue.lock().await;
        loop {
            let taken = self.limiter.lock().unwrap().take(upstream.now());
            match taken {
                Ok(()) => return,
                Err(wait) => sleep(wait).await,
            }
        }
    }
}

pub(super) fn client(upstream: &Upstream) -> Client {
    let (upstream, keys) = (upstream.clone(), upstream.limits().keys());
    let process = Arc::new(Process::default());
    peer(move |job| {
        let (upstream, process) = (upstream.clone(), process.clone());
        async move {
            for attempt in 0..ATTEMPTS {
                if attempt > 0 {
                    let longest = 2_f64.powi(attempt - 1).min(LONGEST_BACKOFF);
                    sleep(Duration::from_secs_f64(fastrand::f64() * longest)).await;
                }
                process.token(&upstream).await;
                let key = process.turn.fetch_add(1, Relaxed) % keys;
                let response = upstream.answer(key, &job).await;
                let limited = response.status() != StatusCode::OK;
                process.limiter.lock().unwrap().respond(limited, upstream.now());
                if !limited {
                    return Some(response);
                }
            }
            None
        }
    })
}
