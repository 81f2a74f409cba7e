//! Keys from a closure.

use std::{borrow::Cow, error::Error, fmt, future::Future, time::Duration};

use tokio::time::sleep;

use super::{
    key_set::KeySet,
    key_source::{KeySource, SourceError, SourceFuture},
};

/// The keys that a closure returns, such as a token that a service issues, or what a command prints.
///
/// The pool calls it when it is built, at an [interval](FromFn::interval) if it has one, before a secret expires, and after
/// a 401. The text of its errors must not hold a secret.
///
/// ```no_run
/// use std::time::Duration;
/// use tower_key_rotation::{KeyId, KeyPool, KeySpec, source::{self, KeySet, SourcedKey}};
/// # struct Token { access_token: String, expires_in: u64 }
/// # async fn fetch_token() -> std::io::Result<Token> { unimplemented!() }
///
/// # async fn serve() -> Result<(), Box<dyn std::error::Error>> {
/// // a token that lives for some time
/// let token = source::from_fn("token endpoint", || async {
///     let token = fetch_token().await?;
///     let key = KeySpec::new(KeyId::new("client-1")?, token.access_token);
///     let key = SourcedKey::from(key).expires_in(Duration::from_secs(token.expires_in));
///     Ok::<_, Box<dyn std::error::Error + Send + Sync>>(key)
/// });
/// // what a command prints
/// let command = source::from_fn("list-keys", || async {
///     let output = tokio::process::Command::new("list-keys").output().await?;
///     let keys = KeySet::parse("list-keys", output.stdout)?;
///     Ok::<_, Box<dyn std::error::Error + Send + Sync>>(keys)
/// })
/// .interval(Duration::from_secs(300));
/// let pool = KeyPool::builder().source(token).await?.source(command).await?.build()?;
/// # Ok(())
/// # }
/// ```
pub fn from_fn<F, R, T, E>(name: impl Into<String>, read: F) -> FromFn<F>
where
    F: Fn() -> R + Send + Sync + 'static,
    R: Future<Output = Result<T, E>> + Send,
    T: Into<KeySet>,
    E: Into<Box<dyn Error + Send + Sync>>,
{
    FromFn { name: name.into(), interval: None, read }
}

/// The source that [`from_fn`] makes of a closure.
#[must_use]
pub struct FromFn<F> {
    name: String,
    interval: Option<Duration>,
    read: F,
}

impl<F> FromFn<F> {
    /// Calls the closure again when that time has passed since the last call: by default not.
    pub fn interval(self, interval: Duration) -> Self {
        Self { interval: Some(interval), ..self }
    }
}

impl<F, R, T, E> KeySource for FromFn<F>
where
    F: Fn() -> R + Send + Sync + 'static,
    R: Future<Output = Result<T, E>> + Send,
    T: Into<KeySet>,
    E: Into<Box<dyn Error + Send + Sync>>,
{
    fn name(&self) -> Cow<'_, str> {
        self.name.as_str().into()
    }

    fn read(&self) -> SourceFuture<'_, Result<KeySet, SourceError>> {
        Box::pin(async { (self.read)().await.map(Into::into).map_err(SourceError::new) })
    }

    fn changed(&self) -> SourceFuture<'_, ()> {
        let interval = self.interval;
        Box::pin(async move {
            match interval {
                Some(interval) => sleep(interval).await,
                None => std::future::pending().await,
            }
        })
    }
}

impl<F> fmt::Debug for FromFn<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("FromFn").field(&self.name).finish()
    }
}
