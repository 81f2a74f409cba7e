//! A service in this process with a token bucket for each key, whose responses have OpenAI's headers.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use http::{Request, Response};
use tokio::time::{Instant, sleep};
use tower::{BoxError, ServiceExt, service_fn, util::BoxCloneService};
use tower_key_rotation::{Error, Failover, KeyPool, KeyRotationLayer};

pub type LimitedClient = BoxCloneService<Request<String>, u16, BoxError>;

#[derive(Clone, Debug)]
pub struct Limited {
    rate: f64,
    burst: f64,
    answers_after: Duration,
    seen: Arc<Mutex<Seen>>,
}

#[derive(Debug, Default)]
struct Seen {
    /// The level of each key's bucket, and when it was that.
    buckets: BTreeMap<String, (f64, Option<Instant>)>,
    served: usize,
    refused: usize,
    /// By the keys' secrets.
    served_by: BTreeMap<String, usize>,
    /// Says that nothing is left, whatever is.
    is_lying: bool,
    /// All keys share one bucket.
    is_one_bucket: bool,
    /// Answers name the organisation of all keys.
    has_organisation: bool,
    /// Refuses everything until then.
    closed_until: Option<Instant>,
}

impl Limited {
    /// Each key may send `rate` requests per second, and `burst` at once.
    pub fn new(rate: f64, burst: f64) -> Self {
        let answers_after = Duration::from_millis(50);
        Self { rate, burst, answers_after, seen: Arc::default() }
    }

    /// The same, with headers that say that nothing is left.
    pub fn lying(self) -> Self {
        self.lies(true);
        self
    }

    /// From now on, headers say that nothing is left; or they are right again.
    pub fn lies(&self, is_lying: bool) {
        self.seen.lock().unwrap().is_lying = is_lying;
    }

    /// The same, with one bucket for all keys, whose organisation answers name.
    pub fn of_one_organisation(self) -> Self {
        self.seen.lock().unwrap().is_one_bucket = true;
        self.names_organisation();
        self
    }

    /// From now on, answers say that all keys are of one organisation.
    pub fn names_organisation(&self) {
        self.seen.lock().unwrap().has_organisation = true;
    }

    /// The same, with answers that come after that time.
    pub fn answering_after(self, answers_after: Duration) -> Self {
        Self { answers_after, ..self }
    }

    /// Refuses everything for so long, and says so.
    pub fn close_for(&self, time: Duration) {
        self.seen.lock().unwrap().closed_until = Some(Instant::now() + time);
    }

    /// Forgets what was counted so far.
    pub fn count_from_now(&self) {
        let mut seen = self.seen.lock().unwrap();
        (seen.served, seen.refused) = (0, 0);
        seen.served_by.clear();
    }

    /// The requests that were served with a key.
    pub fn served_by(&self, secret: &str) -> usize {
        self.seen.lock().unwrap().served_by.get(secret).copied().unwrap_or(0)
    }

    pub fn refused(&self) -> usize {
        self.seen.lock().unwrap().refused
    }

    pub fn served(&self) -> usize {
        self.seen.lock().unwrap().served
    }

    /// The 429s per 100 requests that were served.
    pub fn refused_per_100(&self) -> f64 {
        let seen = self.seen.lock().unwrap();
        100.0 * seen.refused as f64 / seen.served as f64
    }

    /// The answer to a request with that key, which comes now.
    pub fn answer(&self, key: &str) -> Response<String> {
        let seen = &mut *self.seen.lock().unwrap();
        let now = Instant::now();
        if let Some(closed_for) = seen.closed_until.and_then(|until| until.checked_duration_since(now))
            && !closed_for.is_zero()
        {
            seen.refused += 1;
            let response = Response::builder().status(429).header("retry-after", closed_for.as_secs() + 1);
            return response.body(String::new()).unwrap();
        }
        let bucket = if seen.is_one_bucket { "all" } else { key };
        let (level, at) = seen.buckets.entry(bucket.to_owned()).or_insert((self.burst, None));
        let passed = at.map_or(Duration::ZERO, |at| now - at).as_secs_f64();
        *level = (*level + passed * self.rate).min(self.burst);
        *at = Some(now);
        let is_refused = *level < 1.0;
        if !is_refused {
            *level -= 1.0;
        }
        let (left, wait) = (*level, (1.0 - *level) / self.rate);
        let is_lying = seen.is_lying;
        let reset = if is_lying { 60.0 } else { (self.burst - left) / self.rate };
        let left = if is_lying { 0.0 } else { left };
        if is_refused {
            seen.refused += 1
        } else {
            seen.served += 1;
            let secret = key.trim_start_matches("Bearer ").to_owned();
            *seen.served_by.entry(secret).or_default() += 1;
        }
        let mut response = Response::builder()
            .status(if is_refused { 429 } else { 200 })
            .header("x-ratelimit-limit-requests", self.burst as u64)
            .header("x-ratelimit-remaining-requests", left as u64)
            .header("x-ratelimit-reset-requests", format!("{reset:.3}s"));
        if seen.has_organisation {
            response = response.header("openai-organization", "org-1");
        }
        if is_refused && !is_lying {
            response = response.header("retry-after-ms", (wait * 1_000.0).ceil() as u64);
        }
        response.body(String::new()).unwrap()
    }

    /// A client of the service, which waits up to that long.
    pub fn client(&self, pool: &KeyPool, wait: Duration) -> LimitedClient {
        let service = self.clone();
        let inner = service_fn(move |request: Request<String>| {
            let service = service.clone();
            async move {
                sleep(Duration::from_millis(20)).await;
                let key = request.headers()["authorization"].to_str().unwrap();
                let response = service.answer(key);
                sleep(service.answers_after).await;
                Ok::<_, std::io::Error>(response)
            }
        });
        let layer = KeyRotationLayer::new(pool).failover(Failover::attempts(10)).wait_up_to(wait);
        let client = tower::ServiceBuilder::new().layer(layer).service(inner);
        BoxCloneService::new(
            client.map_response(|response| response.status().as_u16()).map_err(Error::into_inner),
        )
    }
}

/// Sends requests at random times, that many a second for so many seconds, and returns how many did not succeed.
pub async fn offer(
    client: &LimitedClient,
    per_second: f64,
    seconds: f64,
    request: impl Fn() -> Request<String>,
) -> usize {
    let mut sent = Vec::new();
    for _ in 0..(per_second * seconds) as usize {
        sent.push(tokio::spawn(client.clone().oneshot(request())));
        let pause = -(1.0 - fastrand::f64()).ln() / per_second;
        sleep(Duration::from_secs_f64(pause)).await;
    }
    let mut failed = 0;
    for request in sent {
        failed += usize::from(!request.await.unwrap().is_ok_and(|status| status == 200));
    }
    failed
}

pub fn post() -> Request<String> {
    Request::post("https://api.example.com/v1").body("body".to_owned()).unwrap()
}
