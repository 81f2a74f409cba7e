//! The trait of classifiers, and its input and output.

use std::{fmt, time::Duration};

use http::{HeaderMap, StatusCode};

use super::{grpc_status, hint, remaining};
use crate::limit::Remaining;

/// The effect of a response on the key that its request carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Verdict {
    /// No effect. A rest that another response began continues.
    Nothing,
    /// The key is rate limited and rests for the pool's cooldown, by default 2 minutes.
    ///
    /// A hint changes the rest within the pool's limits: see
    /// [`KeyPoolBuilder::hint_limits`](crate::KeyPoolBuilder::hint_limits).
    RateLimited {
        /// The wait that the service asks for.
        wait: Option<Duration>,
    },
    /// The key's quota is used up. The key rests until the quota is reset, or for 24 hours if the service does not say
    /// when that is. Then 24 hours are a guess: with [`Failover`](crate::Failover), one request at a time tries the key
    /// meanwhile, as it tries a confirmed one (see [`Refused`](Self::Refused)).
    ///
    /// It rests for no longer than [`KeyPoolBuilder::hint_limits`](crate::KeyPoolBuilder::hint_limits) allow: 24 hours by
    /// default. Then a request finds out whether the quota was reset.
    Exhausted {
        /// The time until the quota is reset, if the service says.
        wait: Option<Duration>,
    },
    /// A quota of one part of the service is used up, such as the requests per day of one model.
    ///
    /// The key rests as after [`Exhausted`](Self::Exhausted), but only for requests of the same
    /// [scope](crate::Traits::scope). After a request without a scope, the whole key rests.
    ScopeExhausted {
        /// The time until the quota is reset, if the service says.
        wait: Option<Duration>,
    },
    /// The service no longer accepts the key. The key rests until an operator resets it.
    ///
    /// For words that leave no doubt. If no other key is available, the key rests as a confirmed one does: see
    /// [`Refused`](Self::Refused).
    Revoked,
    /// The service refuses the request or the key, and the response does not say which: most 401s, 402s and 403s.
    ///
    /// The key is suspected: other requests pass over it while another key is available. Then the pool finds out:
    ///
    /// - With [`Failover`](crate::Failover), the request goes on with another key. If that key refuses it with the same
    ///   status, the request is the reason: no key is suspected, the caller gets the response, and nothing is sent a third
    ///   time. If that key serves it, the first one is confirmed: it rests for two minutes, in all processes.
    /// - Without failover, one request tries the key after 10 seconds. If it is refused, too, the next one tries the key after
    ///   20 seconds, and so on, up to 10 minutes. A key that has served other requests since its last refusal is not
    ///   suspected. If two keys are refused for the first time with the same status, neither is.
    ///
    /// Suspicion never takes out more than half of the keys, nor the last available one. One request at a time tries a
    /// confirmed key, after 1, 2, 4 and 8 minutes, and then every 10 minutes. A success brings the key back.
    ///
    /// ```
    /// use http::StatusCode;
    /// use tower_key_rotation::{
    ///     Failover, KeyPool, KeyRotationLayer,
    ///     classify::{ResponseHead, Verdict},
    /// };
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let pool = KeyPool::builder().key("alpha", "sk-1").key("beta", "sk-2").build()?;
    /// let classify = |response: &ResponseHead<'_>| match response.status() {
    ///     StatusCode::TOO_MANY_REQUESTS => Verdict::RateLimited { wait: response.wait() },
    ///     StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Verdict::Refused,
    ///     _ => Verdict::Nothing,
    /// };
    /// let layer = KeyRotationLayer::new(&pool).classify(classify).failover(Failover::attempts(3));
    /// # let _ = layer;
    /// # Ok(())
    /// # }
    /// ```
    Refused,
}

/// Decides the effect of a response on its key. Implemented for every `Fn(&ResponseHead<'_>) -> Verdict`.
pub trait ClassifyResponse {
    /// Returns the verdict on a response.
    ///
    /// The layer calls this for every response, so decide the common case from the status alone.
    ///
    /// It also calls this for an error within a stream, if
    /// [`KeyRotationLayer::stream_head`](crate::KeyRotationLayer::stream_head) is on: with the status that the service has
    /// for this error before a stream begins, the stream's headers, and the error as the body.
    fn classify(&self, response: &ResponseHead<'_>) -> Verdict;

    /// Returns whether the verdict depends on the body.
    ///
    /// The layer asks this only for a status of 400 or above, and only if
    /// [`KeyRotationLayer::read_error_bodies`](crate::KeyRotationLayer::read_error_bodies) is on.
    fn wants_body(&self, response: &ResponseHead<'_>) -> bool {
        let _ = response;
        false
    }

    /// Returns whether the verdict may come from trailers, which gRPC has behind its messages.
    ///
    /// If so, and if the layer sees the bodies of responses (see [`Reservation`](crate::Reservation#when-it-ends)), it also
    /// calls [`classify`](Self::classify) for the trailers of each gRPC call that fails: with the response's status, and the
    /// trailers as the headers.
    fn wants_trailers(&self) -> bool {
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

/// The parts of a response that a classifier sees.
#[derive(Clone, Copy)]
pub struct ResponseHead<'a> {
    status: StatusCode,
    headers: &'a HeaderMap,
    body: Option<&'a [u8]>,
}

impl<'a> ResponseHead<'a> {
    /// Creates a head without a body.
    #[must_use]
    pub fn new(status: StatusCode, headers: &'a HeaderMap) -> Self {
        Self { status, headers, body: None }
    }

    /// Adds the body, or the beginning of the body, without its compression.
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

    /// The beginning of the body, if the layer read this body.
    ///
    /// The layer reads a body only if [`ClassifyResponse::wants_body`] returned `true`.
    #[must_use]
    pub fn body(&self) -> Option<&'a [u8]> {
        self.body
    }

    /// The wait that the service asks for.
    ///
    /// The first of these that is present counts:
    ///
    /// 1. `Retry-After` (RFC 9110 §10.2.3) and its variants in milliseconds;
    /// 2. the reset of a rate-limit window with nothing remaining, in the headers of OpenAI, Anthropic, GitHub,
    ///    Discord and others, or in a `RateLimit` header of the IETF drafts;
    /// 3. a `google.rpc.RetryInfo` in the body, if the layer read the body.
    ///
    /// A date is compared with the response's own `Date` header, or with the local clock if there is no such
    /// header.
    #[must_use]
    pub fn wait(&self) -> Option<Duration> {
        self.wait_by_headers().or_else(|| self.body.and_then(hint::from_body))
    }

    /// The wait that the service asks for in so many words, not by the reset of a window.
    pub(crate) fn explicit_wait(&self) -> Option<Duration> {
        hint::explicit(self.headers).or_else(|| self.body.and_then(hint::from_body))
    }

    /// What is left of the service's budgets.
    pub(crate) fn remaining(&self) -> Remaining {
        remaining::remaining(self.headers)
    }

    /// Whether the service refused the request: by its status, or by that of a gRPC call without a message.
    pub(crate) fn is_error(&self) -> bool {
        self.status.is_client_error() || self.status.is_server_error() || grpc_status::is_error(self.headers)
    }

    pub(crate) fn wait_by_headers(&self) -> Option<Duration> {
        hint::from_headers(self.headers)
    }
}

impl fmt::Debug for ResponseHead<'_> {
    /// Omits headers and body, since a service may quote the key in them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseHead").field("status", &self.status).finish_non_exhaustive()
    }
}
