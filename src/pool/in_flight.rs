//! A request's place among those in flight with its key, in all scopes together.

use std::sync::Arc;

use super::key::Key;
use crate::limit::Cap;

/// A request in flight with a key that has a limit of them. Dropped, it makes room for another one.
#[derive(Debug)]
pub(crate) struct InFlight(Arc<Key>);

impl InFlight {
    /// A place for a request, if the key has one left.
    ///
    /// A place must not be given up for another reason than the end of a request: that wakes all who wait for one.
    pub(super) fn enter(key: &Arc<Key>) -> Option<Self> {
        key.cap()?.enter().then(|| Self(key.clone()))
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        // Only a full key is closed.
        if self.0.cap().is_some_and(Cap::leave) {
            self.0.has_room();
        }
    }
}
