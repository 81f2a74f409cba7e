//! The called API, and the shape of its errors.

use axum::{
    Json,
    http::{
        HeaderMap, HeaderName, HeaderValue, StatusCode,
        header::{RETRY_AFTER, WWW_AUTHENTICATE},
    },
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

static ANTHROPIC_VERSION: HeaderName = HeaderName::from_static("anthropic-version");

#[derive(Clone, Copy)]
pub(super) enum Api {
    Anthropic,
    /// OpenAI and compatible APIs.
    OpenAi,
}

/// An error of the gateway's own.
pub(super) struct Refusal {
    pub(super) status: StatusCode,
    pub(super) message: String,
    pub(super) retry_after: Option<HeaderValue>,
}

impl Refusal {
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), retry_after: None }
    }
}

impl Api {
    /// Whether a request names a version of Anthropic's API.
    pub(super) fn has_version(headers: &HeaderMap) -> bool {
        headers.contains_key(&ANTHROPIC_VERSION)
    }

    /// The API of a request. The path may have the prefix of an upstream.
    pub(super) fn of(path: &str, has_version: bool) -> Self {
        let ends_at_messages = path.split_once("/v1/messages").map(|(_, rest)| rest);
        let is_anthropic = has_version
            || path.ends_with("/v1/complete")
            || ends_at_messages.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        if is_anthropic { Self::Anthropic } else { Self::OpenAi }
    }

    pub(super) fn error(self, refusal: Refusal) -> Response {
        let Refusal { status, message, retry_after } = refusal;
        let mut response = (status, Json(self.body(status, &message))).into_response();
        if let Some(value) = retry_after {
            response.headers_mut().insert(RETRY_AFTER, value);
        }
        if status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }

    fn body(self, status: StatusCode, message: &str) -> Value {
        match self {
            Self::Anthropic => {
                let kind = anthropic_type(status);
                json!({ "type": "error", "error": { "type": kind, "message": message } })
            }
            Self::OpenAi => {
                let (kind, code) = openai_type(status);
                json!({ "error": { "message": message, "type": kind, "param": null, "code": code } })
            }
        }
    }
}

fn anthropic_type(status: StatusCode) -> &'static str {
    match status.as_u16() {
        401 => "authentication_error",
        402 => "billing_error",
        403 => "permission_error",
        404 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        504 => "timeout_error",
        529 => "overloaded_error",
        400..=499 => "invalid_request_error",
        _ => "api_error",
    }
}

fn openai_type(status: StatusCode) -> (&'static str, Option<&'static str>) {
    match status.as_u16() {
        401 => ("invalid_request_error", Some("invalid_api_key")),
        413 => ("invalid_request_error", Some("request_too_large")),
        429 => ("rate_limit_error", Some("rate_limit_exceeded")),
        400..=499 => ("invalid_request_error", None),
        502 => ("server_error", Some("bad_gateway")),
        503 => ("server_error", Some("service_unavailable")),
        504 => ("server_error", Some("gateway_timeout")),
        _ => ("server_error", None),
    }
}
