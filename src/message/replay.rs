//! A response body that can be read in part and then replayed from the beginning.

use std::{
    collections::VecDeque,
    fmt,
    future::poll_fn,
    mem,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes, BytesMut};
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

use super::{
    end_of_body::{EndOfBody, TellsEnd},
    watch::{Seen, Watch},
};
use crate::clock::Sleep;

pin_project! {
    /// A response body that yields any frames already read, then the rest.
    ///
    /// [`KeyRotationLayer::failover`](crate::KeyRotationLayer::failover) and
    /// [`read_error_bodies`](crate::KeyRotationLayer::read_error_bodies) return this type, since both read the bodies of
    /// some errors, up to a limit; so does [`stream_head`](crate::KeyRotationLayer::stream_head), which reads the beginning
    /// of streams. All other bodies pass through unread.
    pub struct Replay<B: Body> {
        #[pin]
        state: State<B>,
    }
}

pin_project! {
    #[project = StateProjection]
    enum State<B: Body> {
        Untouched { #[pin] body: B },
        // Boxed to keep the response small: it is moved several times, and few bodies are read.
        Begun { begun: Box<Begun<B>> },
    }
}

struct Begun<B: Body> {
    read: VecDeque<Frame<Bytes>>,
    failed: Option<B::Error>,
    // Pinned in a box, since a body must not move once it has been polled.
    rest: Option<Pin<Box<B>>>,
    end: TellsEnd,
    // Sees what follows the frames that have been read.
    watch: Option<Arc<dyn Watch>>,
}

impl<B: Body> Replay<B> {
    #[inline]
    pub(crate) fn untouched(body: B) -> Self {
        Self { state: State::Untouched { body } }
    }

    /// Says when it ends, or is dropped.
    pub(crate) fn tell_end(&mut self, end: Arc<dyn EndOfBody>) {
        if self.is_end_stream() {
            return end.ended(true);
        }
        // Among the parts in the box, so that all other responses stay small.
        let begun = Begun { end: TellsEnd::to(end), ..Begun::empty() };
        let before = mem::replace(&mut self.state, State::Begun { begun: Box::new(begun) });
        let State::Begun { begun } = &mut self.state else { return };
        match before {
            State::Untouched { body } => begun.rest = Some(Box::pin(body)),
            State::Begun { begun: before } => {
                let Begun { read, failed, rest, watch, .. } = *before;
                (begun.read, begun.failed, begun.rest, begun.watch) = (read, failed, rest, watch);
            }
        }
    }

    /// Reads to the end, or until at least `most` bytes are read, or until `time_over` completes.
    pub(crate) async fn read(self, most: usize, time_over: Sleep) -> Self {
        let mut begun = self.begun();
        begun.read(most, time_over).await;
        Self { state: State::Begun { begun } }
    }

    /// Reads until `watch` has seen enough, to the end, or until `time_over` completes. `watch` sees the rest as it passes,
    /// and `end` is told when the caller has read all.
    pub(crate) async fn hold(
        mut self,
        watch: Arc<dyn Watch>,
        end: Option<Arc<dyn EndOfBody>>,
        time_over: Sleep,
    ) -> Self {
        if let Some(end) = end {
            self.tell_end(end);
        }
        let mut begun = self.begun();
        begun.hold(watch, time_over).await;
        Self { state: State::Begun { begun } }
    }

    fn begun(self) -> Box<Begun<B>> {
        match self.state {
            State::Untouched { body } => Box::new(Begun::new(body)),
            State::Begun { begun } => begun,
        }
    }

    /// Returns all bytes that have been read.
    pub(crate) fn beginning(&self) -> Bytes {
        let State::Begun { begun } = &self.state else { return Bytes::new() };
        let mut pieces = begun.read.iter().filter_map(Frame::data_ref);
        match (pieces.next(), pieces.next()) {
            (None, _) => Bytes::new(),
            (Some(only), None) => only.clone(),
            (Some(first), Some(second)) => {
                let mut whole = BytesMut::from(&first[..]);
                whole.extend_from_slice(second);
                pieces.for_each(|piece| whole.extend_from_slice(piece));
                whole.freeze()
            }
        }
    }
}

fn shared<D: Buf>(frame: Frame<D>) -> Frame<Bytes> {
    frame.map_data(|mut data| data.copy_to_bytes(data.remaining()))
}

impl<B: Body> Body for Replay<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        match self.project().state.project() {
            StateProjection::Untouched { body } => {
                let frame = ready!(body.poll_frame(cx));
                Poll::Ready(frame.map(|frame| frame.map(shared)))
            }
            StateProjection::Begun { begun } => {
                let frame = ready!(begun.poll_frame(cx));
                begun.look(&frame);
                Poll::Ready(frame)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.state {
            State::Untouched { body } => body.is_end_stream(),
            State::Begun { begun } => begun.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.state {
            State::Untouched { body } => body.size_hint(),
            State::Begun { begun } => begun.size_hint(),
        }
    }
}

impl<B: Body> Begun<B> {
    fn new(body: B) -> Self {
        Self { rest: Some(Box::pin(body)), ..Self::empty() }
    }

    fn empty() -> Self {
        Self { read: VecDeque::new(), failed: None, rest: None, end: TellsEnd::nobody(), watch: None }
    }

    fn look(&mut self, frame: &Option<Result<Frame<Bytes>, B::Error>>) {
        let mut end = mem::replace(&mut self.end, TellsEnd::nobody());
        end.look(frame.as_ref(), || self.is_end_stream());
        self.end = end;
    }

    fn bytes_read(&self) -> usize {
        self.read.iter().filter_map(Frame::data_ref).map(Bytes::len).sum()
    }

    async fn read(&mut self, most: usize, mut time_over: Sleep) {
        let mut bytes = self.bytes_read();
        while bytes < most {
            let Some(frame) = self.read_frame(&mut time_over).await else { return };
            bytes += frame.data_ref().map_or(0, Bytes::len);
        }
        if self.rest.as_ref().is_some_and(|rest| rest.is_end_stream()) {
            self.rest = None;
        }
    }

    async fn hold(&mut self, watch: Arc<dyn Watch>, mut time_over: Sleep) {
        let mut seen = Seen::TooLittle;
        for frame in &self.read {
            seen = show(&*watch, frame).unwrap_or(seen);
        }
        while seen == Seen::TooLittle {
            let Some(frame) = self.read_frame(&mut time_over).await else { break };
            seen = show(&*watch, frame).unwrap_or(seen);
        }
        if seen == Seen::All {
            return;
        }
        match &self.rest {
            Some(rest) if !rest.is_end_stream() => self.watch = Some(watch),
            _ if self.failed.is_none() => watch.ended(),
            _ => {}
        }
    }

    /// Reads one more frame, if there is one and it comes in time.
    async fn read_frame(&mut self, time_over: &mut Sleep) -> Option<&Frame<Bytes>> {
        let rest = self.rest.as_mut()?;
        let frame = tokio::select! {
            biased;
            frame = poll_fn(|cx| rest.as_mut().poll_frame(cx)) => frame,
            () = time_over => return None,
        };
        match frame {
            Some(Ok(frame)) => {
                self.read.push_back(shared(frame));
                return self.read.back();
            }
            Some(Err(error)) => self.failed = Some(error),
            None => {}
        }
        self.rest = None;
        None
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        if let Some(frame) = self.read.pop_front() {
            return Poll::Ready(Some(Ok(frame)));
        }
        if let Some(error) = self.failed.take() {
            return Poll::Ready(Some(Err(error)));
        }
        let Some(rest) = &mut self.rest else { return Poll::Ready(None) };
        let frame = ready!(rest.as_mut().poll_frame(cx)).map(|frame| frame.map(shared));
        if let Some(watch) = &self.watch {
            // Nobody has to ask for more than the last frame.
            let has_ended = frame.is_none() || rest.is_end_stream();
            if !show_passing(&**watch, &frame, has_ended) {
                self.watch = None;
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        let rest_ended = self.rest.as_ref().is_none_or(|rest| rest.is_end_stream());
        self.read.is_empty() && self.failed.is_none() && rest_ended
    }

    fn size_hint(&self) -> SizeHint {
        let rest = self.rest.as_ref().map_or(SizeHint::with_exact(0), |rest| rest.size_hint());
        let read = self.bytes_read() as u64;
        let mut hint = SizeHint::new();
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper.saturating_add(read));
        }
        hint.set_lower(rest.lower().saturating_add(read));
        hint
    }
}

fn show(watch: &dyn Watch, frame: &Frame<Bytes>) -> Option<Seen> {
    let data = frame.data_ref().map(|data| watch.data(data));
    data.or_else(|| frame.trailers_ref().map(|trailers| watch.trailers(trailers)))
}

/// Shows what a body has yielded. Returns whether the next frame has to be shown, too.
fn show_passing<E>(watch: &dyn Watch, frame: &Option<Result<Frame<Bytes>, E>>, has_ended: bool) -> bool {
    let seen = match frame {
        Some(Ok(frame)) => show(watch, frame).unwrap_or(Seen::Enough),
        Some(Err(_)) => return false,
        None => Seen::Enough,
    };
    if has_ended && seen != Seen::All {
        watch.ended();
    }
    !has_ended && seen != Seen::All
}

impl<B: Body> fmt::Debug for Replay<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Replay").finish_non_exhaustive()
    }
}
