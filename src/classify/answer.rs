//! What an error says, in whatever format: its codes, its message, and the wait that it asks for.

use std::time::Duration;

use serde_json::Value;

use super::{classifier::ResponseHead, grpc_status::GrpcStatus, hint};

/// An error as rules see it. All words are in lower case.
pub(super) struct Answer<'a> {
    head: &'a ResponseHead<'a>,
    form: Form,
    /// Of a body that is complete JSON.
    json: Value,
    codes: Vec<String>,
    message: String,
    grpc: Option<GrpcStatus>,
}

/// The format of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    Json,
    /// HTML.
    Page,
    Text,
    /// There is no body, or nobody read it.
    None,
}

impl<'a> Answer<'a> {
    pub(super) fn of(head: &'a ResponseHead<'a>) -> Self {
        let body = without_bom(head.body().unwrap_or_default()).trim_ascii();
        let grpc = GrpcStatus::of(head.headers());
        // Without a body, as it is with every success, nothing is allocated.
        let json =
            if body.is_empty() { Value::Null } else { serde_json::from_slice(body).unwrap_or_default() };
        let mut answer = Self {
            head,
            form: Form::None,
            json: Value::Null,
            codes: Vec::new(),
            message: String::new(),
            grpc,
        };
        if matches!(json, Value::Object(_) | Value::Array(_)) {
            answer.form = Form::Json;
            (answer.codes, answer.message) = read(&json);
            answer.json = json;
        } else if !body.is_empty() {
            answer.form = if is_page(body) { Form::Page } else { Form::Text };
            answer.message = String::from_utf8_lossy(body).to_lowercase();
        }
        if let Some(grpc) = &answer.grpc {
            answer.codes.extend(grpc.reasons.iter().map(|reason| reason.to_lowercase()));
        }
        answer
    }

    pub(super) fn form(&self) -> Form {
        self.form
    }

    pub(super) fn has_code_of(&self, codes: &[&str]) -> bool {
        self.codes.iter().any(|code| codes.contains(&&**code))
    }

    /// The message; of a body that is no JSON, all of it.
    pub(super) fn message(&self) -> &str {
        &self.message
    }

    /// Whether the message has one of these words.
    pub(super) fn has_word_of(&self, words: &[&str]) -> bool {
        // Hyphens and slashes belong to a word: a model's name may contain "un-blocked".
        let is_of_a_word = |c: char| c.is_alphanumeric() || "_-/".contains(c);
        self.form != Form::Page && self.message.split(|c| !is_of_a_word(c)).any(|own| words.contains(&own))
    }

    pub(super) fn header(&self, name: &str) -> Option<&'a str> {
        hint::values(self.head.headers(), name).next()
    }

    /// A member of the error object.
    pub(super) fn member(&self, pointer: &str) -> Option<&Value> {
        errors(&self.json).find_map(|error| error.pointer(pointer))
    }

    /// The members of all `details` of that type, as Google's services send them.
    pub(super) fn details(&self, kind: &'static str) -> impl Iterator<Item = &Value> {
        let lists = errors(&self.json).filter_map(|error| error.get("details")?.as_array());
        lists.flatten().filter(move |detail| {
            detail.get("@type").and_then(Value::as_str).is_some_and(|own| own.ends_with(kind))
        })
    }

    /// The time of the response, counted from the epoch.
    pub(super) fn time(&self) -> Duration {
        hint::now(self.head.headers())
    }

    pub(super) fn grpc(&self) -> Option<&GrpcStatus> {
        self.grpc.as_ref()
    }

    /// The wait that a limited response asks for.
    pub(super) fn wait(&self) -> Option<Duration> {
        self.head.wait().or_else(|| self.wait_of_body())
    }

    /// The wait that a refusal asks for. Unlike a limited response, it may come while a window has room, so only windows
    /// without room count.
    pub(super) fn wait_of_refusal(&self) -> Option<Duration> {
        let explicit = self.head.explicit_wait().or_else(|| self.wait_of_body());
        explicit.or_else(|| hint::from_exhausted_windows(self.head.headers()))
    }

    fn wait_of_body(&self) -> Option<Duration> {
        if let Some(grpc) = &self.grpc {
            return grpc.wait;
        }
        // Discord: a number of seconds.
        let seconds = self.json.get("retry_after").and_then(Value::as_f64);
        seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()).or_else(|| {
            // OpenRouter: the headers of a limit, within the body.
            let headers = self.member("/metadata/headers")?;
            let text = |name| headers.get(name).and_then(Value::as_str);
            let is_used_up = text("X-RateLimit-Remaining")? == "0";
            hint::reset(text("X-RateLimit-Reset")?, self.time()).filter(|_| is_used_up)
        })
    }
}

/// The objects that may describe the error: that of the member `error`, and the whole body. Gemini's streaming endpoint
/// puts them into an array.
fn errors(json: &Value) -> impl Iterator<Item = &Value> {
    let roots = match json {
        Value::Array(roots) => roots.as_slice(),
        root => std::slice::from_ref(root),
    };
    roots.iter().flat_map(|root| root.get("error").into_iter().chain([root]))
}

/// Reads codes and message out of JSON.
fn read(json: &Value) -> (Vec<String>, String) {
    let (mut codes, mut message) = (Vec::new(), None);
    for error in errors(json) {
        let details = error.get("details");
        let listed = |name| error.get(name).and_then(Value::as_array).into_iter().flatten();
        let nested = listed("details").chain(listed("errors")).chain(details);
        for part in [error].into_iter().chain(nested) {
            add_codes(&mut codes, part);
            add_codes(&mut codes, part.get("extensions").unwrap_or(&Value::Null));
        }
        let own = message_of(error).or_else(|| {
            let errors = error.get("errors")?;
            errors.as_str().or_else(|| message_of(errors.get(0)?))
        });
        message = message.or(own);
    }
    (codes, message.unwrap_or_default().trim().to_lowercase())
}

fn message_of(error: &Value) -> Option<&str> {
    let members = ["message", "detail", "error_description"];
    error.as_str().or_else(|| members.iter().find_map(|name| error.get(name)?.as_str()))
}

fn add_codes(codes: &mut Vec<String>, part: &Value) {
    const MEMBERS: [&str; 6] = ["code", "type", "status", "reason", "error", "error_code"];
    for code in MEMBERS.iter().filter_map(|name| part.get(name)) {
        match code {
            Value::String(code) => codes.push(code.to_lowercase()),
            Value::Number(code) => codes.push(code.to_string()),
            _ => {}
        }
    }
}

fn without_bom(body: &[u8]) -> &[u8] {
    body.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(body)
}

/// Whether a body begins as HTML does, behind declarations and comments.
fn is_page(mut body: &[u8]) -> bool {
    loop {
        body = body.trim_ascii_start();
        let end: &[u8] = match body {
            [b'<', b'!', b'-', b'-', ..] => b"-->",
            [b'<', b'?', ..] => b"?>",
            _ => break,
        };
        match body.windows(end.len()).position(|bytes| bytes == end) {
            Some(at) => body = &body[at + end.len()..],
            None => return false,
        }
    }
    let begins =
        |with: &str| body.len() >= with.len() && body[..with.len()].eq_ignore_ascii_case(with.as_bytes());
    ["<!doctype html", "<html", "<head"].iter().any(|with| begins(with))
}
