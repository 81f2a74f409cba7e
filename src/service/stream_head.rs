//! The option of a layer that looks at the beginning of streams.

use std::time::Duration;

use http::header::{CONTENT_ENCODING, CONTENT_TYPE};

use crate::message::JudgedResponse;

/// How much of a stream is held until its first content, and for how long.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StreamHead {
    pub(super) bytes: usize,
    pub(super) time: Duration,
}

/// In the extensions of a response: a layer further in looks at its stream.
#[derive(Clone, Copy, Debug)]
pub(super) struct Watched;

/// Whether a response is a stream of events that nobody looks at, and that can be read.
pub(super) fn is_stream<R: JudgedResponse>(response: &R) -> bool {
    let headers = response.headers();
    let is_of_events = headers.get(CONTENT_TYPE).is_some_and(|kind| {
        let kind = kind.as_bytes().split(|byte| *byte == b';').next().unwrap_or_default();
        kind.trim_ascii().eq_ignore_ascii_case(b"text/event-stream")
    });
    let is_plain = |encoding: &[u8]| encoding.is_empty() || encoding.eq_ignore_ascii_case(b"identity");
    response.status().is_success()
        && is_of_events
        && headers.get_all(CONTENT_ENCODING).iter().all(|encoding| is_plain(encoding.as_bytes()))
        && response.extensions().get::<Watched>().is_none()
}
