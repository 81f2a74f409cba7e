//! The layer's errors.

use std::error::Error as StdError;

use crate::{key::InjectError, pool::NoKeyAvailable};

/// The error of [`KeyRotation`](crate::KeyRotation): its own, or the client's.
///
/// [`NoKeyAvailable::find`] finds that error of this layer, and of layers further in.
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
    /// No key is available. The request was not sent.
    #[error("the request was not sent")]
    NoKeyAvailable(#[source] NoKeyAvailable),
    /// The key can't or must not be put into this request. The request was not sent.
    #[error("the request was not sent")]
    Inject(#[source] InjectError),
    /// The client's error.
    #[error(transparent)]
    Inner(E),
}

/// The layer's own part of [`Error`].
pub(crate) enum Refused {
    NoKeyAvailable(NoKeyAvailable),
    Inject(InjectError),
}

impl Refused {
    pub(crate) fn is_no_key(&self) -> bool {
        matches!(self, Self::NoKeyAvailable(_))
    }

    pub(crate) fn into_error<E>(self) -> Error<E> {
        match self {
            Self::NoKeyAvailable(error) => Error::NoKeyAvailable(error),
            Self::Inject(error) => Error::Inject(error),
        }
    }
}

type BoxError = Box<dyn StdError + Send + Sync>;

impl<E: Into<BoxError>> Error<E> {
    /// The error in a box, as many layers of `tower` want it: a [`NoKeyAvailable`], an [`InjectError`], or the client's
    /// error.
    ///
    /// `Error<E>` is a `std::error::Error` only if `E` is, which a box is not. Where a layer inside this one returns
    /// boxes, as `Buffer` and `Timeout` do, this makes an error for the layers outside:
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
    /// let request = Request::get("https://api.example.com").body(())?;
    /// let error: BoxError = client.oneshot(request).await.unwrap_err();
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

impl<E> Error<Error<E>> {
    /// Makes the error of two layers, one inside the other, the error of one.
    pub fn flatten(self) -> Error<E> {
        match self {
            Self::NoKeyAvailable(error) => Error::NoKeyAvailable(error),
            Self::Inject(error) => Error::Inject(error),
            Self::Inner(inner) => inner,
        }
    }
}
