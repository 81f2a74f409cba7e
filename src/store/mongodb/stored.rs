//! How a rest stands in a document: a date and a number.

use std::time::Duration;

use ::mongodb::bson::DateTime;

use crate::limit::{Rest, Resting, Until};

/// The date of a key that does not rest.
pub(super) const NEVER: DateTime = DateTime::from_millis(0);

/// The date of a rest that only a reset ends, and the latest date of any: the first day of the year 9999.
pub(super) const FOREVER: DateTime = DateTime::from_millis(253_370_764_800_000);

pub(super) const NO_REASON: i32 = 0;

pub(super) const fn code(reason: Rest) -> i32 {
    match reason {
        Rest::RateLimited => 1,
        Rest::Exhausted => 2,
        Rest::Revoked => 3,
    }
}

/// A rest, with a time that counts from the epoch.
pub(super) fn resting(until_millis: i64, code: i64) -> Option<Resting> {
    let reason = match code {
        ..=0 => return None,
        1 => Rest::RateLimited,
        2 => Rest::Exhausted,
        _ => Rest::Revoked,
    };
    let until = match u64::try_from(until_millis) {
        Err(_) | Ok(0) => return None,
        Ok(_) if until_millis >= FOREVER.timestamp_millis() => Until::Reset,
        Ok(millis) => Until::After(Duration::from_millis(millis)),
    };
    Some(Resting { until, reason })
}
