//! The state of one key, in one atomic word.
//!
//! Zero is healthy. Otherwise the word says until when the key is not used, and why; the highest bit says
//! that an operator disabled it, whatever else holds. Deadlines compare as numbers do.

use std::time::Duration;

use super::status::{Rest, Status};
use crate::sync::atomic::{AtomicU64, Ordering::SeqCst};

/// The deadline of what does not come back by itself.
pub(crate) const NEVER: u64 = u64::MAX;

const DISABLED: u64 = 1 << 63;
const REST_BITS: u32 = 2;
/// 2^61 nanoseconds are 73 years.
const FOREVER: u64 = (DISABLED >> REST_BITS) - 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct State(u64);

impl State {
    pub(crate) const HEALTHY: Self = Self(0);

    /// At rest until `until`, or until somebody resets the key.
    pub(crate) fn resting(rest: Rest, until: Option<Duration>) -> Self {
        let until = until.map_or(FOREVER, |until| nanos(until).clamp(1, FOREVER - 1));
        Self(until << REST_BITS | rest as u64)
    }

    pub(crate) fn disabled(self, disabled: bool) -> Self {
        Self(if disabled { self.0 | DISABLED } else { self.0 & !DISABLED })
    }

    pub(crate) fn is_disabled(self) -> bool {
        self.0 & DISABLED != 0
    }

    fn until(self) -> u64 {
        (self.0 & !DISABLED) >> REST_BITS
    }

    /// When the key is due back, for a key that comes back by itself.
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

    /// This state and another, whichever ends later. An operator's word stands either way.
    pub(crate) fn later(self, other: Self) -> Self {
        let longest = if other.until() > self.until() { other } else { self };
        longest.disabled(self.is_disabled())
    }

    /// By how many nanoseconds this state ends before `other` does.
    pub(crate) fn earlier_by(self, other: Self) -> u64 {
        other.until().saturating_sub(self.until())
    }

    /// Why the key rests and how much of that is left; `None` for a key that doesn't.
    pub(crate) fn rest(self, now: u64) -> Option<(Rest, Option<Duration>)> {
        let rest = match self.0 & ((1 << REST_BITS) - 1) {
            0 => Rest::RateLimited,
            1 => Rest::Exhausted,
            _ => Rest::Revoked,
        };
        match self.until() {
            FOREVER => Some((rest, None)),
            until if until > now => Some((rest, Some(Duration::from_nanos(until - now)))),
            _ => None,
        }
    }

    pub(crate) fn status(self, now: u64) -> Status {
        if self.is_disabled() {
            return Status::Disabled;
        }
        self.rest(now).map_or(Status::Healthy, |(rest, _)| rest.into())
    }
}

/// Nanoseconds, as the pool's atomics hold them; 584 years at most.
#[inline]
pub(crate) fn nanos(duration: Duration) -> u64 {
    duration.as_secs().saturating_mul(1_000_000_000).saturating_add(duration.subsec_nanos().into())
}

#[derive(Debug, Default)]
pub(crate) struct AtomicState(AtomicU64);

impl AtomicState {
    pub(crate) fn new(state: State) -> Self {
        Self(AtomicU64::new(state.0))
    }

    #[inline]
    pub(crate) fn load(&self) -> State {
        State(self.0.load(SeqCst))
    }

    /// Has it last until `other` ends, if that is later, and returns what it is then; of two that end together the graver
    /// one stays. Neither may be disabled. Also where it changes nothing, whoever does it afterwards sees what was done
    /// before.
    pub(crate) fn extend(&self, other: State) -> State {
        State(self.0.fetch_max(other.0, SeqCst).max(other.0))
    }

    /// Replaces the state by what `next` makes of it, and returns the one before, where `next` makes
    /// another one.
    pub(crate) fn update(&self, next: impl Fn(State) -> State) -> Option<State> {
        self.0
            .fetch_update(SeqCst, SeqCst, |word| Some(next(State(word)).0).filter(|next| *next != word))
            .ok()
            .map(State)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn limited(seconds: u32) -> State {
        State::resting(Rest::RateLimited, Some(SECOND * seconds))
    }

    #[test]
    fn a_later_deadline_replaces_an_earlier_one_and_never_the_other_way() {
        assert_eq!(limited(1).later(limited(2)), limited(2));
        assert_eq!(limited(2).later(limited(1)), limited(2));
        assert_eq!(State::HEALTHY.later(limited(1)), limited(1));
    }

    #[test]
    fn of_two_rests_that_end_together_the_first_one_stays() {
        let exhausted = State::resting(Rest::Exhausted, Some(SECOND));
        assert_eq!(limited(1).later(exhausted), limited(1));
        assert_eq!(exhausted.later(limited(1)), exhausted);
    }

    #[test]
    fn a_revoked_key_stays_revoked_whatever_is_marked_later() {
        let revoked = State::resting(Rest::Revoked, None);
        assert_eq!(revoked.later(limited(u32::MAX)), revoked);
        assert_eq!(revoked.deadline(), NEVER);
    }

    #[test]
    fn a_disabled_key_keeps_its_cooldown_and_is_not_due_back_by_itself() {
        let disabled = limited(5).disabled(true);
        assert_eq!(disabled.status(0), Status::Disabled);
        assert_eq!(disabled.deadline(), NEVER);
        assert_eq!(disabled.disabled(false), limited(5));
        assert!(disabled.later(limited(9)).is_disabled());
        assert_eq!(disabled.disabled(true), disabled);
    }

    #[test]
    fn a_rest_is_over_at_its_deadline_exactly() {
        let state = limited(2);
        let end = nanos(SECOND * 2);
        assert_eq!(state.rest(end - 1), Some((Rest::RateLimited, Some(Duration::from_nanos(1)))));
        assert_eq!(state.status(end), Status::Healthy);
        assert!(!state.is_over(end - 1) && state.is_over(end));
    }

    #[test]
    fn an_endless_cooldown_does_not_overflow() {
        let state = State::resting(Rest::Exhausted, Some(Duration::MAX));
        assert_eq!(state.status(0), Status::Exhausted);
        assert_ne!(state, State::resting(Rest::Exhausted, None));
    }
}
