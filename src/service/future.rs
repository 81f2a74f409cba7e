//! The futures of responses.

use std::{
    fmt,
    future::{Future, poll_fn, ready},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use http::StatusCode;
use pin_project_lite::pin_project;
use tower_service::Service;
use tracing::Instrument;

use super::{
    attempts::{Attempts, Client},
    error::{Error, Refused},
    judge::{Judge, Outcome},
    mode::Attempt,
    reservation,
    rotation::Rotation,
    trace::Trace,
};
use crate::{
    classify::ClassifyResponse,
    limit::Traits,
    message::{JudgedResponse, RequestMessage, ResponseMessage},
    pool::Lease,
};

pin_project! {
    /// The response of a [`KeyRotation`](crate::KeyRotation) that sends each request [once](super::Once).
    pub struct ResponseFuture<F, C> {
        #[pin]
        state: State<F, C>,
    }
}

pin_project! {
    #[project = StateProjection]
    enum State<F, C> {
        Keyed { #[pin] response: F, judge: Judge<C>, lease: Lease },
        // Without a key, or with an explanation. One variant for both: a fourth one would make the usual way longer.
        Unusual { #[pin] response: F, traced: Option<Box<Traced<C>>> },
        Refused { refused: Option<Box<Refused>> },
    }
}

/// A request that is explained.
struct Traced<C> {
    judge: Judge<C>,
    lease: Lease,
    trace: Trace,
}

impl<F, C> ResponseFuture<F, C> {
    pub(crate) fn keyed(response: F, judge: Judge<C>, lease: Lease) -> Self {
        Self { state: State::Keyed { response, judge, lease } }
    }

    pub(crate) fn traced(response: F, judge: Judge<C>, lease: Lease, trace: Trace) -> Self {
        let traced = Some(Box::new(Traced { judge, lease, trace }));
        Self { state: State::Unusual { response, traced } }
    }

    pub(crate) fn keyless(response: F) -> Self {
        Self { state: State::Unusual { response, traced: None } }
    }

    pub(crate) fn refused(refused: Box<Refused>) -> Self {
        Self { state: State::Refused { refused: Some(refused) } }
    }
}

impl<F, C, R, E> Future for ResponseFuture<F, C>
where
    F: Future<Output = Result<R, E>>,
    C: ClassifyResponse,
    R: ResponseMessage,
    E: 'static,
{
    type Output = Result<R, Error<E>>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().state.project() {
            StateProjection::Keyed { response, judge, lease } => {
                // Judged in the place where it is returned: a response is large.
                let mut result = ready!(response.poll(cx)).map_err(Error::Inner);
                judge.settle_here(lease, &mut result, None, |lease, response| {
                    reservation::keep(lease, response, R::tell_end);
                });
                Poll::Ready(result)
            }
            StateProjection::Unusual { response, traced: None } => response.poll(cx).map_err(Error::Inner),
            StateProjection::Unusual { response, traced: Some(traced) } => {
                let Traced { judge, lease, trace } = &mut **traced;
                let _entered = trace.enter();
                let mut result = ready!(response.poll(cx)).map_err(Error::Inner);
                judge.settle(lease, &mut result, None, |lease, response| {
                    reservation::keep(lease, response, R::tell_end);
                });
                trace.answered(lease, &result);
                Poll::Ready(result)
            }
            // A future is not polled again once it is ready.
            StateProjection::Refused { refused } => match refused.take() {
                Some(refused) => Poll::Ready(Err(refused.into_error())),
                None => Poll::Pending,
            },
        }
    }
}

impl<F, C> fmt::Debug for ResponseFuture<F, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}

type Answer<M, Req, S> =
    Result<<M as Attempt<Req, <S as Service<Req>>::Response>>::Response, Error<<S as Service<Req>>::Error>>;

type Boxed<T> = Pin<Box<dyn Future<Output = T> + Send>>;

pin_project! {
    /// The response of a [`KeyRotation`](crate::KeyRotation) that may wait for a key, read the bodies of errors, or send a
    /// refused request again.
    // Its parts stand side by side rather than in an enum: a request is large, and is moved once less so.
    pub struct FailoverFuture<S, C, M, Req>
    where
        S: Service<Req>,
        M: Attempt<Req, S::Response>,
    {
        #[pin]
        first: Option<S::Future>,
        // None where the request has no key.
        lease: Option<Lease>,
        kept: Option<M::Kept>,
        traits: Option<Traits>,
        trace: Trace,
        client: S,
        rotation: Arc<Rotation<C, M>>,
        // Boxed: only a limited request, or one that waits, comes here.
        going_on: Option<Boxed<Answer<M, Req, S>>>,
    }
}

impl<S, C, M, Req> FailoverFuture<S, C, M, Req>
where
    S: Service<Req>,
    M: Attempt<Req, S::Response>,
{
    #[inline]
    pub(crate) fn first(
        first: S::Future,
        lease: Option<Lease>,
        kept: Option<M::Kept>,
        traits: Option<Traits>,
        trace: Trace,
        client: S,
        rotation: Arc<Rotation<C, M>>,
    ) -> Self {
        Self { first: Some(first), lease, kept, traits, trace, client, rotation, going_on: None }
    }

    #[cold]
    pub(crate) fn refused(refused: Refused, client: S, rotation: Arc<Rotation<C, M>>) -> Self
    where
        M::Response: Send + 'static,
        S::Error: Send + 'static,
    {
        Self::going_on(Box::pin(ready(Err(refused.into_error()))), client, rotation)
    }

    fn going_on(going_on: Boxed<Answer<M, Req, S>>, client: S, rotation: Arc<Rotation<C, M>>) -> Self {
        Self {
            first: None,
            lease: None,
            kept: None,
            traits: None,
            trace: Trace::none(),
            client,
            rotation,
            going_on: Some(going_on),
        }
    }
}

impl<S, C, M, Req> FailoverFuture<S, C, M, Req>
where
    S: Service<Req, Response: Send + 'static, Error: Send + 'static, Future: Send + 'static>
        + Clone
        + Send
        + 'static,
    C: ClassifyResponse + Send + Sync + 'static,
    M: Attempt<Req, S::Response> + Send + Sync + 'static,
    Req: RequestMessage + Send + 'static,
{
    #[cold]
    pub(crate) fn in_turn(
        request: Req,
        traits: Option<Traits>,
        trace: Trace,
        client: S,
        rotation: Arc<Rotation<C, M>>,
    ) -> Self {
        let span = trace.span();
        let attempts = Attempts::new(rotation.clone(), WhenReady(client.clone()), traits, trace);
        Self::going_on(Box::pin(attempts.run(request).instrument(span)), client, rotation)
    }
}

impl<S, C, M, Req> Future for FailoverFuture<S, C, M, Req>
where
    S: Service<
            Req,
            Response: ResponseMessage + Send + 'static,
            Error: Send + 'static,
            Future: Send + 'static,
        > + Clone
        + Send
        + 'static,
    C: ClassifyResponse + Send + Sync + 'static,
    M: Attempt<Req, S::Response> + Send + Sync + 'static,
    Req: RequestMessage + Send + 'static,
{
    type Output = Answer<M, Req, S>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        if let Some(first) = this.first.as_mut().as_pin_mut() {
            let entered = this.trace.enter();
            let mut result = ready!(first.poll(cx)).map_err(Error::Inner);
            drop(entered);
            let Some(lease) = this.lease else { return Poll::Ready(result.map(M::untouched)) };
            let rotation = &**this.rotation;
            let reads = M::SEES_BODIES
                && rotation.reads_bodies()
                && result.as_ref().is_ok_and(|response| rotation.reads(response));
            let has_kept = this.kept.is_some();
            let is_settled_later = reads
                || result.as_ref().is_ok_and(|response| {
                    response.status() == StatusCode::UNAUTHORIZED
                        && has_kept
                        && rotation.may_be_outdated(lease)
                });
            let outcome =
                (!is_settled_later).then(|| rotation.judge.settle(lease, &mut result, None, |_, _| {}));
            if outcome.is_some() {
                this.trace.answered(lease, &result);
            }
            let has_ended = match outcome {
                Some(Outcome::Answered) => {
                    if this.kept.is_some()
                        && let Some(resend) = rotation.mode.resend()
                    {
                        resend.deposit();
                    }
                    true
                }
                Some(Outcome::Refused | Outcome::Unclear) => this.kept.is_none(),
                Some(Outcome::KeyRested | Outcome::Failed | Outcome::Overloaded) => true,
                None => false,
            };
            if has_ended {
                let mut result = result.map(M::untouched);
                if lease.holds_anything()
                    && let Ok(response) = &mut result
                {
                    reservation::keep(lease, response, M::tell_end);
                }
                return Poll::Ready(result);
            }
            let Some(lease) = this.lease.take() else { return Poll::Ready(result.map(M::untouched)) };
            let client = WhenReady(this.client.clone());
            let trace = std::mem::replace(this.trace, Trace::none());
            let span = trace.span();
            let attempts = Attempts::new(this.rotation.clone(), client, this.traits.take(), trace);
            let kept = this.kept.take();
            let going_on = attempts.go_on(kept, lease, result.map(M::untouched), outcome).instrument(span);
            this.first.set(None);
            *this.going_on = Some(Box::pin(going_on));
        }
        match this.going_on {
            Some(going_on) => going_on.as_mut().poll(cx),
            None => Poll::Pending,
        }
    }
}

impl<S, C, M, Req> fmt::Debug for FailoverFuture<S, C, M, Req>
where
    S: Service<Req>,
    M: Attempt<Req, S::Response>,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FailoverFuture").finish_non_exhaustive()
    }
}

/// A service that is asked whether it is ready before each attempt.
struct WhenReady<S>(S);

impl<S, Req> Client<Req, S::Response, S::Error> for WhenReady<S>
where
    S: Service<Req, Future: Send> + Clone + Send,
    Req: Send,
{
    async fn ready(&mut self) -> Result<(), S::Error> {
        poll_fn(|cx| self.0.poll_ready(cx)).await
    }

    async fn send(&mut self, request: Req) -> Result<S::Response, S::Error> {
        self.0.call(request).await
    }

    fn release(&mut self) {
        self.0 = self.0.clone();
    }
}
