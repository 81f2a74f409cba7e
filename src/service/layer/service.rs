use std::{
    fmt,
    sync::Arc,
    task::{Context, Poll},
};

use tower_service::Service;

use super::ResponseFuture;
use crate::{
    classify::{ClassifyResponse, TooManyRequests},
    message::{RequestMessage, ResponseMessage},
    service::error::Error,
    service::rotation::Rotation,
};

/// A client that sends each request with a key: see the [module](super).
pub struct KeyRotation<S, C = TooManyRequests> {
    inner: S,
    rotation: Arc<Rotation<C>>,
}

impl<S, C> KeyRotation<S, C> {
    pub(super) fn new(inner: S, rotation: Arc<Rotation<C>>) -> Self {
        Self { inner, rotation }
    }

    /// The client.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }

    /// The client, to be changed.
    pub fn get_mut(&mut self) -> &mut S {
        &mut self.inner
    }

    /// The client alone again.
    pub fn into_inner(self) -> S {
        self.inner
    }
}

impl<S: Clone, C> Clone for KeyRotation<S, C> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), rotation: self.rotation.clone() }
    }
}

impl<S, C, Req> Service<Req> for KeyRotation<S, C>
where
    S: Service<Req>,
    S::Response: ResponseMessage,
    S::Error: 'static,
    C: ClassifyResponse + Clone,
    Req: RequestMessage,
{
    type Response = S::Response;
    type Error = Error<S::Error>;
    type Future = ResponseFuture<S::Future, C>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(Error::Inner)
    }

    fn call(&mut self, mut request: Req) -> Self::Future {
        match self.rotation.prepare(&mut request) {
            Ok(Some(lease)) => {
                ResponseFuture::keyed(self.inner.call(request), self.rotation.observer.clone(), lease)
            }
            Ok(None) => ResponseFuture::keyless(self.inner.call(request)),
            Err(refused) => ResponseFuture::refused(refused),
        }
    }
}

impl<S: fmt::Debug, C> fmt::Debug for KeyRotation<S, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyRotation").field("inner", &self.inner).field("rotation", &self.rotation).finish()
    }
}
