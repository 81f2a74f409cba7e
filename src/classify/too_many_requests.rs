//! The default classifier.

use std::sync::Arc;

use http::StatusCode;

use super::classifier::{ClassifyResponse, ResponseHead, Verdict};

/// Rate limits a key after a 429, and ignores every other status.
///
/// Some services answer a limited request with 403 or 503, which have other meanings too.
/// [`or_with_a_hint`](Self::or_with_a_hint) counts such a status if the response says how long to wait:
///
/// ```
/// use http::StatusCode;
/// use tower_key_rotation::classify::TooManyRequests;
///
/// // GitHub's secondary limits
/// let classify = TooManyRequests::new().or_with_a_hint([StatusCode::FORBIDDEN]);
/// # let _ = classify;
/// ```
#[derive(Clone, Debug, Default)]
pub struct TooManyRequests {
    /// `None` by default, since the layer clones its classifier for each request.
    with_a_hint: Option<Arc<[StatusCode]>>,
}

impl TooManyRequests {
    /// Creates a classifier that counts only 429.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Also counts these statuses, if the response says how long to wait.
    #[must_use]
    pub fn or_with_a_hint(mut self, statuses: impl IntoIterator<Item = StatusCode>) -> Self {
        let before = self.with_a_hint.iter().flat_map(|before| before.iter().copied());
        self.with_a_hint = Some(before.chain(statuses).collect());
        self
    }

    #[inline]
    fn counts_with_a_hint(&self, status: StatusCode) -> bool {
        self.with_a_hint.as_ref().is_some_and(|statuses| statuses.contains(&status))
    }
}

impl ClassifyResponse for TooManyRequests {
    #[inline]
    fn classify(&self, response: &ResponseHead<'_>) -> Verdict {
        if response.status() == StatusCode::TOO_MANY_REQUESTS {
            return Verdict::RateLimited { wait: response.wait() };
        }
        if !self.counts_with_a_hint(response.status()) {
            return Verdict::Nothing;
        }
        match response.wait() {
            None => Verdict::Nothing,
            wait => Verdict::RateLimited { wait },
        }
    }

    fn wants_body(&self, response: &ResponseHead<'_>) -> bool {
        let counts =
            response.status() == StatusCode::TOO_MANY_REQUESTS || self.counts_with_a_hint(response.status());
        counts && response.wait_by_headers().is_none()
    }
}
