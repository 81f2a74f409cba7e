//! What a request takes of a limit, and what its answer says.

use std::time::Duration;

use super::nanos;

/// What one request took of a limit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Taken {
    pub(crate) at: u64,
    /// Those that it reserved, or the service counted, as far as is known.
    pub(crate) tokens: u64,
    pub(super) sequence: u64,
    pub(super) token_sequence: u64,
    /// Sent although nothing should be left, to find out whether that is so.
    pub(crate) is_probe: bool,
}

impl Taken {
    /// Of a limit that another process owns.
    pub(crate) fn of_a_loan(tokens: u64, now: u64) -> Self {
        Self { at: now, tokens, sequence: 0, token_sequence: 0, is_probe: false }
    }

    /// The same, used at that time.
    pub(crate) fn used_at(self, at: u64) -> Self {
        Self { at, ..self }
    }
}

/// What an answer says, beside its headers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Answered {
    pub(crate) is_limited: bool,
    /// Whether the request stays in flight until its body ends.
    pub(crate) has_body: bool,
    /// The wait that the service asks for.
    pub(crate) wait: Option<Duration>,
    pub(crate) now: u64,
    /// How many limits share the traffic of the scope.
    pub(crate) keys: usize,
    /// How many requests wait in the scope.
    pub(crate) waiting: usize,
}

/// A time of the pool's clock, in seconds.
pub(crate) fn seconds(nanos: u64) -> f64 {
    nanos as f64 / 1e9
}

/// A wait in seconds, in ns.
pub(crate) fn wait_nanos(seconds: f64) -> u64 {
    nanos(Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX))
}
