//! Reads the beginning of a request's body before the request is sent, and gives the body back whole.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use axum::body::{Body, Bytes, HttpBody};
use futures_util::future::poll_fn;
use hyper::body::{Frame, SizeHint};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// A body of which the first frames have been read.
struct Ahead {
    /// Each with its part of the room for all bodies.
    read: VecDeque<(Bytes, Option<OwnedSemaphorePermit>)>,
    /// What ended the reading, if not the caller's pause: an error comes after what was read.
    error: Option<axum::Error>,
    rest: Option<Body>,
}

/// Reads a body until its end or a limit, or until all bodies together take too much room.
///
/// Returns what was read, and the body as it was, without trailers.
pub(super) async fn read_ahead(body: Body, most: usize, room: &Arc<Semaphore>) -> (Bytes, Body) {
    let mut ahead = Ahead { read: VecDeque::new(), error: None, rest: Some(body) };
    let mut length = 0;
    while length <= most
        && let Some(rest) = &mut ahead.rest
    {
        let data = match poll_fn(|cx| Pin::new(&mut *rest).poll_frame(cx)).await {
            None => {
                ahead.rest = None;
                break;
            }
            Some(Err(error)) => {
                (ahead.error, ahead.rest) = (Some(error), None);
                break;
            }
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) => data,
                Err(_trailers) => continue,
            },
        };
        let size = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let permit = room.clone().try_acquire_many_owned(size).ok();
        let has_room = permit.is_some();
        length += data.len();
        ahead.read.push_back((data, permit));
        if !has_room {
            break;
        }
    }
    (ahead.text(), Body::new(ahead))
}

impl Ahead {
    /// All that was read. Most bodies come in one frame, which is not copied.
    fn text(&self) -> Bytes {
        match (self.read.front(), self.read.len()) {
            (Some((data, _)), 1) => data.clone(),
            _ => self.read.iter().map(|(data, _)| &**data).collect::<Vec<_>>().concat().into(),
        }
    }
}

impl HttpBody for Ahead {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if let Some((data, _)) = self.read.pop_front() {
            return Poll::Ready(Some(Ok(Frame::data(data))));
        }
        if let Some(error) = self.error.take() {
            return Poll::Ready(Some(Err(error)));
        }
        match &mut self.rest {
            Some(rest) => Pin::new(rest).poll_frame(cx),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.read.is_empty() && self.error.is_none() && self.rest.as_ref().is_none_or(HttpBody::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        let read: u64 = self.read.iter().map(|(data, _)| data.len() as u64).sum();
        let rest = match &self.rest {
            Some(rest) => rest.size_hint(),
            // After an error, nobody knows how long the body would have been.
            None if self.error.is_some() => SizeHint::default(),
            None => SizeHint::with_exact(0),
        };
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
    use axum::BoxError;
    use futures_util::stream;
    use http_body_util::BodyExt;

    use super::*;

    fn body(frames: &[Result<&'static str, &'static str>]) -> Body {
        let frames: Vec<Result<Bytes, BoxError>> =
            frames.iter().map(|frame| frame.map(Bytes::from).map_err(BoxError::from)).collect();
        Body::from_stream(stream::iter(frames))
    }

    async fn read(body: Body, most: usize, room: usize) -> (Bytes, Body, Arc<Semaphore>) {
        let room = Arc::new(Semaphore::new(room));
        let (text, body) = read_ahead(body, most, &room).await;
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
            let (text, body, _) = read(body(&frames), most, room).await;
            assert_eq!(text, "one two ");
            assert_eq!(body.collect().await.unwrap().to_bytes(), "one two three");
        }
    }

    #[tokio::test]
    async fn an_error_comes_after_what_was_read() {
        let (text, mut body, _) = read(body(&[Ok("one"), Err("broken")]), 100, 100).await;
        assert_eq!(text, "one");
        assert!(!body.is_end_stream() && body.size_hint().exact().is_none());
        assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "one");
        assert!(body.frame().await.unwrap().is_err());
        assert!(body.frame().await.is_none());
    }
}
