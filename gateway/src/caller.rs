//! A caller's connection. It tracks requests in flight, and times out if the caller reads nothing.

use std::{
    io::{self, ErrorKind, IoSlice},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use http::Version;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Sleep, sleep},
};

/// Whether a connection is in use.
#[derive(Clone, Default)]
pub(crate) struct Activity(Arc<State>);

#[derive(Default)]
struct State {
    in_flight: AtomicUsize,
    is_unread: AtomicBool,
    is_http_2: AtomicBool,
    /// How many requests there were.
    requests: AtomicUsize,
}

impl Activity {
    /// Counts a request as in flight until the guard is dropped.
    pub(crate) fn begin(&self, version: Version) -> InFlight {
        self.0.in_flight.fetch_add(1, Relaxed);
        self.0.requests.fetch_add(1, Relaxed);
        self.0.is_http_2.store(version == Version::HTTP_2, Relaxed);
        InFlight(self.clone())
    }

    /// Returns how many requests there were.
    pub(crate) fn requests(&self) -> usize {
        self.0.requests.load(Relaxed)
    }

    pub(crate) fn is_http_2(&self) -> bool {
        self.0.is_http_2.load(Relaxed)
    }

    /// Whether no request is in flight and no write waits for the caller. In HTTP/2, the end of a response may still wait
    /// in the connection.
    pub(crate) fn is_idle(&self) -> bool {
        self.0.in_flight.load(Relaxed) == 0 && !self.0.is_unread.load(Relaxed)
    }
}

pub(crate) struct InFlight(Activity);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.0.in_flight.fetch_sub(1, Relaxed);
    }
}

/// A connection that fails if the caller reads nothing for too long.
pub(crate) struct Caller {
    stream: TcpStream,
    activity: Activity,
    limit: Duration,
    /// Timer while a write waits for the caller to read.
    patience: Option<Pin<Box<Sleep>>>,
}

impl Caller {
    pub(crate) fn new(stream: TcpStream, activity: Activity, limit: Duration) -> Self {
        Self { stream, activity, limit, patience: None }
    }

    fn wait<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            if self.patience.take().is_some() {
                self.activity.0.is_unread.store(false, Relaxed);
            }
            return written;
        }
        self.activity.0.is_unread.store(true, Relaxed);
        let limit = self.limit;
        ready!(self.patience.get_or_insert_with(|| Box::pin(sleep(limit))).as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(ErrorKind::TimedOut, "the caller reads nothing")))
    }
}

impl AsyncRead for Caller {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Caller {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, data);
        self.wait(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, data);
        self.wait(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
