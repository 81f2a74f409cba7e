use std::{fmt, sync::Arc, time::Duration};

use tower::retry::budget::Budget;
use tower_layer::Layer;

use super::{
    Failover,
    clone::TryClone,
    policy::{FailoverPolicy, Shared},
};
use crate::{pool::KeyPool, service::rotation::BodyLimits};

/// Sends a limited request again with another key: see the [module](super).
///
/// The services of one layer, and those of its clones, share its budget and its queue.
///
/// ```
/// use std::time::Duration;
/// use tower::retry::budget::TpsBudget;
/// use tower_key_rotation::{FailoverLayer, KeyPool};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let pool = KeyPool::builder().key("alpha", "sk-1").build()?;
/// let layer = FailoverLayer::new(&pool)
///     .attempts(2)
///     // half as many further attempts as requests, and 5 more a second
///     .budget(TpsBudget::new(Duration::from_secs(10), 5, 0.5))
///     .wait_up_to(Duration::from_secs(30))
///     .drain_up_to(4 * 1024);
/// # let _ = layer;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
#[must_use]
pub struct FailoverLayer<K = TryClone> {
    shared: Shared,
    clone: K,
}

impl FailoverLayer {
    /// Looks for further keys in that pool, which must be the pool of the
    /// [`KeyRotationLayer`](crate::KeyRotationLayer) inside.
    pub fn new(pool: &KeyPool) -> Self {
        Self { shared: Shared::new(pool), clone: TryClone }
    }
}

impl<K> FailoverLayer<K> {
    /// How often a request is sent at most, the first time included. By default 3; 0 counts as 1.
    pub fn attempts(mut self, attempts: u32) -> Self {
        self.shared.attempts = attempts;
        self
    }

    /// What further attempts are paid from, over all requests. By default one further attempt for every five
    /// requests that went well, and 10 more a second, of either of which 100 can be saved up. A request that can't
    /// be cloned earns none.
    ///
    /// `tower`'s [`TpsBudget`](tower::retry::budget::TpsBudget) does for a budget of one's own.
    pub fn budget(mut self, budget: impl Budget + Send + Sync + 'static) -> Self {
        self.shared.budget = Arc::new(budget);
        self
    }

    /// Lets a request for which there is no key wait for one, up to that long in all; without this it fails
    /// at once. It fails at once, too, where it is known that the first key is back later than that.
    ///
    /// A request that was limited waits as well, where no other key is available, for as long as it may be
    /// sent again. It may then be sent with the key that it was limited on, once that key's cooldown is over.
    ///
    /// Give it some time beyond the cooldown: of several requests that wait for one key, all but the first have
    /// to wait a little longer than that.
    ///
    /// Waiting requests go in their order, and when a key comes back, they are let through a few at first and
    /// more as they succeed.
    pub fn wait_up_to(mut self, limit: Duration) -> Self {
        self.shared.wait = limit;
        self
    }

    /// How much of a limited response's body is read before the next attempt, in bytes. By default 64 KiB,
    /// for at most a second. A connection with a longer one is closed.
    pub fn drain_up_to(mut self, bytes: usize) -> Self {
        self.shared.bodies = BodyLimits::bytes(bytes);
        self
    }

    /// Clones requests in a way of its own: for bodies that are not `Clone`, of which some can be sent again. Where
    /// that turns out only while a body streams, see [`CloneRequest::can_send_again`](super::CloneRequest::can_send_again).
    ///
    /// ```
    /// use bytes::Bytes;
    /// use http::Request;
    /// use tower_key_rotation::{FailoverLayer, KeyPool};
    ///
    /// enum Body {
    ///     Buffered(Bytes),
    ///     Streaming(tokio::fs::File),
    /// }
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let pool = KeyPool::builder().build()?;
    /// let layer = FailoverLayer::new(&pool).clone_with(|request: &Request<Body>| match request.body() {
    ///     Body::Buffered(bytes) => {
    ///         let mut clone = Request::new(Body::Buffered(bytes.clone()));
    ///         *clone.method_mut() = request.method().clone();
    ///         *clone.uri_mut() = request.uri().clone();
    ///         *clone.headers_mut() = request.headers().clone();
    ///         Some(clone)
    ///     }
    ///     Body::Streaming(_) => None,
    /// });
    /// # let _ = layer;
    /// # Ok(())
    /// # }
    /// ```
    pub fn clone_with<L>(self, clone: L) -> FailoverLayer<L> {
        FailoverLayer { shared: self.shared, clone }
    }

    pub(crate) fn into_policy(self) -> FailoverPolicy<K> {
        FailoverPolicy { shared: Arc::new(self.shared), clone: self.clone }
    }
}

impl<S, K: Clone> Layer<S> for FailoverLayer<K> {
    type Service = Failover<S, K>;

    fn layer(&self, inner: S) -> Self::Service {
        Failover::new(inner, self.clone().into_policy())
    }
}

impl<K> fmt::Debug for FailoverLayer<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("FailoverLayer").field(&self.shared).finish()
    }
}
