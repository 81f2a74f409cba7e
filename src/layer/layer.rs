use std::{fmt, sync::Arc};

use tower_layer::Layer;

use super::{KeyRotation, ReadErrorBody};
use crate::{
    classify::TooManyRequests,
    hosts::{Host, InvalidHost},
    pool::KeyPool,
    rotation::{BodyLimits, Rotation},
};

/// Gives each request a key, and rests a key for 2 minutes after a 429: see the [module](super).
#[derive(Clone)]
#[must_use]
pub struct KeyRotationLayer<C = TooManyRequests, B = HeadsOnly> {
    rotation: Rotation<C>,
    bodies: B,
}

/// Says of a [`KeyRotationLayer`] that it looks at the heads of responses only.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct HeadsOnly;

/// Says of a [`KeyRotationLayer`] that it reads the bodies of errors for its classifier.
#[derive(Clone, Copy, Debug)]
pub struct ErrorBodies(BodyLimits);

/// Whether bodies are read: [`HeadsOnly`] or [`ErrorBodies`].
pub trait Bodies: sealed::Bodies {}

impl<B: sealed::Bodies> Bodies for B {}

mod sealed {
    use super::{BodyLimits, ErrorBodies, HeadsOnly};

    pub trait Bodies {
        fn limits(&self) -> Option<BodyLimits>;
    }

    impl Bodies for HeadsOnly {
        fn limits(&self) -> Option<BodyLimits> {
            None
        }
    }

    impl Bodies for ErrorBodies {
        fn limits(&self) -> Option<BodyLimits> {
            Some(self.0)
        }
    }
}

impl KeyRotationLayer {
    /// Takes keys from that pool.
    pub fn new(pool: &KeyPool) -> Self {
        Self { rotation: Rotation::new(pool), bodies: HeadsOnly }
    }
}

impl<C, B> KeyRotationLayer<C, B> {
    /// Decides otherwise what a response says of its key: see [`classify`](crate::classify).
    pub fn classify<D>(self, classifier: D) -> KeyRotationLayer<D, B> {
        KeyRotationLayer { rotation: self.rotation.classify(classifier), bodies: self.bodies }
    }

    /// Gives keys to requests to these hosts only. Any other request passes through without a key, and its
    /// response is not looked at.
    ///
    /// A host is `api.example.com`, on any port, or `api.example.com:8443`, on that one; `*.example.com` is
    /// every host below `example.com`, and not `example.com` itself. A request whose URI has no host is
    /// judged by its `Host` header.
    ///
    /// ```
    /// use tower_key_rotation::{KeyPool, KeyRotationLayer};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let pool = KeyPool::builder().key("alpha", "sk-1").build()?;
    /// let layer = KeyRotationLayer::new(&pool)
    ///     .allowed_hosts(["api.example.com", "*.openai.azure.com"])?;
    ///
    /// assert!(KeyRotationLayer::new(&pool).allowed_hosts(["https://api.example.com"]).is_err());
    /// # let _ = layer;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// A redirect that the client follows by itself is not seen here: see the README for what that means.
    ///
    /// # Errors
    ///
    /// Where one of them is not a host.
    pub fn allowed_hosts<I, H>(mut self, hosts: I) -> Result<Self, InvalidHost>
    where
        I: IntoIterator<Item = H>,
        H: AsRef<str>,
    {
        self.rotation.hosts.allowed = Some(Host::all(hosts)?);
        Ok(self)
    }

    /// Gives keys to requests in cleartext to these hosts as well. Without this, a request by `http` to any
    /// host but loopback fails with [`InjectError::Cleartext`](crate::InjectError::Cleartext).
    ///
    /// ```
    /// use tower_key_rotation::{KeyPool, KeyRotationLayer};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let pool = KeyPool::builder().key("alpha", "sk-1").build()?;
    /// let layer = KeyRotationLayer::new(&pool).allow_cleartext_to(["gateway.internal:8080"])?;
    /// # let _ = layer;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// Where one of them is not a host.
    pub fn allow_cleartext_to<I, H>(mut self, hosts: I) -> Result<Self, InvalidHost>
    where
        I: IntoIterator<Item = H>,
        H: AsRef<str>,
    {
        self.rotation.hosts.cleartext = Host::all(hosts)?;
        Ok(self)
    }

    /// Has each response say which key it was asked for with, as [`ServedBy`](crate::ServedBy) in its
    /// extensions. That allocates once per response.
    pub fn expose_key(mut self) -> Self {
        self.rotation.expose_key = true;
        self
    }

    /// Lets the classifier see the body of an error that it asks for: at most about that many bytes of it,
    /// and for at most a second. The caller still gets the whole body.
    ///
    /// An `http::Response<B>` becomes an `http::Response<Replay<B>>`; see [`Replay`](crate::Replay).
    pub fn read_error_bodies(self, most: usize) -> KeyRotationLayer<C, ErrorBodies> {
        KeyRotationLayer { rotation: self.rotation, bodies: ErrorBodies(BodyLimits::bytes(most)) }
    }

    #[cfg(feature = "reqwest-middleware")]
    pub(crate) fn into_parts(self) -> (Rotation<C>, Option<BodyLimits>)
    where
        B: Bodies,
    {
        let limits = self.bodies.limits();
        (self.rotation, limits)
    }
}

impl<S, C: Clone> Layer<S> for KeyRotationLayer<C, HeadsOnly> {
    type Service = KeyRotation<S, C>;

    fn layer(&self, inner: S) -> Self::Service {
        KeyRotation::new(inner, Arc::new(self.rotation.clone()))
    }
}

impl<S, C: Clone> Layer<S> for KeyRotationLayer<C, ErrorBodies> {
    type Service = KeyRotation<ReadErrorBody<S, C>, C>;

    fn layer(&self, inner: S) -> Self::Service {
        let rotation = Arc::new(self.rotation.clone());
        KeyRotation::new(ReadErrorBody::new(inner, rotation.clone(), self.bodies.0), rotation)
    }
}

impl<C, B> fmt::Debug for KeyRotationLayer<C, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("KeyRotationLayer").field(&self.rotation).finish()
    }
}
