//! Two small layers, around the rotation and inside it, that record for a ledger when keys are picked, used and limited.
//!
//! The ledger belongs to the program that includes this file: `crate::ledger::Ledger`.

use std::{
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
use tower_key_rotation::ServedBy;

use crate::ledger::Ledger;

/// Header of a request to the local service: a time just before its key was picked.
pub(crate) const BEFORE_PICK: HeaderName = HeaderName::from_static("x-before-pick");

/// Header of the local service's 429: the time of the answer.
pub(crate) const ANSWERED: HeaderName = HeaderName::from_static("x-answered-at");

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

/// Around the rotation: knows when a key is about to be picked, and when one has been marked.
#[derive(Clone)]
pub(crate) struct AroundRotation<S> {
    inner: S,
    ledger: Arc<Ledger>,
    witness: Witness,
}

/// Inside the rotation: knows when a request leaves, and when the head of its response arrives.
#[derive(Clone)]
pub(crate) struct InsideRotation<S> {
    inner: S,
    ledger: Arc<Ledger>,
}

/// Extension of a response: the times that [`InsideRotation`] recorded.
#[derive(Clone, Copy)]
struct OnTheWire {
    sent_at: Duration,
    answered_at: Duration,
}

impl<S> AroundRotation<S> {
    pub(crate) fn new(inner: S, ledger: Arc<Ledger>, witness: Witness) -> Self {
        Self { inner, ledger, witness }
    }
}

impl<S> InsideRotation<S> {
    pub(crate) fn new(inner: S, ledger: Arc<Ledger>) -> Self {
        Self { inner, ledger }
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

    fn call(&mut self, mut request: Request) -> Self::Future {
        let (ledger, witness) = (self.ledger.clone(), self.witness);
        let before_pick = ledger.now();
        if witness == Witness::Service {
            request.headers_mut().insert(BEFORE_PICK, stamp(before_pick));
        }
        // The key is picked in this call.
        let response = self.inner.call(request);
        Box::pin(async move {
            let response = response.await?;
            // By now the key has been marked, if it had to be.
            note(&ledger, witness, before_pick, &response);
            Ok(response)
        })
    }
}

/// Records a response that has just left the rotation.
fn note(ledger: &Ledger, witness: Witness, before_pick: Duration, response: &Response) {
    let marked_by = ledger.now();
    let Some(ServedBy(key)) = response.extensions().get() else { return };
    let on_the_wire: Option<&OnTheWire> = response.extensions().get();
    let limited_at = match witness {
        Witness::Service => stamped(response.headers(), &ANSWERED),
        Witness::Client if response.status() != StatusCode::TOO_MANY_REQUESTS => None,
        Witness::Client => on_the_wire.map(|wire| wire.answered_at),
    };
    if let (Witness::Client, Some(wire)) = (witness, on_the_wire) {
        ledger.arrived(key, before_pick, wire.sent_at);
    }
    if let Some(limited_at) = limited_at {
        ledger.limited(key, limited_at, marked_by);
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
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let ledger = self.ledger.clone();
        let sent_at = ledger.now();
        let response = self.inner.call(request);
        Box::pin(async move {
            let mut response = response.await?;
            let answered_at = ledger.now();
            response.extensions_mut().insert(OnTheWire { sent_at, answered_at });
            Ok(response)
        })
    }
}
