//! The error of a request for which there is no key.

use std::{error::Error, time::Duration};

/// There is no key that a request could be sent with now.
///
/// ```
/// use tower_key_rotation::NoKeyAvailable;
///
/// fn retry_after(error: &(dyn std::error::Error + 'static)) -> Option<u64> {
///     let time = NoKeyAvailable::find(error)?.retry_in()?;
///     Some(time.as_secs() + 1)
/// }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no key available: {}", self.reason())]
pub struct NoKeyAvailable {
    keys: usize,
    retry_in: Option<Duration>,
    because: Because,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Because {
    /// The keys rest, or have no room.
    Resting,
    /// The keys have as many requests in flight as they may.
    Busy,
    QueueIsFull,
}

impl NoKeyAvailable {
    pub(super) fn resting(keys: usize, retry_in: Option<Duration>) -> Self {
        Self { keys, retry_in, because: Because::Resting }
    }

    pub(super) fn busy(keys: usize) -> Self {
        Self { keys, retry_in: None, because: Because::Busy }
    }

    pub(super) fn queue_is_full(keys: usize) -> Self {
        Self { keys, retry_in: None, because: Because::QueueIsFull }
    }

    /// Finds it in an error or among its sources: in an [`Error`](crate::Error), in one of several layers, in an error
    /// of `reqwest-middleware`, or in a box.
    ///
    /// An `Error` around a box is no `std::error::Error`: make a box of it by
    /// [`into_inner`](crate::Error::into_inner) first.
    #[must_use]
    pub fn find<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a Self> {
        let mut next = Some(error);
        while let Some(error) = next {
            if let Some(found) = error.downcast_ref() {
                return Some(found);
            }
            #[cfg(feature = "reqwest-middleware")]
            if let Some(reqwest_middleware::Error::Middleware(cause)) = error.downcast_ref() {
                // Its `source` is the one of its cause.
                next = Some(&**cause);
                continue;
            }
            next = error.source();
        }
        None
    }

    /// The time until the first key is back, for a `Retry-After` or a wait of one's own. `None` where no
    /// key comes back by itself: the pool is empty, its keys are revoked or disabled, or they wait for the answers of the
    /// requests in flight.
    #[must_use]
    pub fn retry_in(&self) -> Option<Duration> {
        self.retry_in
    }

    /// Whether the pool holds no key at all.
    #[must_use]
    pub fn is_empty_pool(&self) -> bool {
        self.keys == 0
    }

    /// Whether a key comes back without an operator: its rest ends, or the requests in flight are answered.
    #[must_use]
    pub fn comes_back(&self) -> bool {
        !self.is_empty_pool() && (self.retry_in.is_some() || self.because != Because::Resting)
    }

    fn reason(&self) -> String {
        match (self.keys, self.because, self.retry_in) {
            (0, _, _) => "the pool is empty".to_owned(),
            (keys, Because::Busy, _) => {
                format!("all {keys} rest, or have as many requests in flight as they may")
            }
            (_, Because::QueueIsFull, _) => "too many requests wait already".to_owned(),
            (keys, Because::Resting, Some(time)) => {
                let seconds = time.as_secs_f64();
                format!("all {keys} are resting or out of service, the first is back in {seconds:.1} s")
            }
            (keys, Because::Resting, None) => {
                format!("all {keys} are revoked or disabled, and stay so until reset or enabled")
            }
        }
    }
}
