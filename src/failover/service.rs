use std::{
    fmt,
    future::{Future, poll_fn},
    pin::Pin,
    task::{Context, Poll, ready},
};

use pin_project_lite::pin_project;
use tower::retry::Retry;
use tower_service::Service;

use super::{
    attempt::{Attempt, Attempts, Tracked},
    clone::{CloneRequest, TryClone},
    policy::FailoverPolicy,
};
use crate::{
    error::Error,
    message::{ReadableResponse, RequestMessage},
};

/// A client that sends a limited request again with another key: see the [module](super).
#[derive(Clone)]
pub struct Failover<S, K = TryClone> {
    retry: Retry<FailoverPolicy<K>, Attempts<S>>,
    policy: FailoverPolicy<K>,
}

impl<S, K: Clone> Failover<S, K> {
    pub(super) fn new(inner: S, policy: FailoverPolicy<K>) -> Self {
        Self { retry: Retry::new(policy.clone(), Attempts(inner)), policy }
    }
}

impl<S, K, Req, R, E> Service<Req> for Failover<S, K>
where
    S: Service<Req, Response = R, Error = Error<E>> + Clone + Send + 'static,
    S::Future: Send + 'static,
    K: CloneRequest<Req> + Clone + Send + 'static,
    Req: RequestMessage + Send + 'static,
    R: ReadableResponse + Send + 'static,
    R::Replayed: Send + 'static,
    E: Send + 'static,
{
    type Response = R::Replayed;
    type Error = Error<E>;
    type Future = FailoverFuture<
        <Retry<FailoverPolicy<K>, Attempts<S>> as Service<Tracked<Req, R::Replayed>>>::Future,
        R,
        E,
    >;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Service::<Tracked<Req, R::Replayed>>::poll_ready(&mut self.retry, cx)
    }

    fn call(&mut self, request: Req) -> Self::Future {
        if !self.policy.shared.is_closed_to(&request) {
            let response = self.retry.call(Tracked::new(request));
            return FailoverFuture { state: State::Calling { response } };
        }
        // The service that was made ready may hold a permit for that. It is given back while the request waits,
        // since a request that goes before it may need that permit.
        self.retry = self.retry.clone();
        let mut retry = self.retry.clone();
        let waited = self.policy.shared.clone().first_wait();
        let response = Box::pin(async move {
            let (turn, waited) = waited.await;
            let pass = turn.map_err(Error::NoKeyAvailable)?;
            poll_fn(|cx| Service::<Tracked<Req, R::Replayed>>::poll_ready(&mut retry, cx)).await?;
            retry.call(Tracked::admitted(request, pass, waited)).await
        });
        FailoverFuture { state: State::Waiting { response } }
    }
}

impl<S: fmt::Debug, K> fmt::Debug for Failover<S, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Failover")
            .field("inner", &self.retry.get_ref().0)
            .field("policy", &self.policy.shared)
            .finish()
    }
}

pin_project! {
    /// The response of a [`Failover`].
    pub struct FailoverFuture<F, R: ReadableResponse, E> {
        #[pin]
        state: State<F, R, E>,
    }
}

type Waiting<R, E> = Pin<Box<dyn Future<Output = Result<Attempt<R>, Error<E>>> + Send>>;

pin_project! {
    #[project = StateProjection]
    enum State<F, R: ReadableResponse, E> {
        Calling { #[pin] response: F },
        // Boxed, because it is only ever made where there is no key.
        Waiting { response: Waiting<R, E> },
    }
}

impl<F, R, E> Future for FailoverFuture<F, R, E>
where
    F: Future<Output = Result<Attempt<R>, Error<E>>>,
    R: ReadableResponse,
{
    type Output = Result<R::Replayed, Error<E>>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let attempt = ready!(match self.project().state.project() {
            StateProjection::Calling { response } => response.poll(cx),
            StateProjection::Waiting { response } => response.as_mut().poll(cx),
        })?;
        Poll::Ready(Ok(attempt.into_response()))
    }
}

impl<F, R: ReadableResponse, E> fmt::Debug for FailoverFuture<F, R, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FailoverFuture").finish_non_exhaustive()
    }
}
