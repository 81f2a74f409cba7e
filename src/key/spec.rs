//! All that a key is.

use std::num::NonZeroU32;

use super::secret::{KeyId, Secret};

/// A key: its id and secret, and what a user may say of it beside those.
///
/// ```
/// use tower_key_rotation::{KeyId, KeySpec};
///
/// let spec = KeySpec::new(KeyId::new("alpha").unwrap(), "sk-1").group("org-1").tier(1);
/// assert_eq!(spec.group.as_deref(), Some("org-1"));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KeySpec {
    /// Its public name.
    pub id: KeyId,
    /// Its secret.
    pub secret: Secret,
    /// The quota group: keys of one group share one quota, as those of an organisation do.
    pub group: Option<String>,
    /// The tier: keys of a lower tier are used first.
    pub tier: Option<u8>,
    /// The weight: how many turns the key has where one of weight 1 has one.
    pub weight: Option<NonZeroU32>,
    /// The most requests in flight at once.
    pub max_in_flight: Option<NonZeroU32>,
    /// The base URL that the key's requests go to.
    pub endpoint: Option<String>,
}

impl KeySpec {
    /// A key of which nothing more is said.
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

    /// Puts the key into a quota group.
    #[must_use]
    pub fn group(self, group: impl Into<String>) -> Self {
        Self { group: Some(group.into()), ..self }
    }

    /// Puts the key into a tier.
    #[must_use]
    pub fn tier(self, tier: u8) -> Self {
        Self { tier: Some(tier), ..self }
    }

    /// Gives the key a weight.
    #[must_use]
    pub fn weight(self, weight: NonZeroU32) -> Self {
        Self { weight: Some(weight), ..self }
    }

    /// Caps the requests in flight.
    #[must_use]
    pub fn max_in_flight(self, requests: NonZeroU32) -> Self {
        Self { max_in_flight: Some(requests), ..self }
    }

    /// Sends the key's requests to another base URL.
    #[must_use]
    pub fn endpoint(self, url: impl Into<String>) -> Self {
        Self { endpoint: Some(url.into()), ..self }
    }

    /// The first field in use that does nothing yet: a key that has it is refused rather than misunderstood.
    #[must_use]
    pub fn unsupported(&self) -> Option<&'static str> {
        let used = [
            ("group", self.group.is_some()),
            ("tier", self.tier.is_some()),
            ("weight", self.weight.is_some()),
            ("max_in_flight", self.max_in_flight.is_some()),
            ("endpoint", self.endpoint.is_some()),
        ];
        used.into_iter().find(|(_, is_used)| *is_used).map(|(field, _)| field)
    }
}
