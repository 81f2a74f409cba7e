//! Writes the log to stderr. Threads that serve requests only append to a buffer; a separate thread writes it out. So a
//! stderr that is closed, full or never read loses log lines, but stops no request.

use std::{
    io::{self, ErrorKind, Write},
    mem,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use tracing_subscriber::fmt::MakeWriter;

use crate::metrics;

/// Maximum number of bytes that wait for stderr. Further lines are dropped.
const CAPACITY: usize = 1 << 20;

/// How long [`Log::finish`] waits until stderr has accepted the rest.
const FINISH_LIMIT: Duration = Duration::from_secs(3);

/// Pause between attempts to write to a non-blocking stderr that is full.
const RETRY: Duration = Duration::from_millis(20);

/// Start of the report of lost lines. It bypasses the buffer, which may be full.
const LOST: &str = " WARN log: stderr did not accept all lines; lost since the start:";

#[derive(Clone)]
pub(crate) struct Log(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    waiting: Vec<u8>,
    /// Number of lines since the start that were dropped or could not be written.
    lost: u64,
    /// How many of the lost lines the log has reported.
    reported: u64,
    is_ended: bool,
    is_written: bool,
}

impl Log {
    /// Starts the thread that writes to stderr.
    ///
    /// # Errors
    ///
    /// Returns an error if the system can't create a thread.
    pub(crate) fn to_stderr() -> io::Result<Self> {
        let log = Self(Arc::default());
        let shared = log.0.clone();
        thread::Builder::new().name("log".to_owned()).spawn(move || shared.write_out(io::stderr()))?;
        Ok(log)
    }

    /// Appends a line.
    pub(crate) fn line(&self, text: &str) {
        self.0.append(format!("{text}\n").as_bytes());
    }

    /// Waits until all lines are written, up to a time limit.
    pub(crate) fn finish(&self) {
        let mut state = self.0.lock();
        state.is_ended = true;
        self.0.changed.notify_all();
        let is_unwritten = |state: &mut State| !state.is_written;
        drop(self.0.changed.wait_timeout_while(state, FINISH_LIMIT, is_unwritten));
    }
}

impl Write for &Log {
    /// Appends one event. This never fails, because the subscriber could report an error only to stderr.
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        self.0.append(event);
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'l> MakeWriter<'l> for Log {
    type Writer = &'l Self;

    fn make_writer(&'l self) -> &'l Self {
        self
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn append(&self, event: &[u8]) {
        let mut state = self.lock();
        if state.waiting.len() + event.len() > CAPACITY {
            state.lose(event);
            return;
        }
        let was_empty = state.waiting.is_empty();
        state.waiting.extend_from_slice(event);
        drop(state);
        if was_empty {
            self.changed.notify_all();
        }
    }

    fn write_out(&self, mut to: impl Write) {
        let (mut text, mut is_writable) = (Vec::new(), true);
        while self.take(&mut text, is_writable) {
            let unwritten = write(&mut to, &text);
            is_writable = unwritten.is_empty();
            self.lock().lose(unwritten);
            text.clear();
        }
        self.lock().is_written = true;
        self.changed.notify_all();
    }

    /// Waits for text or for lost lines to report. Returns false once the log has ended.
    fn take(&self, text: &mut Vec<u8>, can_report: bool) -> bool {
        let has_lost = |state: &State| can_report && state.lost > state.reported;
        let is_idle = |state: &mut State| state.waiting.is_empty() && !state.is_ended && !has_lost(state);
        let mut state = self.changed.wait_while(self.lock(), is_idle).unwrap_or_else(PoisonError::into_inner);
        mem::swap(&mut state.waiting, text);
        if has_lost(&state) {
            state.reported = state.lost;
            let lost = state.lost;
            text.extend(format!("{LOST} {lost}\n").bytes());
        }
        !text.is_empty()
    }
}

impl State {
    fn lose(&mut self, text: &[u8]) {
        let lines = text.iter().filter(|byte| **byte == b'\n').count() as u64;
        self.lost += lines;
        metrics::log_lines_lost(lines);
    }
}

/// Writes the text and returns what could not be written.
fn write<'t>(to: &mut impl Write, mut text: &'t [u8]) -> &'t [u8] {
    while !text.is_empty() {
        match to.write(text) {
            Ok(0) => break,
            Ok(count) => text = &text[count..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            // Another process that shares this stderr may have made it non-blocking.
            Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(RETRY),
            Err(_) => break,
        }
    }
    text
}
