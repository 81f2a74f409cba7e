//! What limits a key: whether it rests, why, and for how long.

mod rules;
mod status;
mod word;

pub use self::status::{Rest, Status};
pub(crate) use self::{
    rules::Cooldowns,
    word::{AtomicState, NEVER, State, nanos},
};
