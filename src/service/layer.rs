//! The layer and its options.

use std::{fmt, sync::Arc, time::Duration};

use tower_layer::Layer;

use super::{
    failover::Failover,
    key_rotation::KeyRotation,
    mode::{Mode, Once},
    rotation::Rotation,
};
use crate::{
    classify::{ClassifyResponse, TooManyRequests},
    pool::KeyPool,
};

/// Gives each request a key, and rests a key for 2 minutes after a 429: see the [module](crate::service).
///
/// The services of one layer, and of its clones, share its retry budget and its queue.
///
/// ```
/// use std::time::Duration;
/// use tower_key_rotation::{Failover, KeyPool, KeyRotationLayer, classify::LlmGateway};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let pool = KeyPool::builder().key("alpha", "sk-1").build()?;
/// let layer = KeyRotationLayer::new(&pool)
///     .classify(LlmGateway::new())
///     .read_error_bodies(16 * 1024)
///     .failover(Failover::attempts(3))
///     .wait_up_to(Duration::from_secs(30));
/// # let _ = layer;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
#[must_use]
pub struct KeyRotationLayer<C = TooManyRequests, M = Once> {
    rotation: Rotation<C, M>,
}

impl KeyRotationLayer {
    /// Takes keys from that pool.
    pub fn new(pool: &KeyPool) -> Self {
        Self { rotation: Rotation::new(pool, Once) }
    }
}

impl<C, M> KeyRotationLayer<C, M> {
    /// Another classifier: it decides which responses speak against their key, see [`classify`](crate::classify).
    ///
    /// A classifier is cloned for each request: keep large state behind an `Arc`.
    pub fn classify<D: ClassifyResponse>(self, classifier: D) -> KeyRotationLayer<D, M> {
        KeyRotationLayer { rotation: self.rotation.classify(classifier) }
    }

    /// Sends a refused request again with another key: see [`Failover`].
    ///
    /// The response type becomes an `http::Response<Replay<B>>`, see [`Replay`](crate::Replay); a `reqwest::Response`
    /// stays one. The client has to be `Clone`, and so has the body of an `http::Request`, or see
    /// [`Failover::clone_with`].
    ///
    /// - A request is never sent again with a key that it was refused with, unless it has waited meanwhile.
    /// - Where no other key is available, the caller gets the refused response.
    pub fn failover<K>(self, failover: Failover<K>) -> KeyRotationLayer<C, Failover<K>> {
        let failover = failover.with_budget_of(&self.rotation.pool);
        KeyRotationLayer { rotation: self.rotation.map_mode(|_| failover) }
    }

    /// Lets a request wait for a key where none is available, for that long in all. Without this option, and where the
    /// first key is known to be back later, it fails at once.
    ///
    /// With [`failover`](Self::failover), a refused request waits as well where no other key is available. It may then be
    /// sent with the key that it was refused with, once that key's cooldown is over.
    ///
    /// Give it some time beyond the cooldown: of several requests that wait for one key, all but the first wait a little
    /// longer than that. Requests are let through in the order in which they came, a few at first and more as they
    /// succeed.
    ///
    /// The client has to be `Clone`. Without [`failover`](Self::failover), the response type stays the client's.
    pub fn wait_up_to(self, limit: Duration) -> KeyRotationLayer<C, M::Waiting>
    where
        M: Mode,
    {
        let mut rotation = self.rotation.map_mode(Mode::waiting);
        rotation.wait = limit;
        KeyRotationLayer { rotation }
    }

    /// Lets the classifier see the body of an error if it asks for it: about that many bytes, for at most a second. The
    /// caller still gets the whole body.
    ///
    /// The response type becomes an `http::Response<Replay<B>>`, see [`Replay`](crate::Replay); a `reqwest::Response`
    /// stays one. The client has to be `Clone`.
    pub fn read_error_bodies(self, most: usize) -> KeyRotationLayer<C, M::Reading>
    where
        M: Mode,
    {
        let mut rotation = self.rotation.map_mode(Mode::reading);
        rotation.error_bodies = Some(most);
        KeyRotationLayer { rotation }
    }

    /// Puts the key that served a request into the extensions of its response, as [`ServedBy`](crate::ServedBy). This
    /// allocates once for each response, and once more if the id is longer than 24 bytes.
    pub fn expose_key(mut self) -> Self {
        self.rotation.judge.expose_key = true;
        self
    }

    #[cfg(feature = "reqwest-middleware")]
    pub(crate) fn into_rotation(self) -> Rotation<C, M> {
        self.rotation
    }
}

impl<S, C: Clone, M: Clone> Layer<S> for KeyRotationLayer<C, M> {
    type Service = KeyRotation<S, C, M>;

    fn layer(&self, inner: S) -> Self::Service {
        KeyRotation::new(inner, Arc::new(self.rotation.clone()))
    }
}

impl<C, M> fmt::Debug for KeyRotationLayer<C, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("KeyRotationLayer").field(&self.rotation).finish()
    }
}
