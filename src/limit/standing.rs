//! What is left of a limit, for an operator.

use std::{fmt, time::Duration};

/// What is left of one budget: see [`ExplainedKey::budgets`](crate::ExplainedKey::budgets).
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct BudgetStats {
    /// What is counted.
    pub unit: Unit,
    /// Where the pool knows it from.
    pub known_by: KnownBy,
    /// What is left, as the pool counts. Below 0 after a request that cost more than there was.
    pub left: f64,
    /// How much it holds when it is full.
    pub limit: f64,
    /// The time until it is full again, if nothing is taken: of a window, until that ends. Serialized in seconds, with a
    /// fraction.
    #[cfg_attr(feature = "serde", serde(rename = "resets_in_seconds", serialize_with = "seconds"))]
    pub resets_in: Duration,
    /// Whether all of it comes back at once. Otherwise it refills steadily.
    pub is_window: bool,
}

/// What a budget counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Unit {
    /// Requests.
    Requests,
    /// Tokens, or whatever else requests cost.
    Tokens,
}

/// Where a pool knows a limit from, and so how sure it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum KnownBy {
    /// The user configured it.
    Quota,
    /// The service's headers say it.
    Headers,
    /// Nobody says it. The pool raises the rate until the service refuses a request, and lowers it then.
    Refusals,
    /// The service's headers contradicted its answers, so the pool ignores them and goes by refusals.
    Distrusted,
}

/// Why a limit has no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Closed {
    Resting,
    /// The number of the budget.
    Budget(usize),
    InFlight {
        in_flight: u32,
        most: u32,
    },
}

impl fmt::Display for BudgetStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = match self.unit {
            Unit::Requests => "requests",
            Unit::Tokens => "tokens",
        };
        let known_by = match self.known_by {
            KnownBy::Quota => "quota",
            KnownBy::Headers => "headers",
            KnownBy::Refusals => "refusals",
            KnownBy::Distrusted => "refusals, headers distrusted",
        };
        write!(f, "{:.1} of {:.0} {unit} left (by {known_by})", self.left, self.limit)
    }
}

#[cfg(feature = "serde")]
fn seconds<S: serde::Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(time.as_secs_f64())
}
