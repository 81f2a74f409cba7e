//! Options of failover.

use std::{fmt, sync::Arc};

use tower::retry::budget::Budget;

use super::{budget::EarnedBudget, clone::TryClone};
use crate::pool::KeyPool;

/// How often, and on which budget, a refused request is sent again with another key: an option of
/// [`KeyRotationLayer::failover`](crate::KeyRotationLayer::failover).
///
/// After a refusal that does not say whether it is about the key, the second attempt is also the experiment that finds out:
/// see [`Verdict::Refused`](crate::classify::Verdict::Refused). If two keys refuse a request with the same status, it is not
/// sent a third time, however many attempts are left.
///
/// Some requests try a key that rests for a guessed time: its refusal then costs them one attempt.
///
/// ```
/// use std::time::Duration;
/// use tower::retry::budget::TpsBudget;
/// use tower_key_rotation::{Failover, KeyPool, KeyRotationLayer};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let pool = KeyPool::builder().key("alpha", "sk-1").build()?;
/// let layer = KeyRotationLayer::new(&pool).failover(
///     Failover::attempts(2)
///         // at most half as many further attempts as successful requests, plus 5 per second
///         .budget(TpsBudget::new(Duration::from_secs(10), 5, 0.5))
///         .drain_up_to(4 * 1024),
/// );
/// # let _ = layer;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
#[must_use]
pub struct Failover<K = TryClone> {
    pub(crate) resend: Resend,
    pub(crate) clone: K,
}

/// When a request is sent again.
#[derive(Clone)]
pub struct Resend {
    pub(crate) attempts: u32,
    /// The default one is made with the layer: its clock is the pool's.
    pub(crate) budget: Option<Arc<dyn Budget + Send + Sync>>,
    pub(crate) drain: usize,
}

impl Failover {
    /// At most that many attempts for each request, the first included. 0 counts as 1.
    pub fn attempts(attempts: u32) -> Self {
        let resend = Resend { attempts, budget: None, drain: 64 * 1024 };
        Self { resend, clone: TryClone }
    }
}

impl<K> Failover<K> {
    /// The retry budget of all requests together. By default 20 % of the requests that succeed, plus 10 per second; of
    /// either share, 100 can be saved up. A request that can't be sent again adds nothing.
    ///
    /// `tower`'s [`TpsBudget`](tower::retry::budget::TpsBudget) is one to take instead.
    pub fn budget(mut self, budget: impl Budget + Send + Sync + 'static) -> Self {
        self.resend.budget = Some(Arc::new(budget));
        self
    }

    /// How much of a refused response's body is read before the next attempt, in bytes. By default 64 KiB, for at most
    /// a second. The connection of a longer body is closed.
    pub fn drain_up_to(mut self, bytes: usize) -> Self {
        self.resend.drain = bytes;
        self
    }

    /// Another way to clone requests: a `Fn(&Req) -> Option<Req>`, for a body that is not `Clone` or does not know its
    /// length. You answer for the clone's body: nothing else compares it to the original's.
    ///
    /// It is called with a request before its first attempt, and with that clone before each further one, before
    /// anything is spent on it and again after a wait. `None` means that the request is not sent again: the caller gets
    /// the response of the attempt before. So a clone of a body that streams, and is kept meanwhile up to a limit, can
    /// say at the second call whether it stayed within the limit.
    ///
    /// ```
    /// use bytes::Bytes;
    /// use http::Request;
    /// use tower_key_rotation::{Failover, KeyPool, KeyRotationLayer};
    ///
    /// enum Body {
    ///     Buffered(Bytes),
    ///     Streaming(tokio::fs::File),
    /// }
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let pool = KeyPool::builder().build()?;
    /// let clone = |request: &Request<Body>| match request.body() {
    ///     Body::Buffered(bytes) => {
    ///         let mut clone = Request::new(Body::Buffered(bytes.clone()));
    ///         *clone.method_mut() = request.method().clone();
    ///         *clone.uri_mut() = request.uri().clone();
    ///         *clone.headers_mut() = request.headers().clone();
    ///         Some(clone)
    ///     }
    ///     Body::Streaming(_) => None,
    /// };
    /// let layer = KeyRotationLayer::new(&pool).failover(Failover::attempts(3).clone_with(clone));
    /// # let _ = layer;
    /// # Ok(())
    /// # }
    /// ```
    pub fn clone_with<L>(self, clone: L) -> Failover<L> {
        Failover { resend: self.resend, clone }
    }

    pub(crate) fn with_budget_of(mut self, pool: &KeyPool) -> Self {
        self.resend.budget.get_or_insert_with(|| Arc::new(EarnedBudget::new(pool.clock().clone())));
        self
    }
}

impl Resend {
    /// Whether a refused request may be sent again.
    #[inline]
    pub(crate) fn has_failover(&self) -> bool {
        self.attempts > 1
    }

    /// A request that could have been sent again has succeeded.
    #[inline]
    pub(crate) fn deposit(&self) {
        if let Some(budget) = &self.budget {
            budget.deposit();
        }
    }

    pub(crate) fn withdraw(&self) -> bool {
        self.budget.as_ref().is_some_and(|budget| budget.withdraw())
    }
}

impl<K> fmt::Debug for Failover<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Failover").field("attempts", &self.resend.attempts).finish_non_exhaustive()
    }
}
