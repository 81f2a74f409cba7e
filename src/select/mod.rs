//! Which of the keys that have room serves a request.

mod affinity;

pub(crate) use self::affinity::Ring;
