//! Which of the keys that have room serves a request.

mod affinity;
mod turns;

pub(crate) use self::{
    affinity::{CANDIDATES, Preferences},
    turns::round_of,
};
