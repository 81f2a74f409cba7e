//! What a process has to tell others, for as long as a reader may have missed it.

use super::message::Item;

/// Readers come once a second, with jitter: an item in three messages is seen by all of them.
const MESSAGES: u32 = 3;

/// The items of a scope, each with the number of the message that it was first in.
#[derive(Debug, Default)]
pub(crate) struct Outbox(Vec<(u32, Item)>);

impl Outbox {
    pub(crate) fn push(&mut self, message: u32, item: Item) {
        self.0.push((message, item));
    }

    /// Returns the items of this message and of the ones before it that are still to be told.
    pub(crate) fn items(&mut self, message: u32) -> &[(u32, Item)] {
        self.0.retain(|(first, _)| message.wrapping_sub(*first) < MESSAGES);
        &self.0
    }
}
