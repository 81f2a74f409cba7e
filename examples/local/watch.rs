//! Two small layers, inside the rotation and around it, that record for a ledger when keys are picked, used and limited.
//!
//! The ledger belongs to the program that includes this file: `crate::ledger::Ledger`.

use std::{
    cell::{Cell, RefCell},
    hash::{DefaultHasher, Hash, Hasher},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use reqwest::{
    Request, Response, StatusCode,
    header::{HeaderMap, HeaderName, HeaderValue},
};
use tower::Service;
use tower_key_rotation::KeyId;

use crate::ledger::Ledger;

/// Header of a request to the local service: a time just before its key was picked.
pub(crate) const BEFORE_PICK: HeaderName = HeaderName::from_static("x-before-pick");

/// Headers of the local service's 429: the time of the answer, and the key.
pub(crate) const ANSWERED: HeaderName = HeaderName::from_static("x-answered-at");
pub(crate) const KEY: HeaderName = HeaderName::from_static("x-key");

pub(crate) fn stamp(time: Duration) -> HeaderValue {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).into()
}

pub(crate) fn stamped(headers: &HeaderMap, name: &HeaderName) -> Option<Duration> {
    headers.get(name)?.to_str().ok()?.parse().ok().map(Duration::from_nanos)
}

/// Who records the arrival of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Witness {
    /// The local service, which writes to the same ledger.
    Service,
    /// This program, when it sends them: a real service's view is out of reach.
    Client,
}

/// A limited response.
struct Limited {
    key: KeyId,
    answered_at: Duration,
    /// The wait that it asks for.
    asked: Option<Duration>,
}

thread_local! {
    /// Limited responses that have just come out of [`InsideRotation`]. The rotation marks their keys in the same poll,
    /// at the end of which [`AroundRotation`] looks here.
    static LIMITED: RefCell<Vec<Limited>> = const { RefCell::new(Vec::new()) };

    /// When the poll of [`AroundRotation`] began that this thread is in.
    static POLL_BEGAN: Cell<Option<Duration>> = const { Cell::new(None) };
}

/// Around the rotation: it knows by when a key has been marked.
#[derive(Clone)]
pub(crate) struct AroundRotation<S> {
    inner: S,
    ledger: Arc<Ledger>,
}

/// Inside the rotation: it knows when a key is about to be picked, and when the head of a response is here.
pub(crate) struct InsideRotation<S> {
    inner: S,
    ledger: Arc<Ledger>,
    witness: Witness,
    /// A time before the pick. The rotation asks whether the service inside is ready before it picks a key, or, with a
    /// paced pool, after that in the same poll.
    before_pick: Option<Duration>,
}

impl<S> AroundRotation<S> {
    pub(crate) fn new(inner: S, ledger: Arc<Ledger>) -> Self {
        Self { inner, ledger }
    }
}

impl<S> InsideRotation<S> {
    pub(crate) fn new(inner: S, ledger: Arc<Ledger>, witness: Witness) -> Self {
        Self { inner, ledger, witness, before_pick: None }
    }
}

impl<S: Clone> Clone for InsideRotation<S> {
    fn clone(&self) -> Self {
        Self::new(self.inner.clone(), self.ledger.clone(), self.witness)
    }
}

type ResponseFuture<E> = Pin<Box<dyn Future<Output = Result<Response, E>> + Send>>;

impl<S> Service<Request> for AroundRotation<S>
where
    S: Service<Request, Response = Response>,
    S::Future: Send + 'static,
{
    type Response = Response;
    type Error = S::Error;
    type Future = ResponseFuture<S::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let ledger = self.ledger.clone();
        let mut response = Box::pin(self.inner.call(request));
        Box::pin(std::future::poll_fn(move |cx| {
            POLL_BEGAN.set(Some(ledger.now()));
            let polled = response.as_mut().poll(cx);
            POLL_BEGAN.set(None);
            for Limited { key, answered_at, asked } in LIMITED.take() {
                ledger.limited(&key, answered_at, ledger.now(), asked);
            }
            polled
        }))
    }
}

impl<S> Service<Request> for InsideRotation<S>
where
    S: Service<Request, Response = Response>,
    S::Future: Send + 'static,
{
    type Response = Response;
    type Error = S::Error;
    type Future = ResponseFuture<S::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.before_pick.get_or_insert_with(|| POLL_BEGAN.get().unwrap_or_else(|| self.ledger.now()));
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request) -> Self::Future {
        let (ledger, before_pick) = (self.ledger.clone(), self.before_pick.take().unwrap_or_default());
        if self.witness == Witness::Service {
            request.headers_mut().insert(BEFORE_PICK, stamp(before_pick));
            let response = self.inner.call(request);
            return Box::pin(async move {
                let response = response.await?;
                LIMITED.with_borrow_mut(|limited| limited.extend(limited_by_service(&response)));
                Ok(response)
            });
        }
        let key = name_of_key(&request);
        if let Some(key) = &key {
            ledger.arrived(key, before_pick, ledger.now());
        }
        let response = self.inner.call(request);
        Box::pin(async move {
            let response = response.await?;
            let key = key.filter(|_| response.status() == StatusCode::TOO_MANY_REQUESTS);
            let limited =
                key.map(|key| Limited { key, answered_at: ledger.now(), asked: asked(response.headers()) });
            LIMITED.with_borrow_mut(|all| all.extend(limited));
            Ok(response)
        })
    }
}

fn limited_by_service(response: &Response) -> Option<Limited> {
    let headers = response.headers();
    let key = KeyId::new(headers.get(KEY)?.to_str().ok()?).ok()?;
    Some(Limited { key, answered_at: stamped(headers, &ANSWERED)?, asked: asked(headers) })
}

/// The wait that a response names in milliseconds or seconds; not one that is a date.
fn asked(headers: &HeaderMap) -> Option<Duration> {
    let number = |name: &str| headers.get(name)?.to_str().ok()?.parse::<f64>().ok();
    let seconds = number("retry-after-ms").map(|millis| millis / 1000.0).or_else(|| number("retry-after"))?;
    Duration::try_from_secs_f64(seconds).ok()
}

/// A real service does not say which key a request came with: a hash of all that may hold the key stands for it.
fn name_of_key(request: &Request) -> Option<KeyId> {
    let mut hasher = DefaultHasher::new();
    request.url().query().hash(&mut hasher);
    for value in request.headers().values().filter(|value| value.is_sensitive()) {
        value.hash(&mut hasher);
    }
    KeyId::new(format!("{:x}", hasher.finish())).ok()
}
