//! Token usage: read from a response as it streams by, and credited to the key that served it and to the caller.

use std::{
    mem,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use axum::{
    body::{Bytes, HttpBody},
    http::{HeaderMap, Method, Response},
};
use hyper::body::{Frame, SizeHint};
use tower_key_rotation::{KeyId, KeyPool, Reservation, ServedBy};

use super::json::{Fields, number};
use crate::{callers::UnderWay, media_type::is_plain};

/// The largest JSON that is parsed: a whole response, or one event of a stream.
const LARGEST_JSON: usize = 8 << 20;

/// A response body that passes unchanged while a reader may look for its usage.
pub(super) struct Counted<B> {
    body: B,
    counting: Option<Counting>,
}

impl<B> Counted<B> {
    pub(super) fn new(body: B, counting: Option<Counting>) -> Self {
        Self { body, counting }
    }
}

/// Counts the tokens of a response.
pub(super) struct Counting {
    reader: Reader,
    pool: KeyPool,
    key: KeyId,
    /// The tokens that a paced request reserved.
    reservation: Option<Reservation>,
    caller: Arc<UnderWay>,
}

impl Counting {
    /// Begins to count the tokens of a response to a `POST`.
    ///
    /// Other methods use no tokens: a `GET` of a stored response reports the same usage each time.
    pub(super) fn of<B>(
        pool: &KeyPool,
        caller: &Arc<UnderWay>,
        method: &Method,
        response: &Response<B>,
    ) -> Option<Self> {
        if method != Method::POST {
            return None;
        }
        let ServedBy(key) = response.extensions().get()?;
        let reader = Reader::of(response.headers())?;
        let reservation = response.extensions().get().cloned();
        Some(Self { reader, pool: pool.clone(), key: key.clone(), reservation, caller: caller.clone() })
    }
}

/// Records the usage on drop, so that it counts even if the caller stops reading early.
impl Drop for Counting {
    fn drop(&mut self) {
        let usage = self.reader.usage();
        if let Some(tokens) = usage.tokens() {
            self.pool.record_usage(&self.key, tokens);
            self.caller.used(tokens);
            if let Some(reservation) = &self.reservation {
                reservation.used(usage.limited_tokens(tokens));
            }
        }
    }
}

impl<B: HttpBody<Data = Bytes> + Unpin> HttpBody for Counted<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(Ok(frame)) = &frame
            && let Some(data) = frame.data_ref()
            && let Some(counting) = &mut self.counting
        {
            counting.reader.read(data);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

enum Reader {
    Json { chunks: Vec<Bytes>, length: usize },
    Events(Events),
}

impl Reader {
    fn of(headers: &HeaderMap) -> Option<Self> {
        if is_plain(headers, "application/json") {
            Some(Self::Json { chunks: Vec::new(), length: 0 })
        } else if is_plain(headers, "text/event-stream") {
            Some(Self::Events(Events::default()))
        } else {
            None
        }
    }

    fn read(&mut self, data: &Bytes) {
        match self {
            Self::Json { chunks, length } => {
                *length += data.len();
                if *length > LARGEST_JSON {
                    chunks.clear();
                } else {
                    chunks.push(data.clone());
                }
            }
            Self::Events(events) => events.read(data),
        }
    }

    /// Returns the usage of everything read so far.
    fn usage(&mut self) -> Usage {
        match self {
            Self::Json { chunks, .. } => match &chunks[..] {
                [whole] => usage_in(whole),
                chunks => usage_in(&chunks.concat()),
            },
            Self::Events(events) => events.end(),
        }
    }
}

/// A parser of server-sent events (HTML standard, section 9.2.6).
#[derive(Default)]
struct Events {
    is_begun: bool,
    /// The current, incomplete line.
    line: Vec<u8>,
    /// Whether the last byte was `\r`: in `\r\n`, the `\n` ends no second line.
    is_after_return: bool,
    /// Data of the current, incomplete event.
    data: Vec<u8>,
    usage: Usage,
}

impl Events {
    fn read(&mut self, bytes: &[u8]) {
        for piece in bytes.split_inclusive(|byte| b"\r\n".contains(byte)) {
            let text = piece.strip_suffix(b"\r").or(piece.strip_suffix(b"\n")).unwrap_or(piece);
            let is_after_return = mem::replace(&mut self.is_after_return, piece.ends_with(b"\r"));
            if is_after_return && piece == b"\n" {
                continue;
            }
            if self.line.len() <= LARGEST_JSON {
                self.line.extend_from_slice(text);
            }
            if text.len() < piece.len() {
                self.end_line();
            }
        }
    }

    fn end_line(&mut self) {
        let is_first = !mem::replace(&mut self.is_begun, true);
        let line = self.line.strip_prefix(b"\xef\xbb\xbf").filter(|_| is_first).unwrap_or(&self.line);
        if line.is_empty() {
            // The usage of single-line data was read when the line ended.
            if self.data.contains(&b'\n') {
                self.usage.update(usage_in(&self.data));
            }
            self.data.clear();
        } else if let Some(data) = line.strip_prefix(b"data:") {
            // Some services omit the empty line between events, so each line is tried as a whole event.
            let used = usage_in(data);
            self.usage.update(used);
            if used.tokens().is_none() && self.data.len() + data.len() <= LARGEST_JSON {
                if !self.data.is_empty() {
                    self.data.push(b'\n');
                }
                self.data.extend_from_slice(data);
            }
        }
        self.line.clear();
    }

    /// Ends the stream and returns its usage. It counts even if the caller stopped before the last line break.
    fn end(&mut self) -> Usage {
        self.end_line();
        self.end_line();
        self.usage
    }
}

/// Reads the usage in a response or an event: in itself, in Anthropic's `message` of a `message_start`, or in OpenAI's
/// `response` of a `response.completed`.
fn usage_in(json: &[u8]) -> Usage {
    let mut of_part = None;
    for (name, value) in Fields::of(json) {
        match name {
            b"usage" if value.starts_with(b"{") => return Usage::read(value),
            b"message" | b"response" => {
                let usage = Fields::of(value).find(|(name, _)| *name == b"usage");
                of_part = of_part.or(usage.map(|(_, usage)| Usage::read(usage)));
            }
            _ => {}
        }
    }
    of_part.unwrap_or_default()
}

/// Token counts under the field names of both APIs.
#[derive(Clone, Copy, Default)]
struct Usage {
    total_tokens: Option<u64>,
    prompt_tokens: Option<u64>,
    completion_tokens: Option<u64>,
    input_tokens: Option<u64>,
    output_tokens: Option<u64>,
    cache_creation_input_tokens: Option<u64>,
    cache_read_input_tokens: Option<u64>,
}

impl Usage {
    fn read(json: &[u8]) -> Self {
        let mut usage = Self::default();
        for (name, value) in Fields::of(json) {
            let count = match name {
                b"total_tokens" => &mut usage.total_tokens,
                b"prompt_tokens" => &mut usage.prompt_tokens,
                b"completion_tokens" => &mut usage.completion_tokens,
                b"input_tokens" => &mut usage.input_tokens,
                b"output_tokens" => &mut usage.output_tokens,
                b"cache_creation_input_tokens" => &mut usage.cache_creation_input_tokens,
                b"cache_read_input_tokens" => &mut usage.cache_read_input_tokens,
                _ => continue,
            };
            *count = number(value);
        }
        usage
    }

    /// Merges the usage of a later event.
    ///
    /// Counts are cumulative, so the larger one is right: some services report the input once and 0 after that.
    fn update(&mut self, later: Self) {
        self.total_tokens = self.total_tokens.max(later.total_tokens);
        self.prompt_tokens = self.prompt_tokens.max(later.prompt_tokens);
        self.completion_tokens = self.completion_tokens.max(later.completion_tokens);
        self.input_tokens = self.input_tokens.max(later.input_tokens);
        self.output_tokens = self.output_tokens.max(later.output_tokens);
        self.cache_creation_input_tokens =
            self.cache_creation_input_tokens.max(later.cache_creation_input_tokens);
        self.cache_read_input_tokens = self.cache_read_input_tokens.max(later.cache_read_input_tokens);
    }

    /// Returns the total: as reported, or else the sum of its parts.
    ///
    /// OpenAI's input includes cached tokens, Anthropic's does not. Services compatible with OpenAI may omit the total,
    /// and may report the same count under both names.
    fn tokens(self) -> Option<u64> {
        let parts = [
            self.input_tokens.or(self.prompt_tokens),
            self.output_tokens.or(self.completion_tokens),
            self.cache_creation_input_tokens,
            self.cache_read_input_tokens,
        ];
        self.total_tokens.or_else(|| parts.into_iter().flatten().reduce(u64::saturating_add))
    }

    /// Returns how many of these tokens count for the key's limit.
    ///
    /// Anthropic counts no input that it read from its cache (docs.claude.com, "Rate limits"), and reports it apart.
    fn limited_tokens(self, tokens: u64) -> u64 {
        tokens.saturating_sub(self.cache_read_input_tokens.unwrap_or(0))
    }
}
