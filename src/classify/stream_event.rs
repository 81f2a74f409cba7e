//! What one event of a stream says: content, an error, or nothing yet.
//!
//! An error within a stream has no status. So it gets the one that its service answers with if it refuses the same request
//! before the stream begins; classifiers then judge it by the same rules. The services and their documents:
//!
//! | service | events before content | error |
//! |---|---|---|
//! | OpenAI, chat completions, and services that speak alike | chunks whose deltas have a role alone | an object `error` in a chunk |
//! | OpenAI, responses | `response.created`, `.queued`, `.in_progress`, and the beginnings of messages, reasoning and their parts | `error`, or `response.failed` with the error in its response |
//! | Anthropic | `message_start`, `ping`, and the beginnings of texts and thoughts | `error` |
//! | Gemini | chunks without parts | an object `error`, mostly outside of an event |
//!
//! Sources: developers.openai.com/api/reference/resources/responses/streaming-events,
//! docs.claude.com/en/docs/build-with-claude/streaming, ai.google.dev/api/generate-content,
//! openrouter.ai/docs/api/reference/errors-and-debugging. Any other event is content.

use std::borrow::Cow;

use http::{HeaderMap, StatusCode};
use memchr::memmem;
use serde_json::{Value, json};

use super::{events::Event, grpc_status::forbids_retry, rules, services::OF_LLMS};

/// What an event says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Said {
    /// An error may still come before any content.
    Nothing,
    Content,
    Error(StreamError),
}

/// An error within a stream, as a response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StreamError {
    pub(crate) status: StatusCode,
    /// Instead of the response's headers.
    pub(crate) trailers: Option<HeaderMap>,
    pub(crate) body: Vec<u8>,
}

impl StreamError {
    /// The error of a gRPC call.
    pub(crate) fn in_trailers(trailers: &HeaderMap) -> Self {
        Self { status: StatusCode::OK, trailers: Some(trailers.clone()), body: Vec::new() }
    }

    pub(crate) fn forbids_retry(&self) -> bool {
        self.trailers.as_ref().is_some_and(forbids_retry)
    }
}

/// The statuses that services document for errors without a rule.
const STATUSES: [(&str, u16); 16] = [
    // docs.claude.com/en/api/errors
    ("invalid_request_error", 400),
    ("authentication_error", 401),
    ("not_found_error", 404),
    ("request_too_large", 413),
    ("rate_limit_error", 429),
    ("api_error", 500),
    ("timeout_error", 504),
    // developers.openai.com/docs/guides/error-codes, and github.com/anomalyco/opencode/issues/25730
    ("rate_limit_exceeded", 429),
    ("server_error", 500),
    ("server_is_overloaded", 503),
    ("service_unavailable_error", 503),
    ("slow_down", 503),
    // github.com/googleapis/googleapis/blob/master/google/rpc/code.proto
    ("unauthenticated", 401),
    ("permission_denied", 403),
    ("resource_exhausted", 429),
    ("unavailable", 503),
];

/// Whether an event may be an error. Much cheaper than to read it.
pub(crate) fn may_be_error(event: Event<'_>) -> bool {
    event.data.is_some_and(|data| event.name == b"error" || memmem::find(data, b"\"error\"").is_some())
}

impl Said {
    pub(crate) fn by(event: Event<'_>) -> Self {
        let Some(data) = event.data else { return Self::Content };
        if data.is_empty() {
            return Self::Nothing;
        }
        let is_error = event.name == b"error";
        // Not all data is JSON: `[DONE]`.
        let json = serde_json::from_slice(data).unwrap_or(Value::Null);
        match error_in(&json, is_error) {
            Some(error) => {
                let body = error.to_string().into_bytes();
                Self::Error(StreamError { status: status(&error, &body), trailers: None, body })
            }
            None if is_error => {
                Self::Error(StreamError { status: UNKNOWN, trailers: None, body: data.to_vec() })
            }
            None if is_before_content(&json) => Self::Nothing,
            None => Self::Content,
        }
    }
}

/// An error that no service documents is about neither a key nor a limit.
const UNKNOWN: StatusCode = StatusCode::INTERNAL_SERVER_ERROR;

/// The error of an event, as the body of a response has it.
fn error_in(json: &Value, is_error: bool) -> Option<Cow<'_, Value>> {
    let json = json.get(0).unwrap_or(json);
    let is = |member: &str, value| json.get(member).and_then(Value::as_str) == Some(value);
    if json.get("error").is_some_and(|error| !is_blank(error)) {
        return Some(Cow::Borrowed(json));
    }
    if is("type", "response.failed") {
        return Some(Cow::Owned(json!({ "error": json.pointer("/response/error") })));
    }
    // OpenAI's responses, and Mistral: the members of the error stand in the event itself.
    let is_error = is_error || is("type", "error") || is("object", "error");
    (is_error && json.is_object()).then_some(Cow::Borrowed(json))
}

/// The status of a response with this error: the one that it names, one of a rule for it, or the one that its service
/// documents.
fn status(json: &Value, body: &[u8]) -> StatusCode {
    let objects = || [json.get("error"), Some(json)].into_iter().flatten();
    let values = |members: &'static [&str]| {
        objects().flat_map(|object| members.iter().filter_map(|member| object.get(*member)))
    };
    let named = || values(&["code", "status", "status_code"]).find_map(named_status);
    let by_rule = || StatusCode::from_u16(rules::status_with(&OF_LLMS, body)?).ok();
    let documented = || values(&["code", "type", "status", "error_type"]).find_map(documented_status);
    named().or_else(by_rule).or_else(documented).unwrap_or(UNKNOWN)
}

fn named_status(value: &Value) -> Option<StatusCode> {
    let number = value.as_u64().or_else(|| value.as_str()?.parse().ok())?;
    let status = StatusCode::from_u16(u16::try_from(number).ok()?).ok()?;
    (status.is_client_error() || status.is_server_error()).then_some(status)
}

fn documented_status(value: &Value) -> Option<StatusCode> {
    let word = value.as_str()?.to_lowercase();
    let (_, status) = STATUSES.iter().find(|(known, _)| *known == word)?;
    StatusCode::from_u16(*status).ok()
}

/// Whether an event begins an answer, and has nothing of it.
fn is_before_content(json: &Value) -> bool {
    let at = |pointer: &str| json.pointer(pointer).unwrap_or(&Value::Null);
    let is = |pointer: &str, values: &[&str]| at(pointer).as_str().is_some_and(|own| values.contains(&own));
    match at("/type").as_str() {
        Some(
            "ping"
            | "keepalive"
            | "message_start"
            | "response.created"
            | "response.queued"
            | "response.in_progress",
        ) => true,
        Some("content_block_start") => is_blank_but(at("/content_block"), "type"),
        Some("response.output_item.added") => is("/item/type", &["message", "reasoning"]),
        Some("response.content_part.added" | "response.reasoning_summary_part.added") => {
            is_blank(at("/part/text")) && is("/part/type", &["output_text", "reasoning_text", "summary_text"])
        }
        Some(_) => false,
        None => match (at("/choices").as_array(), at("/candidates").as_array()) {
            (Some(choices), _) => choices.iter().all(has_role_alone),
            (None, Some(candidates)) => candidates.iter().all(has_no_parts),
            // Gemini may count the tokens of the prompt first.
            (None, None) => {
                json.get("usageMetadata").is_some() && is_blank(at("/promptFeedback/blockReason"))
            }
        },
    }
}

/// Of a chunk of a chat's completion.
fn has_role_alone(choice: &Value) -> bool {
    let member = |name| choice.get(name).unwrap_or(&Value::Null);
    is_blank(member("finish_reason")) && is_blank(member("text")) && is_blank_but(member("delta"), "role")
}

/// Of a chunk of Gemini.
fn has_no_parts(candidate: &Value) -> bool {
    let parts = candidate.pointer("/content/parts").unwrap_or(&Value::Null);
    is_blank(parts) && candidate.get("finishReason").is_none_or(is_blank)
}

fn is_blank(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(values) => values.iter().all(is_blank),
        Value::Object(_) => is_blank_but(value, ""),
        Value::Bool(is) => !is,
        Value::Number(_) => false,
    }
}

/// Whether nothing but that member has a value.
fn is_blank_but(value: &Value, member: &str) -> bool {
    match value {
        Value::Object(members) => members.iter().all(|(name, value)| name == member || is_blank(value)),
        value => is_blank(value),
    }
}
