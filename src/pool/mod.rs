//! The keys of one service and the state of each, shared by every clone of a pool.
//!
//! [`KeyPool`] is a façade. The engine is the pool in memory; [`replication`](crate::replication) is between the pool and
//! its store. `key.rs` says what a key is, `snapshot.rs` which keys there are, with indexes over them.
//!
//! # The order of locks
//!
//! No request of a pool without limits takes any of these. Whoever holds one may take those below it.
//!
//! | lock | held while |
//! |---|---|
//! | `Link::turn` | keys are read from the store, or an operator's change is made there, and applied here |
//! | `Link::sharing` | a task exchanges messages about limits; never with the others |
//! | `Link::round` | a round of marks is written; beside `turn`, never with it |
//! | `Engine::editing` | the set of keys is replaced |
//! | the state of a `Source` | what is known of a source is read or changed; with `Engine::editing` or alone |
//! | `Doubts::known` | a refusal is judged, or a key is tried |
//! | `Complaints`, `Link::gone`, `Meter::scopes` | their own map is read or changed; each alone |
//! | `Borrowing::stock`, `Borrowing::news` | a token is taken or added; something is noted for a lender; each alone |
//! | a `KeyLease`'s request, or a `Reservation`'s ticket | the answer, the usage or the end of one request is noted |
//! | `Common::sharing`, then `Limit::learned` | an answer is learned from |
//! | `ScopesInUse::adding`, `Common::newest`, `Common::probing` | a scope is made; the newest snapshot's scope is looked up; a probe is planned; each alone |
//! | `Scopes` | rests of scopes are read or changed |

mod accepted;
mod bitset;
mod borrowing;
mod builder;
mod choose;
mod deadlines;
mod doubts;
mod engine;
#[cfg(all(test, schedules = "loom"))]
mod every_schedule;
mod exchange;
mod explain;
mod explanation;
mod in_flight;
mod insert;
mod kept;
mod key;
mod key_pool;
mod layout;
mod lease;
mod lender;
#[cfg(feature = "metrics")]
mod metrics;
mod no_key;
mod operate;
mod organisation;
mod parked;
#[cfg(all(test, schedules = "shuttle"))]
mod random_schedules;
mod refusals;
mod renewal;
mod scoped;
mod scopes;
mod scopes_in_use;
mod shared;
mod snapshot;
mod source;
mod stats;
mod take_over;
mod ticket;
mod waiting;
mod windows;

pub use self::{
    builder::{BuildError, KeyPoolBuilder},
    explanation::{ExplainedKey, Explanation, PassedOver},
    key_pool::KeyPool,
    no_key::NoKeyAvailable,
    operate::OperateError,
    source::SourceStats,
    stats::{KeyStats, PoolStats, ScopeStats, ScopeTotals},
};
pub(crate) use self::{
    doubts::Trials,
    engine::Engine,
    key::{Key, UsableKey},
    lease::Lease,
    lender::Lender,
    parked::block_on,
    snapshot::Snapshot,
    source::Source,
    take_over::Taken,
    ticket::{Head, Ticket},
};
