//! What a response says of the key that it was asked for with.
//!
//! A [`ClassifyResponse`] looks at a response's head and gives a [`Verdict`]. [`TooManyRequests`] is the
//! default; [`LlmGateway`] knows more of what LLM services and the gateways before them answer; a function
//! does for anything else:
//!
//! ```
//! use http::StatusCode;
//! use tower_key_rotation::{KeyPool, KeyRotationLayer, classify::{ResponseHead, Verdict}};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let pool = KeyPool::builder().key("alpha", "sk-1").build()?;
//! let layer = KeyRotationLayer::new(&pool).classify(|response: &ResponseHead<'_>| {
//!     match response.status() {
//!         StatusCode::TOO_MANY_REQUESTS => Verdict::RateLimited { wait: response.wait() },
//!         StatusCode::PAYMENT_REQUIRED => Verdict::Exhausted { wait: None },
//!         _ => Verdict::Nothing,
//!     }
//! });
//! # let _ = layer;
//! # Ok(())
//! # }
//! ```

mod hint;
mod llm_gateway;
mod too_many_requests;

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use http::{HeaderMap, StatusCode};

pub use self::{llm_gateway::LlmGateway, too_many_requests::TooManyRequests};

/// What a response says of its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Verdict {
    /// Nothing. A key that rests because of another response goes on resting.
    Nothing,
    /// It is limited, and rests for 2 minutes or for what the pool's builder and this hint say.
    RateLimited {
        /// How long the service asks to wait.
        wait: Option<Duration>,
    },
    /// Its quota is used up, and it rests for 24 hours or for what the pool's builder and this hint say.
    Exhausted {
        /// How long the service asks to wait.
        wait: Option<Duration>,
    },
    /// The service doesn't accept it any more. It rests until somebody resets it.
    Revoked,
}

/// Decides what a response says of its key. Any `Fn(&ResponseHead<'_>) -> Verdict` does.
pub trait ClassifyResponse {
    /// Looks at a response. It is called for every one, so it should settle the usual case by the status.
    fn classify(&self, response: &ResponseHead<'_>) -> Verdict;

    /// Whether the body has to be read for that. It is asked only for statuses from 400 on, and only where
    /// bodies are read at all: see
    /// [`KeyRotationLayer::read_error_bodies`](crate::KeyRotationLayer::read_error_bodies).
    fn wants_body(&self, response: &ResponseHead<'_>) -> bool {
        let _ = response;
        false
    }
}

impl<F> ClassifyResponse for F
where
    F: Fn(&ResponseHead<'_>) -> Verdict,
{
    fn classify(&self, response: &ResponseHead<'_>) -> Verdict {
        self(response)
    }
}

/// What a classifier sees of a response.
#[derive(Clone, Copy)]
pub struct ResponseHead<'a> {
    status: StatusCode,
    headers: &'a HeaderMap,
    body: Option<&'a [u8]>,
}

impl<'a> ResponseHead<'a> {
    /// A response of which the body is not known.
    #[must_use]
    pub fn new(status: StatusCode, headers: &'a HeaderMap) -> Self {
        Self { status, headers, body: None }
    }

    /// The same with the body, or as much of it as was read.
    #[must_use]
    pub fn with_body(self, body: &'a [u8]) -> Self {
        Self { body: Some(body), ..self }
    }

    /// The status.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// The headers.
    #[must_use]
    pub fn headers(&self) -> &'a HeaderMap {
        self.headers
    }

    /// The beginning of the body, where bodies are read and the classifier wanted this one.
    #[must_use]
    pub fn body(&self) -> Option<&'a [u8]> {
        self.body
    }

    /// How long the service asks to wait, by any of the headers in use for that: `Retry-After` (RFC 9110
    /// §10.2.3) and its variants in milliseconds, then the reset of a window with nothing remaining, as
    /// OpenAI, Anthropic, GitHub, Discord and the IETF's `RateLimit` drafts write it. Where there is none and
    /// the body was read, by a `google.rpc.RetryInfo` in it.
    ///
    /// Dates are reckoned from the response's own `Date`, and from the local clock only where it has none.
    #[must_use]
    pub fn wait(&self) -> Option<Duration> {
        self.wait_by_headers().or_else(|| self.body.and_then(hint::from_body))
    }

    pub(crate) fn wait_by_headers(&self) -> Option<Duration> {
        hint::from_headers(self.headers, SystemTime::now())
    }
}

impl fmt::Debug for ResponseHead<'_> {
    /// Without headers and body: a service may quote the key in them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseHead").field("status", &self.status).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn by_header(response: &ResponseHead<'_>) -> Verdict {
        if response.headers().contains_key("x-quota-exceeded") {
            Verdict::Exhausted { wait: None }
        } else {
            Verdict::Nothing
        }
    }

    #[test]
    fn a_function_that_goes_by_the_headers_is_a_classifier_and_wants_no_body() {
        let mut headers = HeaderMap::new();
        let verdict = |headers: &HeaderMap| {
            let head = ResponseHead::new(StatusCode::SERVICE_UNAVAILABLE, headers);
            assert!(!by_header.wants_body(&head));
            by_header.classify(&head)
        };
        assert_eq!(verdict(&headers), Verdict::Nothing);
        headers.insert("x-quota-exceeded", HeaderValue::from_static("monthly"));
        assert_eq!(verdict(&headers), Verdict::Exhausted { wait: None });
    }
}
