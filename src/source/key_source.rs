//! What a pool asks of a source of keys.

use std::{borrow::Cow, error::Error, fmt, future::Future, pin::Pin, time::Duration};

use super::key_set::KeySet;

/// What the methods of a [`KeySource`] return.
pub type SourceFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A place where keys come from, and may change while the program runs.
///
/// A pool reads it when it is built, whenever [`changed`](Self::changed) completes, before a secret expires, and after a 401.
/// The futures may be dropped before they complete.
///
/// ```
/// use std::borrow::Cow;
/// use tokio::sync::watch;
/// use tower_key_rotation::{KeyPool, KeySpec, source::{KeySet, KeySource, SourceError, SourceFuture}};
///
/// /// What another task of the program receives.
/// #[derive(Debug)]
/// struct Received(watch::Receiver<Vec<KeySpec>>);
///
/// impl KeySource for Received {
///     fn name(&self) -> Cow<'_, str> {
///         "control plane".into()
///     }
///     fn read(&self) -> SourceFuture<'_, Result<KeySet, SourceError>> {
///         Box::pin(async { Ok(self.0.borrow().clone().into()) })
///     }
///     fn changed(&self) -> SourceFuture<'_, ()> {
///         let mut keys = self.0.clone();
///         Box::pin(async move {
///             // a sender that is gone changes nothing any more
///             if keys.changed().await.is_err() {
///                 std::future::pending().await
///             }
///         })
///     }
/// }
/// # use tower_key_rotation::KeyId;
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let (_sender, receiver) = watch::channel(vec![KeySpec::new(KeyId::new("alpha")?, "sk-1")]);
/// let pool = KeyPool::builder().source(Received(receiver)).await?.build()?;
/// assert_eq!(pool.stats().healthy, 1);
/// # Ok(())
/// # }
/// ```
pub trait KeySource: fmt::Debug + Send + Sync + 'static {
    /// The name in logs, in errors and in [`KeyPool::sources`](crate::KeyPool::sources). It holds no secret.
    fn name(&self) -> Cow<'_, str>;

    /// Reads all keys. One that takes longer than 30 seconds has failed.
    fn read(&self) -> SourceFuture<'_, Result<KeySet, SourceError>>;

    /// Completes when the keys may have changed since the last [`read`](Self::read): by default never.
    ///
    /// A pool drops this future and asks for another one whenever it reads the source for another reason.
    fn changed(&self) -> SourceFuture<'_, ()> {
        Box::pin(std::future::pending())
    }
}

/// A source could not be read.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct SourceError(Problem);

#[derive(Debug, thiserror::Error)]
enum Problem {
    #[error("the source could not be read")]
    Failed(#[source] Box<dyn Error + Send + Sync>),
    #[error("the source has no key")]
    Empty,
    #[error("the source could not be read within {0:?}")]
    TookTooLong(Duration),
}

impl SourceError {
    /// Wraps the cause, whose text must not hold a secret.
    pub fn new(cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self(Problem::Failed(cause.into()))
    }

    pub(crate) fn empty() -> Self {
        Self(Problem::Empty)
    }

    pub(crate) fn took_too_long(limit: Duration) -> Self {
        Self(Problem::TookTooLong(limit))
    }
}
