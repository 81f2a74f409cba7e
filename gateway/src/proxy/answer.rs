//! The body of a response to the caller.

use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use axum::body::{Bytes, HttpBody};
use hyper::body::{Frame, SizeHint};
use tokio::time::{Instant, Sleep, sleep};
use tower::BoxError;

use crate::with_sources;

/// A response body on its way to the caller.
///
/// - It fails if the upstream sends nothing for too long. Then the response to the caller breaks off, too.
/// - It drops trailers, because the gateway does not search them for a key that the upstream repeats.
/// - It delays an error until hyper has sent the head and what came of the body. Otherwise hyper would close an HTTP/1.1
///   connection without them. In HTTP/2, what waits for the caller's window is lost all the same.
pub(super) struct AnswerBody<B> {
    body: B,
    /// How long the upstream may send nothing.
    idle: Duration,
    /// Runs while the upstream is waited for. Most bodies have arrived with their head and never need it.
    patience: Option<Pin<Box<Sleep>>>,
    is_waiting: bool,
    /// The error of a body that has failed.
    error: Option<BoxError>,
}

impl<B> AnswerBody<B> {
    pub(super) fn new(body: B, idle: Duration) -> Self {
        Self { body, idle, patience: None, is_waiting: false, error: None }
    }

    /// Whether the upstream has sent nothing for too long.
    fn is_idle(&mut self, cx: &mut Context<'_>) -> bool {
        let idle = self.idle;
        let patience = self.patience.get_or_insert_with(|| Box::pin(sleep(idle)));
        if !std::mem::replace(&mut self.is_waiting, true) {
            patience.as_mut().reset(Instant::now() + idle);
        }
        patience.as_mut().poll(cx).is_ready()
    }
}

impl<B: HttpBody<Data = Bytes, Error: Into<BoxError>> + Unpin> HttpBody for AnswerBody<B> {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if let Some(error) = self.error.take() {
            return Poll::Ready(Some(Err(error)));
        }
        let error = match Pin::new(&mut self.body).poll_frame(cx) {
            Poll::Pending if self.is_idle(cx) => Idle.into(),
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Some(Err(error))) => error.into(),
            Poll::Ready(frame) => {
                self.is_waiting = false;
                let frame = frame.and_then(Result::ok).filter(|frame| !frame.is_trailers());
                return Poll::Ready(frame.map(Ok));
            }
        };
        tracing::warn!("the upstream's response broke off: {}", with_sources(&*error));
        self.error = Some(error);
        // hyper sends what it has while it waits for the body.
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn is_end_stream(&self) -> bool {
        self.error.is_none() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The upstream has sent nothing for too long.
#[derive(Debug)]
struct Idle;

impl fmt::Display for Idle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("nothing arrived within the idle timeout")
    }
}

impl std::error::Error for Idle {}
