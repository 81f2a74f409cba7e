//! Failover for clients that take nothing but a key.

use std::{
    fmt,
    future::{Future, ready},
    sync::Arc,
    time::Duration,
};

use http::StatusCode;

use super::{
    error::Error,
    experiment::Experiment,
    failover::{Failover, Resend},
    key_lease::{Answer, KeyLease},
};
use crate::{
    classify::Verdict,
    clock::Clock,
    limit::Traits,
    pool::{self, Key, KeyPool, NoKeyAvailable, Trials},
};

/// Keys for a client that takes a key and no layer: an SDK, `ureq`, a command. It fails over as the layer does.
///
/// Make one for each service, and keep it: its clones share a retry budget.
///
/// ```
/// use std::time::Duration;
/// use tower_key_rotation::{Failover, KeyLeases, KeyPool, Traits, classify::Verdict};
/// # #[derive(Debug, PartialEq, thiserror::Error)]
/// # enum SdkError {
/// #     #[error("rate limited")]
/// #     RateLimited,
/// # }
/// # async fn chat(key: &str, prompt: &str) -> Result<String, SdkError> {
/// #     if key == "sk-1" { Err(SdkError::RateLimited) } else { Ok(prompt.to_uppercase()) }
/// # }
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let pool = KeyPool::builder().key("alpha", "sk-1").key("beta", "sk-2").paced().build()?;
/// let keys = KeyLeases::new(&pool)
///     .failover(Failover::attempts(3))
///     .wait_up_to(Duration::from_secs(30));
///
/// let traits = Traits::new().scope("gpt-5-mini");
/// let reply = keys
///     .with_key(&traits, async |key| {
///         // `chat` is the SDK: its error says that the key is limited, and no more
///         let reply = chat(key.secret().expose(), "hello").await;
///         if let Err(SdkError::RateLimited) = &reply {
///             key.answered_with(Verdict::RateLimited { wait: None });
///         }
///         reply
///     })
///     .await?;
/// // alpha was limited
/// assert_eq!(reply, "HELLO");
/// # Ok(())
/// # }
/// ```
///
/// A client that shows the head of a response can tell it: see [`KeyLease::answered`]. Then the pool also learns from the
/// headers.
#[derive(Clone)]
#[must_use]
pub struct KeyLeases {
    pool: KeyPool,
    resend: Resend,
    wait: Duration,
}

impl KeyLeases {
    /// Takes keys from that pool, for up to three attempts at each request, and waits for no key.
    pub fn new(pool: &KeyPool) -> Self {
        let resend = Failover::attempts(3).with_budget_of(pool).resend;
        Self { pool: pool.clone(), resend, wait: Duration::ZERO }
    }

    /// How often, and on which budget, a refused request is made again.
    pub fn failover(mut self, failover: Failover) -> Self {
        self.resend = failover.with_budget_of(&self.pool).resend;
        self
    }

    /// Lets a request wait for a key, for that long in all: before its first attempt and between attempts.
    pub fn wait_up_to(mut self, limit: Duration) -> Self {
        self.wait = limit;
        self
    }

    /// Calls `request` with a key, and again with another key while the answer is a refusal.
    ///
    /// `request` is a closure such as `async |key| …`. It may borrow what is around it, but not change it.
    ///
    /// `request` says what the answer means for the key: see [`KeyLease::answered`] and [`KeyLease::answered_with`]. If it
    /// says nothing, `Ok` means that the request was served, and `Err` that there was no answer. It is called again only
    /// after it has said that the request was refused: with a verdict other than [`Verdict::Nothing`], and a status of 400
    /// or more where there is a status.
    ///
    /// The request is in flight until `request` returns, or longer if it returns the lease, beside a stream.
    ///
    /// # Errors
    ///
    /// `request`'s own error, also that of the last refusal if no attempt, no budget or no key is left for another one; or
    /// [`Error::NoKeyAvailable`] if there was no key at all.
    pub async fn with_key<T, E, F>(
        &self,
        traits: &Traits,
        request: impl FnMut(KeyLease) -> F,
    ) -> Result<T, Error<E>>
    where
        F: Future<Output = Result<T, E>>,
    {
        self.attempt(traits, &**self.pool.clock(), request).await
    }

    /// As [`with_key`](Self::with_key), and blocks this thread: see [`KeyPool::lease_blocking`].
    ///
    /// ```
    /// use http::{Response, StatusCode};
    /// use tower_key_rotation::{KeyLeases, KeyPool, Traits, classify::ResponseHead};
    /// # fn call(key: &str) -> std::io::Result<Response<String>> {
    /// #     let status = if key == "sk-1" { StatusCode::TOO_MANY_REQUESTS } else { StatusCode::OK };
    /// #     Ok(Response::builder().status(status).body(String::new()).unwrap())
    /// # }
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let pool = KeyPool::builder().key("alpha", "sk-1").key("beta", "sk-2").build()?;
    /// let keys = KeyLeases::new(&pool);
    ///
    /// let response = keys.with_key_blocking(&Traits::new(), |key| {
    ///     let response = call(key.secret().expose())?; // `ureq`, `reqwest::blocking`, …
    ///     key.answered(&ResponseHead::new(response.status(), response.headers()));
    ///     std::io::Result::Ok(response)
    /// })?;
    /// assert_eq!(response.status(), StatusCode::OK);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As of [`with_key`](Self::with_key).
    pub fn with_key_blocking<T, E>(
        &self,
        traits: &Traits,
        mut request: impl FnMut(KeyLease) -> Result<T, E>,
    ) -> Result<T, Error<E>> {
        pool::block_on(self.pool.clock(), async |clock| {
            self.attempt(traits, clock, |key| ready(request(key))).await
        })
    }

    // With `AsyncFnMut`, rustc could not prove that the future is `Send`, and nobody could spawn it.
    async fn attempt<T, E, F>(
        &self,
        traits: &Traits,
        clock: &dyn Clock,
        mut request: impl FnMut(KeyLease) -> F,
    ) -> Result<T, Error<E>>
    where
        F: Future<Output = Result<T, E>>,
    {
        let engine = self.pool.engine();
        let mut waited = Duration::ZERO;
        let trials = Trials::with_failover(self.resend.has_failover());
        let first = self.wait_for_key(traits, &mut waited, trials, clock).await;
        let mut key = first.map_err(|error| {
            self.pool.meter().no_key();
            Error::NoKeyAvailable(error)
        })?;
        let mut tried = Vec::new();
        let mut experiment = Experiment::default();
        loop {
            let result = request(key.shared()).await;
            if result.is_ok() && key.answer().is_none() {
                key.answered_with(Verdict::Nothing);
            }
            let is_outdated = match key.answer() {
                Some(Answer::Refused(status) | Answer::Unclear(status))
                    if status == StatusCode::UNAUTHORIZED =>
                {
                    engine.is_outdated(key.key(), clock).await
                }
                _ => false,
            };
            let goes_on = match key.answer() {
                _ if is_outdated => true,
                Some(Answer::Refused(_)) => true,
                Some(Answer::Unclear(status)) => experiment.refused(engine, key.key(), status),
                Some(Answer::Served(status)) => {
                    experiment.answered(engine, status);
                    false
                }
                Some(Answer::KeyRested) | None => false,
            };
            if !goes_on {
                if result.is_ok() && !matches!(key.answer(), Some(Answer::Unclear(_))) {
                    self.resend.deposit();
                }
                return result.map_err(Error::Inner);
            }
            tried.push(key.key().clone());
            // Refused, it holds nothing any more that others could take.
            let is_experiment = !experiment.has_not_begun();
            let Some(next) = self.next_key(traits, &tried, is_experiment, &mut waited, clock).await else {
                return result.map_err(Error::Inner);
            };
            key = next;
        }
    }

    /// A key for another attempt, if there may be one. Only another key at once shows an experiment more.
    async fn next_key(
        &self,
        traits: &Traits,
        tried: &[Arc<Key>],
        is_experiment: bool,
        waited: &mut Duration,
        clock: &dyn Clock,
    ) -> Option<KeyLease> {
        let meter = self.pool.meter();
        let may_help = !is_experiment || self.pool.engine().has_available_besides(tried);
        if tried.len() >= self.resend.attempts as usize || !may_help {
            return None;
        }
        if !self.resend.withdraw() {
            meter.budget_is_used_up();
            return None;
        }
        let key = match self.pool.lease_besides(traits, tried, is_experiment) {
            Some(key) => key,
            None if is_experiment => return None,
            None => self.wait_for_key(traits, waited, Trials::No, clock).await.ok()?,
        };
        meter.failed_over();
        Some(key)
    }

    async fn wait_for_key(
        &self,
        traits: &Traits,
        waited: &mut Duration,
        trials: Trials,
        clock: &dyn Clock,
    ) -> Result<KeyLease, NoKeyAvailable> {
        let before = clock.now();
        let key = self.pool.lease_by(traits, self.wait.saturating_sub(*waited), trials, clock).await;
        *waited += clock.now().saturating_sub(before);
        key
    }
}

impl fmt::Debug for KeyLeases {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyLeases")
            .field("pool", &self.pool)
            .field("attempts", &self.resend.attempts)
            .field("wait", &self.wait)
            .finish()
    }
}
