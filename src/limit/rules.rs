//! How long a key rests.

use std::time::Duration;

use super::status::Rest;

/// The rules by which the service's hint and the pool's own default become a cooldown.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cooldowns {
    pub(crate) rate_limited: Duration,
    pub(crate) exhausted: Duration,
    pub(crate) shortest_hint: Duration,
    pub(crate) longest_hint: Duration,
    pub(crate) exact_hints: bool,
}

impl Default for Cooldowns {
    fn default() -> Self {
        Self {
            rate_limited: Duration::from_secs(120),
            exhausted: Duration::from_secs(24 * 60 * 60),
            shortest_hint: Duration::from_secs(1),
            longest_hint: Duration::from_secs(60 * 60),
            exact_hints: false,
        }
    }
}

impl Cooldowns {
    /// How long a key rests; `None` until somebody resets it.
    pub(crate) fn how_long(&self, rest: Rest, hint: Option<Duration>) -> Option<Duration> {
        let (by_default, longest) = match rest {
            Rest::RateLimited => (self.rate_limited, self.longest_hint),
            Rest::Exhausted => (self.exhausted, self.longest_hint.max(self.exhausted)),
            Rest::Revoked => return None,
        };
        let hint = hint.map(|hint| hint.max(self.shortest_hint).min(longest));
        Some(match hint {
            None => by_default,
            // The time of a reset is exact: until then no request succeeds, and from then on all do.
            Some(hint) if rest == Rest::Exhausted || self.exact_hints => hint,
            Some(hint) => hint.max(by_default),
        })
    }
}
