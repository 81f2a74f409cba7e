//! The key of one request.

use std::{sync::Arc, time::Duration};

use super::{
    key::Key,
    ticket::{Head, Ticket},
};
use crate::{
    key::{KeyId, inject::Rendered},
    limit::Rest,
    sync::atomic::Ordering::Relaxed,
};

/// The key that one request is sent with, and what the request took of the key's limit.
#[derive(Debug)]
pub(crate) struct Lease {
    pub(crate) key: Arc<Key>,
    /// `None` where the pool looks at rests of whole keys only. Boxed, so that such requests do not move it.
    pub(crate) ticket: Option<Box<Ticket>>,
}

impl Lease {
    /// Of a key without limits.
    #[inline(always)]
    pub(crate) fn of(key: Arc<Key>) -> Self {
        Self { key, ticket: None }
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

    /// Notes the service's answer at the request's limit.
    pub(crate) fn settle(&mut self, head: Head<'_>) {
        if let Some(ticket) = &mut self.ticket {
            ticket.answered(head);
        }
    }

    /// The ticket of a request that has its answer, and is in flight until its body ends.
    pub(crate) fn take_ticket_of_body(&mut self) -> Option<Box<Ticket>> {
        self.ticket.take_if(|ticket| ticket.has_body())
    }

    /// Whether a refusal rests the key's limit in the scope of the request, not the whole key.
    pub(crate) fn rests_apart(&self) -> bool {
        self.ticket.as_ref().is_some_and(|ticket| ticket.rests_apart())
    }

    /// Whether the request finds out if a key has room that should have none.
    pub(crate) fn is_probe(&self) -> bool {
        self.ticket.as_ref().is_some_and(|ticket| ticket.is_probe())
    }

    /// The request was not sent.
    #[cold]
    pub(crate) fn put_back(mut self) {
        if let Some(ticket) = self.ticket.take() {
            ticket.put_back();
        }
    }

    /// Rests the key's limit in the scope of the request: a quota of that scope is used up.
    pub(crate) fn exhaust_scope(&mut self, wait: Option<Duration>, http_status: u16) {
        if let Some(ticket) = &mut self.ticket {
            ticket.exhausted(wait);
        }
        self.count_limited(http_status);
    }

    /// Counts a refusal of which the limit rests, not the whole key.
    pub(crate) fn count_limited(&self, http_status: u16) {
        self.key.counts.limited.fetch_add(1, Relaxed);
        self.key.set_last_status(http_status);
    }
}
