use std::{fmt, sync::Arc};

use tower_layer::Layer;

use super::{KeyRotation, ReadErrorBody};
use crate::{
    classify::TooManyRequests,
    pool::KeyPool,
    service::rotation::{BodyLimits, Rotation},
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
    /// Decides otherwise what a response says of its key: see [`classify`](crate::classify). The classifier is
    /// cloned for each request: what it holds much of, it should hold behind an `Arc`.
    pub fn classify<D>(self, classifier: D) -> KeyRotationLayer<D, B> {
        KeyRotationLayer { rotation: self.rotation.classify(classifier), bodies: self.bodies }
    }

    /// Has each response say which key it was asked for with, as [`ServedBy`](crate::ServedBy) in its
    /// extensions. That allocates once per response, and once more where
    /// the id is longer than 24 bytes.
    pub fn expose_key(mut self) -> Self {
        self.rotation.observer.expose_key = true;
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
