//! What the pool should know of a request to choose its key.

use std::{
    fmt,
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
};

use super::words::Scope;
use crate::key::KeyId;

/// What a request is: the part of the service that it uses, whose it is, and what it costs.
///
/// A request carries its traits in its extensions, or
/// [`KeyRotationLayer::describe`](crate::KeyRotationLayer::describe) makes them. Requests without traits have no scope.
///
/// ```
/// use http::Request;
/// use tower_key_rotation::Traits;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let traits = Traits::new()
///     .scope("gpt-5-mini")      // limited apart from other models
///     .session("user-7")        // keeps its key, for the service's prompt cache
///     .tokens(1_200);           // an estimate of input and output
/// let request = Request::post("https://api.example.com/v1").extension(traits).body(())?;
/// # let _ = request;
/// # Ok(())
/// # }
/// ```
///
/// A clone is cheap: make the traits of a scope once, and clone them for each request.
#[derive(Clone, Default, PartialEq, Eq)]
#[must_use]
pub struct Traits(Option<Arc<Named>>);

/// What the traits of a request name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Named {
    pub(crate) scope: Option<Scope>,
    pub(crate) session: Option<u64>,
    /// `None` if the caller has no estimate.
    pub(crate) tokens: Option<u64>,
    pub(crate) key: Option<KeyId>,
    pub(crate) avoid: Vec<KeyId>,
}

static NOTHING: Named = Named { scope: None, session: None, tokens: None, key: None, avoid: Vec::new() };

impl Traits {
    /// A request without a scope or a session, of unknown cost.
    pub fn new() -> Self {
        Self::default()
    }

    /// The part of the service that is limited apart: a model, a route, a resource. A key that is limited in one scope
    /// serves the others.
    ///
    /// Of a longer name the first 128 bytes count, and control characters count as `?`. An empty name is no scope.
    pub fn scope(mut self, name: impl AsRef<str>) -> Self {
        self.named_mut().scope = Scope::lossy(name.as_ref());
        self
    }

    /// Whose request this is: a user, a conversation. The requests of one session go to the same key while that key has
    /// room, so that the service finds its prompt cache.
    pub fn session(mut self, session: impl Hash) -> Self {
        // Without random keys: after a restart, a session keeps its key.
        let mut hasher = DefaultHasher::new();
        session.hash(&mut hasher);
        self.named_mut().session = Some(hasher.finish());
        self
    }

    /// An estimate of the tokens that the service will count, of input and output. The request reserves so many; see
    /// [`Reservation`](crate::Reservation). More than 4,294,967,295 count as so many.
    ///
    /// Where tokens are limited, a request without an estimate reserves what recent requests of its scope used, on average:
    /// those whose use was recorded, or else those with an estimate. Before there is one, it reserves 1,000 tokens, or a
    /// tenth of the limit if that is less.
    pub fn tokens(mut self, tokens: u64) -> Self {
        self.named_mut().tokens = Some(tokens.min(u64::from(u32::MAX)));
        self
    }

    /// The only key that may serve the request.
    pub fn key(mut self, id: KeyId) -> Self {
        self.named_mut().key = Some(id);
        self
    }

    /// A key that must not serve the request. May be called several times.
    pub fn avoid(mut self, id: KeyId) -> Self {
        self.named_mut().avoid.push(id);
        self
    }

    fn named_mut(&mut self) -> &mut Named {
        Arc::make_mut(self.0.get_or_insert_default())
    }

    /// Whether they say nothing of the request.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    #[inline]
    pub(crate) fn named(&self) -> &Named {
        self.0.as_deref().unwrap_or(&NOTHING)
    }
}

impl fmt::Debug for Traits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Named { scope, session, tokens, key, avoid } = self.named();
        f.debug_struct("Traits")
            .field("scope", scope)
            .field("session", session)
            .field("tokens", tokens)
            .field("key", key)
            .field("avoid", avoid)
            .finish()
    }
}
