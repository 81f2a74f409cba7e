//! A body that fails if it is not whole.
//!
//! hyper takes the end of an HTTP/2 stream by `RST_STREAM` or `GOAWAY` with `NO_ERROR` for the end of its body. Without
//! a `content-length`, the receiver could not tell that such a body is cut off.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use axum::body::HttpBody;
use http::Version;
use hyper::body::{Frame, SizeHint};
use tower::BoxError;

/// A body of hyper's.
pub(crate) struct Whole<B> {
    body: B,
    /// hyper itself finds such bodies in HTTP/1.1.
    is_http_2: bool,
}

impl<B> Whole<B> {
    pub(crate) fn new(body: B, version: Version) -> Self {
        Self { body, is_http_2: version == Version::HTTP_2 }
    }
}

impl<B> HttpBody for Whole<B>
where
    B: HttpBody<Error: Into<BoxError>> + Unpin,
{
    type Data = B::Data;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, BoxError>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        // An HTTP/2 body is at the end of its stream only if the peer has ended it by END_STREAM.
        let is_cut_off = frame.is_none() && self.is_http_2 && !self.body.is_end_stream();
        Poll::Ready(if is_cut_off {
            Some(Err("the HTTP/2 stream ended before its body".into()))
        } else {
            frame.map(|frame| frame.map_err(Into::into))
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
