//! What a response says is left of the service's budgets.

use std::time::Duration;

/// One budget, as a response describes it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Left {
    /// The size of the budget; above 0.
    pub(crate) limit: f64,
    /// The unused part of the budget; from 0 to `limit`.
    pub(crate) remaining: f64,
    /// The time until the bucket is full, or until the window ends.
    pub(crate) reset: Duration,
    /// The resolution of `reset`.
    pub(crate) resolution: Duration,
    /// How the budget refills; `None` if the family of headers does not say.
    pub(crate) kind: Option<Kind>,
}

/// The way a budget refills.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Steadily.
    Bucket,
    /// All at once, when the window ends.
    Window,
}

/// The budgets of requests and of tokens, and whose they are.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Remaining {
    pub(crate) requests: Option<Left>,
    pub(crate) tokens: Option<Left>,
    /// A hash of the name of the organisation that the key belongs to; 0 if the response names none.
    pub(crate) organisation: u64,
}

impl Remaining {
    pub(crate) fn is_known(&self) -> bool {
        self.requests.is_some() || self.tokens.is_some()
    }
}
