//! What a request asks for, as far as its limits depend on it: the model, whose request it is, and its tokens.

use std::{
    borrow::Cow,
    fmt,
    hash::{DefaultHasher, Hash, Hasher},
};

use axum::http::{HeaderMap, HeaderName, Method, request::Parts};
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use serde_json::{Value, value::RawValue};
use tower_key_rotation::Traits;

use super::json;
use crate::{config::ScopeRule, media_type::is_plain};

/// In UTF-8 a token of English takes about so many bytes.
const BYTES_A_TOKEN: u64 = 4;

/// A larger body holds images or files, whose size says nothing of their tokens.
const LARGEST_TEXT: usize = 256 << 10;

/// No model writes more. A caller that allows more says nothing of what its request will take.
const LARGEST_OUTPUT: u64 = 128 << 10;

/// Of a conversation that begins with more instructions, the further ones do not count for its session.
const MOST_INSTRUCTIONS: usize = 16;

/// Headers by which callers name their conversation.
static SESSIONS: [HeaderName; 2] =
    [HeaderName::from_static("x-session-id"), HeaderName::from_static("session_id")];

/// Whether the body says what the request asks for.
pub(super) fn is_in_the_body(head: &Parts) -> bool {
    head.method == Method::POST && is_plain(&head.headers, "application/json")
}

/// What a request asks for.
pub(super) struct Asked {
    /// In the body.
    model: Option<String>,
    /// In the path.
    model_of_path: Option<String>,
    /// Whether all of the body was read, and names no field twice that matters.
    is_clear: bool,
    /// An estimate of input and output; `None` if the body names no maximum, or is no text.
    pub(super) tokens: Option<u64>,
    /// The scope's hash, which callers that wait take turns by.
    pub(super) scope: u64,
    /// For the pool: the scope, the session and the tokens.
    pub(super) traits: Traits,
}

/// Reads what a request asks for. Its scope is the model or what else the rule says, and its session is what the caller
/// names, or else what the conversation begins with. `body` is empty if it was not read; of a body that was read in part,
/// what comes later is not seen.
pub(super) fn read(rule: ScopeRule, head: &Parts, body: &[u8]) -> Asked {
    let mut fields = Fields::default();
    // What is no JSON asks for nothing. What breaks off has been read so far.
    let mut json = serde_json::Deserializer::from_slice(body);
    let read = Reading(&mut fields).deserialize(&mut json);
    if read.is_err() && !fields.has_first_message {
        // Instructions alone are the same in many conversations.
        fields.begins_with.clear();
    }
    let is_whole = read.and_then(|()| json.end()).is_ok();
    let is_clear = (is_whole || body.is_empty()) && fields.models <= 1;
    let model_of_path = model_in(head.uri.path()).map(str::to_owned);
    let mut traits = Traits::new();
    let scope = match rule {
        ScopeRule::Model => fields.model.as_deref().or(model_of_path.as_deref()),
        ScopeRule::Path => Some(head.uri.path()),
        ScopeRule::None => None,
    };
    let mut hash = DefaultHasher::new();
    if let Some(scope) = scope {
        scope.hash(&mut hash);
        traits = traits.scope(scope);
    }
    let scope = hash.finish();
    if let Some(name) = named_session(&head.headers) {
        traits = traits.session(name);
    } else if let Some(session) = &fields.session {
        traits = traits.session(session);
    } else if !fields.begins_with.is_empty() {
        traits = traits.session(&fields.begins_with);
    }
    let is_text = body.len() <= LARGEST_TEXT;
    let output = fields.max_output.filter(|output| is_text && *output <= LARGEST_OUTPUT);
    let tokens = output.map(|output| output.saturating_add(body.len() as u64 / BYTES_A_TOKEN));
    if let Some(tokens) = tokens {
        traits = traits.tokens(tokens);
    }
    Asked { model: fields.model, model_of_path, is_clear, tokens, scope, traits }
}

impl Asked {
    /// Whether the request is for models that are allowed, without doubt: servers differ in what they read from an
    /// unclear body.
    pub(super) fn is_for(&self, is_allowed: impl Fn(&str) -> bool) -> bool {
        let mut models = self.model.iter().chain(&self.model_of_path).peekable();
        self.is_clear && models.peek().is_some() && models.all(|model| is_allowed(model))
    }
}

fn named_session(headers: &HeaderMap) -> Option<&[u8]> {
    SESSIONS.iter().find_map(|name| headers.get(name)).map(|value| value.as_bytes())
}

/// The model in a path of Gemini (`/v1beta/models/{model}:generateContent`) or the deployment in one of Azure
/// (`/openai/deployments/{name}/…`).
fn model_in(path: &str) -> Option<&str> {
    let mut segments = path.split('/').skip_while(|segment| !["models", "deployments"].contains(segment));
    let is_azure = segments.next()? == "deployments";
    let name = segments.next()?;
    let model = match name.split_once(':') {
        Some((model, _method)) => model,
        None if is_azure => name,
        // `/v1/models/{model}` describes a model, and does not use it.
        None => return None,
    };
    (!model.is_empty()).then_some(model)
}

#[derive(Default)]
struct Fields<'de> {
    model: Option<String>,
    /// How often a model is named.
    models: usize,
    session: Option<String>,
    /// The system prompt, and the first message of the user, as they are written.
    begins_with: Vec<Cow<'de, str>>,
    /// Whether the first message of the user has been read.
    has_first_message: bool,
    max_output: Option<u64>,
}

struct Reading<'a, 'de>(&'a mut Fields<'de>);

impl<'de> DeserializeSeed<'de> for Reading<'_, 'de> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Reading<'_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<(), A::Error> {
        let asked = self.0;
        while let Some(name) = fields.next_key::<Name<'de>>()? {
            match &*name.0 {
                "model" => {
                    asked.models += 1;
                    asked.model = text(fields.next_value()?);
                }
                "prompt_cache_key" => asked.session = text(fields.next_value()?).or(asked.session.take()),
                "metadata" => {
                    let mut metadata: Value = fields.next_value()?;
                    let user = metadata.get_mut("user_id").map(Value::take).and_then(text);
                    asked.session = asked.session.take().or(user);
                }
                "max_tokens" | "max_completion_tokens" | "max_output_tokens" => {
                    asked.max_output = asked.max_output.max(fields.next_value::<Value>()?.as_u64());
                }
                "generationConfig" | "generation_config" => {
                    let config: Value = fields.next_value()?;
                    let output = config.get("maxOutputTokens").and_then(Value::as_u64);
                    asked.max_output = asked.max_output.max(output);
                }
                "system" | "instructions" | "systemInstruction" | "system_instruction" => {
                    asked.begins_with.push(fields.next_value::<&RawValue>()?.get().into());
                }
                "messages" | "input" | "contents" => {
                    fields.next_value_seed(Beginning(asked))?;
                }
                name => {
                    // Some servers ignore the case of names.
                    asked.models += usize::from(name.eq_ignore_ascii_case("model"));
                    _ = fields.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(())
    }
}

fn text(value: Value) -> Option<String> {
    match value {
        Value::String(text) if !text.is_empty() => Some(text),
        _ => None,
    }
}

#[derive(Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

/// Reads the messages of a conversation up to the first one of the user.
struct Beginning<'a, 'de>(&'a mut Fields<'de>);

impl<'de> Beginning<'_, 'de> {
    fn message(&mut self, message: &'de RawValue) {
        let message = message.get();
        let role = json::Fields::of(message.as_bytes()).find(|(name, _)| *name == b"role");
        let is = |role: &[u8], name: &str| role.starts_with(name.as_bytes());
        let is_instruction =
            role.is_some_and(|(_, role)| is(role, r#""system""#) || is(role, r#""developer""#));
        self.0.has_first_message = !is_instruction;
        self.0.begins_with.push(message.into());
    }
}

impl<'de> DeserializeSeed<'de> for Beginning<'_, 'de> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Beginning<'_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("messages")
    }

    fn visit_borrowed_str<E>(self, text: &'de str) -> Result<(), E> {
        self.0.has_first_message = true;
        self.0.begins_with.push(text.into());
        Ok(())
    }

    /// With escapes.
    fn visit_str<E>(self, text: &str) -> Result<(), E> {
        self.0.has_first_message = true;
        self.0.begins_with.push(text.to_owned().into());
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut messages: A) -> Result<(), A::Error> {
        for _ in 0..MOST_INSTRUCTIONS {
            if self.0.has_first_message {
                break;
            }
            match messages.next_element()? {
                Some(message) => self.message(message),
                None => return Ok(()),
            }
        }
        while messages.next_element::<IgnoredAny>()?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<(), A::Error> {
        while fields.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use axum::http::Request;

    use super::*;

    fn head(path: &str, headers: &[(&'static str, &str)]) -> Parts {
        let mut request = Request::post(format!("http://gateway{path}"));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    fn traits(head: &Parts, body: &[u8]) -> Traits {
        read(ScopeRule::Model, head, body).traits
    }

    fn of_body(body: &str) -> Traits {
        traits(&head("/v1/chat/completions", &[]), body.as_bytes())
    }

    fn beginning(messages: &[&str]) -> Vec<String> {
        messages.iter().map(|message| (*message).to_owned()).collect()
    }

    #[test]
    fn the_model_and_tokens_of_openai_and_anthropic_count() {
        for field in ["max_tokens", "max_completion_tokens", "max_output_tokens"] {
            let body = format!(r#"{{"stream":true,"{field}":100,"model":"m-1","tools":[{{"model":"x"}}]}}"#);
            assert_eq!(of_body(&body), Traits::new().scope("m-1").tokens(100 + body.len() as u64 / 4));
        }
        assert_eq!(of_body(r#"{"model":"m-1"}"#), Traits::new().scope("m-1"));
    }

    #[test]
    fn models_and_deployments_in_paths_count() {
        for (path, model) in [
            ("/v1beta/models/gemini-3-pro:generateContent", Some("gemini-3-pro")),
            ("/v1/projects/p/locations/l/publishers/google/models/g:streamGenerateContent", Some("g")),
            ("/openai/deployments/mine/chat/completions", Some("mine")),
            ("/v1/models/gpt-5", None),
            ("/v1/models", None),
            ("/v1/files", None),
        ] {
            let expected = model.map_or_else(Traits::new, |model| Traits::new().scope(model));
            assert_eq!(traits(&head(path, &[]), b""), expected, "{path}");
        }
    }

    #[test]
    fn output_of_gemini_counts() {
        let body = r#"{"contents":[],"generationConfig":{"maxOutputTokens":40}}"#;
        assert_eq!(of_body(body), Traits::new().tokens(40 + body.len() as u64 / 4));
    }

    #[test]
    fn only_a_clear_body_is_for_an_allowed_model() {
        let is_for_m = |path: &str, body: &str| {
            read(ScopeRule::Model, &head(path, &[]), body.as_bytes()).is_for(|model| model == "m")
        };
        assert!(is_for_m("/v1/chat/completions", r#"{"model":"m"}"#));
        assert!(is_for_m("/v1beta/models/m:generateContent", ""));
        for body in [
            r#"{"model":"n"}"#,
            r#"{}"#,
            "",
            r#"{"model":"m","model":"n"}"#,
            r#"{"model":"m","Model":"n"}"#,
            r#"{"model":"m","#,
            r#"{"model":"m"} x"#,
        ] {
            assert!(!is_for_m("/v1/chat/completions", body), "{body}");
        }
        assert!(!is_for_m("/v1beta/models/n:generateContent", r#"{"model":"m"}"#));
    }

    #[test]
    fn named_sessions_outrank_the_conversation() {
        let body = r#"{"prompt_cache_key":"key","metadata":{"user_id":"user"},"messages":[{"role":"user","content":"hello"}]}"#;
        assert_eq!(of_body(body), Traits::new().session("key".to_owned()));
        let body = r#"{"metadata":{"user_id":"user"},"messages":[{"role":"user","content":"hello"}]}"#;
        assert_eq!(of_body(body), Traits::new().session("user".to_owned()));
        let head = head("/", &[("x-session-id", "header")]);
        assert_eq!(traits(&head, body.as_bytes()), Traits::new().session("header".as_bytes()));
    }

    #[test]
    fn a_conversation_keeps_its_session_as_it_grows() {
        let (system, hello) =
            (r#"{"role":"system","content":"be kind"}"#, r#"{"role":"user","content":"hello"}"#);
        let expected = Traits::new().session(beginning(&[system, hello]));
        assert_eq!(of_body(&format!(r#"{{"messages":[{system},{hello}]}}"#)), expected);
        let grown =
            format!(r#"{{"messages":[{system},{hello},{{"role":"assistant","content":"hi"}},{hello}]}}"#);
        assert_eq!(of_body(&grown), expected);
        let other = format!(r#"{{"messages":[{system},{{"role":"user","content":"bye"}}]}}"#);
        assert_ne!(of_body(&other), expected);

        assert_eq!(of_body(r#"{"system":"s","messages":[]}"#), Traits::new().session(beginning(&[r#""s""#])));
        assert_eq!(of_body(r#"{"input":"hello"}"#), Traits::new().session(beginning(&["hello"])));
    }

    #[test]
    fn odd_bodies_ask_for_nothing() {
        for body in ["", "null", "[]", "{", "text", r#"{"model":5}"#, r#"{"messages":{"a":1},"input":3}"#] {
            assert_eq!(of_body(body), Traits::new(), "{body}");
        }
        let deep = "[".repeat(100_000);
        assert_eq!(of_body(&format!(r#"{{"tools":{deep}"#)), Traits::new());
    }

    #[test]
    fn a_body_that_breaks_off_is_read_so_far() {
        assert_eq!(of_body(r#"{"model":"m-1","messages":[{"role":"us"#), Traits::new().scope("m-1"));
    }

    #[test]
    fn a_conversation_that_breaks_off_later_keeps_its_session() {
        let (system, hello) =
            (r#"{"role":"system","content":"be kind"}"#, r#"{"role":"user","content":"hello"}"#);
        let expected = Traits::new().session(beginning(&[system, hello]));
        assert_eq!(of_body(&format!(r#"{{"messages":[{system},{hello},{{"role":"assis"#)), expected);
        assert_eq!(
            of_body(&format!(r#"{{"messages":[{system},{{"role":"user","content":"hel"#)),
            Traits::new()
        );
    }

    #[test]
    fn many_instructions_are_read_once() {
        let instruction = r#"{"role":"system","content":""}"#;
        let body = format!(r#"{{"messages":[{}],"model":"m-1"}}"#, vec![instruction; 30_000].join(","));
        let session = beginning(&[instruction; MOST_INSTRUCTIONS]);
        assert_eq!(of_body(&body), Traits::new().scope("m-1").session(session));
    }

    #[test]
    fn the_largest_maximum_of_output_counts() {
        let body = r#"{"max_completion_tokens":500,"max_tokens":null}"#;
        assert_eq!(of_body(body), Traits::new().tokens(500 + body.len() as u64 / 4));
        assert_eq!(of_body(r#"{"max_tokens":4000000000}"#), Traits::new());
    }

    #[test]
    fn large_bodies_leave_their_tokens_open() {
        let body = format!(r#"{{"max_tokens":5,"image":"{}"}}"#, "A".repeat(LARGEST_TEXT));
        assert_eq!(of_body(&body), Traits::new());
    }

    #[test]
    fn only_plain_json_is_read_ahead() {
        let json = ("content-type", "application/json; charset=utf-8");
        assert!(is_in_the_body(&head("/", &[json])));
        assert!(!is_in_the_body(&head("/", &[json, ("content-encoding", "gzip")])));
        assert!(!is_in_the_body(&head("/", &[("content-type", "multipart/form-data")])));
        assert!(!is_in_the_body(&head("/", &[])));
    }
}
