//! What is done with a key, and how it is told: to whoever asked, and in the log.

use tower_key_rotation::{KeyId, OperateError};

use crate::with_sources;

/// Of an id that the pool would take, why the admin does not: nobody could do anything with the key.
pub(super) fn cannot_name(id: &str) -> Option<&'static str> {
    let reason = "a key can't be called . or .., which clients leave out of a path: give it another id";
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

    /// What an error says. Of a store's, only the log has the cause.
    pub(super) fn failed(self, error: &OperateError) -> String {
        match (error, self) {
            (OperateError::Store(store), Self::Add | Self::Remove) => {
                format!("{store}, so it was not {}", self.done())
            }
            (OperateError::Store(store), _) => {
                format!("{store}, so it is {} in this gateway only, until the next reload", self.done())
            }
            _ => error.to_string(),
        }
    }

    /// Nothing is logged that can't be an id: it may be a secret that came to a wrong place.
    pub(super) fn log(self, id: &str, outcome: &Result<(), OperateError>) {
        let (id, done) = (KeyId::new(id).ok(), self.done());
        let key = id.as_ref().map(KeyId::as_str);
        match outcome {
            Ok(()) => tracing::info!(key, "key {done} by the admin"),
            Err(error) => tracing::warn!(key, error = with_sources(error), "key not {done}"),
        }
    }
}
