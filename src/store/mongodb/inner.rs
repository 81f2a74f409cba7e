//! The parts of a store: collections, names, limits and lanes.

use std::sync::Arc;

use ::mongodb::{
    Collection, Database,
    bson::RawDocumentBuf,
    options::{
        Acknowledgment, CollectionOptions, ReadConcern, ReadPreference, SelectionCriteria, WriteConcern,
    },
};

use super::{
    at_rest::AtRest,
    clock::ServerClock,
    error::Failure,
    fields::Fields,
    lane::{Lane, Lanes},
    limits::Limits,
    unsent::Unsent,
};
use crate::{key::KeyId, store::StoreError};

pub(super) type Documents = Collection<RawDocumentBuf>;

pub(super) struct Inner {
    pub(super) database: Database,
    pub(super) keys: Documents,
    pub(super) standby: Option<Documents>,
    pub(super) fields: Fields,
    pub(super) at_rest: AtRest,
    pub(super) limits: Limits,
    pub(super) clock: ServerClock,
    pub(super) unsent: Unsent,
    pub(super) per_key: Lanes,
    pub(super) loads: Lane,
    pub(super) sweeps: Lane,
    pub(super) usage: Lane,
    pub(super) replacements: Lane,
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
    pub(super) async fn about<T, F>(
        self: &Arc<Self>,
        id: &KeyId,
        operation: impl FnOnce(Arc<Self>) -> F,
    ) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Failure>> + Send + 'static,
    {
        let lane = self.per_key.of(id);
        Ok(lane.run(self.limits.operation, |_| operation(self.clone())).await?)
    }
}
