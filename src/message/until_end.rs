//! A body that says when it ends.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

use super::end_of_body::{EndOfBody, TellsEnd};

pin_project! {
    /// A body that passes unchanged, and says when it ends.
    pub(crate) struct UntilEnd<B> {
        #[pin]
        body: B,
        end: TellsEnd,
    }
}

impl<B: Body> UntilEnd<B> {
    pub(crate) fn new(body: B, end: Arc<dyn EndOfBody>) -> Self {
        let mut end = TellsEnd::to(end);
        if body.is_end_stream() {
            end.tell(true);
        }
        Self { body, end }
    }
}

impl<B: Body> Body for UntilEnd<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let mut this = self.project();
        let frame = ready!(this.body.as_mut().poll_frame(cx));
        this.end.look(frame.as_ref(), || this.body.is_end_stream());
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
