//! Keys that change while the program runs: in files, in directories of secrets, in whatever issues them.
//!
//! [`KeyPoolBuilder::source`](crate::KeyPoolBuilder::source) reads a [`KeySource`]. Then a
//! [`RecoveryHandle`](crate::RecoveryHandle) follows it: when the source has changed, the pool takes over what differs, key
//! by key, by its id. Without a handle, the pool keeps the keys that it was built with.
//!
//! | source | changes when |
//! |---|---|
//! | [`KeyFile`] | the file is written, or replaced by another one, as editors and Kubernetes do |
//! | [`KeyDirectory`] | a file in it comes, goes or changes: Docker and Kubernetes mount secrets so, one file each |
//! | [`KeyVariable`] | never by itself |
//! | [`from_fn`] | its [interval](FromFn::interval) has passed, if it has one. It may give a key a [time to live](SourcedKey::expires_in) |
//! | your [`KeySource`] | it says so |
//!
//! ```
//! use std::{fs, time::Duration};
//! use tower_key_rotation::{KeyPool, RecoveryHandle, source::KeyFile};
//!
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let directory = tempfile::tempdir()?;
//! # let path = directory.path().join("keys.txt");
//! # let next = directory.path().join("keys.txt.new");
//! fs::write(&path, "alpha|sk-1\nbeta|sk-2\n")?;
//! let pool = KeyPool::builder().source(KeyFile::new(&path)).await?.build()?;
//! let recovery = RecoveryHandle::spawn(&pool);
//!
//! // beta has another secret, and gamma is new; alpha keeps its rests and its requests in flight
//! fs::write(&next, "alpha|sk-1\nbeta|sk-3\ngamma|sk-4\n")?;
//! fs::rename(&next, &path)?;
//! tokio::time::sleep(Duration::from_secs(5)).await;
//! assert_eq!(pool.stats().healthy, 3);
//! assert_eq!(pool.sources()[0].error, None);
//!
//! // a file that can't be used changes nothing
//! fs::write(&path, "")?;
//! tokio::time::sleep(Duration::from_secs(5)).await;
//! assert_eq!(pool.stats().healthy, 3);
//! assert_eq!(pool.sources()[0].error.as_deref(), Some("the source has no key"));
//! # recovery.shutdown().await?;
//! # Ok(())
//! # }
//! ```
//!
//! # What changes, and what stays
//!
//! - **A key that stays as it was** keeps its rests, its counters and its requests in flight.
//! - **A key with another secret** begins healthy; one with other settings keeps its rests. Requests in flight finish with
//!   the secret that they were sent with.
//! - **A key that is gone** leaves the pool.
//! - **A source that can't be read, or has no key,** changes nothing. That is logged once, until the source can be read or
//!   fails in another way.
//! - **An entry that can't be used** is left out and logged once, as by the builder. If its id is known, and the pool has
//!   that key, the key stays as it is.
//!
//! Each key of a source needs an id. If two sources have the same id, the first one that gave it counts.
//!
//! # Operators, and other programs
//!
//! The pool takes over **changes** of a source, not its contents again and again. So the last change counts, whoever made
//! it:
//!
//! | an operator, or another program in the store | then the source | the pool has |
//! |---|---|---|
//! | inserts a key that is in no source | changes in any way | that key |
//! | removes a key | names it as before | no such key |
//! | removes a key | names it with another secret or other settings | the key of the source |
//! | changes a key's secret | names it as before | the changed key |
//! | changes a key's secret | names it with another secret or other settings | the key of the source |
//! | disables a key, or a response rests it | names it as before | the disabled, resting key |
//! | anything | no longer names it | no such key |
//!
//! With a [store](crate::store), the pool makes these changes there, so all processes get them; a process that finds a
//! change made leaves it at that. While the store fails, the pool tries again. At a start, the source's keys are those of
//! the builder: over a `FileStore`, they are the truth for which keys there are; over any other store, the store's key of
//! the same id takes precedence. A key that left the source while no process ran stays in such a store.
//!
//! A secret with a time to live is different: the store's copy may have expired, so the newest secret of the source counts
//! in any case.
//!
//! # Secrets that expire
//!
//! A source that gives a key a [time to live](SourcedKey::expires_in) is read again after 75 to 90 % of it, once for all
//! requests, and then at growing intervals while that fails. The secret that has not expired serves on meanwhile; once it
//! has expired, it is not sent any more: the key leaves the pool until the source can be read. The key with the new secret
//! goes on with the counters, budgets and rests of the old one, except that it is no longer revoked.
//!
//! A 401 may be the first sign that a secret has changed. With [failover](crate::KeyRotationLayer::failover), the source of
//! the key is read at once, whatever the classifier says of a 401; if the key then has another secret, the 401 counts for
//! nothing, and the request is sent again, within its attempts and the retry budget. All requests share one such read, and
//! there is one in 10 seconds at most. Without failover, the caller gets the 401; if the classifier counts it against the
//! key, the source is read in the background.

mod directory;
mod file;
mod from_fn;
mod key_set;
mod key_source;
mod variable;
mod watched;

pub use self::{
    directory::KeyDirectory,
    file::KeyFile,
    from_fn::{FromFn, from_fn},
    key_set::{KeySet, SourcedKey},
    key_source::{KeySource, SourceError, SourceFuture},
    variable::KeyVariable,
};
pub use crate::pool::SourceStats;
