//! How a request is kept for a further attempt.

use http::Request;

/// Clones a request for another attempt, if that can be done. Any `Fn(&Req) -> Option<Req>` does.
pub trait CloneRequest<Req> {
    /// The clone; `None` where the request can only be sent once.
    fn clone_request(&self, request: &Req) -> Option<Req>;

    /// Whether a clone can be sent, which is asked when its turn may have come: after the response of the attempt
    /// before, and before anything is spent on a further one. By default it can.
    ///
    /// This is for a body that streams, and is kept meanwhile up to a limit: whether it stays within that is not
    /// known yet when the request is cloned. After `true`, the clone is sent, or dropped where no key is left.
    /// After `false`, the caller gets the response that there is.
    fn can_send_again(&self, request: &Req) -> bool {
        let _ = request;
        true
    }
}

/// Clones an `http::Request` whose body is `Clone`, and a `reqwest::Request` unless its body streams.
#[derive(Clone, Copy, Debug, Default)]
pub struct TryClone;

impl<B: Clone> CloneRequest<Request<B>> for TryClone {
    #[inline]
    fn clone_request(&self, request: &Request<B>) -> Option<Request<B>> {
        Some(request.clone())
    }
}

#[cfg(feature = "reqwest")]
impl CloneRequest<reqwest::Request> for TryClone {
    fn clone_request(&self, request: &reqwest::Request) -> Option<reqwest::Request> {
        request.try_clone()
    }
}

impl<Req, F> CloneRequest<Req> for F
where
    F: Fn(&Req) -> Option<Req>,
{
    fn clone_request(&self, request: &Req) -> Option<Req> {
        self(request)
    }
}
