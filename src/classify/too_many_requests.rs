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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use http::{HeaderMap, HeaderValue, header::RETRY_AFTER};

    use super::*;

    fn classify(classifier: &TooManyRequests, status: u16, retry_after: Option<&'static str>) -> Verdict {
        with_head(status, retry_after, |head| classifier.classify(head))
    }

    fn with_head<T>(
        status: u16,
        retry_after: Option<&'static str>,
        look: impl Fn(&ResponseHead<'_>) -> T,
    ) -> T {
        let mut headers = HeaderMap::new();
        headers.extend(retry_after.map(|value| (RETRY_AFTER, HeaderValue::from_static(value))));
        look(&ResponseHead::new(StatusCode::from_u16(status).unwrap(), &headers))
    }

    #[test]
    fn a_429_rate_limits_with_the_services_hint() {
        let classifier = TooManyRequests::new();
        assert_eq!(classify(&classifier, 429, None), Verdict::RateLimited { wait: None });
        let wait = Some(Duration::from_secs(30));
        assert_eq!(classify(&classifier, 429, Some("30")), Verdict::RateLimited { wait });
    }

    #[test]
    fn every_other_status_is_ignored() {
        for status in [200, 301, 401, 402, 403, 500, 503] {
            assert_eq!(classify(&TooManyRequests::new(), status, Some("30")), Verdict::Nothing, "{status}");
        }
    }

    #[test]
    fn an_added_status_counts_only_with_a_hint() {
        let classifier = TooManyRequests::new().or_with_a_hint([StatusCode::FORBIDDEN]);
        assert_eq!(classify(&classifier, 403, None), Verdict::Nothing);
        let wait = Some(Duration::from_secs(30));
        assert_eq!(classify(&classifier, 403, Some("30")), Verdict::RateLimited { wait });
    }

    #[test]
    fn only_a_missing_hint_wants_a_body() {
        let classifier = TooManyRequests::new().or_with_a_hint([StatusCode::FORBIDDEN]);
        let wants_body =
            |status, retry_after| with_head(status, retry_after, |head| classifier.wants_body(head));
        assert!(wants_body(429, None) && wants_body(403, None));
        assert!(!wants_body(429, Some("30")) && !wants_body(403, Some("30")));
        assert!(!wants_body(500, None) && !wants_body(500, Some("30")));
    }
}
