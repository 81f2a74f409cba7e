//! What a key is good for, and why it rests.

/// What a key is good for at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Status {
    /// It is picked.
    Healthy,
    /// The service limits it; it comes back when its cooldown ends.
    RateLimited,
    /// Its quota is used up; it comes back when its rest ends.
    Exhausted,
    /// The service no longer accepts it. It stays out until somebody resets it.
    Revoked,
    /// An operator took it out of service.
    Disabled,
}

/// Why a key rests; the graver reason is the greater one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Rest {
    /// The service limits it.
    RateLimited,
    /// Its quota is used up.
    Exhausted,
    /// The service no longer accepts it.
    Revoked,
}

impl Rest {
    pub(crate) fn status(self) -> Status {
        match self {
            Self::RateLimited => Status::RateLimited,
            Self::Exhausted => Status::Exhausted,
            Self::Revoked => Status::Revoked,
        }
    }
}
