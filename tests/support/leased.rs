//! Requests without a client: leases of numbered keys, and the answers that limit them.

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use tower_key_rotation::{KeyPool, KeyPoolBuilder, Traits, classify::ResponseHead};

/// A builder with so many keys, `k0` and so on.
pub fn keys(count: usize) -> KeyPoolBuilder {
    KeyPool::builder().keys((0..count).map(|key| (format!("k{key}"), format!("sk-{key}"))))
}

pub fn scope(name: &str) -> Traits {
    Traits::new().scope(name)
}

pub fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
    let pair = |(name, value): &(&'static str, &str)| {
        (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())
    };
    pairs.iter().map(pair).collect()
}

/// OpenAI's headers of a bucket of 10 requests.
pub fn left(requests: &str, reset: &str) -> HeaderMap {
    headers(&[
        ("x-ratelimit-limit-requests", "10"),
        ("x-ratelimit-remaining-requests", requests),
        ("x-ratelimit-reset-requests", reset),
    ])
}

/// Sends a request by a lease, which is answered so.
pub fn ask(pool: &KeyPool, traits: &Traits, status: u16, headers: &HeaderMap) {
    let lease = pool.lease(traits).unwrap();
    lease.answered(&ResponseHead::new(StatusCode::from_u16(status).unwrap(), headers));
}
