//! Whether an HTTP/2 upstream allows requests on a connection.
//!
//! hyper keeps a request until the upstream allows one more. An upstream that allows none, by
//! `SETTINGS_MAX_CONCURRENT_STREAMS` of 0, would make the request wait for its whole time limit. RFC 9113 section 6.5.2
//! wants a 0 for short durations only, so the gateway waits [`PATIENCE`] and then uses another connection.
//!
//! hyper does not tell what the upstream allows, so this module reads it from the frames that the upstream sends.

use std::{
    error::Error,
    fmt,
    future::pending,
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use hyper_util::{
    client::legacy::connect::{Connected, Connection},
    rt::TokioIo,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::watch,
    time::timeout,
};

/// How long a request waits for an upstream that allows no request.
const PATIENCE: Duration = Duration::from_secs(1);

/// The upstream allowed no request on the connection. The request was not sent.
#[derive(Debug)]
pub(super) struct NoStreams;

impl fmt::Display for NoStreams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the upstream allows no requests on its HTTP/2 connection: its SETTINGS_MAX_CONCURRENT_STREAMS is 0")
    }
}

impl Error for NoStreams {}

/// What the upstream allows on the connections of one client. An HTTP/2 client has one connection at a time.
#[derive(Clone)]
pub(super) struct Streams(Arc<watch::Sender<State>>);

#[derive(Clone, Copy, Default)]
struct State {
    allowed: Allowed,
    /// How often requests were allowed after they were not.
    openings: u64,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Allowed {
    /// There is no connection, or its settings have not arrived.
    #[default]
    Unknown,
    Some,
    None,
}

impl Streams {
    pub(super) fn new() -> Self {
        Self(Arc::new(watch::Sender::new(State::default())))
    }

    /// Whether the upstream allows no request now.
    pub(super) fn are_none(&self) -> bool {
        self.0.borrow().allowed == Allowed::None
    }

    /// Sends a request, unless the upstream allows none for a while.
    ///
    /// After the upstream has allowed requests even for a moment, this one may have been sent, so it gets all its time.
    pub(super) async fn send<T, E>(
        &self,
        response: impl Future<Output = Result<T, E>>,
    ) -> Result<Result<T, E>, NoStreams> {
        let begun = *self.0.borrow();
        if begun.allowed == Allowed::Some {
            return Ok(response.await);
        }
        tokio::select! {
            biased;
            response = response => Ok(response),
            () = stay_none(self.0.subscribe(), begun.openings) => Err(NoStreams),
        }
    }

    fn set(&self, allowed: Allowed) {
        self.0.send_if_modified(|state| {
            let is_news = state.allowed != allowed;
            state.openings += u64::from(is_news && allowed == Allowed::Some);
            state.allowed = allowed;
            is_news
        });
    }
}

/// Completes if no request was allowed since the beginning, and none is for [`PATIENCE`].
async fn stay_none(mut changes: watch::Receiver<State>, openings: u64) {
    loop {
        let state = *changes.borrow_and_update();
        if state.openings > openings {
            return pending().await;
        }
        let change = changes.changed();
        let change = match state.allowed {
            Allowed::None => match timeout(PATIENCE, change).await {
                Ok(change) => change,
                Err(_) => return,
            },
            _ => change.await,
        };
        if change.is_err() {
            return pending().await;
        }
    }
}

/// A connection to the upstream that notes what its settings allow.
pub(super) struct Noted<C> {
    connection: TokioIo<C>,
    /// `None` for HTTP/1.1.
    frames: Option<Frames>,
    streams: Streams,
}

impl<C: Connection> Noted<C> {
    pub(super) fn new(connection: C, streams: Streams) -> Self {
        let is_http_2 = connection.connected().is_negotiated_h2();
        if !is_http_2 {
            streams.set(Allowed::Some);
        }
        Self { connection: TokioIo::new(connection), frames: is_http_2.then(Frames::default), streams }
    }
}

impl<C> Drop for Noted<C> {
    fn drop(&mut self) {
        if self.frames.is_some() {
            self.streams.set(Allowed::Unknown);
        }
    }
}

impl<C: Connection> Connection for Noted<C> {
    fn connected(&self) -> Connected {
        self.connection.inner().connected()
    }
}

impl<C: hyper::rt::Read + Unpin> AsyncRead for Noted<C> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.connection).poll_read(cx, buffer))?;
        if let Some(frames) = &mut self.frames
            && let Some(most) = frames.read(&buffer.filled()[before..])
        {
            self.streams.set(if most == 0 { Allowed::None } else { Allowed::Some });
        }
        Poll::Ready(Ok(()))
    }
}

impl<C: hyper::rt::Write + Unpin> AsyncWrite for Noted<C> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.connection).poll_write(cx, data)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.connection).poll_write_vectored(cx, data)
    }

    fn is_write_vectored(&self) -> bool {
        self.connection.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_shutdown(cx)
    }
}

/// Length of a frame's head (RFC 9113 section 4.1).
const HEAD: usize = 9;

/// Length of a setting: a 16-bit identifier and a 32-bit value.
const SETTING: usize = 6;

const SETTINGS: u8 = 4;

const ACK: u8 = 1;

const MAX_CONCURRENT_STREAMS: u16 = 3;

/// Follows the frames that the upstream sends, and reads its settings.
#[derive(Default)]
struct Frames {
    /// The head of a frame, or a setting, as far as it has arrived.
    part: Vec<u8>,
    /// How much of the current frame's payload has not arrived.
    left: usize,
    is_settings: bool,
    has_settings: bool,
    /// What the current frame of settings says so far.
    most: Option<u32>,
}

impl Frames {
    /// Returns how many requests the connection may carry from now on, if the bytes say so.
    fn read(&mut self, mut bytes: &[u8]) -> Option<u32> {
        let mut most = None;
        while !bytes.is_empty() {
            if self.left > 0 && !self.is_settings {
                let skipped = self.left.min(bytes.len());
                self.left -= skipped;
                bytes = &bytes[skipped..];
                continue;
            }
            let whole = if self.left > 0 { SETTING } else { HEAD };
            let (more, rest) = bytes.split_at(bytes.len().min(whole - self.part.len()));
            self.part.extend_from_slice(more);
            bytes = rest;
            if self.part.len() < whole {
                break;
            }
            if whole == SETTING {
                self.setting()
            } else {
                self.head()
            }
            self.part.clear();
            // Not before the end of the frame: its last setting counts.
            if self.left == 0 {
                most = self.most.take().or(most);
            }
        }
        most
    }

    /// Begins a frame. The first settings allow any number of requests unless they say otherwise.
    fn head(&mut self) {
        let &[long, middle, short, kind, flags, ..] = &self.part[..] else { return };
        self.left = u32::from_be_bytes([0, long, middle, short]) as usize;
        self.is_settings = kind == SETTINGS && flags & ACK == 0;
        if self.is_settings && !self.has_settings {
            self.has_settings = true;
            self.most = Some(u32::MAX);
        }
    }

    fn setting(&mut self) {
        self.left = self.left.saturating_sub(SETTING);
        let &[high, low, a, b, c, d] = &self.part[..] else { return };
        if u16::from_be_bytes([high, low]) == MAX_CONCURRENT_STREAMS {
            self.most = Some(u32::from_be_bytes([a, b, c, d]));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = (payload.len() as u32).to_be_bytes();
        [&length[1..], &[kind, flags, 0, 0, 0, 0], payload].concat()
    }

    fn setting(id: u16, value: u32) -> Vec<u8> {
        [&id.to_be_bytes()[..], &value.to_be_bytes()].concat()
    }

    fn settings(settings: &[Vec<u8>]) -> Vec<u8> {
        frame(SETTINGS, 0, &settings.concat())
    }

    #[test]
    fn settings_are_read_among_other_frames() {
        let mut frames = Frames::default();
        assert_eq!(frames.read(&settings(&[setting(4, 70_000), setting(3, 7)])), Some(7));
        // Data that looks like settings, and an acknowledgement.
        let others = [frame(0, 0, &settings(&[setting(3, 0)])), frame(SETTINGS, ACK, &[])].concat();
        assert_eq!(frames.read(&others), None);
        assert_eq!(frames.read(&settings(&[setting(3, 0)])), Some(0));
        assert_eq!(frames.read(&settings(&[setting(4, 1)])), None, "the rest stays");
    }

    #[test]
    fn first_settings_without_a_number_allow_any() {
        assert_eq!(Frames::default().read(&settings(&[])), Some(u32::MAX));
    }

    #[test]
    fn settings_are_read_byte_by_byte() {
        let mut frames = Frames::default();
        let text = [settings(&[setting(3, 5)]), frame(0, 0, b"data"), settings(&[setting(3, 0)])].concat();
        let found: Vec<_> = text.chunks(1).filter_map(|byte| frames.read(byte)).collect();
        assert_eq!(found, [5, 0]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_was_allowed_for_a_moment_waits_on() {
        let streams = Streams::new();
        streams.set(Allowed::None);
        let sent = streams.send(async {
            tokio::time::sleep(PATIENCE / 2).await;
            streams.set(Allowed::Some);
            streams.set(Allowed::None);
            tokio::time::sleep(PATIENCE * 100).await;
            Ok::<_, io::Error>(())
        });
        assert!(sent.await.is_ok());
        assert!(streams.send(pending::<io::Result<()>>()).await.is_err());
    }
}
