//! How a layer learns what a request is.

use crate::{limit::Traits, message::RequestMessage};

/// Says what a request is: see [`KeyRotationLayer::describe`](crate::KeyRotationLayer::describe). Any
/// `Fn(&Req) -> Traits` does.
#[diagnostic::on_unimplemented(
    message = "`{Self}` can't say what a `{Req}` is",
    label = "the client inside `KeyRotationLayer` takes a `{Req}`",
    note = "name the request's type: `describe(|request: &{Req}| Traits::new())`"
)]
pub trait Describe<Req> {
    #[doc(hidden)]
    fn describe(&self, request: &Req) -> Option<Traits>;
}

/// Takes the [`Traits`] in the extensions of an `http::Request`. Requests without them, and every `reqwest::Request`, have
/// none.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct FromExtensions;

impl<Req: RequestMessage> Describe<Req> for FromExtensions {
    #[inline(always)]
    fn describe(&self, request: &Req) -> Option<Traits> {
        request.traits()
    }
}

impl<Req, F: Fn(&Req) -> Traits> Describe<Req> for F {
    #[inline]
    fn describe(&self, request: &Req) -> Option<Traits> {
        Some(self(request))
    }
}
