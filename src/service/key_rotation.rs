//! The service.

use std::{
    fmt,
    sync::Arc,
    task::{Context, Poll},
};

use tower_service::Service;

use super::{
    describe::{Describe, FromExtensions},
    error::Error,
    mode::Once,
    rotation::Rotation,
    send::SendBy,
};
use crate::classify::TooManyRequests;

/// A client that sends each request with a key: see the [module](crate::service).
pub struct KeyRotation<S, C = TooManyRequests, M = Once, D = FromExtensions> {
    inner: S,
    rotation: Arc<Rotation<C, M>>,
    describe: D,
}

impl<S, C, M, D> KeyRotation<S, C, M, D> {
    pub(crate) fn new(inner: S, rotation: Arc<Rotation<C, M>>, describe: D) -> Self {
        Self { inner, rotation, describe }
    }
}

impl<S: Clone, C, M, D: Clone> Clone for KeyRotation<S, C, M, D> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), rotation: self.rotation.clone(), describe: self.describe.clone() }
    }
}

impl<S, C, M, D, Req> Service<Req> for KeyRotation<S, C, M, D>
where
    S: Service<Req>,
    Req: SendBy<S, C, M>,
    D: Describe<Req>,
{
    type Response = Req::Response;
    type Error = Error<S::Error>;
    type Future = Req::Future;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(Error::Inner)
    }

    fn call(&mut self, request: Req) -> Self::Future {
        let traits = |request: &Req| self.describe.describe(request);
        request.send(&mut self.inner, &self.rotation, traits)
    }
}

impl<S: fmt::Debug, C, M, D> fmt::Debug for KeyRotation<S, C, M, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyRotation").field("inner", &self.inner).field("rotation", &self.rotation).finish()
    }
}
