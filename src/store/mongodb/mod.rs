//! Keys in MongoDB, for many processes.

mod at_rest;
mod builder;
mod clock;
mod commands;
#[cfg(feature = "encryption")]
mod data_keys;
mod document;
#[cfg(feature = "encryption")]
mod encrypt;
mod error;
mod fields;
#[cfg(all(fuzzing, feature = "encryption"))]
#[doc(hidden)]
pub mod fuzzing;
mod lane;
mod standby;
mod watch;

use std::{fmt, future::Future, sync::Arc, time::Duration};

use ::mongodb::{
    Collection, Database, IndexModel,
    bson::{Bson, Document, RawDocumentBuf, doc},
    options::{
        Acknowledgment, CollectionOptions, ReadConcern, ReadPreference, ReturnDocument, SelectionCriteria,
        WriteConcern,
    },
};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};

use self::{
    at_rest::AtRest,
    builder::Limits,
    clock::ServerClock,
    commands::Update,
    error::Failure,
    lane::{Lane, Lanes},
};
pub use self::{
    builder::{ConnectError, MongoStoreBuilder},
    fields::Fields,
};
#[cfg(feature = "encryption")]
pub use self::{
    data_keys::{DataKeys, InvalidDataKeys},
    encrypt::Encrypted,
};
use super::{Changed, KeyStore, Loaded, Mark, Recovered, Replaced, StoreError, StoreFuture, UsageBatch};
use crate::key::{KeyId, Secret};

/// So many keys' usage goes to the server at once.
const USAGE_AT_ONCE: usize = 500;

/// So many keys of a load are passed on at once.
const KEYS_AT_ONCE: usize = 500;

/// How long one command may take that is about all keys. A pass has a limit of its own.
const ALL_KEYS_LIMIT: Duration = Duration::from_secs(60);

/// Keys and their state in a collection of MongoDB, shared by all processes that open a pool over it.
///
/// ```no_run
/// use tower_key_rotation::{KeyPool, RecoveryHandle, store::MongoStore};
///
/// # #[tokio::main]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let store = MongoStore::connect("mongodb://localhost:27017").await?;
/// let pool = KeyPool::builder().open(store).await?;
/// let recovery = RecoveryHandle::spawn(&pool);
/// # let _ = recovery;
/// # Ok(())
/// # }
/// ```
///
/// A key that one process saw limited is rested by all: within a second where the deployment has change streams
/// (a replica set, a sharded cluster), elsewhere within the
/// [poll interval](MongoStoreBuilder::poll_interval). That takes a running
/// [`RecoveryHandle`](crate::RecoveryHandle) in each.
///
/// # Time
///
/// Deadlines are reckoned and compared by the server's clock alone. No client's clock has to be right.
///
/// # Documents
///
/// One document a key, in the collection `ohmygpt_keys` of the database `fproxy` unless told
/// [otherwise](MongoStoreBuilder). Other programs may read and write the same documents. Fields that this crate
/// doesn't know stay as they are, and a document that can't be read as a key is left alone, counted in
/// [`PoolStats::unreadable`](crate::PoolStats::unreadable) and logged by its `_id`.
///
/// | field | type | |
/// |---|---|---|
/// | `_id` | string | the key's id |
/// | `apiKey` | string | its secret |
/// | `status` | string | `healthy`; `rate_limited`; `exhausted`; `error`, for revoked; `disabled`. With any other word the key counts as disabled, and the word stays |
/// | `cooldownUntil` | date or null | until when a key rests. A `rate_limited` one without a date gets one, 2 minutes ahead, at the next sweep |
/// | `lastError` | string | what was last said against the key, in a few words of this crate's |
/// | `requestsCount`, `tokensUsed` | int64 | added up; read in any numeric type |
/// | `lastUsedAt` | date | up to a pass earlier or later than the use |
/// | `createdAt`, `updatedAt` | date | |
/// | `resetAt` | date | when a key was reset through this crate: a mark observed before it is dropped |
///
/// Of its own it adds `exhaustedUntil` (a key that this crate found exhausted is back then, as long as it is the
/// same as `cooldownUntil`; one that another program found exhausted is not, whatever date it has), `disabledFrom`,
/// `failedAt`, `replacedBy`, `retiredAt`, `replacedKey` and `usageWriters`.
///
/// # Standby keys
///
/// With a [standby collection](MongoStoreBuilder::standby_collection), a key that is marked as exhausted or
/// revoked is replaced by the oldest standby key that is not `isUsed`: it is inserted as a healthy key with
/// `replacedKey`, under its own `_id`, and the failed key stays out of service, with `retiredAt`, until somebody
/// resets it. Whichever process sees it first does it; several replace a key once, and what one began before it
/// crashed another finishes. Keys that were exhausted or revoked before, by another program or another version,
/// are left as they are.
///
/// | field | type | |
/// |---|---|---|
/// | `_id` | string or ObjectId | the id that the key will have |
/// | `apiKey` | string | its secret |
/// | `isUsed` | bool | anything but true is unused |
/// | `activated`, `usedFor`, `usedAt` | bool, string, date | set with `isUsed` |
/// | `createdAt` | date | the oldest is taken first |
///
/// The secret's field is called as in the keys' documents; the others are called so in any case. A standby key that
/// can't be used (no usable secret, an `_id` or a secret that another key has) is logged, stays `isUsed`, and the
/// next one is taken.
///
/// # Durability
///
/// Writes are acknowledged by a majority, and reads go to the primary and see what a majority has, whatever the
/// client is set to: an election loses no cooldown.
///
/// # Logs
///
/// No key is in them, as long as nobody turns on the driver's feature `tracing-unstable`: it logs, at the level debug,
/// all that is sent and received, keys included.
#[derive(Clone)]
pub struct MongoStore {
    inner: Arc<Inner>,
}

struct Inner {
    database: Database,
    keys: Collection<RawDocumentBuf>,
    standby: Option<Collection<RawDocumentBuf>>,
    fields: Fields,
    at_rest: AtRest,
    limits: Limits,
    per_key: Lanes,
    loads: Lane,
    sweeps: Lane,
    usage: Lane,
    replacements: Lane,
    server_clock: ServerClock,
}

/// A collection as this store uses it: whatever the client is set to, writes are acknowledged by a majority, and
/// reads go to the primary.
fn collection(database: &Database, name: &str, limits: Limits) -> Collection<RawDocumentBuf> {
    let majority = WriteConcern::builder().w(Acknowledgment::Majority).w_timeout(limits.operation).build();
    let options = CollectionOptions::builder()
        .selection_criteria(primary())
        // The one that change streams take, too. What a majority has acknowledged, it shows.
        .read_concern(ReadConcern::majority())
        .write_concern(majority)
        .build();
    database.collection_with_options(name, options)
}

fn primary() -> SelectionCriteria {
    SelectionCriteria::ReadPreference(ReadPreference::Primary)
}

impl MongoStore {
    /// Connects with the usual names and limits.
    ///
    /// # Errors
    ///
    /// Where the URI can't be used, or no server answers within 5 seconds.
    pub async fn connect(uri: impl AsRef<str>) -> Result<Self, ConnectError> {
        Self::builder().connect(uri).await
    }

    /// A store with names, limits or a client of one's own.
    pub fn builder() -> MongoStoreBuilder {
        MongoStoreBuilder::default()
    }

    fn new(inner: Inner) -> Self {
        Self { inner: Arc::new(inner) }
    }

    /// Makes the indexes that sweeps, and the search for a standby key, are quick with: `{ status: 1,
    /// cooldownUntil: 1 }` on the keys, `{ isUsed: 1, createdAt: 1 }` on the standby keys. It does nothing
    /// where they exist.
    ///
    /// With fewer than some thousand keys nobody will notice whether they are there.
    ///
    /// # Errors
    ///
    /// Where MongoDB fails, or takes longer than a minute.
    pub async fn ensure_indexes(&self) -> Result<(), StoreError> {
        let inner = self.inner.clone();
        let make = async move {
            let fields = &inner.fields;
            let index = |keys: Document| IndexModel::builder().keys(keys).build();
            inner.keys.create_index(index(doc! { &fields.status: 1, &fields.cooldown_until: 1 })).await?;
            if let Some(standby) = &inner.standby {
                standby.create_index(index(doc! { "isUsed": 1, "createdAt": 1 })).await?;
            }
            Ok(())
        };
        Ok(Lane::default().run(ALL_KEYS_LIMIT, |_| make).await?)
    }

    /// Something about one key, after whatever is under way about it.
    async fn about<T, F>(
        &self,
        id: &KeyId,
        operation: impl FnOnce(Arc<Inner>, Duration) -> F,
    ) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Failure>> + Send + 'static,
    {
        let inner = self.inner.clone();
        let lane = self.inner.per_key.of(id);
        Ok(lane.run(self.inner.limits.operation, |waited| operation(inner, waited)).await?)
    }

    /// Each part of it has the limit of an operation: it may take as long as there are keys.
    async fn load(&self, only: Option<&[KeyId]>) -> Result<Loaded, StoreError> {
        let (inner, limit) = (self.inner.clone(), self.inner.limits.operation);
        let pipeline = self.inner.fields.load(only);
        let (parts, mut received) = mpsc::channel(2);
        let loading = |_| async move { inner.load(pipeline, parts).await };
        let loading = self.inner.loads.begin(limit, loading).await?;
        let mut loaded = Loaded::default();
        while let Some(part) =
            timeout(limit, received.recv()).await.map_err(|_| Failure::TookTooLong(limit))?
        {
            let Loaded { records, unreadable } = part;
            loaded.records.extend(records);
            loaded.unreadable.extend(unreadable);
        }
        // What is left was true when the server began to answer.
        let answered = lane::ended_within(limit, loading).await?;
        document::pass_time(&mut loaded.records, answered.elapsed());
        Ok(loaded)
    }
}

impl Inner {
    /// Says when the server began to answer. It ends early where nobody takes what it reads.
    async fn load(&self, pipeline: Vec<Document>, parts: mpsc::Sender<Loaded>) -> Result<Instant, Failure> {
        let mut cursor = self.keys.aggregate(pipeline).await?;
        let answered = Instant::now();
        let (mut part, mut is_first) = (Loaded::default(), true);
        while cursor.advance().await? {
            if std::mem::take(&mut is_first)
                && let Ok(said) = cursor.current().get_datetime(document::SERVER_TIME)
            {
                self.server_clock.heard(said, answered);
            }
            match document::decode(cursor.current(), &self.fields, &self.at_rest) {
                Ok(record) => part.records.push(record),
                Err(unreadable) => part.unreadable.push(unreadable),
            }
            if part.records.len() + part.unreadable.len() == KEYS_AT_ONCE
                && parts.send(std::mem::take(&mut part)).await.is_err()
            {
                break;
            }
        }
        let _ = parts.send(part).await;
        Ok(answered)
    }

    /// Whether there was a document to update.
    async fn update_one(&self, Update { filter, pipeline }: Update) -> Result<bool, Failure> {
        Ok(self.keys.update_one(filter, pipeline).await?.matched_count == 1)
    }

    async fn update_many(&self, Update { filter, pipeline }: Update) -> Result<u64, Failure> {
        Ok(self.keys.update_many(filter, pipeline).await?.modified_count)
    }

    async fn insert_key(&self, id: &KeyId, secret: &Secret, replaced: Option<&str>) -> Result<bool, Failure> {
        let stored = self.at_rest.stored(id, secret)?;
        let Update { filter, pipeline } = self.fields.insert(id, &stored, replaced);
        match self.keys.update_one(filter, pipeline).upsert(true).await.map_err(Failure::from) {
            Ok(_) => Ok(true),
            // Unless it is an index of somebody else's that it is a duplicate in.
            Err(failure) if failure.is_duplicate() && self.has(id).await? => Ok(false),
            Err(failure) => Err(failure),
        }
    }

    async fn has(&self, id: &KeyId) -> Result<bool, Failure> {
        let found = self.keys.find_one(doc! { "_id": id.as_str() }).projection(doc! { "_id": 1 }).await?;
        Ok(found.is_some())
    }

    /// A key that has this secret, with its status.
    async fn find_by_secret(&self, secret: &Secret) -> Result<Option<RawDocumentBuf>, Failure> {
        let Fields { api_key, status, .. } = &self.fields;
        if !self.at_rest.encrypts() {
            let found = self.keys.find_one(doc! { api_key: secret.expose() }).projection(doc! { status: 1 });
            return Ok(found.await?);
        }
        let mut keys = self.keys.find(doc! {}).projection(doc! { api_key: 1, status: 1 }).await?;
        while keys.advance().await? {
            let key = keys.current();
            let stored = document::id(key).zip(document::text(key, api_key).ok());
            if stored.is_some_and(|(id, stored)| self.at_rest.secret(&id, stored).as_ref() == Ok(secret)) {
                return Ok(Some(key.to_owned()));
            }
        }
        Ok(None)
    }

    async fn reset(&self, id: &KeyId) -> Result<bool, Failure> {
        let Update { filter, pipeline } = self.fields.reset(id);
        let reset_at = &self.fields.reset_at;
        let reset = self.keys.find_one_and_update(filter, pipeline).return_document(ReturnDocument::After);
        let reset = reset.projection(doc! { reset_at: 1 }).await?;
        // So that a mark which is observed after the reset is not taken for an older one.
        if let Some(at) = reset.as_ref().and_then(|key| key.get_datetime(reset_at).ok()) {
            self.server_clock.heard(at, Instant::now());
        }
        Ok(reset.is_some())
    }

    async fn recover(&self) -> Result<Recovered, Failure> {
        self.update_many(self.fields.date_the_undated()).await?;
        let ids = self.some_expired().await?;
        let count = self.update_many(self.fields.sweep()).await?;
        // Another process may have been quicker with some of them.
        let ids = if ids.len() as u64 == count { ids } else { Vec::new() };
        Ok(Recovered::new(count, ids))
    }

    /// One more than are named, so that it shows where there are more.
    async fn some_expired(&self) -> Result<Vec<KeyId>, Failure> {
        let limit = Recovered::NAMED_AT_MOST as i64 + 1;
        let mut expired =
            self.keys.find(self.fields.expired()).projection(doc! { "_id": 1 }).limit(limit).await?;
        let mut ids = Vec::new();
        while expired.advance().await? {
            ids.extend(document::id(expired.current()));
        }
        Ok(ids)
    }

    async fn add_usage(&self, updates: Vec<Update>, ids: Vec<KeyId>) -> Result<(), Failure> {
        for Refused { index, code } in self.update_each(&self.keys, updates).await?.refused {
            tracing::warn!(key = ?ids.get(index), code, "MongoDB refused to add usage up");
        }
        Ok(())
    }

    /// By a command of our own: the driver has no bulk write for servers older than 8.0.
    async fn update_each(
        &self,
        collection: &Collection<RawDocumentBuf>,
        updates: Vec<Update>,
    ) -> Result<Updated, Failure> {
        if updates.is_empty() {
            return Ok(Updated::default());
        }
        let updates = updates.into_iter().map(|update| doc! { "q": update.filter, "u": update.pipeline });
        let command = doc! {
            "update": collection.name(),
            "updates": updates.collect::<Vec<_>>(),
            "ordered": false,
            "writeConcern": { "w": "majority", "wtimeout": self.limits.operation.as_millis() as i64 },
        };
        let answer = self.database.run_command(command).selection_criteria(primary()).await?;
        let errors = answer.get_array("writeErrors").into_iter().flatten();
        let refused = errors.filter_map(Bson::as_document).map(Refused::read).collect::<Result<_, _>>()?;
        if let Ok(error) = answer.get_document("writeConcernError") {
            let code = error.get_i32("code").unwrap_or_default();
            return Err(Failure::server(code, error.get_str("codeName").unwrap_or_default()));
        }
        #[cfg(feature = "encryption")]
        let modified = answer.get_i32("nModified").unwrap_or_default().max(0).unsigned_abs().into();
        Ok(Updated {
            #[cfg(feature = "encryption")]
            modified,
            refused,
        })
    }
}

/// What became of several updates.
#[derive(Default)]
struct Updated {
    #[cfg(feature = "encryption")]
    modified: u64,
    refused: Vec<Refused>,
}

/// One that the server has something against.
struct Refused {
    index: usize,
    code: i32,
}

impl Refused {
    fn read(error: &Document) -> Result<Self, Failure> {
        let code = error.get_i32("code").unwrap_or_default();
        let failure = Failure::server(code, "");
        match error.get_i32("index").map(usize::try_from) {
            Ok(Ok(index)) if failure.is_about_the_document() => Ok(Self { index, code }),
            _ => Err(failure),
        }
    }
}

impl KeyStore for MongoStore {
    fn load(&self) -> StoreFuture<'_, Loaded> {
        Box::pin(self.load(None))
    }

    fn load_some<'a>(&'a self, ids: &'a [KeyId]) -> StoreFuture<'a, Loaded> {
        Box::pin(self.load(Some(ids)))
    }

    fn watch(&self) -> Option<mpsc::Receiver<Changed>> {
        let (changes, receiver) = mpsc::channel(16);
        tokio::spawn(watch::follow(self.inner.clone(), changes));
        Some(receiver)
    }

    fn write(&self, mark: Mark) -> StoreFuture<'_, ()> {
        Box::pin(async move {
            let id = mark.id.clone();
            let write = |inner: Arc<Inner>, waited: Duration| async move {
                let mark = Mark {
                    age: mark.age.saturating_add(waited),
                    left: mark.left.map(|left| left.saturating_sub(waited)),
                    ..mark
                };
                let stored = inner.at_rest.may_be_stored_as(&mark.id, &mark.secret)?;
                let observed = inner.server_clock.before(mark.age);
                inner.update_one(inner.fields.mark(&mark, stored, observed)).await
            };
            self.about(&id, write).await.map(|_| ())
        })
    }

    fn recover(&self) -> StoreFuture<'_, Recovered> {
        Box::pin(async {
            let inner = self.inner.clone();
            let recover = |_| async move { inner.recover().await };
            Ok(self.inner.sweeps.run(ALL_KEYS_LIMIT, recover).await?)
        })
    }

    fn add_usage<'a>(&'a self, batch: &'a UsageBatch) -> StoreFuture<'a, ()> {
        Box::pin(async move {
            for usage in batch.usage.chunks(USAGE_AT_ONCE) {
                let inner = self.inner.clone();
                let updates = usage.iter().map(|usage| inner.fields.add_usage(batch, usage)).collect();
                let ids = usage.iter().map(|usage| usage.id.clone()).collect();
                let add = |_| async move { inner.add_usage(updates, ids).await };
                self.inner.usage.run(self.inner.limits.operation, add).await?;
            }
            Ok(())
        })
    }

    fn replace_failed(&self) -> StoreFuture<'_, Vec<Replaced>> {
        Box::pin(async {
            let Some(standby) = self.inner.standby.clone() else { return Ok(Vec::new()) };
            let inner = self.inner.clone();
            let replace = |_| standby::replace_failed(inner, standby);
            Ok(self.inner.replacements.run(ALL_KEYS_LIMIT, replace).await?)
        })
    }

    fn insert(&self, id: KeyId, secret: Secret) -> StoreFuture<'_, bool> {
        Box::pin(async move {
            let key = id.clone();
            self.about(&key, |inner, _| async move { inner.insert_key(&id, &secret, None).await }).await
        })
    }

    fn remove<'a>(&'a self, id: &'a KeyId) -> StoreFuture<'a, bool> {
        let key = id.clone();
        Box::pin(self.about(id, |inner, _| async move {
            Ok(inner.keys.delete_one(doc! { "_id": key.as_str() }).await?.deleted_count == 1)
        }))
    }

    fn reset<'a>(&'a self, id: &'a KeyId) -> StoreFuture<'a, bool> {
        let key = id.clone();
        Box::pin(self.about(id, |inner, _| async move { inner.reset(&key).await }))
    }

    fn set_disabled<'a>(&'a self, id: &'a KeyId, disabled: bool) -> StoreFuture<'a, bool> {
        let key = id.clone();
        Box::pin(self.about(id, move |inner, _| async move {
            inner.update_one(inner.fields.set_disabled(&key, disabled)).await
        }))
    }
}

impl fmt::Debug for MongoStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MongoStore")
            .field("keys", &self.inner.keys.namespace().to_string())
            .finish_non_exhaustive()
    }
}
