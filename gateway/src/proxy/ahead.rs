//! Reads the beginning of a request's body before the request is sent, and gives the body back whole.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use axum::body::{Bytes, HttpBody};
use bytes::BytesMut;
use futures_util::future::poll_fn;
use hyper::body::{Frame, SizeHint};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// A smaller frame is copied: as it is, it would keep the whole buffer that it was read into.
const SMALL: usize = 4 << 10;

/// A body of which the first frames may have been read.
pub(crate) struct Ahead<B> {
    read: VecDeque<Bytes>,
    /// The share of `read` in the room for all bodies.
    room: Option<OwnedSemaphorePermit>,
    rest: Option<B>,
}

impl<B: HttpBody<Data = Bytes> + Unpin> Ahead<B> {
    /// A body of which nothing has been read.
    pub(super) fn new(body: B) -> Self {
        Self { read: VecDeque::new(), room: None, rest: Some(body) }
    }

    pub(super) fn empty() -> Self {
        Self { read: VecDeque::new(), room: None, rest: None }
    }

    /// Reads until the end of the body or a limit, or until all bodies together take too much room, and returns what was
    /// read. The body stays as it was, without trailers.
    ///
    /// # Errors
    ///
    /// If the body breaks off.
    pub(super) async fn read(&mut self, most: usize, room: &Arc<Semaphore>) -> Result<Bytes, B::Error> {
        let mut small = BytesMut::new();
        let mut length = 0;
        while length <= most
            && let Some(rest) = &mut self.rest
        {
            let Some(frame) = poll_fn(|cx| Pin::new(&mut *rest).poll_frame(cx)).await else {
                self.rest = None;
                break;
            };
            let Ok(data) = frame?.into_data() else { continue };
            length += data.len();
            let has_room = self.take_room(room, data.len());
            if data.len() < SMALL {
                small.extend_from_slice(&data);
            } else {
                self.push(small.split());
                self.read.push_back(data);
            }
            if !has_room {
                break;
            }
        }
        self.push(small);
        Ok(self.text())
    }

    fn take_room(&mut self, room: &Arc<Semaphore>, size: usize) -> bool {
        let size = u32::try_from(size).unwrap_or(u32::MAX);
        let Ok(more) = room.clone().try_acquire_many_owned(size) else { return false };
        match &mut self.room {
            Some(room) => room.merge(more),
            none => *none = Some(more),
        }
        true
    }

    fn push(&mut self, small: BytesMut) {
        if !small.is_empty() {
            self.read.push_back(small.freeze());
        }
    }

    /// All that was read. Most bodies come in one frame, which is not copied again.
    fn text(&self) -> Bytes {
        match (self.read.front(), self.read.len()) {
            (Some(data), 1) => data.clone(),
            _ => self.read.iter().map(|data| &**data).collect::<Vec<_>>().concat().into(),
        }
    }
}

impl<B: HttpBody<Data = Bytes> + Unpin> HttpBody for Ahead<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        if let Some(data) = self.read.pop_front() {
            if let Some(room) = &mut self.room {
                // The last frame may have found no room.
                drop(room.split(data.len().min(room.num_permits())));
            }
            return Poll::Ready(Some(Ok(Frame::data(data))));
        }
        match &mut self.rest {
            Some(rest) => Pin::new(rest).poll_frame(cx),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.read.is_empty() && self.rest.as_ref().is_none_or(HttpBody::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        let read: u64 = self.read.iter().map(|data| data.len() as u64).sum();
        let rest = self.rest.as_ref().map_or_else(|| SizeHint::with_exact(0), HttpBody::size_hint);
        let mut hint = SizeHint::new();
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper.saturating_add(read));
        }
        hint.set_lower(rest.lower().saturating_add(read));
        hint
    }
}

#[cfg(test)]
mod tests {
    use axum::{BoxError, body::Body};
    use futures_util::stream;
    use http_body_util::BodyExt;

    use super::*;

    fn body(frames: &[Result<&'static str, &'static str>]) -> Body {
        let frames: Vec<Result<Bytes, BoxError>> =
            frames.iter().map(|frame| frame.map(Bytes::from).map_err(BoxError::from)).collect();
        Body::from_stream(stream::iter(frames))
    }

    async fn read(body: Body, most: usize, room: usize) -> (Bytes, Ahead<Body>, Arc<Semaphore>) {
        let room = Arc::new(Semaphore::new(room));
        let mut body = Ahead::new(body);
        let text = body.read(most, &room).await.unwrap();
        (text, body, room)
    }

    #[tokio::test]
    async fn short_bodies_are_read_whole_and_come_back() {
        let (text, body, room) = read(body(&[Ok("one "), Ok("two")]), 100, 100).await;
        assert_eq!((&*text, body.size_hint().exact()), (&b"one two"[..], Some(7)));
        assert_eq!(room.available_permits(), 93);
        assert_eq!(body.collect().await.unwrap().to_bytes(), "one two");
        assert_eq!(room.available_permits(), 100);
    }

    #[tokio::test]
    async fn long_bodies_are_read_to_the_limit() {
        let frames = [Ok("one "), Ok("two "), Ok("three")];
        for (most, room) in [(4, 100), (100, 5)] {
            let (text, body, room) = read(body(&frames), most, room).await;
            assert_eq!(text, "one two ");
            assert_eq!(body.collect().await.unwrap().to_bytes(), "one two three");
            assert!([100, 5].contains(&room.available_permits()));
        }
    }

    #[tokio::test]
    async fn tiny_frames_are_kept_together() {
        let (text, mut body, room) = read(body(&vec![Ok("."); 10_000]), 20_000, 20_000).await;
        assert_eq!((text.len(), room.available_permits()), (10_000, 10_000));
        assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap().len(), 10_000);
        assert!(body.is_end_stream() && room.available_permits() == 20_000);
    }

    #[tokio::test]
    async fn a_body_that_breaks_off_is_an_error() {
        let room = Arc::new(Semaphore::new(100));
        let mut body = Ahead::new(body(&[Ok("one"), Err("broken")]));
        assert!(body.read(100, &room).await.is_err());
        drop(body);
        assert_eq!(room.available_permits(), 100);
    }
}
