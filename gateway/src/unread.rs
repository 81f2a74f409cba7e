//! Responses over HTTP/2 that their caller does not read.
//!
//! A caller can read one stream of a connection and leave another one unread for ever. Such a response holds a stream
//! of the upstream and what has arrived of it. It is broken off after a time.

use std::{
    mem,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use axum::{
    Error,
    body::{Body, Bytes, HttpBody},
};
use hyper::body::{Frame, SizeHint};

/// The responses of one connection.
#[derive(Clone, Default)]
pub(crate) struct Responses(Arc<Mutex<Vec<Weak<Mutex<State>>>>>);

struct State {
    body: Body,
    /// When hyper last took something of the body. It takes nothing while the caller does not read.
    taken_at: Instant,
    /// Whether the upstream is waited for, and not the caller.
    waits_for_upstream: bool,
    is_broken_off: bool,
}

struct Response(Arc<Mutex<State>>);

impl Responses {
    /// Watches a response body.
    pub(crate) fn watch(&self, body: Body) -> Body {
        if body.is_end_stream() {
            return body;
        }
        let state = State { body, taken_at: Instant::now(), waits_for_upstream: false, is_broken_off: false };
        let state = Arc::new(Mutex::new(state));
        let mut watched = lock(&self.0);
        // Keeps the list as short as twice the number of responses in flight.
        if watched.len() == watched.capacity() {
            watched.retain(|state| state.strong_count() > 0);
        }
        watched.push(Arc::downgrade(&state));
        drop(watched);
        Body::new(Response(state))
    }

    /// Breaks off the responses of which the caller has read nothing for this long, and returns how many.
    pub(crate) fn break_off(&self, limit: Duration) -> usize {
        let watched: Vec<_> = lock(&self.0).iter().filter_map(Weak::upgrade).collect();
        watched.iter().filter(|state| lock(state).break_off(limit)).count()
    }
}

impl State {
    fn break_off(&mut self, limit: Duration) -> bool {
        let is_unread = !self.waits_for_upstream && !self.is_broken_off && self.taken_at.elapsed() >= limit;
        if is_unread {
            // The drop frees the upstream's stream.
            drop(mem::take(&mut self.body));
            self.is_broken_off = true;
        }
        is_unread
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl HttpBody for Response {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let mut state = lock(&self.0);
        if state.is_broken_off {
            return Poll::Ready(Some(Err(Error::new("the caller read nothing for too long"))));
        }
        let frame = Pin::new(&mut state.body).poll_frame(cx);
        state.taken_at = Instant::now();
        state.waits_for_upstream = frame.is_pending();
        frame
    }

    fn is_end_stream(&self) -> bool {
        let state = lock(&self.0);
        !state.is_broken_off && state.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        lock(&self.0).body.size_hint()
    }
}
