//! A key for a client that takes nothing but a key.

use std::{fmt, time::Duration};

use super::{error::Refused, judge, trace::Trace};
use crate::{
    classify::{ClassifyResponse, ResponseHead, TooManyRequests, Verdict},
    key::{KeyId, Secret},
    limit::Traits,
    pool::{KeyPool, Lease, NoKeyAvailable},
};

/// A key for one request of a client that takes a key and no layer: an SDK, `ureq`, a command.
///
/// Tell it the answer by [`answered`](Self::answered): then the pool learns from it, and rests the key after a 429.
/// Dropped without an answer, it gives back its tokens and its place among the requests in flight. The request itself
/// stays counted: the service may have counted it.
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
/// assert_eq!(pool.lease(&Traits::new())?.id().as_str(), "beta");
/// # Ok(())
/// # }
/// ```
#[must_use]
pub struct KeyLease {
    lease: Lease,
    trace: Trace,
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
        let lease = engine.pick_for(traits).map_err(|until| engine.no_room(until));
        KeyLease::of(lease, trace)
    }

    /// Picks the key for a request that no layer sends, after a wait in the queue of its scope if need be.
    ///
    /// # Errors
    ///
    /// If no key has room within `limit`, or too many requests wait.
    pub async fn lease_within(&self, traits: &Traits, limit: Duration) -> Result<KeyLease, NoKeyAvailable> {
        let mut trace = Trace::begin(self, Some(traits));
        let began = trace.is_on().then(|| self.clock().now());
        let lease = self.engine().acquire(traits, limit, false).await;
        if let Some(began) = began {
            trace.waited(self.clock().now().saturating_sub(began));
        }
        KeyLease::of(lease, trace)
    }
}

impl KeyLease {
    fn of(lease: Result<Lease, NoKeyAvailable>, mut trace: Trace) -> Result<Self, NoKeyAvailable> {
        match lease {
            Ok(lease) => {
                trace.sends(&lease);
                Ok(Self { lease, trace })
            }
            Err(error) => {
                trace.refused(&Refused::NoKeyAvailable(error));
                Err(error)
            }
        }
    }

    /// The key's id.
    #[must_use]
    pub fn id(&self) -> &KeyId {
        self.lease.id()
    }

    /// The key's secret.
    #[must_use]
    pub fn secret(&self) -> Secret {
        self.lease.key.secret()
    }

    /// Applies the service's answer to the key: after a 429, it rests.
    pub fn answered(self, response: &ResponseHead<'_>) -> Verdict {
        self.answered_by(&TooManyRequests::new(), response)
    }

    /// Applies the service's answer to the key, as a classifier judges it.
    pub fn answered_by(mut self, classifier: &impl ClassifyResponse, response: &ResponseHead<'_>) -> Verdict {
        let verdict = classifier.classify(response);
        judge::apply(&mut self.lease, verdict, response);
        self.trace.says_answer(&self.lease, Some(response.status().as_u16()));
        verdict
    }
}

impl fmt::Debug for KeyLease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("KeyLease").field(self.id()).finish()
    }
}
