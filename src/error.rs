//! What a keyed client can fail with.

use crate::{message::UriTooLong, pool::NoKeyAvailable};

/// The error of [`KeyRotation`](crate::KeyRotation): its own, or the inner service's.
///
/// ```
/// use tower_key_rotation::Error;
///
/// fn status<E>(error: &Error<E>) -> u16 {
///     match error {
///         Error::NoKeyAvailable(_) => 429,
///         Error::Inner(_) => 502,
///         _ => 500,
///     }
/// }
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error<E> {
    /// There is no key to send the request with. The inner service was not called.
    #[error(transparent)]
    NoKeyAvailable(NoKeyAvailable),
    /// The key can't or must not be put into this request. The inner service was not called.
    #[error(transparent)]
    Inject(InjectError),
    /// The inner service's error.
    #[error(transparent)]
    Inner(E),
}

/// Why a request was not given a key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InjectError {
    /// It would travel in cleartext to a host that is not loopback.
    #[error("{host} would get a key in cleartext: use https, or name it to the pool's `allow_cleartext_to`")]
    Cleartext {
        /// The host.
        host: String,
    },
    /// With the key in it, the URI would be longer than one can be.
    #[error(transparent)]
    UriTooLong(UriTooLong),
}

/// The rotation's own part of [`Error`].
pub(crate) enum Refused {
    NoKeyAvailable(NoKeyAvailable),
    Inject(InjectError),
}

impl<E> From<Refused> for Error<E> {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::NoKeyAvailable(error) => Self::NoKeyAvailable(error),
            Refused::Inject(error) => Self::Inject(error),
        }
    }
}

impl<E> Error<E> {
    /// What is said about the missing key, if that is the error.
    #[must_use]
    pub fn no_key_available(&self) -> Option<&NoKeyAvailable> {
        match self {
            Self::NoKeyAvailable(error) => Some(error),
            _ => None,
        }
    }
}
