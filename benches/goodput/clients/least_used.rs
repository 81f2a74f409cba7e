//! Routing by usage, as LiteLLM's `usage-based-routing-v2` does.
//!
//! A request goes to the key that was used least in this minute of the clock, of those below their known limit per
//! minute, which is divided by the processes and the keys of a group. After a 429 the key rests for 5 s, and the request
//! is sent again at once. With no key left, it is sent again after a backoff. In both cases, 3 times at most.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use http::StatusCode;
use tokio::time::sleep;

use super::{Client, peer};
use crate::{
    service::{Limits, MODELS},
    upstream::Upstream,
};

const RETRIES: i32 = 3;
const COOLDOWN: f64 = 5.0;
/// The first backoff, in seconds. It doubles each time.
const BACKOFF: f64 = 0.5;

#[derive(Clone)]
struct Deployment {
    per_minute: f64,
    /// A minute of the clock, and the requests in it.
    usage: (u64, f64),
    rests_until: f64,
}

impl Deployment {
    fn used_in(&self, minute: u64) -> f64 {
        if self.usage.0 == minute { self.usage.1 } else { 0.0 }
    }
}

/// The keys of one model.
struct Router(Vec<Deployment>);

impl Router {
    fn new(limits: &Limits, model: usize, processes: usize) -> Self {
        let share = 1.0 / (processes * limits.members()) as f64;
        let deployment = |key| Deployment {
            per_minute: (60.0 * limits.quota(key, model).rate() * share).max(1.0),
            usage: (0, 0.0),
            rests_until: 0.0,
        };
        Self((0..limits.keys()).map(deployment).collect())
    }

    fn pick(&mut self, now: f64) -> Option<usize> {
        let minute = (now / 60.0) as u64;
        let is_available =
            |key: &Deployment| key.rests_until <= now && key.used_in(minute) + 1.0 <= key.per_minute;
        let available = self.0.iter_mut().enumerate().filter(|(_, key)| is_available(key));
        let (number, key) =
            available.min_by(|(_, a), (_, b)| a.used_in(minute).total_cmp(&b.used_in(minute)))?;
        key.usage = (minute, key.used_in(minute) + 1.0);
        Some(number)
    }
}

pub(super) fn client(upstream: &Upstream, processes: usize) -> Client {
    let (upstream, limits) = (upstream.clone(), upstream.limits());
    let routers: Arc<[Mutex<Router>]> =
        (0..MODELS).map(|model| Mutex::new(Router::new(&limits, model, processes))).collect();
    peer(move |job| {
        let (upstream, routers) = (upstream.clone(), routers.clone());
        async move {
            let router = &routers[job.model];
            for retry in 0..=RETRIES {
                let picked = router.lock().unwrap().pick(upstream.now());
                let Some(key) = picked else {
                    sleep(Duration::from_secs_f64(BACKOFF * 2_f64.powi(retry))).await;
                    continue;
                };
                let response = upstream.answer(key, &job).await;
                if response.status() == StatusCode::OK {
                    return Some(response);
                }
                router.lock().unwrap().0[key].rests_until = upstream.now() + COOLDOWN;
            }
            None
        }
    })
}
