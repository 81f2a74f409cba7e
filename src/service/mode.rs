//! How a layer sends requests, as a type.

use std::{
    convert::Infallible,
    future::{Future, ready},
    sync::Arc,
};

use bytes::Bytes;

use super::{
    clone::CloneRequest,
    failover::{Failover, Resend},
};
use crate::{
    clock::Sleep,
    message::{EndOfBody, ReadableResponse, ResponseMessage, Watch},
};

/// Each request is sent once. Where there is no key, it fails at once. The response type is the client's.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Once;

/// Each request is sent once. Where there is no key, it waits for one. The response type is the client's.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Waiting;

/// What a mode does with requests and responses of these types.
pub trait Attempt<Req, R> {
    type Kept: Send + 'static;
    type Response: ResponseMessage + Send + 'static;
    /// Whether the mode can see bodies.
    const SEES_BODIES: bool;

    /// Whether requests may be sent again, and how often.
    fn resend(&self) -> Option<&Resend>;
    /// Keeps a request, before its first attempt, for a further one.
    fn keep(&self, request: &Req) -> Option<Self::Kept>;
    /// The request for a further attempt, if it can be sent now.
    fn again(&self, kept: &Self::Kept) -> Option<Req>;

    fn untouched(response: R) -> Self::Response;
    fn read(
        response: Self::Response,
        most: usize,
        time_over: Sleep,
    ) -> impl Future<Output = (Self::Response, Bytes)> + Send;
    /// Reads a body until `watch` has seen enough of it, if the mode can see the body.
    fn hold(
        response: Self::Response,
        watch: Arc<dyn Watch>,
        end: Option<Arc<dyn EndOfBody>>,
        time_over: Sleep,
    ) -> impl Future<Output = Self::Response> + Send;
    /// Has the body say when it ends, if the mode can see the body.
    fn tell_end(response: &mut Self::Response, end: Arc<dyn EndOfBody>);
}

/// Of the modes that keep nothing and read nothing.
macro_rules! sends_once {
    ($mode:ty) => {
        impl<Req, R: ResponseMessage + Send + 'static> Attempt<Req, R> for $mode {
            type Kept = Infallible;
            type Response = R;
            const SEES_BODIES: bool = false;

            fn resend(&self) -> Option<&Resend> {
                None
            }

            fn keep(&self, _: &Req) -> Option<Infallible> {
                None
            }

            fn again(&self, kept: &Infallible) -> Option<Req> {
                match *kept {}
            }

            fn untouched(response: R) -> R {
                response
            }

            fn read(response: R, _: usize, _: Sleep) -> impl Future<Output = (R, Bytes)> + Send {
                ready((response, Bytes::new()))
            }

            fn hold(
                response: R,
                _: Arc<dyn Watch>,
                _: Option<Arc<dyn EndOfBody>>,
                _: Sleep,
            ) -> impl Future<Output = R> + Send {
                ready(response)
            }

            fn tell_end(response: &mut R, end: Arc<dyn EndOfBody>) {
                response.tell_end(end);
            }
        }
    };
}

sends_once!(Once);
sends_once!(Waiting);

impl<K, Req, R> Attempt<Req, R> for Failover<K>
where
    K: CloneRequest<Req>,
    K::Kept: Send + 'static,
    R: ReadableResponse,
    R::Replayed: Send + 'static,
{
    type Kept = K::Kept;
    type Response = R::Replayed;
    const SEES_BODIES: bool = true;

    #[inline]
    fn resend(&self) -> Option<&Resend> {
        Some(&self.resend)
    }

    #[inline]
    fn keep(&self, request: &Req) -> Option<K::Kept> {
        self.clone.keep(request)
    }

    fn again(&self, kept: &K::Kept) -> Option<Req> {
        self.clone.again(kept)
    }

    #[inline]
    fn untouched(response: R) -> R::Replayed {
        response.untouched()
    }

    fn read(
        response: R::Replayed,
        most: usize,
        time_over: Sleep,
    ) -> impl Future<Output = (R::Replayed, Bytes)> + Send {
        R::read(response, most, time_over)
    }

    fn hold(
        response: R::Replayed,
        watch: Arc<dyn Watch>,
        end: Option<Arc<dyn EndOfBody>>,
        time_over: Sleep,
    ) -> impl Future<Output = R::Replayed> + Send {
        R::hold(response, watch, end, time_over)
    }

    fn tell_end(response: &mut R::Replayed, end: Arc<dyn EndOfBody>) {
        R::tell_end_of(response, end);
    }
}

impl<Req> CloneRequest<Req> for Once {
    type Kept = Infallible;

    fn keep(&self, _: &Req) -> Option<Infallible> {
        None
    }

    fn again(&self, kept: &Infallible) -> Option<Req> {
        match *kept {}
    }
}
