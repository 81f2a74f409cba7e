//! The windows of the pool's quotas, for the store.

use super::{
    engine::Engine,
    kept::{encode, wall_millis},
};
use crate::limit::nanos;

impl Engine {
    /// Whether there is a quota whose windows are worth keeping.
    pub(crate) fn has_windows(&self) -> bool {
        self.limiting.quotas.iter().any(|quota| quota.is_window())
    }

    /// Goes on with what is left of the windows that the last process used.
    pub(crate) fn restore_windows(&self, kept: &[u8]) {
        self.limiting.kept.fill(kept);
    }

    /// The windows of which something was used.
    pub(crate) fn windows(&self) -> Vec<u8> {
        let (now, wall) = (nanos(self.config.clock.now()), wall_millis(&*self.config.clock));
        // Of limits that no request has used yet, what the last process kept.
        let mut windows = self.limiting.kept.all(wall);
        self.snapshot().scopes.each(|scoped| {
            for (slot, name) in scoped.layout.names(&scoped.keys).limits() {
                if let Some(limit) = scoped.known_limit(*slot) {
                    windows.insert((scoped.common.name(), *name), limit.kept(now, wall).collect());
                }
            }
        });
        encode(&windows)
    }
}
