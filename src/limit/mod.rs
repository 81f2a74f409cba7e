//! What limits a key: whether it rests, why, and for how long.

mod budget;
mod cap;
mod civil;
mod estimate;
#[cfg(all(test, schedules = "loom"))]
mod every_schedule;
mod found;
mod kept;
mod known;
mod left;
mod lent;
mod limit_of_key;
mod quota;
mod rules;
mod sharing;
mod standing;
mod status;
mod taken;
mod traits;
mod word;
mod words;

pub(crate) use self::{
    cap::Cap,
    civil::{Civil, InvalidReset},
    kept::KeptWindow,
    known::Known,
    left::{Kind, Left, Remaining},
    limit_of_key::Limit,
    rules::Cooldowns,
    sharing::{Alike, Sharing},
    standing::Closed,
    taken::{Answered, Taken},
    traits::Named,
    word::{AtomicWord, NEVER, Word, millis, nanos},
};
pub use self::{
    quota::Quota,
    standing::{BudgetStats, KnownBy, Unit},
    status::{Rest, RestCause, Status},
    traits::Traits,
    words::{InvalidScope, Resting, Scope, Until, Words},
};
