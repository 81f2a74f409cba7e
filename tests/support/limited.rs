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
    /// Says that nothing is left, whatever is.
    is_lying: bool,
    seen: Arc<Mutex<Seen>>,
}

#[derive(Debug, Default)]
struct Seen {
    /// The level of each key's bucket, and when it was that.
    buckets: BTreeMap<String, (f64, Option<Instant>)>,
    served: usize,
    refused: usize,
}

impl Limited {
    /// Each key may send `rate` requests per second, and `burst` at once.
    pub fn new(rate: f64, burst: f64) -> Self {
        Self { rate, burst, is_lying: false, seen: Arc::default() }
    }

    /// The same, with headers that say that nothing is left.
    pub fn lying(self) -> Self {
        Self { is_lying: true, ..self }
    }

    /// Forgets what was counted so far.
    pub fn count_from_now(&self) {
        let mut seen = self.seen.lock().unwrap();
        (seen.served, seen.refused) = (0, 0);
    }

    pub fn served(&self) -> usize {
        self.seen.lock().unwrap().served
    }

    /// The 429s per 100 requests that were served.
    pub fn refused_per_100(&self) -> f64 {
        let seen = self.seen.lock().unwrap();
        100.0 * seen.refused as f64 / seen.served as f64
    }

    fn answer(&self, key: &str) -> Response<String> {
        let mut seen = self.seen.lock().unwrap();
        let now = Instant::now();
        let (level, at) = seen.buckets.entry(key.to_owned()).or_insert((self.burst, None));
        let passed = at.map_or(Duration::ZERO, |at| now - at).as_secs_f64();
        *level = (*level + passed * self.rate).min(self.burst);
        *at = Some(now);
        let is_refused = *level < 1.0;
        if !is_refused {
            *level -= 1.0;
        }
        let (left, wait) = (*level, (1.0 - *level) / self.rate);
        let reset = if self.is_lying { 60.0 } else { (self.burst - left) / self.rate };
        let left = if self.is_lying { 0.0 } else { left };
        if is_refused {
            seen.refused += 1
        } else {
            seen.served += 1
        }
        let mut response = Response::builder()
            .status(if is_refused { 429 } else { 200 })
            .header("x-ratelimit-limit-requests", self.burst as u64)
            .header("x-ratelimit-remaining-requests", left as u64)
            .header("x-ratelimit-reset-requests", format!("{reset:.3}s"));
        if is_refused && !self.is_lying {
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
                sleep(Duration::from_millis(50)).await;
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
