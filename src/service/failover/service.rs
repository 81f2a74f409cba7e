use std::{
    fmt,
    future::{Future, poll_fn},
    pin::Pin,
    task::{Context, Poll, ready},
};

use pin_project_lite::pin_project;
use tower_service::Service;

use super::{
    attempts::{History, SendOnce, Sending, go_on, send_with_failover},
    clone::{CloneRequest, TryClone},
    policy::FailoverPolicy,
};
use crate::{
    message::{ReadableResponse, RequestMessage},
    pool::Lease,
    service::error::Error,
    service::tried,
};

/// A client that sends a limited request again with another key: see the [module](super).
#[derive(Clone)]
pub struct Failover<S, K = TryClone> {
    inner: S,
    policy: FailoverPolicy<K>,
}

impl<S, K> Failover<S, K> {
    pub(super) fn new(inner: S, policy: FailoverPolicy<K>) -> Self {
        Self { inner, policy }
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
    type Future = FailoverFuture<S, K, Req>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), E>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Req) -> Self::Future {
        if self.policy.shared.is_closed_to(&request) {
            return self.call_when_it_is_its_turn(request);
        }
        let again = self.policy.clone.clone_request(&request);
        let response = self.inner.call(request);
        FailoverFuture {
            first: Some(response),
            again,
            client: self.inner.clone(),
            policy: self.policy.clone(),
            going_on: None,
        }
    }
}

impl<S: Clone, K: Clone> Failover<S, K> {
    #[cold]
    fn call_when_it_is_its_turn<Req, R, E>(&mut self, request: Req) -> FailoverFuture<S, K, Req>
    where
        S: Service<Req, Response = R, Error = Error<E>> + Send + 'static,
        S::Future: Send + 'static,
        K: CloneRequest<Req> + Send + 'static,
        Req: RequestMessage + Send + 'static,
        R: ReadableResponse + Send + 'static,
        R::Replayed: Send + 'static,
        E: Send + 'static,
    {
        // The service that was made ready may hold a permit for that. It is given back while the request waits,
        // since a request that goes before it may need that permit.
        self.inner = self.inner.clone();
        let client = WhenReady(self.inner.clone());
        FailoverFuture {
            first: None,
            again: None,
            client: self.inner.clone(),
            policy: self.policy.clone(),
            going_on: Some(Box::pin(send_with_failover(self.policy.clone(), request, client))),
        }
    }
}

impl<S: fmt::Debug, K> fmt::Debug for Failover<S, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Failover").field("inner", &self.inner).field("policy", &self.policy.shared).finish()
    }
}

/// A client that is asked whether it is ready before each attempt.
struct WhenReady<S>(S);

impl<S, Req, R, E> SendOnce<Req, R, E> for WhenReady<S>
where
    S: Service<Req, Response = R, Error = Error<E>> + Send,
    S::Future: Send,
    Req: Send + 'static,
{
    fn send(&mut self, request: Req, tried: Vec<Lease>) -> Sending<'_, R, E> {
        Box::pin(async move {
            poll_fn(|cx| self.0.poll_ready(cx)).await?;
            tried::call_without(tried, || self.0.call(request)).await
        })
    }
}

type Result<R, E> = std::result::Result<R, Error<E>>;

type GoingOn<R, E> = Pin<Box<dyn Future<Output = std::result::Result<R, E>> + Send>>;

pin_project! {
    /// The response of a [`Failover`].
    // Its parts stand side by side rather than in an enum: a request is large, and so is moved once less.
    pub struct FailoverFuture<S, K, Req>
    where
        S: Service<Req>,
        S::Response: ReadableResponse,
    {
        #[pin]
        first: Option<S::Future>,
        // The request once more, if it could be cloned, and whom to send it to.
        again: Option<Req>,
        client: S,
        policy: FailoverPolicy<K>,
        // Boxed, because it is only ever made where a key is limited or there is none.
        going_on: Option<GoingOn<<S::Response as ReadableResponse>::Replayed, S::Error>>,
    }
}

impl<S, K, Req, R, E> Future for FailoverFuture<S, K, Req>
where
    S: Service<Req, Response = R, Error = Error<E>> + Clone + Send + 'static,
    S::Future: Send,
    K: CloneRequest<Req> + Clone + Send + 'static,
    Req: Send + 'static,
    R: ReadableResponse + Send + 'static,
    R::Replayed: Send + 'static,
    E: Send + 'static,
{
    type Output = Result<R::Replayed, E>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        if let Some(first) = this.first.as_mut().as_pin_mut() {
            let result = ready!(first.poll(cx));
            if this.again.is_none() || this.policy.shared.settles(&result) {
                return Poll::Ready(result.map(ReadableResponse::untouched));
            }
            let (client, policy) = (WhenReady(this.client.clone()), this.policy.clone());
            let going_on = go_on(policy, this.again.take(), client, History::default(), result);
            this.first.set(None);
            *this.going_on = Some(Box::pin(going_on));
        }
        match this.going_on {
            Some(going_on) => going_on.as_mut().poll(cx),
            None => Poll::Pending,
        }
    }
}

impl<S, K, Req> fmt::Debug for FailoverFuture<S, K, Req>
where
    S: Service<Req>,
    S::Response: ReadableResponse,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FailoverFuture").finish_non_exhaustive()
    }
}
