//! Tokens used: read from a response as it passes, and credited to the key that served it.

use std::{
    mem,
    pin::Pin,
    task::{Context, Poll, ready},
};

use axum::{
    body::{Body, Bytes, HttpBody},
    http::{HeaderMap, Method, header::CONTENT_ENCODING},
    response::Response,
};
use hyper::body::{Frame, SizeHint};
use serde::Deserialize;
use tower_key_rotation::{KeyId, KeyPool, ServedBy};

use crate::media_type::media_type;

/// The largest JSON that is looked at: an answer, or an event of a stream.
const LARGEST_JSON: usize = 8 << 20;

/// A body that is passed on as it is, and looked at.
struct Counted {
    body: Body,
    reader: Reader,
    pool: KeyPool,
    key: KeyId,
}

/// Only what was posted uses tokens: an answer that is kept can be read as often as one likes, and says each time what
/// was used once.
pub(super) fn count(pool: &KeyPool, method: &Method, response: Response) -> Response {
    if method != Method::POST {
        return response;
    }
    let key = response.extensions().get().map(|ServedBy(key)| key.clone());
    let (Some(key), Some(reader)) = (key, Reader::of(response.headers())) else { return response };
    let pool = pool.clone();
    response.map(|body| Body::new(Counted { body, reader, pool, key }))
}

/// When a body is dropped it has been passed on, all of it or as much as the caller wanted.
impl Drop for Counted {
    fn drop(&mut self) {
        if let Some(tokens) = self.reader.usage().tokens() {
            self.pool.record_usage(&self.key, tokens);
        }
    }
}

impl HttpBody for Counted {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(Ok(frame)) = &frame
            && let Some(data) = frame.data_ref()
        {
            self.reader.read(data);
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
        let is_plain = headers.get(CONTENT_ENCODING).is_none_or(|encoding| encoding == "identity");
        match media_type(headers)?.as_str() {
            "application/json" if is_plain => Some(Self::Json { chunks: Vec::new(), length: 0 }),
            "text/event-stream" if is_plain => Some(Self::Events(Events::default())),
            _ => None,
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

    /// After all that has come.
    fn usage(&mut self) -> Usage {
        match self {
            Self::Json { chunks, .. } => usage_in(&chunks.concat()),
            Self::Events(events) => events.end(),
        }
    }
}

/// An event stream as far as it has come, read as the HTML standard says, section 9.2.6.
#[derive(Default)]
struct Events {
    is_begun: bool,
    /// What has come of a line that has not ended yet.
    line: Vec<u8>,
    /// A line break in `\r\n` ends no second line.
    is_after_return: bool,
    /// Of the event that has not ended yet.
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
            // Of one line, all is known.
            if self.data.contains(&b'\n') {
                self.usage.update(usage_in(&self.data));
            }
            self.data.clear();
        } else if let Some(data) = line.strip_prefix(b"data:") {
            // Some services leave out the empty lines.
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

    /// What was used counts also where the caller had no patience for the last line break.
    fn end(&mut self) -> Usage {
        self.end_line();
        self.end_line();
        self.usage
    }
}

/// What an answer or an event says of the tokens that were used.
fn usage_in(json: &[u8]) -> Usage {
    let Ok(answer) = serde_json::from_slice::<Answer>(json) else { return Usage::default() };
    let of_part = answer.message.or(answer.response).and_then(|part| part.usage);
    answer.usage.or(of_part).unwrap_or_default()
}

#[derive(Deserialize)]
struct Answer {
    usage: Option<Usage>,
    /// In Anthropic's `message_start`.
    message: Option<Part>,
    /// In OpenAI's `response.completed`.
    response: Option<Part>,
}

#[derive(Deserialize)]
struct Part {
    usage: Option<Usage>,
}

/// The numbers of both APIs, by their names there.
#[derive(Clone, Copy, Default, Deserialize)]
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
    /// Takes over what a later event says. Its numbers count from the beginning, and one that has become smaller was
    /// left out: some services say 0 for the input once it has been told.
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

    /// The total where the API says it: OpenAI's input has what was cached in it already. Anthropic's has not.
    /// Services that are like OpenAI's may leave out the total, and may call the same number by both names.
    fn tokens(self) -> Option<u64> {
        let parts = [
            self.input_tokens.or(self.prompt_tokens),
            self.output_tokens.or(self.completion_tokens),
            self.cache_creation_input_tokens,
            self.cache_read_input_tokens,
        ];
        self.total_tokens.or_else(|| parts.into_iter().flatten().reduce(u64::saturating_add))
    }
}
