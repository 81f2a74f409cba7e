//! What a request holds of its key's limit until the response's body ends.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crate::{
    limit::Rest,
    message::{EndOfBody, JudgedResponse},
    pool::{Lease, Ticket},
};

/// The tokens that a request has reserved of its key's limit, and its place among the requests in flight: in the extensions
/// of its response.
///
/// Tell it how many tokens the request used, as the response's body says. Otherwise the request counts for what it
/// reserved: see [`Traits::tokens`](crate::Traits::tokens). A response has no reservation if nothing limits the tokens
/// of its scope and the number of requests in flight, and if its status is 400 or more: then all tokens are given back.
///
/// ```
/// use http::Response;
/// use tower_key_rotation::Reservation;
///
/// struct Usage {
///     input: u64,
///     cached_input: u64,
///     output: u64,
/// }
///
/// /// Of a service that does not count cached input towards its limit.
/// fn correct<B>(response: &Response<B>, usage: &Usage) {
///     if let Some(reservation) = response.extensions().get::<Reservation>() {
///         reservation.used(usage.input.saturating_sub(usage.cached_input) + usage.output);
///     }
/// }
/// ```
///
/// The usage is mostly known when the body has been read, and the head is gone: keep a clone of the reservation.
///
/// # When it ends
///
/// The request counts as in flight until the end of the body, or until the body is dropped. A body that is dropped before
/// its end gives half of the tokens back, unless its usage was recorded: the input was used, and the service may not have
/// written all of the output.
///
/// Of an `http::Response`, a layer sees the body only with [`failover`](crate::KeyRotationLayer::failover),
/// [`read_error_bodies`](crate::KeyRotationLayer::read_error_bodies) or
/// [`stream_head`](crate::KeyRotationLayer::stream_head). Without them, the request is in flight until the last clone of its
/// reservation is dropped: mostly with the head of the response.
#[derive(Clone)]
pub struct Reservation(Arc<Held>);

/// A request's ticket, while its response's body passes.
pub(super) struct Held(Mutex<Ticket>);

impl Reservation {
    /// Says that the request used so many tokens, beside those that were said before: input that the service counts, and
    /// output. Leave out cached input where the service does not count it.
    ///
    /// It may be called at any time, also after the end of the body. Until the body ends, the request counts for what it has
    /// reserved at least. For the statistics of a key, see [`KeyPool::record_usage`](crate::KeyPool::record_usage).
    ///
    /// A number above 1,000,000,000 is taken for a mistake, such as a subtraction below zero, and ignored.
    pub fn used(&self, tokens: u64) {
        self.0.lock().used(tokens);
    }
}

impl Held {
    /// An error within the body says that a limit rests. Returns whether it is the limit in the request's scope alone.
    pub(super) fn rest(&self, reason: Rest, wait: Option<Duration>) -> bool {
        let ticket = self.lock();
        let rests_apart = ticket.rests_apart();
        if rests_apart {
            ticket.rest(reason, wait);
        }
        rests_apart
    }

    /// The body began with an error: the request is refused after all.
    pub(super) fn refused(&self) {
        self.lock().body_refused();
    }

    fn lock(&self) -> MutexGuard<'_, Ticket> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl EndOfBody for Held {
    fn ended(&self, is_whole: bool) {
        self.lock().body_ended(is_whole);
    }
}

/// Keeps a request in flight until its response's body ends, if that makes a difference.
#[cold]
pub(crate) fn keep<R: JudgedResponse>(
    lease: &mut Lease,
    response: &mut R,
    tell_end: impl FnOnce(&mut R, Arc<dyn EndOfBody>),
) {
    if let Some(ticket) = lease.take_ticket_of_body() {
        let held = Arc::new(Held(Mutex::new(ticket)));
        response.extensions_mut().insert(Reservation(held.clone()));
        tell_end(response, held);
    }
}

/// The same for a stream, which tells its end itself: an error in it may rest the limit, also if the end makes no difference.
pub(super) fn keep_for_stream<R: JudgedResponse>(lease: &mut Lease, response: &mut R) -> Option<Arc<Held>> {
    let ticket = lease.take_ticket()?;
    let has_body = ticket.has_body();
    let held = Arc::new(Held(Mutex::new(ticket)));
    if has_body {
        response.extensions_mut().insert(Reservation(held.clone()));
    }
    Some(held)
}

impl fmt::Debug for Reservation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reservation").finish_non_exhaustive()
    }
}
