//! A request body that streams to the upstream and can be replayed.
//!
//! The body keeps a copy of the received bytes, up to a limit, so that a retry can send them again with another key.

use std::{
    fmt,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker, ready},
};

use axum::body::{Bytes, HttpBody};
use bytes::BytesMut;
use hyper::body::{Frame, SizeHint};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tower::BoxError;

#[derive(Clone)]
pub(super) struct BodyLimits {
    /// Bytes to keep for a retry.
    pub(super) keep: usize,
    /// Size of the largest body.
    pub(super) most: usize,
    /// Bytes that all bodies together may still keep.
    pub(super) room: Arc<Semaphore>,
}

/// A caller's body, as one attempt sends it.
///
/// A clone is for another attempt and starts at the first byte. Only one attempt reads from the caller: the last one
/// that called [`hold`](Self::hold) before it was sent.
pub(crate) struct KeptBody<B> {
    shared: Arc<Mutex<Shared<B>>>,
    attempt: u32,
    /// Number of bytes that this attempt has sent.
    sent: usize,
}

/// Tells whether the caller or the upstream delays a request body.
pub(super) struct Caller<B>(Arc<Mutex<Shared<B>>>);

impl<B> Caller<B> {
    /// Whether the upstream is ready for more of the body than the caller has sent.
    pub(super) fn is_waited_for(&self) -> bool {
        lock(&self.0).waits_for_source
    }
}

struct Shared<B> {
    /// `None` after its end or an error.
    source: Option<B>,
    waits_for_source: bool,
    received: usize,
    limits: BodyLimits,
    /// All received bytes; `None` if they exceed a limit.
    kept: Option<Kept>,
    /// The attempt that reads from the caller.
    reader: u32,
    /// The next attempt. Until it starts or is dropped, nothing more is read from the caller.
    held_for: Option<u32>,
    /// Number of the newest attempt.
    last: u32,
    /// Waker of the reader while it waits.
    waker: Option<Waker>,
}

/// Received bytes, and their part of the room for all bodies.
#[derive(Default)]
struct Kept {
    bytes: BytesMut,
    room: Option<OwnedSemaphorePermit>,
}

impl Kept {
    /// Whether there was room for the data.
    fn push(&mut self, data: &[u8], room: &Arc<Semaphore>) -> bool {
        let Some(more) = u32::try_from(data.len())
            .ok()
            .and_then(|length| room.clone().try_acquire_many_owned(length).ok())
        else {
            return false;
        };
        match &mut self.room {
            Some(room) => room.merge(more),
            room => *room = Some(more),
        }
        self.bytes.extend_from_slice(data);
        true
    }
}

impl<B> KeptBody<B> {
    pub(super) fn new(body: B, limits: BodyLimits) -> Self {
        let shared = Shared {
            source: Some(body),
            waits_for_source: false,
            received: 0,
            limits,
            kept: Some(Kept::default()),
            reader: 0,
            held_for: None,
            last: 0,
            waker: None,
        };
        Self { shared: Arc::new(Mutex::new(shared)), attempt: 0, sent: 0 }
    }

    /// Whether this attempt can send the whole body.
    ///
    /// If so, the previous attempt reads nothing more until this attempt is sent or dropped.
    pub(super) fn hold(&self) -> bool {
        let mut shared = self.shared();
        let can_be_sent = shared.kept.is_some();
        shared.held_for = can_be_sent.then_some(self.attempt);
        can_be_sent
    }

    /// Whether this is the body of the first attempt, rather than a clone of it.
    pub(super) fn is_first(&self) -> bool {
        self.attempt == 0
    }

    pub(super) fn caller(&self) -> Caller<B> {
        Caller(self.shared.clone())
    }

    fn shared(&self) -> MutexGuard<'_, Shared<B>> {
        lock(&self.shared)
    }
}

fn lock<B>(shared: &Mutex<Shared<B>>) -> MutexGuard<'_, Shared<B>> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<B> Clone for KeptBody<B> {
    fn clone(&self) -> Self {
        let mut shared = self.shared();
        shared.last += 1;
        Self { shared: self.shared.clone(), attempt: shared.last, sent: 0 }
    }
}

impl<B> Drop for KeptBody<B> {
    fn drop(&mut self) {
        let mut shared = self.shared();
        if shared.held_for == Some(self.attempt) {
            shared.held_for = None;
            wake(shared);
        }
    }
}

fn wake<B>(mut shared: MutexGuard<'_, Shared<B>>) {
    let waker = shared.waker.take();
    drop(shared);
    if let Some(waker) = waker {
        waker.wake();
    }
}

impl<B> HttpBody for KeptBody<B>
where
    B: HttpBody<Data = Bytes, Error: Into<BoxError>> + Unpin,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let (attempt, sent) = (self.attempt, self.sent);
        let mut shared = self.shared();
        if shared.held_for == Some(attempt) {
            shared.reader = attempt;
            shared.held_for = None;
            // So that the previous attempt sees that it has been replaced.
            wake(shared);
            shared = self.shared();
        }
        let frame = ready!(shared.poll_for(attempt, sent, cx));
        drop(shared);
        if let Some(Ok(data)) = &frame {
            self.sent += data.len();
        }
        Poll::Ready(frame.map(|frame| frame.map(Frame::data)))
    }

    fn is_end_stream(&self) -> bool {
        let shared = self.shared();
        shared.unsent(self.sent).is_empty() && shared.source.as_ref().is_none_or(HttpBody::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        let shared = self.shared();
        let unsent = shared.unsent(self.sent).len() as u64;
        let rest = shared.source.as_ref().map_or(SizeHint::with_exact(0), HttpBody::size_hint);
        let mut hint = SizeHint::new();
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper.saturating_add(unsent));
        }
        hint.set_lower(rest.lower().saturating_add(unsent));
        hint
    }
}

impl<B> Shared<B>
where
    B: HttpBody<Data = Bytes, Error: Into<BoxError>> + Unpin,
{
    fn unsent(&self, sent: usize) -> &[u8] {
        self.kept.as_ref().and_then(|kept| kept.bytes.get(sent..)).unwrap_or_default()
    }

    fn poll_for(
        &mut self,
        attempt: u32,
        sent: usize,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, BoxError>>> {
        if attempt != self.reader || (sent < self.received && self.kept.is_none()) {
            return Poll::Ready(Some(Err(SentByAnother.into())));
        }
        if self.held_for.is_some() {
            self.waker = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let unsent = self.unsent(sent);
        if !unsent.is_empty() {
            return Poll::Ready(Some(Ok(Bytes::copy_from_slice(unsent))));
        }
        let frame = self.poll_source(cx);
        self.waits_for_source = frame.is_pending();
        if self.waits_for_source {
            self.waker = Some(cx.waker().clone());
        }
        frame
    }

    fn poll_source(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, BoxError>>> {
        loop {
            let Some(source) = &mut self.source else { return Poll::Ready(None) };
            let frame = match ready!(Pin::new(source).poll_frame(cx)) {
                Some(Ok(frame)) => frame,
                Some(Err(error)) => return Poll::Ready(Some(Err(self.fail(CutOff(error.into()))))),
                None => {
                    self.source = None;
                    return Poll::Ready(None);
                }
            };
            // A proxy may drop trailers, and a retry could not send them again.
            let Ok(data) = frame.into_data() else { continue };
            self.received = self.received.saturating_add(data.len());
            if self.received > self.limits.most {
                return Poll::Ready(Some(Err(self.fail(TooLarge))));
            }
            self.keep(&data);
            return Poll::Ready(Some(Ok(data)));
        }
    }

    fn keep(&mut self, data: &[u8]) {
        let is_small = self.received <= self.limits.keep;
        let is_kept = self.kept.as_mut().is_some_and(|kept| is_small && kept.push(data, &self.limits.room));
        if !is_kept {
            self.kept = None;
        }
    }

    fn fail(&mut self, error: impl Into<BoxError>) -> BoxError {
        self.source = None;
        self.kept = None;
        error.into()
    }
}

/// The body is larger than `max-body`.
#[derive(Debug)]
pub(super) struct TooLarge;

/// The caller's connection broke, or its body was malformed.
#[derive(Debug)]
pub(super) struct CutOff(BoxError);

/// Another attempt has replaced this one.
#[derive(Debug)]
struct SentByAnother;

impl fmt::Display for TooLarge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the request's body is too large")
    }
}

impl fmt::Display for CutOff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the request's body broke off")
    }
}

impl fmt::Display for SentByAnother {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the request was sent again")
    }
}

impl std::error::Error for TooLarge {}

impl std::error::Error for CutOff {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&*self.0)
    }
}

impl std::error::Error for SentByAnother {}
