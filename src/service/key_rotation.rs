//! The service.

use std::{
    fmt,
    sync::Arc,
    task::{Context, Poll},
};

use tower_service::Service;

use super::{error::Error, mode::Once, rotation::Rotation, send::SendBy};
use crate::classify::TooManyRequests;

/// A client that sends each request with a key: see the [module](crate::service).
pub struct KeyRotation<S, C = TooManyRequests, M = Once> {
    inner: S,
    rotation: Arc<Rotation<C, M>>,
}

impl<S, C, M> KeyRotation<S, C, M> {
    pub(crate) fn new(inner: S, rotation: Arc<Rotation<C, M>>) -> Self {
        Self { inner, rotation }
    }
}

impl<S: Clone, C, M> Clone for KeyRotation<S, C, M> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), rotation: self.rotation.clone() }
    }
}

impl<S, C, M, Req> Service<Req> for KeyRotation<S, C, M>
where
    S: Service<Req>,
    Req: SendBy<S, C, M>,
{
    type Response = Req::Response;
    type Error = Error<S::Error>;
    type Future = Req::Future;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(Error::Inner)
    }

    fn call(&mut self, request: Req) -> Self::Future {
        request.send(&mut self.inner, &self.rotation)
    }
}

impl<S: fmt::Debug, C, M> fmt::Debug for KeyRotation<S, C, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyRotation").field("inner", &self.inner).field("rotation", &self.rotation).finish()
    }
}
