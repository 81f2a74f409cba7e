//! A limit's generation and rest in one atomic word.
//!
//! From the highest bit: 19 bits of generation, 42 bits of deadline in milliseconds of the pool's clock, 2 bits of
//! reason, and a flag. Without the flag, words compare as numbers do: the greater of two words is their join.

use std::time::Duration;

use super::{
    status::{Rest, Status},
    words::{Resting, Until},
};
use crate::sync::atomic::{AtomicU64, Ordering::SeqCst};

/// The deadline of a rest that does not end by itself.
pub(crate) const NEVER: u64 = u64::MAX;

/// Of a key's state: an operator disabled the key. Of its pending word: rests of scopes are pending, too.
const FLAG: u64 = 1;
const REASON_BITS: u32 = 2;
const UNTIL_BITS: u32 = 42;
const REASON_AT: u32 = 1;
const UNTIL_AT: u32 = REASON_AT + REASON_BITS;
const GENERATION_AT: u32 = UNTIL_AT + UNTIL_BITS;

/// 2^42 milliseconds are 139 years.
const FOREVER: u64 = (1 << UNTIL_BITS) - 1;
const LAST_GENERATION: u64 = u64::MAX >> GENERATION_AT;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Word(u64);

impl Word {
    /// The first generation, in which nothing rests.
    pub(crate) const HEALTHY: Self = Self(0);

    /// A generation beyond the last one that has room counts as the last one.
    pub(crate) fn new(generation: u64, resting: Option<Resting>, now: Duration) -> Self {
        let generation = generation.min(LAST_GENERATION) << GENERATION_AT;
        let Some(Resting { until, reason }) = resting else { return Self(generation) };
        let until = match until {
            Until::After(Duration::ZERO) => return Self(generation),
            Until::Reset => FOREVER,
            // Up, so that no rest is shorter than it should be.
            Until::After(left) => ceil_millis(now.saturating_add(left)).clamp(1, FOREVER - 1),
        };
        Self(generation | until << UNTIL_AT | (reason as u64) << REASON_AT)
    }

    /// Whether nothing but a generation is set.
    #[inline(always)]
    pub(crate) fn is_available(self) -> bool {
        self.0 << (u64::BITS - GENERATION_AT) == 0
    }

    pub(crate) fn generation(self) -> u64 {
        self.0 >> GENERATION_AT
    }

    pub(crate) fn in_generation_of(self, other: Self) -> Self {
        let rest = (1 << GENERATION_AT) - 1;
        Self(other.0 & !rest | self.0 & rest)
    }

    /// The join of two words, with the flag of the first one.
    pub(crate) fn join(self, other: Self) -> Self {
        Self((self.0 & !FLAG).max(other.0 & !FLAG) | self.0 & FLAG)
    }

    /// The same generation and flag without a rest.
    pub(crate) fn ended(self) -> Self {
        Self::HEALTHY.in_generation_of(self).flag(self.is_flagged())
    }

    fn flag(self, flag: bool) -> Self {
        Self(self.0 & !FLAG | u64::from(flag))
    }

    fn is_flagged(self) -> bool {
        self.0 & FLAG != 0
    }

    /// Only a key's state says whether an operator disabled the key.
    pub(crate) fn with_disabled(self, disabled: bool) -> Self {
        self.flag(disabled)
    }

    pub(crate) fn is_disabled(self) -> bool {
        self.is_flagged()
    }

    /// Only a key's pending word says whether rests of scopes are pending, too.
    pub(crate) fn with_scopes(self, are_pending: bool) -> Self {
        self.flag(are_pending)
    }

    pub(crate) fn has_scopes(self) -> bool {
        self.is_flagged()
    }

    fn until(self) -> u64 {
        self.0 >> UNTIL_AT & FOREVER
    }

    /// When the key comes back by itself, in milliseconds.
    pub(crate) fn deadline(self) -> u64 {
        match self.until() {
            0 | FOREVER => NEVER,
            _ if self.is_disabled() => NEVER,
            until => until,
        }
    }

    pub(crate) fn is_over(self, now: u64) -> bool {
        self.deadline() <= now
    }

    /// The rest that is left.
    pub(crate) fn resting(self, now: Duration) -> Option<Resting> {
        let reason = match self.0 >> REASON_AT & ((1 << REASON_BITS) - 1) {
            0 => Rest::RateLimited,
            1 => Rest::Exhausted,
            _ => Rest::Revoked,
        };
        let until = match self.until() {
            FOREVER => Until::Reset,
            until => {
                let left = Duration::from_millis(until).saturating_sub(now);
                Until::After(Some(left).filter(|left| !left.is_zero())?)
            }
        };
        Some(Resting { until, reason })
    }

    pub(crate) fn status(self, now: Duration) -> Status {
        if self.is_disabled() {
            return Status::Disabled;
        }
        self.resting(now).map_or(Status::Healthy, |resting| resting.reason.status())
    }

    pub(crate) fn time_left(self, now: Duration) -> Option<Duration> {
        self.resting(now)?.until.left()
    }
}

/// Nanoseconds as atomics hold them; 584 years at most.
pub(crate) const fn nanos(duration: Duration) -> u64 {
    duration.as_secs().saturating_mul(1_000_000_000).saturating_add(duration.subsec_nanos() as u64)
}

/// The milliseconds that have passed, as deadlines are compared with them.
#[inline]
pub(crate) fn millis(duration: Duration) -> u64 {
    duration.as_secs().saturating_mul(1_000).saturating_add(duration.subsec_millis().into())
}

fn ceil_millis(duration: Duration) -> u64 {
    millis(duration.saturating_add(Duration::from_nanos(999_999)))
}

#[derive(Debug, Default)]
pub(crate) struct AtomicWord(AtomicU64);

impl AtomicWord {
    #[inline]
    pub(crate) fn load(&self) -> Word {
        Word(self.0.load(SeqCst))
    }

    /// Replaces the word by `next` of it. Returns the word before, if that is another one.
    pub(crate) fn update(&self, next: impl Fn(Word) -> Word) -> Option<Word> {
        self.0
            .fetch_update(SeqCst, SeqCst, |word| Some(next(Word(word)).0).filter(|next| *next != word))
            .ok()
            .map(Word)
    }

    /// Replaces the word if it is still `before`.
    pub(crate) fn replace(&self, before: Word, after: Word) {
        let _ = self.0.compare_exchange(before.0, after.0, SeqCst, SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn word(generation: u64, until: Until, reason: Rest) -> Word {
        Word::new(generation, Some(Resting { until, reason }), Duration::ZERO)
    }

    fn limited(seconds: u32) -> Word {
        word(0, Until::After(SECOND * seconds), Rest::RateLimited)
    }

    fn any_word() -> impl Strategy<Value = Word> {
        let until = prop_oneof![(0_u32..5).prop_map(|left| Until::After(SECOND * left)), Just(Until::Reset)];
        let reason = prop_oneof![Just(Rest::RateLimited), Just(Rest::Exhausted), Just(Rest::Revoked)];
        let generation = prop_oneof![0_u64..4, Just(LAST_GENERATION)];
        (generation, until, reason, any::<bool>())
            .prop_map(|(generation, until, reason, flag)| word(generation, until, reason).with_disabled(flag))
    }

    /// What orders words: the generation, then the deadline, then the reason.
    fn order(word: Word) -> (u64, Option<Resting>) {
        (word.generation(), word.resting(Duration::ZERO))
    }

    proptest! {
        #[test]
        fn f10_joins_keep_the_later_word_and_own_flag(one in any_word(), other in any_word()) {
            let joined = one.join(other);
            prop_assert_eq!(order(joined), order(one).max(order(other)));
            prop_assert_eq!(joined.is_disabled(), one.is_disabled());
        }

        #[test]
        fn a_word_says_what_it_was_made_of(
            generation in 0..=2 * LAST_GENERATION,
            now in 0_u64..1_000_000_000_000,
            left in 0_u64..1_000_000_000_000,
        ) {
            let (now, left) = (Duration::from_nanos(now), Duration::from_nanos(left));
            let resting = Resting { until: Until::After(left), reason: Rest::Exhausted };
            let word = Word::new(generation, Some(resting), now);
            prop_assert_eq!(word.generation(), generation.min(LAST_GENERATION));
            let longer = word.time_left(now).unwrap_or_default() - left;
            prop_assert!(longer < Duration::from_millis(1), "{longer:?}");
            prop_assert_eq!(word.is_available(), left.is_zero());
        }
    }

    #[test]
    fn a_key_is_available_whatever_its_generation() {
        for generation in [0, 1, LAST_GENERATION] {
            let healthy = Word::new(generation, None, SECOND);
            assert!(healthy.is_available() && !healthy.with_disabled(true).is_available());
            for until in [Until::After(SECOND), Until::Reset] {
                let resting = word(generation, until, Rest::RateLimited);
                assert!(!resting.is_available() && resting.ended().is_available());
                assert_eq!(resting.ended().generation(), generation);
            }
        }
    }

    #[test]
    fn revoked_and_disabled_keys_have_no_deadline() {
        let (revoked, disabled) = (word(3, Until::Reset, Rest::Revoked), limited(5).with_disabled(true));
        assert_eq!([revoked, disabled].map(Word::deadline), [NEVER, NEVER]);
        assert_eq!(disabled.status(Duration::ZERO), Status::Disabled);
        assert_ne!(word(0, Until::After(Duration::MAX), Rest::Revoked).deadline(), NEVER);
    }

    #[test]
    fn a_rest_is_over_at_its_deadline_exactly() {
        let instant = Duration::from_nanos(1);
        assert_eq!(limited(2).time_left(2 * SECOND - instant), Some(instant));
        assert_eq!(limited(2).status(2 * SECOND), Status::Healthy);
        assert!(!limited(2).is_over(millis(2 * SECOND - instant)) && limited(2).is_over(millis(2 * SECOND)));
    }
}
