//! The layer and its options.

use std::{fmt, sync::Arc, time::Duration};

use tower_layer::Layer;

use super::{
    describe::FromExtensions,
    failover::Failover,
    key_rotation::KeyRotation,
    mode::{Once, Waiting},
    rotation::Rotation,
    stream_head::StreamHead,
};
use crate::{
    classify::{ClassifyResponse, TooManyRequests},
    limit::Traits,
    pool::KeyPool,
};

/// Gives each request a key, and rests a key for 2 minutes after a 429: see the [module](crate::service).
///
/// The services of one layer, and of its clones, share its retry budget and its queue. With the feature
/// `reqwest-middleware`, the layer is also a `reqwest_middleware::Middleware`.
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
pub struct KeyRotationLayer<C = TooManyRequests, M = Once, D = FromExtensions> {
    pub(super) rotation: Arc<Rotation<C, M>>,
    pub(super) describe: D,
}

impl KeyRotationLayer {
    /// Takes keys from that pool.
    pub fn new(pool: &KeyPool) -> Self {
        Self { rotation: Arc::new(Rotation::new(pool, Once)), describe: FromExtensions }
    }
}

impl<C: Clone, M: Clone, D> KeyRotationLayer<C, M, D> {
    /// Another classifier: it decides which responses speak against their key, see [`classify`](crate::classify).
    ///
    /// A classifier is cloned for each request: keep large state behind an `Arc`.
    pub fn classify<E: ClassifyResponse>(self, classifier: E) -> KeyRotationLayer<E, M, D> {
        self.map(|rotation| rotation.classify(classifier))
    }

    /// Sends a refused request again with another key: see [`Failover`].
    ///
    /// The response type becomes an `http::Response<Replay<B>>`, see [`Replay`](crate::Replay); a `reqwest::Response`
    /// stays one. The client has to be `Clone`, and so has the body of an `http::Request`, or see
    /// [`Failover::clone_with`].
    ///
    /// - A request is never sent again with a key that it was refused with, unless it has waited meanwhile.
    /// - Where no other key is available, the caller gets the refused response.
    pub fn failover<K>(self, failover: Failover<K>) -> KeyRotationLayer<C, Failover<K>, D> {
        let failover = failover.with_budget_of(&self.rotation.pool);
        self.map(|rotation| rotation.map_mode(|_| failover))
    }

    /// Puts the key that served a request into the extensions of its response, as [`ServedBy`](crate::ServedBy). This
    /// allocates once for each response, and once more if the id is longer than 24 bytes.
    pub fn expose_key(self) -> Self {
        self.map(|mut rotation| {
            rotation.judge.expose_key = true;
            rotation
        })
    }

    /// Says what each request is, by a closure over the client's requests: its scope, its session, its cost. By default,
    /// [`Traits`](crate::Traits) come from the extensions of an `http::Request`, or of a `reqwest-middleware` request.
    ///
    /// ```
    /// use http::Request;
    /// use tower_key_rotation::{KeyPool, KeyRotationLayer, Traits};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let pool = KeyPool::builder().key("alpha", "sk-1").paced().build()?;
    /// let layer = KeyRotationLayer::new(&pool)
    ///     .describe(|request: &Request<String>| Traits::new().scope(request.uri().path()));
    /// # let _ = layer;
    /// # Ok(())
    /// # }
    /// ```
    pub fn describe<Req, F>(self, describe: F) -> KeyRotationLayer<C, M, F>
    where
        F: Fn(&Req) -> Traits + Clone,
    {
        KeyRotationLayer { rotation: self.rotation, describe }
    }

    fn waiting<N>(self, limit: Duration, mode: impl FnOnce(M) -> N) -> KeyRotationLayer<C, N, D> {
        self.map(|rotation| Rotation { wait: limit, ..rotation.map_mode(mode) })
    }

    fn reading<N>(self, most: usize, mode: impl FnOnce(M) -> N) -> KeyRotationLayer<C, N, D> {
        self.map(|rotation| Rotation { error_bodies: Some(most), ..rotation.map_mode(mode) })
    }

    fn holding<N>(
        self,
        bytes: usize,
        time: Duration,
        mode: impl FnOnce(M) -> N,
    ) -> KeyRotationLayer<C, N, D> {
        let head = StreamHead { bytes, time };
        self.map(|rotation| Rotation { stream_head: Some(head), ..rotation.map_mode(mode) })
    }

    fn map<E, N>(self, map: impl FnOnce(Rotation<C, M>) -> Rotation<E, N>) -> KeyRotationLayer<E, N, D> {
        let rotation = Arc::new(map(Arc::unwrap_or_clone(self.rotation)));
        KeyRotationLayer { rotation, describe: self.describe }
    }
}

impl<C: Clone, D> KeyRotationLayer<C, Once, D> {
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
    pub fn wait_up_to(self, limit: Duration) -> KeyRotationLayer<C, Waiting, D> {
        self.waiting(limit, |_| Waiting)
    }

    /// Lets the classifier see the body of an error if it asks for it: about that many bytes, for at most a second. The
    /// caller still gets the whole body. The classifier sees a body in gzip, deflate, brotli or zstd without its
    /// compression, up to that many bytes, and up to 1 MiB.
    ///
    /// The response type becomes an `http::Response<Replay<B>>`, see [`Replay`](crate::Replay); a `reqwest::Response`
    /// stays one. The client has to be `Clone`.
    pub fn read_error_bodies(self, most: usize) -> KeyRotationLayer<C, Failover<Once>, D> {
        self.reading(most, |_| reads_only())
    }

    /// Holds the head of a stream until its first content, so that an error before it is a refusal: services accept a
    /// request with a 200, and say in the stream that they are overloaded, or that the key is limited.
    ///
    /// It holds responses of the type `text/event-stream` with a 2xx status, of OpenAI (chat completions and responses),
    /// Anthropic, Gemini, and services that speak as one of these, until the first of these:
    ///
    /// - **The first content**: any event but one that begins an answer, such as `message_start`, a `ping`, or a chunk with
    ///   a role alone. The caller gets the head with it, at the same moment as without this option.
    /// - **An error**: the classifier judges it as a response with the status that the service has for it. After a verdict
    ///   on the key, the key rests, and [`failover`](Self::failover) sends the request again, as after such a response. If
    ///   the service has no capacity (`overloaded_error`, `server_is_overloaded`, a code of 503 or 529), no key rests, and
    ///   failover sends the request again with another key.
    /// - `bytes` of the stream were read, `time` has passed since its head came, or it has ended: then it goes to the caller
    ///   as it is.
    ///
    /// Nothing is sent again afterwards. An error later in the stream rests its key, and passes unchanged: all that the
    /// caller reads is what the service sent, byte for byte. An event of more than `bytes` counts as content. OpenAI's
    /// `response.created` repeats the instructions and tools of the request, so allow for them.
    ///
    /// A stream with a `Content-Encoding` is not looked at. `reqwest` removes that header where it decodes.
    ///
    /// ```
    /// use std::time::Duration;
    /// use tower_key_rotation::{Failover, KeyPool, KeyRotationLayer, classify::LlmGateway};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let pool = KeyPool::builder().key("alpha", "sk-1").key("beta", "sk-2").build()?;
    /// let layer = KeyRotationLayer::new(&pool)
    ///     .classify(LlmGateway::new())
    ///     .failover(Failover::attempts(3))
    ///     .stream_head(256 * 1024, Duration::from_secs(10));
    /// # let _ = layer;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// The response type becomes an `http::Response<Replay<B>>`, see [`Replay`](crate::Replay); a `reqwest::Response`
    /// stays one. The client has to be `Clone`.
    pub fn stream_head(self, bytes: usize, time: Duration) -> KeyRotationLayer<C, Failover<Once>, D> {
        self.holding(bytes, time, |_| reads_only())
    }
}

impl<C: Clone, D> KeyRotationLayer<C, Waiting, D> {
    /// Lets the classifier see the body of an error: as without a wait.
    pub fn read_error_bodies(self, most: usize) -> KeyRotationLayer<C, Failover<Once>, D> {
        self.reading(most, |_| reads_only())
    }

    /// Looks at the beginning of streams: as without a wait.
    pub fn stream_head(self, bytes: usize, time: Duration) -> KeyRotationLayer<C, Failover<Once>, D> {
        self.holding(bytes, time, |_| reads_only())
    }
}

impl<C: Clone, K: Clone, D> KeyRotationLayer<C, Failover<K>, D> {
    /// Lets a request wait for a key: as without failover, and between its attempts as well.
    pub fn wait_up_to(self, limit: Duration) -> Self {
        self.waiting(limit, |mode| mode)
    }

    /// Lets the classifier see the body of an error: as without failover.
    pub fn read_error_bodies(self, most: usize) -> Self {
        self.reading(most, |mode| mode)
    }

    /// Holds the head of a stream until its first content: as without failover. With it, a request is sent again if the
    /// stream begins with an error that refuses it.
    pub fn stream_head(self, bytes: usize, time: Duration) -> Self {
        self.holding(bytes, time, |mode| mode)
    }
}

/// Failover that sends nothing again: it reads bodies.
fn reads_only() -> Failover<Once> {
    Failover::attempts(1).clone_with(Once)
}

impl<S, C: Clone, M: Clone, D: Clone> Layer<S> for KeyRotationLayer<C, M, D> {
    type Service = KeyRotation<S, C, M, D>;

    fn layer(&self, inner: S) -> Self::Service {
        // An allocation of its own, so that threads with a service each do not share a reference count.
        KeyRotation::new(inner, Arc::new((*self.rotation).clone()), self.describe.clone())
    }
}

impl<C, M, D> fmt::Debug for KeyRotationLayer<C, M, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("KeyRotationLayer").field(&self.rotation).finish()
    }
}
