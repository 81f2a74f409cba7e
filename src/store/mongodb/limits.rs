//! How long operations may take.

use std::time::Duration;

#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) connect: Duration,
    pub(super) operation: Duration,
    pub(super) poll: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        let seconds = Duration::from_secs(5);
        Self { connect: seconds, operation: seconds, poll: seconds }
    }
}

/// The limit of one command about all keys. A recovery pass has a limit of its own.
pub(super) const ALL_KEYS_LIMIT: Duration = Duration::from_secs(60);
