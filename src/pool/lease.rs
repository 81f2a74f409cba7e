//! The key of one request.

use std::{sync::Arc, time::Duration};

use super::{
    key::Key,
    ticket::{Head, Ticket},
};
use crate::{
    key::{KeyId, inject::Rendered},
    limit::Rest,
};

/// The key that one request is sent with, and what the request took of the key's limit.
#[derive(Debug)]
pub(crate) struct Lease {
    pub(crate) key: Arc<Key>,
    /// `None` where the pool looks at rests of whole keys only, and the key is not in doubt. Boxed, so that such requests
    /// do not move it.
    held: Option<Box<Held>>,
}

/// What few requests hold beside their key.
#[derive(Debug)]
struct Held {
    ticket: Option<Ticket>,
    /// Whether the request finds out if a key in doubt serves again, and has no answer yet.
    is_trial: bool,
}

impl Lease {
    /// Of a key without limits.
    #[inline(always)]
    pub(crate) fn of(key: Arc<Key>) -> Self {
        Self { key, held: None }
    }

    /// With what the request took of the key's limit.
    pub(crate) fn with(key: Arc<Key>, ticket: Ticket) -> Self {
        Self { key, held: Some(Box::new(Held { ticket: Some(ticket), is_trial: false })) }
    }

    /// The same for a request that tries a key in doubt.
    pub(crate) fn into_trial(mut self) -> Self {
        let ticket = self.held.take().and_then(|held| held.ticket);
        Self { key: self.key, held: Some(Box::new(Held { ticket, is_trial: true })) }
    }

    /// Whether the pool has to hear of every answer, and not of refusals only.
    #[inline(always)]
    pub(crate) fn holds_anything(&self) -> bool {
        self.held.is_some()
    }

    pub(crate) fn ticket(&mut self) -> Option<&mut Ticket> {
        self.held.as_mut()?.ticket.as_mut()
    }

    /// Ends the request without an answer at its limit.
    pub(crate) fn drop_ticket(&mut self) {
        if let Some(held) = &mut self.held {
            held.ticket = None;
        }
    }

    /// A trial was answered with no refusal: its key serves.
    pub(crate) fn has_served(&mut self) {
        if self.take_trial() {
            self.key.serves();
        }
    }

    /// Whether the request finds out if a key in doubt serves again. The caller notes it when that is known: see
    /// [`Key::serves`].
    pub(crate) fn take_trial(&mut self) -> bool {
        self.held.as_mut().is_some_and(|held| std::mem::take(&mut held.is_trial))
    }

    pub(crate) fn id(&self) -> &KeyId {
        &self.key.id
    }

    pub(crate) fn credentials(&self) -> &Rendered {
        &self.key.credentials
    }

    /// Applies what the response said of the key, if the pool still exists.
    pub(crate) fn mark(&self, rest: Rest, hint: Option<Duration>, http_status: u16) {
        self.key.mark(rest, hint, http_status);
    }

    /// Applies a refusal of the key, or of the request, if the pool still exists.
    pub(crate) fn refuse(&self, http_status: u16) {
        self.key.refuse(http_status);
    }

    /// Notes the service's answer at the request's limit.
    pub(crate) fn settle(&mut self, head: Head<'_>) {
        if let Some(ticket) = self.ticket() {
            ticket.answered(head);
        }
    }

    pub(crate) fn take_ticket(&mut self) -> Option<Ticket> {
        self.held.as_mut()?.ticket.take()
    }

    /// The ticket of a request that has its answer, and is in flight until its body ends.
    pub(crate) fn take_ticket_of_body(&mut self) -> Option<Ticket> {
        self.held.as_mut()?.ticket.take_if(|ticket| ticket.has_body())
    }

    /// Whether a refusal rests the key's limit in the scope of the request, not the whole key.
    pub(crate) fn rests_apart(&self) -> bool {
        self.of_ticket(Ticket::rests_apart)
    }

    /// Whether the request finds out if a key has room that should have none.
    pub(crate) fn is_probe(&self) -> bool {
        self.of_ticket(Ticket::is_probe)
    }

    fn of_ticket(&self, is_it: impl FnOnce(&Ticket) -> bool) -> bool {
        self.held.as_ref().and_then(|held| held.ticket.as_ref()).is_some_and(is_it)
    }

    /// The request was not sent.
    #[cold]
    pub(crate) fn put_back(mut self) {
        if let Some(ticket) = self.held.take().and_then(|held| held.ticket) {
            ticket.put_back();
        }
    }

    /// Rests the key's limit in the scope of the request: a quota of that scope is used up.
    pub(crate) fn exhaust_scope(&mut self, wait: Option<Duration>, http_status: u16) {
        if let Some(ticket) = self.ticket() {
            ticket.exhausted(wait);
        }
        self.count_limited(http_status);
    }

    /// Counts a refusal of which the limit rests, not the whole key.
    pub(crate) fn count_limited(&self, http_status: u16) {
        self.key.count_limited(http_status);
    }
}
