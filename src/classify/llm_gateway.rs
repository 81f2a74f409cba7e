//! What LLM services, and the gateways before them, say of a key.

use http::StatusCode;

use super::{ClassifyResponse, ResponseHead, Verdict};

/// A preset for LLM services and gateways.
///
/// | status | and the body says | verdict |
/// |---|---|---|
/// | 401, 403 | | revoked |
/// | 402 | | exhausted |
/// | 429 | banned, blocked, suspended or disabled | revoked |
/// | 429 | `insufficient_quota` | exhausted |
/// | 429 | | rate limited |
/// | 400 | budget … exceeded | exhausted |
///
/// What depends on a body needs
/// [`KeyRotationLayer::read_error_bodies`](crate::KeyRotationLayer::read_error_bodies); without it the body
/// is not looked at, and a 400 says nothing.
///
/// A revoked key stays out of service until somebody resets it. A 403 that is about the request rather than
/// the key (a model or a region that is not allowed) takes the key out as well: where a service does that, use
/// a classifier of your own.
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
    /// The preset.
    #[must_use]
    pub fn new() -> Self {
        Self
    }
}

const LOCKED_OUT: [&str; 4] = ["banned", "blocked", "suspended", "disabled"];

impl ClassifyResponse for LlmGateway {
    fn classify(&self, response: &ResponseHead<'_>) -> Verdict {
        let body = || Words::of(response.body().unwrap_or_default());
        match response.status() {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Verdict::Revoked,
            StatusCode::PAYMENT_REQUIRED => Verdict::Exhausted { wait: None },
            StatusCode::TOO_MANY_REQUESTS => too_many_requests(response, &body()),
            StatusCode::BAD_REQUEST if body().say_the_budget_is_exceeded() => {
                Verdict::Exhausted { wait: None }
            }
            _ => Verdict::Nothing,
        }
    }

    fn wants_body(&self, response: &ResponseHead<'_>) -> bool {
        matches!(response.status(), StatusCode::TOO_MANY_REQUESTS | StatusCode::BAD_REQUEST)
    }
}

fn too_many_requests(response: &ResponseHead<'_>, body: &Words) -> Verdict {
    if LOCKED_OUT.iter().any(|word| body.have(word)) {
        Verdict::Revoked
    } else if body.have("insufficient_quota") {
        // OpenAI answers a used-up balance with 429, platform.openai.com/docs/guides/error-codes.
        Verdict::Exhausted { wait: None }
    } else {
        Verdict::RateLimited { wait: response.wait() }
    }
}

/// The words of a body, in lower case.
struct Words(String);

impl Words {
    fn of(body: &[u8]) -> Self {
        Self(String::from_utf8_lossy(body).to_lowercase())
    }

    fn have(&self, word: &str) -> bool {
        self.all().any(|own| own == word)
    }

    fn say_the_budget_is_exceeded(&self) -> bool {
        self.have("budget_exceeded") || (self.have("budget") && self.have("exceeded"))
    }

    fn all(&self) -> impl Iterator<Item = &str> {
        self.0.split(|c: char| !c.is_alphanumeric() && c != '_')
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderMap;

    use super::*;

    fn classify(status: u16, body: &str) -> Verdict {
        let headers = HeaderMap::new();
        let head = ResponseHead::new(StatusCode::from_u16(status).unwrap(), &headers);
        LlmGateway::new().classify(&head.with_body(body.as_bytes()))
    }

    const EXHAUSTED: Verdict = Verdict::Exhausted { wait: None };
    const LIMITED: Verdict = Verdict::RateLimited { wait: None };

    #[test]
    fn the_status_alone_tells_a_revoked_and_an_unpaid_key() {
        assert_eq!(classify(401, ""), Verdict::Revoked);
        assert_eq!(classify(403, ""), Verdict::Revoked);
        assert_eq!(classify(402, ""), EXHAUSTED);
        for status in [200, 404, 500, 529] {
            assert_eq!(classify(status, "banned budget exceeded"), Verdict::Nothing, "{status}");
        }
    }

    #[test]
    fn no_body_is_wanted_where_the_status_tells_all() {
        let wants_body = |status: &u16| {
            let headers = HeaderMap::new();
            let head = ResponseHead::new(StatusCode::from_u16(*status).unwrap(), &headers);
            LlmGateway::new().wants_body(&head)
        };
        let wanted: Vec<_> = (400..600).filter(wants_body).collect();
        assert_eq!(wanted, [400, 429]);
    }

    #[test]
    fn a_429_is_read_for_why() {
        assert_eq!(classify(429, r#"{"error":"slow down"}"#), LIMITED);
        for word in ["banned", "Blocked", "SUSPENDED", "disabled"] {
            assert_eq!(
                classify(429, &format!(r#"{{"error":"key is {word}."}}"#)),
                Verdict::Revoked,
                "{word}"
            );
        }
        assert_eq!(classify(429, r#"{"error":{"code":"insufficient_quota"}}"#), EXHAUSTED);
    }

    #[test]
    fn a_word_within_a_word_does_not_count() {
        assert_eq!(classify(429, "unblocked requests, abandoned"), LIMITED);
    }

    #[test]
    fn a_400_counts_only_where_it_says_that_the_budget_is_exceeded() {
        assert_eq!(classify(400, "Budget has been exceeded! Current cost: 12"), EXHAUSTED);
        assert_eq!(classify(400, r#"{"error":{"type":"budget_exceeded"}}"#), EXHAUSTED);
        assert_eq!(classify(400, "thinking.budget_tokens must be less than max_tokens"), Verdict::Nothing);
        assert_eq!(classify(400, "budget_tokens exceeded max_tokens"), Verdict::Nothing);
        assert_eq!(classify(400, "maximum context length exceeded"), Verdict::Nothing);
    }

    #[test]
    fn a_body_that_is_no_text_is_no_reason_to_fail() {
        let headers = HeaderMap::new();
        let head = ResponseHead::new(StatusCode::TOO_MANY_REQUESTS, &headers);
        assert_eq!(LlmGateway::new().classify(&head.with_body(&[0xff, 0x00, 0xfe])), LIMITED);
        assert_eq!(LlmGateway::new().classify(&head), LIMITED);
    }
}
