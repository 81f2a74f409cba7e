use std::{
    fmt,
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
};

use pin_project_lite::pin_project;

use crate::{
    classify::ClassifyResponse,
    message::ResponseMessage,
    pool::Lease,
    service::error::{Error, Refused},
    service::rotation::Observer,
};

pin_project! {
    /// The response of a [`KeyRotation`](super::KeyRotation).
    pub struct ResponseFuture<F, C> {
        #[pin]
        state: State<F, C>,
    }
}

pin_project! {
    #[project = StateProjection]
    enum State<F, C> {
        Keyed { #[pin] response: F, observer: Observer<C>, lease: Lease },
        Keyless { #[pin] response: F },
        Refused { refused: Option<Box<Refused>> },
    }
}

impl<F, C> ResponseFuture<F, C> {
    pub(super) fn keyed(response: F, observer: Observer<C>, lease: Lease) -> Self {
        let state = State::Keyed { response, observer, lease };
        Self { state }
    }

    pub(super) fn keyless(response: F) -> Self {
        let state = State::Keyless { response };
        Self { state }
    }

    pub(super) fn refused(refused: Box<Refused>) -> Self {
        let state = State::Refused { refused: Some(refused) };
        Self { state }
    }
}

impl<F, C, Res, E> Future for ResponseFuture<F, C>
where
    F: Future<Output = Result<Res, E>>,
    C: ClassifyResponse,
    Res: ResponseMessage,
    E: 'static,
{
    type Output = Result<Res, Error<E>>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().state.project() {
            StateProjection::Keyed { response, observer, lease } => {
                Poll::Ready(observer.settle(lease, ready!(response.poll(cx))))
            }
            StateProjection::Keyless { response } => response.poll(cx).map_err(Error::Inner),
            // A future is not polled again once it is ready.
            StateProjection::Refused { refused } => match refused.take() {
                Some(refused) => Poll::Ready(Err(refused.into())),
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
