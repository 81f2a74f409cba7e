//! A body that holds a value until it ends or is dropped.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use axum::body::HttpBody;
use hyper::body::{Frame, SizeHint};

/// A body, and a value that is dropped at the body's end, or with the body.
pub(crate) struct Held<B, T> {
    body: B,
    held: Option<T>,
}

impl<B: HttpBody, T> Held<B, T> {
    /// Drops the value at once if there is no body.
    pub(crate) fn new(body: B, held: T) -> Self {
        let held = (!body.is_end_stream()).then_some(held);
        Self { body, held }
    }
}

impl<B: HttpBody + Unpin, T: Unpin> HttpBody for Held<B, T> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if !matches!(frame, Some(Ok(_))) || self.body.is_end_stream() {
            self.held = None;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
