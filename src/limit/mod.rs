//! What limits a key: whether it rests, why, and for how long.

mod rules;
mod status;
mod word;
mod words;

pub(crate) use self::{
    rules::Cooldowns,
    word::{AtomicWord, NEVER, Word, millis, nanos},
};
pub use self::{
    status::{Rest, Status},
    words::{InvalidScope, Resting, Scope, Until, Words},
};
