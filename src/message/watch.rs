//! Who sees a body as it passes.

use http::HeaderMap;

/// Sees a body as it passes, in order.
pub trait Watch: Send + Sync {
    /// Sees the next data.
    fn data(&self, data: &[u8]) -> Seen;
    /// Sees trailers.
    fn trailers(&self, trailers: &HeaderMap) -> Seen;
    /// The body has ended. Not called if the body fails or is dropped.
    fn ended(&self);
}

/// How much of a body has been seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Not enough to let the beginning go to the caller.
    TooLittle,
    /// Enough for that.
    Enough,
    /// All that matters. Nobody looks at the rest.
    All,
}
