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
            Some(hint) if self.exact_hints => hint,
            Some(hint) => hint.max(by_default),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    fn limited(rules: &Cooldowns, hint: Duration) -> Option<Duration> {
        rules.how_long(Rest::RateLimited, Some(hint))
    }

    #[test]
    fn without_a_hint_the_default_cooldowns_apply() {
        let rules = Cooldowns::default();
        assert_eq!(rules.how_long(Rest::RateLimited, None), Some(2 * MINUTE));
        assert_eq!(rules.how_long(Rest::Exhausted, None), Some(24 * 60 * MINUTE));
        assert_eq!(rules.how_long(Rest::Revoked, None), None);
    }

    #[test]
    fn only_hints_longer_than_the_cooldown_are_honoured() {
        let rules = Cooldowns::default();
        assert_eq!(limited(&rules, 5 * MINUTE), Some(5 * MINUTE));
        assert_eq!(limited(&rules, MINUTE), Some(2 * MINUTE));
    }

    #[test]
    fn a_hint_is_capped_at_an_hour() {
        assert_eq!(limited(&Cooldowns::default(), Duration::MAX), Some(60 * MINUTE));
    }

    #[test]
    fn exact_hints_shorten_cooldowns_down_to_the_floor() {
        let rules = Cooldowns { exact_hints: true, ..Cooldowns::default() };
        assert_eq!(limited(&rules, MINUTE), Some(MINUTE));
        assert_eq!(limited(&rules, Duration::ZERO), Some(Duration::from_secs(1)));
    }

    #[test]
    fn exact_hints_are_capped_except_for_quotas() {
        let rules = Cooldowns { exact_hints: true, longest_hint: MINUTE, ..Cooldowns::default() };
        assert_eq!(limited(&rules, 60 * MINUTE), Some(MINUTE));
        assert_eq!(rules.how_long(Rest::RateLimited, None), Some(2 * MINUTE));
        let in_10_hours = Some(600 * MINUTE);
        assert_eq!(rules.how_long(Rest::Exhausted, in_10_hours), in_10_hours);
    }

    #[test]
    fn the_cap_wins_over_a_higher_floor() {
        let rules = Cooldowns {
            shortest_hint: 2 * MINUTE,
            longest_hint: MINUTE,
            rate_limited: MINUTE,
            exact_hints: true,
            ..Cooldowns::default()
        };
        assert_eq!(limited(&rules, Duration::ZERO), Some(MINUTE));
    }
}
