//! What a keyed client can fail with.

use crate::{key::InjectError, pool::NoKeyAvailable};

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

/// The rotation's own part of [`Error`].
pub(crate) enum Refused {
    NoKeyAvailable(NoKeyAvailable),
    Inject(InjectError),
}

impl<E> From<Box<Refused>> for Error<E> {
    fn from(refused: Box<Refused>) -> Self {
        match *refused {
            Refused::NoKeyAvailable(error) => Self::NoKeyAvailable(error),
            Refused::Inject(error) => Self::Inject(error),
        }
    }
}

impl<E: Into<BoxError>> Error<E> {
    /// What is in it, in a box, as many layers of `tower` want it: a [`NoKeyAvailable`], an [`InjectError`], or
    /// the inner service's error.
    ///
    /// `Error<E>` is a `std::error::Error` only where `E` is, which a box is not. So where a layer *inside* the
    /// rotation gives boxes (`Buffer`, `Timeout`), this is how they go on:
    ///
    /// ```
    /// use std::time::Duration;
    /// use http::{Request, Response};
    /// use tower::{BoxError, ServiceBuilder, ServiceExt, service_fn, timeout::TimeoutLayer};
    /// use tower_key_rotation::{Error, KeyPool, KeyRotationLayer, NoKeyAvailable};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), BoxError> {
    /// let pool = KeyPool::builder().build()?;
    /// let client = ServiceBuilder::new()
    ///     .map_err(Error::into_inner)
    ///     .layer(KeyRotationLayer::new(&pool))
    ///     .layer(TimeoutLayer::new(Duration::from_secs(10)))
    ///     .service(service_fn(async |_: Request<()>| Ok::<_, std::io::Error>(Response::new(()))));
    ///
    /// let error: BoxError = client.oneshot(Request::new(())).await.unwrap_err();
    /// assert!(error.is::<NoKeyAvailable>());
    /// # Ok(())
    /// # }
    /// ```
    pub fn into_inner(self) -> BoxError {
        match self {
            Self::NoKeyAvailable(error) => error.into(),
            Self::Inject(error) => error.into(),
            Self::Inner(error) => error.into(),
        }
    }
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;

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
