//! The body of a response to the caller.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use axum::body::{Body, Bytes, HttpBody};
use hyper::body::{Frame, SizeHint};

struct AnswerBody {
    body: Body,
    /// The error of a body that has failed.
    error: Option<axum::Error>,
}

/// Wraps a response body.
///
/// - It drops trailers, because the gateway does not search them for a key that the upstream repeats.
/// - It delays an error until hyper has sent the head and what came of the body. Otherwise hyper would close an HTTP/1.1
///   connection without them. In HTTP/2, what waits for the caller's window is lost all the same.
pub(super) fn body(body: Body) -> Body {
    if body.is_end_stream() {
        return body;
    }
    Body::new(AnswerBody { body, error: None })
}

impl HttpBody for AnswerBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if let Some(error) = self.error.take() {
            return Poll::Ready(Some(Err(error)));
        }
        match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
            Some(Err(error)) => {
                self.error = Some(error);
                // hyper sends what it has while it waits for the body.
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            frame => Poll::Ready(frame.filter(|frame| !frame.as_ref().is_ok_and(Frame::is_trailers))),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.error.is_none() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
