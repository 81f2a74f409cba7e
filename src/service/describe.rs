//! How a layer learns what a request is.

use crate::limit::Traits;

/// Says what a request is: see [`KeyRotationLayer::describe`](crate::KeyRotationLayer::describe). Any
/// `Fn(&Req) -> Traits` does.
#[diagnostic::on_unimplemented(
    message = "`{Self}` can't say what a `{Req}` is",
    label = "the client inside `KeyRotationLayer` takes a `{Req}`",
    note = "name the request's type: `describe(|request: &{Req}| Traits::new())`"
)]
pub trait Describe<Req> {
    /// `None` if the request's extensions say it.
    #[doc(hidden)]
    fn describe(&self, request: &Req) -> Option<Traits>;
}

/// Takes the [`Traits`] in the extensions of an `http::Request` or, as a middleware of `reqwest-middleware`, in those of the
/// request. Other requests have none.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct FromExtensions;

// For every type, so that the compiler's error about a wrong request names what is wrong with the request alone.
impl<Req> Describe<Req> for FromExtensions {
    #[inline(always)]
    fn describe(&self, _: &Req) -> Option<Traits> {
        None
    }
}

impl<Req, F: Fn(&Req) -> Traits> Describe<Req> for F {
    #[inline]
    fn describe(&self, request: &Req) -> Option<Traits> {
        Some(self(request))
    }
}
