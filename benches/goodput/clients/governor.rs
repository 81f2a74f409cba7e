//! `governor`: a GCRA for each key and model, with the known limits divided by the processes and the keys of a group.
//!
//! Requests of a model wait in order. After a 429, a request goes to the end of the queue, up to 10 attempts in all.

use std::{num::NonZeroU32, sync::Arc, time::Duration};

use governor::{
    Quota, RateLimiter,
    clock::Clock,
    middleware::NoOpMiddleware,
    state::{InMemoryState, NotKeyed},
};
use http::StatusCode;
use tokio::{
    sync::Mutex,
    time::{Instant, sleep},
};

use super::{Client, peer};
use crate::{
    service::{Limits, MODELS},
    upstream::Upstream,
};

const ATTEMPTS: usize = 10;

/// The runtime's clock.
#[derive(Clone)]
struct TokioClock;

impl Clock for TokioClock {
    type Instant = std::time::Instant;

    fn now(&self) -> Self::Instant {
        Instant::now().into_std()
    }
}

type Limiter =
    RateLimiter<NotKeyed, InMemoryState, TokioClock, NoOpMiddleware<<TokioClock as Clock>::Instant>>;

/// The limiters of a model, one for each key.
struct Model {
    limiters: Vec<Limiter>,
    /// The next key, and the queue: the holder of the lock is the first in it.
    turn: Mutex<usize>,
}

impl Model {
    fn new(limits: &Limits, model: usize, processes: usize) -> Self {
        let share = 1.0 / (processes * limits.members()) as f64;
        let limiter = |key| {
            let quota = limits.quota(key, model);
            let period = Duration::from_secs_f64(1.0 / (quota.rate() * share));
            let burst = NonZeroU32::new((quota.burst() * share) as u32).unwrap_or(NonZeroU32::MIN);
            let quota = Quota::with_period(period).unwrap().allow_burst(burst);
            RateLimiter::direct_with_clock(quota, TokioClock)
        };
        Self { limiters: (0..limits.keys()).map(limiter).collect(), turn: Mutex::new(0) }
    }

    async fn next_key(&self) -> usize {
        let mut turn = self.turn.lock().await;
        loop {
            let mut wait = Duration::MAX;
            for offset in 0..self.limiters.len() {
                let key = (*turn + offset) % self.limiters.len();
                match self.limiters[key].check() {
                    Ok(()) => {
                        *turn = key + 1;
                        return key;
                    }
                    Err(not_until) => wait = wait.min(not_until.wait_time_from(TokioClock.now())),
                }
            }
            sleep(wait).await;
        }
    }
}

pub(super) fn client(upstream: &Upstream, processes: usize) -> Client {
    let (upstream, limits) = (upstream.clone(), upstream.limits());
    let models: Arc<[Model]> = (0..MODELS).map(|model| Model::new(&limits, model, processes)).collect();
    peer(move |job| {
        let (upstream, models) = (upstream.clone(), models.clone());
        async move {
            for _ in 0..ATTEMPTS {
                let key = models[job.model].next_key().await;
                let response = upstream.answer(key, &job).await;
                if response.status() == StatusCode::OK {
                    return Some(response);
                }
            }
            None
        }
    })
}
