//! Which responses a layer looks at beyond their heads, although they are no errors.

use std::time::Duration;

use http::{
    HeaderValue, StatusCode,
    header::{CONTENT_ENCODING, CONTENT_TYPE},
};

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

/// What a layer looks at.
#[derive(Clone, Copy, Debug)]
pub(super) enum Watches {
    /// The events of a stream.
    Events(StreamHead),
    /// The trailers of a gRPC call. They are held for if they are there at once.
    Trailers,
}

fn is_seen_by_another<R: JudgedResponse>(response: &R) -> bool {
    response.extensions().get::<Watched>().is_some()
}

/// Whether a response is one to a gRPC call, and may have trailers. Those of gRPC-Web are a part of the body.
pub(super) fn is_call<R: JudgedResponse>(response: &R) -> bool {
    let headers = response.headers();
    let kind = headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes);
    let rest = kind.and_then(|kind| kind.strip_prefix(b"application/grpc"));
    response.status() == StatusCode::OK
        && rest.is_some_and(|rest| matches!(rest, [] | [b'+' | b';', ..]))
        && !headers.contains_key("grpc-status")
        && !is_seen_by_another(response)
}

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
        && !is_seen_by_another(response)
}
