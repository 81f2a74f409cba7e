//! Responses over HTTP/2 that their caller does not read.
//!
//! A caller can read one stream of a connection and leave another one unread for ever. Such a response holds a stream
//! of the upstream and what has arrived of it. It is broken off after a time.

use std::{
    mem,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    task::{Context, Poll, ready},
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

/// The largest piece of a body that hyper gets at once. It takes the next one when the caller has room for it, so a slow
/// caller is seen to read, and little waits for a caller that does not.
const PIECE: usize = 16 << 10;

struct State {
    body: Body,
    /// What is left of the last data.
    rest: Bytes,
    /// When hyper last took something of the body. It takes nothing while the caller does not read.
    taken_at: Instant,
    /// Whether the upstream is waited for, and not the caller.
    waits_for_upstream: bool,
    is_broken_off: bool,
}

/// A response body that is watched.
struct Watched(Arc<Mutex<State>>);

impl Responses {
    /// Watches a response body.
    pub(crate) fn watch(&self, body: Body) -> Body {
        if body.is_end_stream() {
            return body;
        }
        let state = State {
            body,
            rest: Bytes::new(),
            taken_at: Instant::now(),
            waits_for_upstream: false,
            is_broken_off: false,
        };
        let state = Arc::new(Mutex::new(state));
        let mut watched = lock(&self.0);
        // Keeps the list as short as twice the number of responses in flight.
        if watched.len() == watched.capacity() {
            watched.retain(|state| state.strong_count() > 0);
        }
        watched.push(Arc::downgrade(&state));
        drop(watched);
        Body::new(Watched(state))
    }

    /// Breaks off the responses of which the caller has read nothing for this long, and returns how many.
    pub(crate) fn break_off(&self, limit: Duration) -> usize {
        let watched: Vec<_> = lock(&self.0).iter().filter_map(Weak::upgrade).collect();
        watched.iter().filter(|state| lock(state).break_off(limit)).count()
    }
}

impl State {
    fn next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        if self.rest.is_empty() {
            match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.rest = data,
                    Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                },
                end => return Poll::Ready(end),
            }
        }
        let piece = self.rest.split_to(self.rest.len().min(PIECE));
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn break_off(&mut self, limit: Duration) -> bool {
        let is_unread = !self.waits_for_upstream && !self.is_broken_off && self.taken_at.elapsed() >= limit;
        if is_unread {
            // The drop frees the upstream's stream.
            drop((mem::take(&mut self.body), mem::take(&mut self.rest)));
            self.is_broken_off = true;
        }
        is_unread
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let mut state = lock(&self.0);
        if state.is_broken_off {
            return Poll::Ready(Some(Err(Error::new("the caller read nothing for too long"))));
        }
        let frame = state.next(cx);
        state.taken_at = Instant::now();
        state.waits_for_upstream = frame.is_pending();
        frame
    }

    fn is_end_stream(&self) -> bool {
        let state = lock(&self.0);
        !state.is_broken_off && state.rest.is_empty() && state.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let state = lock(&self.0);
        let (hint, rest) = (state.body.size_hint(), state.rest.len() as u64);
        let mut with_rest = SizeHint::new();
        if let Some(upper) = hint.upper() {
            with_rest.set_upper(upper + rest);
        }
        with_rest.set_lower(hint.lower() + rest);
        with_rest
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    #[tokio::test]
    async fn data_comes_in_small_pieces() {
        let mut body = Responses::default().watch(Body::from(vec![7; 40_000]));
        assert_eq!(body.size_hint().exact(), Some(40_000));
        let mut pieces = Vec::new();
        while let Some(frame) = body.frame().await {
            pieces.push(frame.unwrap().into_data().unwrap().len());
        }
        assert_eq!(pieces, [16_384, 16_384, 7_232]);
        assert!(body.is_end_stream());
    }

    #[tokio::test]
    async fn an_unread_response_is_broken_off_once() {
        let responses = Responses::default();
        let mut body = responses.watch(Body::from("unread"));
        assert_eq!(responses.break_off(Duration::from_secs(60)), 0);
        assert_eq!(responses.break_off(Duration::ZERO), 1);
        assert_eq!(responses.break_off(Duration::ZERO), 0);
        assert!(body.frame().await.unwrap().is_err());
    }
}
