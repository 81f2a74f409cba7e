//! What the fields of a key's document are called.

/// The names of a key's fields, for documents that are not called as this crate would.
///
/// ```
/// use tower_key_rotation::store::mongodb::{Fields, MongoStore};
///
/// let store = MongoStore::builder()
///     .database("gateway")
///     .collection("provider_keys")
///     .fields(Fields::default().api_key("token").cooldown_until("restsUntil"));
/// # let _ = store;
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub struct Fields {
    pub(super) api_key: String,
    pub(super) status: String,
    pub(super) cooldown_until: String,
    pub(super) last_error: String,
    pub(super) tokens_used: String,
    pub(super) requests_count: String,
    pub(super) created_at: String,
    pub(super) last_used_at: String,
    pub(super) updated_at: String,
}

pub(super) const HEALTHY: &str = "healthy";
pub(super) const RATE_LIMITED: &str = "rate_limited";
pub(super) const EXHAUSTED: &str = "exhausted";
pub(super) const ERROR: &str = "error";
pub(super) const DISABLED: &str = "disabled";

/// The statuses of a key in service. With any other one a key is disabled, and the status stays as it is.
pub(super) const KNOWN: [&str; 4] = [HEALTHY, RATE_LIMITED, EXHAUSTED, ERROR];

/// Fields of this crate's own. Other programs leave them alone, and have no need of them.
pub(super) mod ours {
    /// The word: generation, until, reason.
    pub(crate) const REST: &str = "rest";
    /// Which key object the document is.
    pub(crate) const BORN: &str = "born";
    /// The digest of the secret that the key object has.
    pub(crate) const SECRET_HASH: &str = "secretHash";
    /// The rests of scopes.
    pub(crate) const LIMITS: &str = "limits";
    /// All of the above but the digest, as one text for change streams.
    pub(crate) const WORDS: &str = "words";
    /// What is said of the key beside its id and secret.
    pub(crate) const SPEC: &str = "spec";
    /// When a key was marked as exhausted or revoked, and so may be replaced by a standby key.
    pub(crate) const FAILED_AT: &str = "failedAt";
    /// The standby key that is to take this one's place.
    pub(crate) const REPLACED_BY: &str = "replacedBy";
    /// When the standby key had taken it.
    pub(crate) const RETIRED_AT: &str = "retiredAt";
    /// Of a key that was a standby key: whose place it took.
    pub(crate) const REPLACED_KEY: &str = "replacedKey";

    /// In documents of earlier versions: the same as `cooldownUntil`, for a key that this crate found exhausted.
    pub(crate) const EXHAUSTED_UNTIL: &str = "exhaustedUntil";
    /// In documents of earlier versions: the status that a disabled key would have.
    pub(crate) const DISABLED_FROM: &str = "disabledFrom";

    /// Fields of earlier versions, which the next write of a document removes.
    pub(crate) const FORMER: [&str; 4] = [EXHAUSTED_UNTIL, DISABLED_FROM, "usageWriters", "resetAt"];

    pub(crate) const ALL: [&str; 10] =
        [REST, BORN, SECRET_HASH, LIMITS, WORDS, SPEC, FAILED_AT, REPLACED_BY, RETIRED_AT, REPLACED_KEY];
}

/// What a load has the server say beside the fields of a document.
pub(super) mod computed {
    pub(crate) const SERVER_TIME: &str = "serverTime";
    pub(crate) const IS_SETTLED: &str = "isSettled";

    pub(crate) const ALL: [&str; 2] = [SERVER_TIME, IS_SETTLED];
}

macro_rules! names {
    ($($(#[$doc:meta])+ $field:ident = $name:literal)*) => {
        impl Default for Fields {
            fn default() -> Self {
                Self { $($field: $name.into()),* }
            }
        }

        impl Fields {
            $($(#[$doc])+
            #[doc = concat!("By default `", $name, "`.")]
            pub fn $field(mut self, name: impl Into<String>) -> Self {
                self.$field = name.into();
                self
            })*

            fn names(&self) -> Vec<&str> {
                vec![$(&self.$field),*]
            }
        }
    };
}

names! {
    /// Sets the name of the secret, a string.
    api_key = "apiKey"
    /// Sets the name of the status: `healthy`, `rate_limited`, `exhausted`, `error`, `disabled`, or a word of somebody
    /// else's for a key that is not to be used.
    status = "status"
    /// Sets the name of the date until which a limited key rests.
    cooldown_until = "cooldownUntil"
    /// Sets the name of what was last said against the key, in a few words.
    last_error = "lastError"
    /// Sets the name of the sum of tokens.
    tokens_used = "tokensUsed"
    /// Sets the name of the sum of requests.
    requests_count = "requestsCount"
    /// Sets the name of the date of the insertion.
    created_at = "createdAt"
    /// Sets the name of the date of the last usage.
    last_used_at = "lastUsedAt"
    /// Sets the name of the date of the last change.
    updated_at = "updatedAt"
}

impl Fields {
    /// The first name that can't be one, or that two fields have.
    pub(super) fn invalid(&self) -> Option<&str> {
        let names = self.names();
        let taken = |name: &str| {
            name == "_id"
                || ours::ALL.contains(&name)
                || ours::FORMER.contains(&name)
                || computed::ALL.contains(&name)
                || names.iter().filter(|other| **other == name).count() > 1
        };
        let invalid = |name: &str| {
            name.is_empty() || name.starts_with('$') || name.contains(['.', '\0']) || taken(name)
        };
        names.iter().copied().find(|name| invalid(name))
    }
}
