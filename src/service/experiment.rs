//! The experiment by which a request finds out whether a refusal is about its key or about itself.

use std::sync::Arc;

use http::StatusCode;

use super::judge;
use crate::pool::{Engine, Key};

/// The keys that refused one request without saying why, each with the status.
#[derive(Default)]
pub(super) struct Experiment {
    refused: Vec<(Arc<Key>, StatusCode)>,
}

impl Experiment {
    /// Another key has refused the request. Returns whether the request goes on: not if a key before has refused it with
    /// the same status. Then the request is the reason.
    pub(super) fn refused(&mut self, engine: &Engine, key: &Arc<Key>, status: StatusCode) -> bool {
        let same = self.refused.iter().find(|(_, before)| *before == status);
        if let Some((before, _)) = same {
            engine.acquit([before, key]);
            return false;
        }
        self.refused.push((key.clone(), status));
        true
    }

    /// A key was answered with no refusal. If it has served the request, those before are the reason for theirs.
    pub(super) fn answered(&mut self, engine: &Engine, status: StatusCode) {
        if judge::has_served(status) {
            for (key, status) in self.refused.drain(..) {
                engine.confirm(&key, status.as_u16());
            }
        }
    }

    /// Whether no key has refused the request in that way.
    pub(super) fn has_not_begun(&self) -> bool {
        self.refused.is_empty()
    }
}
