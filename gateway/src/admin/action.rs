//! Changes of a key by an admin, and their wording in responses and logs.

use tower_key_rotation::{KeyId, OperateError};

use super::upstreams::Named;
use crate::{audit::AUDIT, with_sources};

/// Returns the reason why the admin refuses an id that the pool would accept: no URL could name such a key.
pub(super) fn cannot_name(id: &str) -> Option<&'static str> {
    let reason = "the id can't be . or .., because clients remove these from a path: give it another id";
    matches!(id, "." | "..").then_some(reason)
}

#[derive(Clone, Copy)]
pub(super) enum Action {
    Add,
    Remove,
    Reset,
    Disable,
    Enable,
}

impl Action {
    fn done(self) -> &'static str {
        match self {
            Self::Add => "added",
            Self::Remove => "removed",
            Self::Reset => "reset",
            Self::Disable => "disabled",
            Self::Enable => "enabled",
        }
    }

    /// Formats an error for a response. The cause of a store's error appears only in the log.
    pub(super) fn failed(self, error: &OperateError) -> String {
        match self {
            _ if !error.is_store_failure() => error.to_string(),
            Self::Add | Self::Remove => format!("the key store failed, so it was not {}", self.done()),
            _ => format!(
                "the key store failed, so it is {} in this gateway only, until the next reload",
                self.done()
            ),
        }
    }

    /// Logs the outcome. A text that is no valid id is left out, because it may be a misplaced secret.
    pub(super) fn log(self, named: &Named, id: &str, outcome: &Result<(), OperateError>) {
        let (id, done) = (KeyId::new(id).ok(), self.done());
        let key = id.as_ref().map(KeyId::as_str);
        let (upstream, from) = (named.name(), named.from());
        match outcome {
            Ok(()) => tracing::info!(target: AUDIT, key, upstream, from, "key {done} by the admin"),
            Err(error) => {
                tracing::warn!(target: AUDIT, key, upstream, from, error = with_sources(error), "key not {done}")
            }
        }
    }
}
