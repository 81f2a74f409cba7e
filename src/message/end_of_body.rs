//! A body that says when it ends.

use std::{
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

/// Is told once that a body has ended, or was dropped before that.
pub trait EndOfBody: Send + Sync {
    fn ended(&self, is_whole: bool);
}

/// Tells the end of a body. Dropped before that, it says so.
pub(crate) struct TellsEnd(Option<Arc<dyn EndOfBody>>);

impl TellsEnd {
    pub(crate) fn nobody() -> Self {
        Self(None)
    }

    pub(crate) fn to(end: Arc<dyn EndOfBody>) -> Self {
        Self(Some(end))
    }

    #[cold]
    fn tell(&mut self, is_whole: bool) {
        if let Some(end) = self.0.take() {
            end.ended(is_whole);
        }
    }

    /// Looks at what a body has yielded, and whether nothing follows.
    #[inline]
    pub(crate) fn look<D, E>(&mut self, frame: Option<&Result<Frame<D>, E>>, is_end: impl FnOnce() -> bool) {
        if self.0.is_some() {
            match frame {
                None => self.tell(true),
                Some(Err(_)) => self.tell(false),
                // Nobody has to ask for more than the last frame.
                Some(Ok(_)) if is_end() => self.tell(true),
                Some(Ok(_)) => {}
            }
        }
    }
}

impl Drop for TellsEnd {
    #[inline]
    fn drop(&mut self) {
        if self.0.is_some() {
            self.tell(false);
        }
    }
}

impl fmt::Debug for TellsEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("TellsEnd").field(&self.0.is_some()).finish()
    }
}

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
