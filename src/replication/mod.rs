//! Between a pool and its store: what is loaded, and what is written.
//!
//! Pool and store agree by joining words, so nothing here depends on order: a load may be older than a mark, a write may
//! arrive twice, late, or after a reset.

mod complaints;
mod follow;
mod limits;
mod link;
mod loader;
mod log;
mod quotas;
mod recovery;
mod seeds;
mod sources;
mod usage;
mod writer;

pub use self::recovery::{NotWritten, PassError, RecoveryConfig, RecoveryHandle, Report};
pub(crate) use self::{link::Link, log::Chain};
