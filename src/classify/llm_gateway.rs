//! A classifier for LLM services and LLM gateways.

use http::StatusCode;
use serde_json::Value;

use super::classifier::{ClassifyResponse, ResponseHead, Verdict};

/// A classifier for LLM services and LLM gateways.
///
/// The first row that matches counts; any other response has no effect.
///
/// | status | body | verdict |
/// |---|---|---|
/// | 401, 403 | refuses the request itself: see below | nothing |
/// | 401, 403 | any other, or not read | revoked |
/// | 402 | any | exhausted |
/// | 429 | contains the word `banned`, `blocked`, `suspended` or `disabled` | revoked |
/// | 429 | contains `insufficient_quota` | exhausted |
/// | 429 | any other, or not read | rate limited |
/// | 400 | `API_KEY_INVALID` (Gemini), or "This organization has been disabled" (Anthropic) | revoked |
/// | 400 | `budget_exceeded` (LiteLLM), or "Your credit balance is too low" (Anthropic) | exhausted |
///
/// Turn on [`KeyRotationLayer::read_error_bodies`](crate::KeyRotationLayer::read_error_bodies). Without it, this
/// classifier decides from the status alone and ignores every 400.
///
/// A revoked key stays out of service until an operator resets it. Failover sends a refused request again with
/// another key. If a 401 or 403 counted although it refuses the request itself, one request would revoke key after
/// key. Such refusals are:
///
/// - The key has no access to a model, an organization, a file or an operation. Examples are `model_not_found` and
///   `missing_scope` (OpenAI), `permission_error` (Anthropic), `model_permission_blocked_…` (Groq),
///   `…_model_access_denied` (LiteLLM) and `IAM_PERMISSION_DENIED` (Google).
/// - The service does not serve the caller's country.
/// - The service refuses the content (OpenRouter's moderation, xAI's usage guidelines).
/// - A firewall answers 403 with an HTML page.
///
/// If the layer does not read bodies, or a service words such a refusal differently, one request can revoke several
/// keys. In that case, write your own classifier.
///
/// For a 400, only the error code and the beginning of the message count, since the rest of the message may quote the
/// request.
///
/// ```
/// use tower_key_rotation::{KeyPool, KeyRotationLayer, classify::LlmGateway};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let pool = KeyPool::builder().key("alpha", "sk-1").build()?;
/// let layer = KeyRotationLayer::new(&pool)
///     .classify(LlmGateway::new())
///     .read_error_bodies(16 * 1024);
/// # let _ = layer;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct LlmGateway;

impl LlmGateway {
    /// Creates the classifier.
    #[must_use]
    pub fn new() -> Self {
        Self
    }
}

const LOCKED_OUT: [&str; 4] = ["banned", "blocked", "suspended", "disabled"];

/// Error codes that refuse the request, not the key.
const ABOUT_THE_REQUEST: [&str; 17] = [
    // OpenAI, and in the last line Anthropic.
    "model_not_found",
    "mismatched_organization",
    "invalid_organization",
    "mismatched_project",
    "missing_scope",
    "unsupported_country_region_territory",
    "permission_error",
    // Groq.
    "model_permission_blocked_org",
    "model_permission_blocked_project",
    // LiteLLM.
    "key_model_access_denied",
    "user_model_access_denied",
    "team_model_access_denied",
    "project_model_access_denied",
    "org_model_access_denied",
    // Google's google.api.ErrorReason. Most of its other reasons refuse the key.
    "iam_permission_denied",
    "access_token_scope_insufficient",
    "user_project_denied",
];

/// Beginnings of messages that refuse the request, for errors without a code or with a code that is too general.
const ABOUT_THE_REQUEST_IN_WORDS: [&str; 5] = [
    // OpenAI.
    "you have insufficient permissions for this operation",
    "you are not allowed to sample from this model",
    // xAI.
    "content violates usage guidelines",
    // Google, for a file and for a model.
    "you do not have permission to access the ",
    "the caller does not have permission",
];

impl ClassifyResponse for LlmGateway {
    fn classify(&self, response: &ResponseHead<'_>) -> Verdict {
        let body = || response.body().unwrap_or_default();
        match response.status() {
            status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN)
                if is_about_the_request(status, body()) =>
            {
                Verdict::Nothing
            }
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Verdict::Revoked,
            StatusCode::PAYMENT_REQUIRED => Verdict::Exhausted { wait: None },
            StatusCode::TOO_MANY_REQUESTS => too_many_requests(response, &Words::of(body())),
            StatusCode::BAD_REQUEST => {
                bad_request(&ErrorBody::read(body()).unwrap_or_else(|| ErrorBody::of_text(body())))
            }
            _ => Verdict::Nothing,
        }
    }

    fn wants_body(&self, response: &ResponseHead<'_>) -> bool {
        matches!(
            response.status(),
            StatusCode::BAD_REQUEST
                | StatusCode::UNAUTHORIZED
                | StatusCode::FORBIDDEN
                | StatusCode::TOO_MANY_REQUESTS
        )
    }
}

fn is_about_the_request(status: StatusCode, body: &[u8]) -> bool {
    let text = Words::of(body);
    let is_a_page = ["<!doctype html", "<html"].iter().any(|begin| text.0.trim_start().starts_with(begin));
    match ErrorBody::read(body) {
        // A firewall answers 403. An HTML page with 401 may come from the authentication proxy in front of the service.
        _ if is_a_page => status == StatusCode::FORBIDDEN,
        // Anthropic also says `permission_error` if an OAuth token is no longer valid, which refuses the key.
        Some(error) if error.message.starts_with("oauth ") => false,
        Some(error) => {
            error.has_code_of(&ABOUT_THE_REQUEST)
                || error.begins_with_one_of(&ABOUT_THE_REQUEST_IN_WORDS)
                || error.is_of_moderation
        }
        // The body may be JSON that the layer read only in part.
        None => ABOUT_THE_REQUEST.iter().any(|code| text.have(code)),
    }
}

fn too_many_requests(response: &ResponseHead<'_>, body: &Words) -> Verdict {
    if LOCKED_OUT.iter().any(|word| body.have(word)) {
        Verdict::Revoked
    } else if body.have("insufficient_quota") {
        // OpenAI answers 429 when the balance is used up, platform.openai.com/docs/guides/error-codes.
        Verdict::Exhausted { wait: None }
    } else {
        Verdict::RateLimited { wait: response.wait() }
    }
}

fn bad_request(error: &ErrorBody) -> Verdict {
    if error.has_code_of(&["api_key_invalid"])
        || error.begins_with_one_of(&["this organization has been disabled"])
    {
        Verdict::Revoked
    } else if error.has_code_of(&["budget_exceeded"])
        || error.begins_with_one_of(&["budget has been exceeded", "your credit balance is too low"])
    {
        Verdict::Exhausted { wait: None }
    } else {
        Verdict::Nothing
    }
}

/// An error in the JSON format of OpenAI, Anthropic, Google or an LLM gateway, in lower case.
struct ErrorBody {
    codes: Vec<String>,
    message: String,
    /// Whether OpenRouter's moderation refused the content, openrouter.ai/docs/errors.
    is_of_moderation: bool,
}

impl ErrorBody {
    /// Returns `None` if the body is not complete JSON.
    fn read(body: &[u8]) -> Option<Self> {
        let json: Value = serde_json::from_slice(body).ok()?;
        // Gemini's streaming endpoint wraps its error in an array.
        let json = json.get(0).unwrap_or(&json);
        let error = json.get("error").unwrap_or(json);
        let text = |of: &Value, name| of.get(name).and_then(Value::as_str).map(str::to_lowercase);
        let details = error.get("details").and_then(Value::as_array).into_iter().flatten();
        let reasons = details.filter_map(|detail| text(detail, "reason"));
        let message = text(error, "message").or_else(|| error.as_str().map(str::to_lowercase));
        Some(Self {
            codes: ["type", "code"].into_iter().filter_map(|name| text(error, name)).chain(reasons).collect(),
            message: message.unwrap_or_default(),
            is_of_moderation: error.pointer("/metadata/flagged_input").is_some(),
        })
    }

    fn of_text(body: &[u8]) -> Self {
        Self {
            codes: Vec::new(),
            message: String::from_utf8_lossy(body).trim().to_lowercase(),
            is_of_moderation: false,
        }
    }

    fn has_code_of(&self, codes: &[&str]) -> bool {
        self.codes.iter().any(|code| codes.contains(&&**code))
    }

    fn begins_with_one_of(&self, beginnings: &[&str]) -> bool {
        beginnings.iter().any(|beginning| self.message.starts_with(beginning))
    }
}

/// The words of a body, in lower case.
struct Words(String);

impl Words {
    fn of(body: &[u8]) -> Self {
        Self(String::from_utf8_lossy(body).to_lowercase())
    }

    fn have(&self, word: &str) -> bool {
        // Hyphens and slashes belong to a word: a model's name may contain "un-blocked".
        let is_of_a_word = |c: char| c.is_alphanumeric() || "_-/".contains(c);
        self.0.split(|c| !is_of_a_word(c)).any(|own| own == word)
    }
}
