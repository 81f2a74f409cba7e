//! Reads the bodies of errors before the rotation looks at their heads.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use pin_project_lite::pin_project;
use tower_service::Service;

use crate::{
    classify::ClassifyResponse,
    key::hosts::Ruling,
    message::{ReadableResponse, RequestMessage, rule},
    service::rotation::{BodyLimits, Rotation},
};

/// A client whose errors come with the beginning of their bodies: what
/// [`KeyRotationLayer::read_error_bodies`](super::KeyRotationLayer::read_error_bodies) puts between the
/// rotation and the client.
pub struct ReadErrorBody<S, C> {
    inner: S,
    rotation: Arc<Rotation<C>>,
    limits: BodyLimits,
}

impl<S, C> ReadErrorBody<S, C> {
    pub(super) fn new(inner: S, rotation: Arc<Rotation<C>>, limits: BodyLimits) -> Self {
        Self { inner, rotation, limits }
    }
}

impl<S: Clone, C> Clone for ReadErrorBody<S, C> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), rotation: self.rotation.clone(), limits: self.limits }
    }
}

impl<S, C, Req> Service<Req> for ReadErrorBody<S, C>
where
    S: Service<Req>,
    S::Response: ReadableResponse + Send + 'static,
    C: ClassifyResponse,
    Req: RequestMessage,
{
    type Response = <S::Response as ReadableResponse>::Replayed;
    type Error = S::Error;
    type Future = ReadErrorBodyFuture<S::Future, S::Response, C>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Req) -> Self::Future {
        let keyed = rule(self.rotation.pool.hosts(), &request) == Ruling::Key;
        ReadErrorBodyFuture {
            state: State::Calling { response: self.inner.call(request), keyed },
            rotation: self.rotation.clone(),
            limits: self.limits,
        }
    }
}

impl<S: fmt::Debug, C> fmt::Debug for ReadErrorBody<S, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ReadErrorBody").field(&self.inner).finish()
    }
}

pin_project! {
    /// The response of a [`ReadErrorBody`].
    pub struct ReadErrorBodyFuture<F, R: ReadableResponse, C> {
        #[pin]
        state: State<F, R::Replayed>,
        rotation: Arc<Rotation<C>>,
        limits: BodyLimits,
    }
}

pin_project! {
    #[project = StateProjection]
    enum State<F, R> {
        Calling { #[pin] response: F, keyed: bool },
        // Boxed, because it is only ever made for errors.
        Reading { response: Pin<Box<dyn Future<Output = R> + Send>> },
    }
}

impl<F, R, E, C> Future for ReadErrorBodyFuture<F, R, C>
where
    F: Future<Output = Result<R, E>>,
    R: ReadableResponse + Send + 'static,
    C: ClassifyResponse,
{
    type Output = Result<R::Replayed, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        loop {
            match this.state.as_mut().project() {
                StateProjection::Calling { response, keyed } => {
                    let response = ready!(response.poll(cx))?;
                    if !*keyed || !this.rotation.observer.wants_body(&response) {
                        return Poll::Ready(Ok(response.untouched()));
                    }
                    let (limits, pool) = (*this.limits, this.rotation.pool.clone());
                    let response = Box::pin(async move { limits.read(&pool, response).await });
                    this.state.set(State::Reading { response });
                }
                StateProjection::Reading { response } => return response.as_mut().poll(cx).map(Ok),
            }
        }
    }
}

impl<F, R: ReadableResponse, C> fmt::Debug for ReadErrorBodyFuture<F, R, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReadErrorBodyFuture").finish_non_exhaustive()
    }
}
