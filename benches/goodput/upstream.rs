//! The simulated service as clients see it: a `tower::Service` that takes its time, and counts what it serves.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use bytes::Bytes;
use fastrand::Rng;
use http::{Request, Response, StatusCode, header::AUTHORIZATION};
use http_body_util::Full;
use tokio::time::{Instant, sleep};
use tower::{Service, service_fn};

use crate::{
    arrivals::Job,
    service::{Limits, ServiceKind},
};

/// The time from the service's refusal until the client has the 429.
const REFUSAL: f64 = 0.01;
const SECRET: &str = "sk-";

/// When a request was sent: an extension of its response.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SentAt(pub(crate) f64);

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) served: usize,
    pub(crate) limited: usize,
}

/// A handle to the service; clones share it.
#[derive(Clone)]
pub(crate) struct Upstream {
    start: Instant,
    state: Arc<Mutex<State>>,
}

struct State {
    limits: Limits,
    counts: Counts,
    rng: Rng,
}

impl Upstream {
    /// Starts the service at the runtime's present time.
    pub(crate) fn start(kind: ServiceKind, seed: u64) -> Self {
        let state = State { limits: Limits::new(kind), counts: Counts::default(), rng: Rng::with_seed(seed) };
        Self { start: Instant::now(), state: Arc::new(Mutex::new(state)) }
    }

    /// Returns a secret for each key.
    pub(crate) fn secrets(&self) -> impl Iterator<Item = String> + use<> {
        (0..self.limits().keys()).map(|key| format!("{SECRET}{key}"))
    }

    /// Returns the present limits, for clients that know them.
    pub(crate) fn limits(&self) -> Limits {
        self.state().limits.clone()
    }

    pub(crate) fn counts(&self) -> Counts {
        self.state().counts
    }

    /// Returns the seconds since the start.
    pub(crate) fn now(&self) -> f64 {
        self.start.elapsed().as_secs_f64()
    }

    /// Returns the service: it reads the key from `authorization`, and what is asked for from the extension [`Job`].
    pub(crate) fn service(
        &self,
    ) -> impl Service<
        Request<Full<Bytes>>,
        Response = Response<Full<Bytes>>,
        Error = Infallible,
        Future: Send + 'static,
    > + Clone
    + Send
    + 'static {
        let upstream = self.clone();
        service_fn(move |request: Request<Full<Bytes>>| {
            let upstream = upstream.clone();
            async move {
                let job = *request.extensions().get::<Job>().expect("a job in each request");
                let authorization = request.headers()[AUTHORIZATION].to_str().expect("text");
                let (_, key) = authorization.rsplit_once(SECRET).expect("a secret of the service");
                Ok(upstream.answer(key.parse().expect("a number"), &job).await)
            }
        })
    }

    /// Returns the head of the response. The caller has the end of the body [`Job::body`] later.
    pub(crate) async fn answer(&self, key: usize, job: &Job) -> Response<Full<Bytes>> {
        let sent = SentAt(self.now());
        let network = Duration::from_millis(self.state().rng.u64(10..30));
        sleep(network).await;
        let (status, headers) = self.decide(key, job);
        let until_head = if status == StatusCode::OK { job.until_head() } else { REFUSAL };
        sleep(Duration::from_secs_f64(until_head)).await;
        if status == StatusCode::OK {
            self.end_later(key, *job);
        }
        let mut response = Response::new(Full::default());
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        response.extensions_mut().insert(sent);
        response
    }

    fn decide(&self, key: usize, job: &Job) -> (StatusCode, http::HeaderMap) {
        let now = self.now();
        let mut state = self.state();
        let (status, headers) = state.limits.request(key, job, now);
        match status {
            StatusCode::OK => state.counts.served += 1,
            _ => state.counts.limited += 1,
        }
        (status, headers)
    }

    fn end_later(&self, key: usize, job: Job) {
        let upstream = self.clone();
        tokio::spawn(async move {
            sleep(Duration::from_secs_f64(job.body())).await;
            let now = upstream.now();
            upstream.state().limits.end(key, &job, now);
        });
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}
