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

/// No service has a larger budget, or one that lasts longer. Learning relies on that: larger numbers would overflow.
const LARGEST_LIMIT: f64 = (1_u64 << 40) as f64;
const LONGEST_RESET: Duration = Duration::from_secs(400 * 24 * 60 * 60);

impl Left {
    /// Whether a service may say so.
    pub(crate) fn is_possible(&self) -> bool {
        let Self { limit, remaining, reset, resolution, .. } = *self;
        (1.0..=LARGEST_LIMIT).contains(&limit)
            && (0.0..=limit).contains(&remaining)
            && reset <= LONGEST_RESET
            && resolution <= Duration::from_secs(1)
    }
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
