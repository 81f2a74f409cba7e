//! How a request is kept for a further attempt.

use http::Request;
use http_body::Body;

/// Keeps a request for a further attempt. Any `Fn(&Req) -> Option<Req>` that clones requests does.
#[diagnostic::on_unimplemented(
    message = "a `{Req}` can't be kept to be sent again, as `failover` does",
    label = "the request's body is not `Clone`, or not an `http_body::Body`",
    note = "`failover` sends a request again if its body is `Clone` and an `http_body::Body` of a known length, such as `http_body_util::Full<Bytes>` or `String`",
    note = "for any other body, name a closure that clones requests: `Failover::attempts(3).clone_with(|request: &{Req}| …)`",
    note = "without `failover`, any body does"
)]
pub trait CloneRequest<Req> {
    /// A kept request: often a clone.
    type Kept;

    /// Keeps a request, before its first attempt. `None` if the request can only be sent once.
    fn keep(&self, request: &Req) -> Option<Self::Kept>;

    /// Makes the request for a further attempt, before anything is spent on it and again after a wait. The request
    /// is sent, or dropped where no key is left. After `None`, the caller gets the response of the attempt before.
    ///
    /// A body that streams, and is kept meanwhile up to a limit, can say here whether it stayed within the limit.
    fn again(&self, kept: &Self::Kept) -> Option<Req>;
}

impl<Req, F> CloneRequest<Req> for F
where
    F: Fn(&Req) -> Option<Req>,
{
    type Kept = Req;

    fn keep(&self, request: &Req) -> Option<Req> {
        self(request)
    }

    fn again(&self, kept: &Req) -> Option<Req> {
        self(kept)
    }
}

/// Clones an `http::Request` whose body is `Clone` and knows its exact length, and a `reqwest::Request` unless its body
/// streams.
///
/// The clone of an `http::Request` is sent only if its body still has the length that the original had before the first
/// attempt. Some bodies are `Clone` but share one stream: their clones are consumed with the original.
#[derive(Clone, Copy, Debug, Default)]
pub struct TryClone;

#[diagnostic::do_not_recommend]
impl<B: Clone + Body> CloneRequest<Request<B>> for TryClone {
    /// With the length of the original's body before the first attempt, and whether it had ended.
    type Kept = (Request<B>, u64, bool);

    #[inline]
    fn keep(&self, request: &Request<B>) -> Option<Self::Kept> {
        let length = request.body().size_hint().exact()?;
        Some((request.clone(), length, request.body().is_end_stream()))
    }

    fn again(&self, (kept, length, had_ended): &Self::Kept) -> Option<Request<B>> {
        let body = kept.body();
        let is_whole = body.size_hint().exact() == Some(*length) && body.is_end_stream() == *had_ended;
        is_whole.then(|| kept.clone())
    }
}

#[cfg(feature = "reqwest")]
impl CloneRequest<reqwest::Request> for TryClone {
    type Kept = reqwest::Request;

    fn keep(&self, request: &reqwest::Request) -> Option<reqwest::Request> {
        request.try_clone()
    }

    fn again(&self, kept: &reqwest::Request) -> Option<reqwest::Request> {
        kept.try_clone()
    }
}
