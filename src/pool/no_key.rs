//! The error of a request for which there is no key.

use std::{fmt, time::Duration};

/// There is no key that a request could be sent with now.
///
/// ```
/// use tower_key_rotation::{Error, NoKeyAvailable};
///
/// fn retry_after<E>(error: &Error<E>) -> Option<u64> {
///     let time = error.no_key_available()?.retry_in()?;
///     Some(time.as_secs() + 1)
/// }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoKeyAvailable {
    pub(super) keys: usize,
    pub(super) retry_in: Option<Duration>,
}

impl NoKeyAvailable {
    /// The time until the first key is back, for a `Retry-After` or a wait of one's own. `None` where no
    /// key comes back by itself: the pool is empty, or its keys are revoked or disabled.
    #[must_use]
    pub fn retry_in(&self) -> Option<Duration> {
        self.retry_in
    }

    /// Whether the pool holds no key at all.
    #[must_use]
    pub fn is_empty_pool(&self) -> bool {
        self.keys == 0
    }
}

impl fmt::Display for NoKeyAvailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.keys, self.retry_in) {
            (0, _) => f.write_str("no key available: the pool is empty"),
            (keys, Some(time)) => write!(
                f,
                "no key available: all {keys} are resting or out of service, the first is back in {:.1} s",
                time.as_secs_f64()
            ),
            (keys, None) => write!(
                f,
                "no key available: all {keys} are revoked or disabled, and stay so until reset or enabled"
            ),
        }
    }
}

impl std::error::Error for NoKeyAvailable {}
