//! Times of many single calls, for their high percentiles.

use std::time::{Duration, Instant};

pub struct Times(Vec<u64>);

impl Times {
    /// Times each call until `time` has passed.
    pub fn of(time: Duration, mut call: impl FnMut()) -> Self {
        let mut times = Vec::with_capacity(64 * 1024 * 1024);
        let end = Instant::now() + time;
        loop {
            let started = Instant::now();
            call();
            times.push(started.elapsed().as_nanos() as u64);
            if started > end || times.len() == times.capacity() {
                break;
            }
        }
        Self::from(times)
    }

    /// Returns the percentile for this share of the calls, in nanoseconds.
    pub fn at(&self, share: f64) -> f64 {
        self.0[((self.0.len() - 1) as f64 * share) as usize] as f64
    }

    pub fn print_head(what: &str) {
        println!("\n| {what}, ns | p50 | p99 | p99.9 | longest |\n|---|---|---|---|---|");
    }

    pub fn print(&self, when: &str) {
        let columns: Vec<_> = [0.5, 0.99, 0.999, 1.0].map(|share| self.at(share).to_string()).into();
        println!("| {when} | {} |", columns.join(" | "));
    }
}

impl From<Vec<u64>> for Times {
    fn from(mut nanoseconds: Vec<u64>) -> Self {
        nanoseconds.sort_unstable();
        Self(nanoseconds)
    }
}
