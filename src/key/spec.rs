//! The specification of a key.

use std::num::NonZeroU32;

use super::secret::{KeyId, Secret};

/// A key: its id and secret, and optional settings.
///
/// `endpoint` has no effect yet. The pool rejects a key that sets it, so that no setting is ignored silently: see
/// [`unsupported`](Self::unsupported).
///
/// ```
/// use tower_key_rotation::{KeyId, KeySpec};
///
/// let mut spec = KeySpec::new(KeyId::new("alpha").unwrap(), "sk-1");
/// assert_eq!(spec.unsupported(), None);
/// spec.tier = Some(1);
/// spec.weight = std::num::NonZeroU32::new(3);
/// assert_eq!(spec.unsupported(), None);
/// spec.endpoint = Some("https://eu.api.example.com".to_owned());
/// assert_eq!(spec.unsupported(), Some("endpoint"));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KeySpec {
    /// The public name.
    pub id: KeyId,
    /// The secret.
    pub secret: Secret,
    /// The quota group. Keys of one group share one quota, for example the keys of one organisation.
    ///
    /// A [paced](crate::KeyPoolBuilder::paced) pool finds the group of a key without one, where responses name the
    /// organisation.
    pub group: Option<String>,
    /// The tier. The pool prefers keys of a lower tier: those of a higher one serve while no other has room.
    ///
    /// For keys that take the place of lost ones, `MongoStore` has standby keys.
    pub tier: Option<u8>,
    /// The weight in the rotation; 1 if it is not set. While both have room, a key of weight 3 serves three times as many
    /// requests as a key of weight 1 in the same tier, evenly spread, and three times as many sessions.
    ///
    /// Weights are exact while those of a tier, divided by what they have in common, add up to 65,536 at most, or to 16 for
    /// each key; beyond that they are rounded.
    pub weight: Option<NonZeroU32>,
    /// The limit of requests in flight with this key, in all scopes together, from the choice of the key until the answer.
    /// Further requests go to other keys, or wait. Each process counts its own.
    pub max_in_flight: Option<NonZeroU32>,
    /// The base URL for requests with this key.
    pub endpoint: Option<String>,
}

impl KeySpec {
    /// A key without further settings.
    #[must_use]
    pub fn new(id: KeyId, secret: impl Into<Secret>) -> Self {
        Self {
            id,
            secret: secret.into(),
            group: None,
            tier: None,
            weight: None,
            max_in_flight: None,
            endpoint: None,
        }
    }

    /// Returns the first field that is set but has no effect yet. The pool rejects a key with such a field.
    #[must_use]
    pub fn unsupported(&self) -> Option<&'static str> {
        self.endpoint.is_some().then_some("endpoint")
    }
}
