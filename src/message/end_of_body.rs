//! Who is told when a body ends.

use std::{fmt, sync::Arc};

use http_body::Frame;

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
    pub(super) fn tell(&mut self, is_whole: bool) {
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
