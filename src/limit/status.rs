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
    /// The service refused a request with it, and nobody knows yet whether the key is the reason. Requests pass over it
    /// while another key is available. One request at a time tries it again.
    Suspected,
    /// An operator took it out of service.
    Disabled,
}

/// Who says that a key rests, or is passed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum RestCause {
    /// The service named the time, or said that it no longer accepts the key. The key is not tried before.
    Service,
    /// The service refused the key and named no time: the time is the pool's own.
    Guessed,
    /// The service refused a request: see [`Status::Suspected`].
    Suspected,
    /// The service refused a request with this key, and served it with another one; or it no longer accepts the key, and
    /// no other key was available. One request at a time tries the key again.
    Confirmed,
    /// An operator disabled the key.
    Operator,
    /// The store says so: another process, or a program that writes to the store.
    Store,
}

impl RestCause {
    /// The cause of that number.
    pub(crate) fn of(number: u8) -> Self {
        const ALL: [RestCause; 6] = [
            RestCause::Service,
            RestCause::Guessed,
            RestCause::Suspected,
            RestCause::Confirmed,
            RestCause::Operator,
            RestCause::Store,
        ];
        ALL.into_iter().find(|cause| *cause as u8 == number).unwrap_or(Self::Guessed)
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Service => "said by the service",
            Self::Guessed => "guessed",
            Self::Suspected => "suspected",
            Self::Confirmed => "confirmed by another key",
            Self::Operator => "an operator",
            Self::Store => "known from the store",
        }
    }
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
