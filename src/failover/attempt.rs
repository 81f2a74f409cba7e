//! One attempt: what goes to the rotation, what comes back, and what a request's attempts share.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use pin_project_lite::pin_project;
use tower_service::Service;

use super::gate::Pass;
use crate::{
    error::Error,
    message::ReadableResponse,
    pool::{Lease, NoKeyAvailable},
    rotation::SpokeAgainstKey,
    tried,
};

/// A request, and what has become of its attempts so far.
pub struct Tracked<Req, R> {
    pub(crate) request: Req,
    history: Option<Arc<Mutex<History<R>>>>,
}

/// What the attempts of one request share. It is made when the first of them does not simply succeed.
pub(super) struct History<R> {
    /// The keys that it has been limited on, as long as it must not be sent with them again.
    pub(super) tried: Vec<Lease>,
    pub(super) sent: u32,
    pub(super) waited: Duration,
    /// The last limited response, for the caller where no further attempt can be made.
    pub(super) kept: Option<R>,
    pub(super) turn: Option<Result<Pass, NoKeyAvailable>>,
}

impl<Req, R> Tracked<Req, R> {
    pub(crate) fn new(request: Req) -> Self {
        Self { request, history: None }
    }

    /// A request that has waited for its turn already.
    pub(crate) fn admitted(request: Req, pass: Pass, waited: Duration) -> Self {
        let mut tracked = Self::new(request);
        let history = tracked.history();
        let mut shared = lock(&history);
        shared.waited = waited;
        shared.turn = Some(Ok(pass));
        drop(shared);
        tracked
    }

    /// The same for another attempt.
    pub(super) fn again(&self, request: Req) -> Self {
        Self { request, history: self.history.clone() }
    }

    pub(super) fn history(&mut self) -> Arc<Mutex<History<R>>> {
        let new = || Arc::new(Mutex::new(History::default()));
        self.history.get_or_insert_with(new).clone()
    }

    pub(crate) fn tried(&self) -> Vec<Lease> {
        self.history.as_ref().map_or_else(Vec::new, |history| lock(history).tried.clone())
    }

    /// The outcome of having waited for this attempt, if it had to wait.
    pub(crate) fn take_turn(&self) -> Option<Result<Pass, NoKeyAvailable>> {
        self.history.as_ref().and_then(|history| lock(history).turn.take())
    }
}

impl<R> Default for History<R> {
    fn default() -> Self {
        Self { tried: Vec::new(), sent: 0, waited: Duration::ZERO, kept: None, turn: None }
    }
}

pub(super) fn lock<R>(history: &Mutex<History<R>>) -> MutexGuard<'_, History<R>> {
    history.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What an attempt comes back with.
pub enum Attempt<R: ReadableResponse> {
    Fresh(R),
    /// The response of an earlier attempt, after this one found no key.
    Kept(R::Replayed),
}

impl<R: ReadableResponse> Attempt<R> {
    /// The key that the response speaks against, if it does.
    pub(crate) fn spoke_against(&self) -> Option<&Lease> {
        match self {
            Self::Fresh(response) => response.extensions().get().map(|SpokeAgainstKey(lease)| lease),
            Self::Kept(_) => None,
        }
    }

    /// What the caller gets.
    pub(crate) fn into_response(self) -> R::Replayed {
        match self {
            Self::Fresh(response) => response.untouched(),
            Self::Kept(response) => response,
        }
    }
}

/// Tells the gate how an attempt went that had waited at it.
pub(crate) fn answer<R: ReadableResponse, E>(pass: Option<Pass>, result: &Result<Attempt<R>, E>) {
    if let (Some(pass), Ok(attempt)) = (pass, result) {
        pass.answered(attempt.spoke_against().is_some());
    }
}

/// The rotation, as `tower`'s retry sees it.
#[derive(Clone, Debug)]
pub struct Attempts<S>(pub(super) S);

impl<S, Req, R, E> Service<Tracked<Req, R::Replayed>> for Attempts<S>
where
    S: Service<Req, Response = R, Error = Error<E>>,
    R: ReadableResponse,
{
    type Response = Attempt<R>;
    type Error = Error<E>;
    type Future = AttemptFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, tracked: Tracked<Req, R::Replayed>) -> Self::Future {
        let state = match tracked.take_turn() {
            Some(Err(no_key)) => State::Refused { no_key },
            turn => {
                let pass = turn.and_then(Result::ok);
                let response = tried::call_without(tracked.tried(), || self.0.call(tracked.request));
                State::Calling { response, pass }
            }
        };
        AttemptFuture { state }
    }
}

pin_project! {
    pub struct AttemptFuture<F> {
        #[pin]
        state: State<F>,
    }
}

pin_project! {
    #[project = StateProjection]
    enum State<F> {
        Calling { #[pin] response: F, pass: Option<Pass> },
        Refused { no_key: NoKeyAvailable },
    }
}

impl<F, R, E> Future for AttemptFuture<F>
where
    F: Future<Output = Result<R, Error<E>>>,
    R: ReadableResponse,
{
    type Output = Result<Attempt<R>, Error<E>>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Poll::Ready(match self.project().state.project() {
            StateProjection::Calling { response, pass } => {
                let result = ready!(response.poll(cx)).map(Attempt::Fresh);
                answer(pass.take(), &result);
                result
            }
            StateProjection::Refused { no_key } => Err(Error::NoKeyAvailable(*no_key)),
        })
    }
}
