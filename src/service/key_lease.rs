//! A key for a client that takes nothing but a key.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use http::{HeaderMap, StatusCode};

use super::{error::Refused, judge, trace::Trace};
use crate::{
    classify::{ClassifyResponse, ResponseHead, TooManyRequests, Verdict},
    clock::Clock,
    key::{KeyId, Secret},
    limit::Traits,
    pool::{self, Key, KeyPool, Lease, NoKeyAvailable, Trials},
};

/// A key for one request of a client that takes a key and no layer: an SDK, `ureq`, a command.
///
/// [`KeyLeases::with_key`](crate::KeyLeases::with_key) leases a key, and another one after a refusal.
///
/// Tell the lease the answer: then the pool learns from it, and rests the key after a 429. Tell it the tokens that were used,
/// too, where the service limits tokens. Keep it until the response's body is read: while it lives, the request counts as
/// in flight. Dropped without an answer, it gives its tokens back. The request itself stays counted: the service may have
/// counted it.
///
/// ```
/// use http::{HeaderMap, StatusCode};
/// use tower_key_rotation::{KeyPool, Traits, classify::{ResponseHead, Verdict}};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let pool = KeyPool::builder().key("alpha", "sk-1").key("beta", "sk-2").build()?;
///
/// let key = pool.lease(&Traits::new())?;
/// assert_eq!((key.id().as_str(), key.secret().expose()), ("alpha", "sk-1"));
/// // send the request with `key.secret()`, and say what came back
/// let headers = HeaderMap::new();
/// let verdict = key.answered(&ResponseHead::new(StatusCode::TOO_MANY_REQUESTS, &headers));
/// assert_eq!(verdict, Verdict::RateLimited { wait: None });
///
/// let key = pool.lease(&Traits::new().tokens(1_200))?;
/// assert_eq!(key.id().as_str(), "beta");
/// key.answered(&ResponseHead::new(StatusCode::OK, &headers));
/// key.used(1_037); // as the response's body says
/// # Ok(())
/// # }
/// ```
#[must_use = "dropping it ends the request"]
pub struct KeyLease {
    key: Arc<Key>,
    request: Arc<Mutex<Request>>,
}

struct Request {
    lease: Lease,
    trace: Trace,
    answer: Option<Answer>,
}

/// What the caller said of the answer.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    Served(StatusCode),
    /// By a success that rests the key.
    KeyRested,
    Refused(StatusCode),
    /// Nobody knows if it was about the key.
    Unclear(StatusCode),
}

impl KeyPool {
    /// Picks the key for a request that no layer sends. Its host is not checked.
    ///
    /// # Errors
    ///
    /// If no key has room now: the error says when one has.
    pub fn lease(&self, traits: &Traits) -> Result<KeyLease, NoKeyAvailable> {
        let engine = self.engine();
        let trace = Trace::begin(self, Some(traits));
        let lease = if engine.chooses() || !traits.is_empty() {
            engine.pick_for(traits, Trials::OfSuspects).map_err(|until| engine.no_room(until))
        } else {
            engine.pick_apart().ok_or_else(|| self.no_key())
        };
        KeyLease::of(lease, trace)
    }

    /// Picks the key for a request that no layer sends, after a wait in the queue of its scope if need be.
    ///
    /// # Errors
    ///
    /// If no key has room within `limit`, or too many requests wait.
    pub async fn lease_within(&self, traits: &Traits, limit: Duration) -> Result<KeyLease, NoKeyAvailable> {
        self.lease_by(traits, limit, Trials::OfSuspects, &**self.clock()).await
    }

    /// Picks the key for a request that no layer sends, and blocks this thread until there is one: for `ureq`,
    /// `reqwest::blocking` and other clients without a runtime.
    ///
    /// The thread waits in the queue of its scope, in one order with the tasks that wait there. It needs no runtime, and
    /// it sleeps until its turn.
    ///
    /// In an async task it blocks the runtime's thread, and with it all tasks of a runtime that has only one: call it by
    /// `tokio::task::spawn_blocking`, or use [`lease_within`](Self::lease_within). It returns after `limit` at the latest
    /// even there.
    ///
    /// ```
    /// use std::{thread, time::Duration};
    /// use tower_key_rotation::{KeyPool, Quota, Traits};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let pool = KeyPool::builder().key("alpha", "sk-1").quota(Quota::per_second(50)).build()?;
    /// let leases = thread::scope(|scope| {
    ///     let lease = || pool.lease_blocking(&Traits::new(), Duration::from_secs(30));
    ///     let threads: Vec<_> = (0..55).map(|_| scope.spawn(lease)).collect();
    ///     threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Result<Vec<_>, _>>()
    /// })?;
    /// assert_eq!(leases.len(), 55);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// If no key has room within `limit`, or too many requests wait.
    pub fn lease_blocking(&self, traits: &Traits, limit: Duration) -> Result<KeyLease, NoKeyAvailable> {
        pool::block_on(self.clock(), async |clock| {
            self.lease_by(traits, limit, Trials::OfSuspects, clock).await
        })
    }

    /// A lease for a request, after a wait by that clock. One that was refused before tries no key in doubt.
    pub(super) async fn lease_by(
        &self,
        traits: &Traits,
        limit: Duration,
        trials: Trials,
        clock: &dyn Clock,
    ) -> Result<KeyLease, NoKeyAvailable> {
        let mut trace = Trace::begin(self, Some(traits));
        let began = trace.is_on().then(|| self.clock().now());
        let lease = self.engine().acquire(traits, limit, trials == Trials::No, trials, clock).await;
        if let Some(began) = began {
            trace.waited(self.clock().now().saturating_sub(began));
        }
        KeyLease::of(lease, trace)
    }

    /// A lease for a request that was refused with these keys, at once.
    pub(super) fn lease_besides(
        &self,
        traits: &Traits,
        tried: &[Arc<Key>],
        is_experiment: bool,
    ) -> Option<KeyLease> {
        let trace = Trace::begin(self, Some(traits));
        let lease = self.engine().pick_besides_for(traits, tried, is_experiment)?;
        KeyLease::of(Ok(lease), trace).ok()
    }
}

impl KeyLease {
    fn of(lease: Result<Lease, NoKeyAvailable>, mut trace: Trace) -> Result<Self, NoKeyAvailable> {
        match lease {
            Ok(lease) => {
                trace.sends(&lease);
                let key = lease.key.clone();
                Ok(Self { key, request: Arc::new(Mutex::new(Request { lease, trace, answer: None })) })
            }
            Err(error) => {
                trace.refused(&Refused::NoKeyAvailable(error));
                Err(error)
            }
        }
    }

    /// The same lease, for the one who gives it to a caller. The request ends when both are dropped.
    pub(super) fn shared(&self) -> Self {
        Self { key: self.key.clone(), request: self.request.clone() }
    }

    /// The key's id.
    #[must_use]
    pub fn id(&self) -> &KeyId {
        &self.key.id
    }

    /// The key's secret.
    #[must_use]
    pub fn secret(&self) -> Secret {
        self.key.secret()
    }

    /// Applies the service's answer to the key: after a 429, it rests. The first answer counts.
    pub fn answered(&self, response: &ResponseHead<'_>) -> Verdict {
        self.answered_by(&TooManyRequests::new(), response)
    }

    /// Applies the service's answer to the key, as a classifier judges it.
    pub fn answered_by(&self, classifier: &impl ClassifyResponse, response: &ResponseHead<'_>) -> Verdict {
        let verdict = classifier.classify(response);
        self.apply(verdict, response);
        verdict
    }

    /// Applies an answer of which the client shows no more than an error: you say what it means for the key. Limit headers
    /// are then not known, so the pool finds the limits by refusals.
    pub fn answered_with(&self, verdict: Verdict) {
        // What a service would have answered.
        let status = match verdict {
            Verdict::Nothing => StatusCode::OK,
            Verdict::RateLimited { .. } | Verdict::ScopeExhausted { .. } => StatusCode::TOO_MANY_REQUESTS,
            Verdict::Exhausted { .. } => StatusCode::PAYMENT_REQUIRED,
            Verdict::Revoked => StatusCode::UNAUTHORIZED,
            Verdict::Refused => StatusCode::FORBIDDEN,
        };
        self.apply(verdict, &ResponseHead::new(status, &HeaderMap::new()));
    }

    fn apply(&self, verdict: Verdict, response: &ResponseHead<'_>) {
        let mut request = self.lock();
        if request.answer.is_none() {
            let Request { lease, trace, .. } = &mut *request;
            judge::apply(lease, verdict, response);
            trace.says_answer(lease, Some(response.status().as_u16()));
            let status = response.status();
            request.answer = Some(match verdict {
                Verdict::Nothing => Answer::Served(status),
                _ if !response.is_error() => Answer::KeyRested,
                Verdict::Refused => Answer::Unclear(status),
                _ => Answer::Refused(status),
            });
        }
    }

    /// Says that the request used so many tokens, beside those that were said before: input that the service counts, and
    /// output. Leave out cached input where the service does not count it.
    ///
    /// Without it, the request counts for what it reserved: see [`Traits::tokens`]. For the statistics of a key, see
    /// [`KeyPool::record_usage`].
    ///
    /// A number above 1,000,000,000 is taken for a mistake, such as a subtraction below zero, and ignored.
    pub fn used(&self, tokens: u64) {
        if let Some(ticket) = self.lock().lease.ticket() {
            ticket.used(tokens);
        }
    }

    pub(super) fn key(&self) -> &Arc<Key> {
        &self.key
    }

    pub(super) fn answer(&self) -> Option<Answer> {
        self.lock().answer
    }

    fn lock(&self) -> MutexGuard<'_, Request> {
        self.request.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for KeyLease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("KeyLease").field(self.id()).finish()
    }
}
