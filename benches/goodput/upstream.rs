//! The simulated service as clients see it: a `tower::Service` whose responses take time.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use bytes::Bytes;
use fastrand::Rng;
use futures_util::stream;
use http::{HeaderMap, Request, Response, StatusCode, header::AUTHORIZATION};
use http_body::Frame;
use http_body_util::{BodyExt, Empty, Full, StreamBody, combinators::UnsyncBoxBody};
use tokio::time::{Instant, sleep};
use tower::{Service, service_fn};

use crate::{
    arrivals::Job,
    service::{Limits, ServiceKind},
};

/// The time from the service's refusal until the client has the 429.
const REFUSAL: f64 = 0.01;
const SECRET: &str = "sk-";

pub(crate) type Body = UnsyncBoxBody<Bytes, Infallible>;

/// The time at which a request was sent, as an extension of its response.
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

    /// Returns the service, which reads the key from `authorization` and the request from its extension [`Job`].
    pub(crate) fn service(
        &self,
    ) -> impl Service<
        Request<Full<Bytes>>,
        Response = Response<Body>,
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
                Ok(upstream.answer(key_of(request.headers()), &job).await)
            }
        })
    }

    /// Returns the response as soon as the client has its head. The body takes [`Job::body`] from when it is first polled.
    pub(crate) async fn answer(&self, key: usize, job: &Job) -> Response<Body> {
        let sent = SentAt(self.now());
        let network = Duration::from_millis(self.state().rng.u64(10..30));
        sleep(network).await;
        let (status, headers) = self.decide(key, job);
        let is_served = status == StatusCode::OK;
        sleep(Duration::from_secs_f64(if is_served { job.until_head() } else { REFUSAL })).await;
        let body = if is_served {
            self.end_later(key, *job);
            ends_after(Duration::from_secs_f64(job.body()))
        } else {
            Empty::new().boxed_unsync()
        };
        let mut response = Response::new(body);
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        response.extensions_mut().insert(sent);
        response
    }

    fn decide(&self, key: usize, job: &Job) -> (StatusCode, HeaderMap) {
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

/// Returns the key that `authorization` names.
pub(crate) fn key_of(headers: &HeaderMap) -> usize {
    let authorization = headers[AUTHORIZATION].to_str().expect("text");
    let (_, key) = authorization.rsplit_once(SECRET).expect("a secret of the service");
    key.parse().expect("a number")
}

fn ends_after(time: Duration) -> Body {
    let end = async move {
        sleep(time).await;
        Ok(Frame::data(Bytes::from_static(b"{}")))
    };
    StreamBody::new(stream::once(end)).boxed_unsync()
}
