//! The parts of a store: collections, names, limits and lanes.

use std::{collections::BTreeMap, sync::Mutex, time::Duration};

use ::mongodb::{
    Collection, Database,
    bson::RawDocumentBuf,
    options::{
        Acknowledgment, CollectionOptions, ReadConcern, ReadPreference, SelectionCriteria, WriteConcern,
    },
};

use super::{
    clock::ServerClock,
    error::Failure,
    fields::Fields,
    lane::{Lane, Lanes},
};
use crate::{
    key::KeyId,
    store::{StoreFuture, Usage, encryption::AtRest},
};

/// The limit of one command about all keys. A recovery pass has a limit of its own.
pub(super) const ALL_KEYS_LIMIT: Duration = Duration::from_secs(60);

/// How long operations may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) connect: Duration,
    pub(super) operation: Duration,
    pub(super) poll: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        let seconds = Duration::from_secs(5);
        Self { connect: seconds, operation: seconds, poll: seconds }
    }
}

pub(super) type Documents = Collection<RawDocumentBuf>;

pub(super) struct Inner {
    pub(super) database: Database,
    pub(super) keys: Documents,
    pub(super) standby: Option<Documents>,
    pub(super) processes: Documents,
    pub(super) fields: Fields,
    pub(super) at_rest: AtRest,
    pub(super) limits: Limits,
    pub(super) clock: ServerClock,
    /// Usage that certainly did not reach the server: the next batch takes it along.
    pub(super) unsent: Mutex<BTreeMap<KeyId, Usage>>,
    pub(super) per_key: Lanes,
    pub(super) loads: Lane,
    pub(super) sweeps: Lane,
    pub(super) usage: Lane,
    pub(super) replacements: Lane,
    pub(super) messages: Lane,
}

/// A collection as this store uses it: whatever the client is set to, writes are acknowledged by a majority, and
/// reads go to the primary.
pub(super) fn collection(database: &Database, name: &str, limits: Limits) -> Documents {
    let majority = WriteConcern::builder().w(Acknowledgment::Majority).w_timeout(limits.operation).build();
    let options = CollectionOptions::builder()
        .selection_criteria(primary())
        // Change streams take the same. It shows what a majority has acknowledged.
        .read_concern(ReadConcern::majority())
        .write_concern(majority)
        .build();
    database.collection_with_options(name, options)
}

pub(super) fn primary() -> SelectionCriteria {
    SelectionCriteria::ReadPreference(ReadPreference::Primary)
}

impl Inner {
    /// Runs an operation about one key, after any other one about it.
    pub(super) fn about<'a, T: Send + 'static>(
        &'a self,
        id: &KeyId,
        operation: impl Future<Output = Result<T, Failure>> + Send + 'static,
    ) -> StoreFuture<'a, T> {
        let lane = self.per_key.of(id);
        Box::pin(async { Ok(lane.run(self.limits.operation, operation).await?) })
    }
}
