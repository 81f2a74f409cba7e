//! The store: each method of the trait as commands.

use std::{fmt, sync::Arc};

use ::mongodb::{
    IndexModel,
    bson::{Document, doc},
    options::{IndexOptions, ReturnDocument},
};
use tokio::{sync::mpsc, time::Instant};

use super::{
    commands::{Called, Update},
    document,
    error::Failure,
    fields::ours,
    inner::{ALL_KEYS_LIMIT, Inner},
    lane::Lane,
    load, standby, usage, watch,
};
use crate::{
    key::{KeyId, KeySpec},
    store::{
        Born, Change, Heard, KeyStore, Loaded, Mark, Operation, Recovered, Replaced, Standing, StoreError,
        StoreFuture, Usage,
    },
};

/// Keys and their state in a collection of MongoDB, shared by all processes that open a pool over it.
///
/// ```no_run
/// use tower_key_rotation::{KeyPool, RecoveryHandle, store::mongodb::MongoStore};
///
/// # #[tokio::main]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let store = MongoStore::connect("mongodb://localhost:27017/gateway").await?;
/// let pool = KeyPool::builder().open(store).await?;
/// let recovery = RecoveryHandle::spawn(&pool);
/// # let _ = recovery;
/// # Ok(())
/// # }
/// ```
///
/// When one process sees that a key is limited, all processes rest it: within a second if the deployment has change
/// streams (a replica set, a sharded cluster), otherwise within the
/// [poll interval](crate::store::mongodb::MongoStoreBuilder::poll_interval). Each process needs a running
/// [`RecoveryHandle`](crate::RecoveryHandle) for that.
///
/// # Time
///
/// Deadlines are dates of the server. No client's clock has to be right, and a command that is held up on its way
/// makes no deadline later.
///
/// # Documents
///
/// Each key is one document of the collection `keys`, in the database that the URI names;
/// [`MongoStoreBuilder`](crate::store::mongodb::MongoStoreBuilder) takes other names. Other programs may read and write the same documents. Fields that this
/// crate does not know stay as they are. A document that cannot be read as a key is left alone, counted in
/// [`PoolStats::unreadable`](crate::PoolStats::unreadable), and logged by its `_id`.
///
/// | field | type | |
/// |---|---|---|
/// | `_id` | string or ObjectId | the key's id; of an ObjectId, its hexadecimal digits |
/// | `apiKey` | string | its secret |
/// | `status` | string | `healthy`; `rate_limited`; `exhausted`; `error`, for revoked; `disabled`. With any other status the key counts as disabled, and the status stays |
/// | `cooldownUntil` | date or null | when the key's rest ends |
/// | `lastError` | string | the last failure, or that scopes rest, in a few words of this crate's |
/// | `requestsCount`, `tokensUsed` | number | usage, added up; the usage of the last moments before a crash or an outage may be missing |
/// | `lastUsedAt` | date | when usage was last added, to ten seconds |
/// | `createdAt`, `updatedAt` | date | |
///
/// ## What other programs see
///
/// `status` and `cooldownUntil` speak of the **whole key**. A key of which only some scopes rest (a model, a route) is
/// `healthy`, because it is used for everything else. **So `healthy` does not mean that a key serves every request.** A
/// program that knows nothing of scopes sees this in two fields:
///
/// - `limits` is there while scopes rest: a list of `{ s, u, r }`, that is scope, end, reason (1 rate limited, 2 exhausted,
///   3 revoked). `(none)` stands for requests without a scope. The rest of a whole quota group is in the document of the
///   member that met it. There are 64 entries at most, those that end last. A sweep removes entries that have ended, every
///   30 seconds, and with the last one the field.
/// - `lastError` says `rests in 2 of its scopes, see limits`, and is empty again with the last rest.
///
/// ```text
/// { status: "healthy", limits: { $exists: false } }   // serves every request
/// { "limits.s": "gemini-2.5-pro" }                    // rests for this model
/// ```
///
/// ## What other programs may do
///
/// | to | write |
/// |---|---|
/// | rest a key | `status: "rate_limited"` and a `cooldownUntil`; without a date the key rests for 2 minutes |
/// | take a key out until somebody resets it | `status: "error"`, or `status: "exhausted"`, with whatever date |
/// | reset a key | `status: "healthy"`: this ends all rests, those of scopes included, whatever older marks are still on their way. A key that is `healthy` already is not reset by that; see the next row |
/// | reset a key of which only scopes rest | unset `limits` and `born` |
/// | disable a key | `status: "disabled"`, or a status of your own; `status: "healthy"` ends that, and resets the key |
/// | give a key another secret | `apiKey`: a new key, which rests for nothing but what `status` and `cooldownUntil` say |
/// | add or remove a key | insert a document with `_id`, `apiKey` and `status`, or delete it |
/// | describe a key | `spec`: `{ group, tier, weight, maxInFlight, endpoint }`, each of them optional |
///
/// A shorter `cooldownUntil` than before counts as a reset, too. Pools see all of that within a second, or within the
/// poll interval; single fields of `spec` that are written by `spec.tier` and the like, at the next reload.
///
/// After you restore a **backup**, unset `born` in all documents. Otherwise running pools know of later resets
/// than the backup, and go by what they know.
///
/// ## Fields of this crate
///
/// Other programs have no need of these, and leave them alone but for the cases above: `rest` (`{ g, u, r }`: how often
/// the key was reset, when its rest ends, and why), `born` (which key object the document is), `limits`, `secretHash`
/// (a digest by the server, which tells that another program changed the secret), `words` (all of that as one text, for
/// change streams), `failedAt`, `replacedBy`, `retiredAt` and `replacedKey`.
///
/// Documents of earlier versions get these fields when they are first loaded, and lose `exhaustedUntil`,
/// `disabledFrom`, `resetAt` and `usageWriters`.
///
/// # Standby keys
///
/// With a [standby collection](crate::store::mongodb::MongoStoreBuilder::standby_collection), a key that a response marks as exhausted or
/// revoked is replaced by the oldest standby key that is not `isUsed`. The standby key is inserted as a healthy key with
/// `replacedKey`, under its own `_id`, and the failed key stays out of service, with `retiredAt`, until somebody resets
/// it. Any process may do it, and several that try replace a key once. If one crashes half-way, another finishes. Keys
/// that another program found exhausted or revoked are left as they are.
///
/// | field | type | |
/// |---|---|---|
/// | `_id` | string or ObjectId | the id that the key will have |
/// | `apiKey` | string | its secret |
/// | `isUsed` | bool | anything but true is unused |
/// | `activated`, `usedFor`, `usedAt` | bool, string, date | set with `isUsed` |
/// | `createdAt` | date | the oldest is taken first |
///
/// The secret's field has the same name as in the keys' documents; the other names are fixed. A standby key that
/// cannot be used (no usable secret, an `_id` or a secret that another key has) is logged, stays `isUsed`, and the next
/// one is taken.
///
/// Standby keys are not [tiers](crate::KeySpec::tier):
///
/// | | a key of a higher tier | a standby key |
/// |---|---|---|
/// | use it for | more load than the first keys take | keys that are lost |
/// | serves | while no key of a lower tier has room, for a moment or for a day | from the moment on in which a key is exhausted or revoked, for good |
/// | until then | is a key of the pool: its limits are learned, and it shows in the statistics | is in no pool; nobody needs to pay for it yet |
/// | needs | any pool, with or without a store | `MongoStore` |
///
/// # Processes that share limits
///
/// Pools that [learn limits](crate::KeyPoolBuilder::paced) share them through one more collection, `keys_processes` by
/// default: one document of some hundred bytes for each process, `{ _id, at, body }`, written once a second and read by
/// all others, while requests come. It holds no secret, no id of a key and no name of a scope. Documents of processes that
/// have ended are deleted after a minute. A user that may not write there only loses the sharing.
///
/// # Durability
///
/// Writes are acknowledged by a majority, and reads go to the primary and see what a majority has, whatever the
/// client is set to: an election loses no cooldown.
///
/// # Logs
///
/// MongoDB logs slow commands, and may profile all of them. No command but the insertion of a key carries a secret. This
/// crate's own logs hold none either, unless somebody turns on the driver's feature `tracing-unstable`: it logs, at
/// the level debug, all that is sent and received, secrets included.
///
/// # Versions
///
/// Tested with MongoDB 6.0. The server has to know `$toHashedIndexKey` and `$sortArray`.
#[derive(Clone)]
pub struct MongoStore {
    pub(super) inner: Arc<Inner>,
}

impl MongoStore {
    /// Creates the indexes that make sweeps, and the search for a standby key, quick: `{ status: 1,
    /// cooldownUntil: 1 }` and `{ "limits.u": 1 }` on the keys, `{ isUsed: 1, createdAt: 1 }` on the standby keys. Existing
    /// ones stay.
    ///
    /// Below some thousand keys they make no difference.
    ///
    /// # Errors
    ///
    /// If MongoDB fails, or takes longer than a minute.
    pub async fn ensure_indexes(&self) -> Result<(), StoreError> {
        let inner = self.inner.clone();
        let make = async move {
            let fields = &inner.fields;
            let index = |keys: Document| IndexModel::builder().keys(keys).build();
            inner.keys.create_index(index(doc! { &fields.status: 1, &fields.cooldown_until: 1 })).await?;
            let of_scopes = IndexModel::builder().keys(doc! { format!("{}.u", ours::LIMITS): 1 });
            let sparse = IndexOptions::builder().sparse(true).build();
            inner.keys.create_index(of_scopes.options(sparse).build()).await?;
            if let Some(standby) = &inner.standby {
                standby.create_index(index(doc! { "isUsed": 1, "createdAt": 1 })).await?;
            }
            Ok(())
        };
        Ok(Lane::default().run(ALL_KEYS_LIMIT, make).await?)
    }
}

impl Inner {
    async fn merge(self: Arc<Self>, mark: Mark, called: Instant) -> Result<Option<Standing>, Failure> {
        let merge = |at| self.update_one(self.fields.merge(&mark, Called { at, waited: called.elapsed() }));
        let (standing, clock_was_ahead) = merge(self.clock.latest(called)).await?;
        if !clock_was_ahead {
            return Ok(standing);
        }
        // The date may be too early. Joining twice changes nothing that joining once does not.
        Ok(merge(None).await?.0)
    }

    async fn operate(self: Arc<Self>, id: KeyId, operation: Operation) -> Result<Option<Standing>, Failure> {
        let (fields, born) = (&self.fields, Born::now());
        let update = match operation {
            Operation::Insert(spec) => {
                let inserted = self.insert(&spec, born, None).await?;
                return Ok(inserted.then(|| Standing::new(born, Default::default(), false)));
            }
            Operation::Remove => return self.remove(&id).await,
            Operation::Reset(scope) => fields.reset(&id, scope.as_ref(), born),
            Operation::Disable => fields.disable(&id, born),
            Operation::Enable => fields.enable(&id, born),
        };
        Ok(self.update_one(update).await?.0)
    }

    /// Returns how the key stands then, and whether the server's clock is ahead of what it could be.
    async fn update_one(&self, update: Update) -> Result<(Option<Standing>, bool), Failure> {
        let sent = Instant::now();
        let update = self.keys.find_one_and_update(update.filter, update.pipeline);
        let update = update.return_document(ReturnDocument::After).projection(self.fields.standing());
        let Some(key) = update.await? else { return Ok((None, false)) };
        let is_ahead = self.heard(&key, sent);
        Ok((self.standing_now(&key), is_ahead))
    }

    /// Whether the key was inserted; `false` if there is one of that id.
    pub(super) async fn insert(
        &self,
        spec: &KeySpec,
        born: Born,
        replaced: Option<&str>,
    ) -> Result<bool, Failure> {
        // To the server, an ObjectId is another `_id`.
        if document::object_id(&spec.id).is_some() && self.has(&spec.id).await? {
            return Ok(false);
        }
        let stored = self.at_rest.stored(&spec.id, &spec.secret)?;
        let Update { filter, pipeline } = self.fields.insert(spec, &stored, born, replaced);
        match self.keys.update_one(filter, pipeline).upsert(true).await.map_err(Failure::from) {
            Ok(_) => Ok(true),
            // A unique index of another program's may be what refuses it.
            Err(failure) if failure.is_duplicate() && self.has(&spec.id).await? => Ok(false),
            Err(failure) => Err(failure),
        }
    }

    async fn has(&self, id: &KeyId) -> Result<bool, Failure> {
        let found =
            self.keys.find_one(doc! { "_id": document::is_id(id) }).projection(doc! { "_id": 1 }).await?;
        Ok(found.is_some())
    }

    async fn remove(&self, id: &KeyId) -> Result<Option<Standing>, Failure> {
        let removed = self.keys.find_one_and_delete(doc! { "_id": document::is_id(id) });
        let Some(key) = removed.projection(self.fields.standing()).await? else { return Ok(None) };
        Ok(Some(self.standing_now(&key).unwrap_or_else(Standing::healthy)))
    }

    async fn sweep(self: Arc<Self>) -> Result<Recovered, Failure> {
        self.update_many(self.fields.date_the_undated(Born::now())).await?;
        let mut ids = self.some_of(self.fields.expired()).await?;
        let mut count = self.update_many(self.fields.sweep(self.fields.expired(), Born::now())).await?;
        if let Some(now) = self.clock.latest(Instant::now()) {
            let expired = self.fields.expired_in_scopes(now);
            let in_scopes = self.some_of(expired.clone()).await?;
            if !in_scopes.is_empty() {
                count += self.update_many(self.fields.sweep(expired, Born::now())).await?;
                ids.extend(in_scopes);
            }
        }
        // Another process may have been quicker with some of them.
        let ids = if ids.len() as u64 == count { ids } else { Vec::new() };
        Ok(Recovered::new(count, ids))
    }

    /// One more than are named, which tells that there are more.
    async fn some_of(&self, expired: Document) -> Result<Vec<KeyId>, Failure> {
        let limit = Recovered::NAMED_AT_MOST as i64 + 1;
        let mut expired = self.keys.find(expired).projection(doc! { "_id": 1 }).limit(limit).await?;
        let mut ids = Vec::new();
        while expired.advance().await? {
            ids.extend(document::id(expired.current()));
        }
        Ok(ids)
    }
}

impl KeyStore for MongoStore {
    fn load<'a>(&'a self, only: Option<&'a [KeyId]>) -> StoreFuture<'a, Loaded> {
        Box::pin(async move { Ok(load::load(&self.inner, only).await?) })
    }

    fn merge(&self, mark: Mark) -> StoreFuture<'_, Option<Standing>> {
        let id = mark.id.clone();
        self.inner.about(&id, self.inner.clone().merge(mark, Instant::now()))
    }

    fn operate(&self, id: KeyId, operation: Operation) -> StoreFuture<'_, Option<Standing>> {
        self.inner.about(&id.clone(), self.inner.clone().operate(id, operation))
    }

    fn sweep(&self) -> StoreFuture<'_, Recovered> {
        let sweep = self.inner.clone().sweep();
        Box::pin(async { Ok(self.inner.sweeps.run(ALL_KEYS_LIMIT, sweep).await?) })
    }

    fn changes(&self) -> Option<mpsc::Receiver<Change>> {
        let (changes, receiver) = mpsc::channel(16);
        tokio::spawn(watch::follow(self.inner.clone(), changes));
        Some(receiver)
    }

    fn add_usage(&self, usage: Vec<Usage>) -> StoreFuture<'_, ()> {
        Box::pin(async move { Ok(usage::add(&self.inner, usage).await?) })
    }

    fn replace_failed(&self) -> StoreFuture<'_, Vec<Replaced>> {
        Box::pin(async {
            let Some(standby) = self.inner.standby.clone() else { return Ok(Vec::new()) };
            let replace = standby::replace_failed(self.inner.clone(), standby);
            Ok(self.inner.replacements.run(ALL_KEYS_LIMIT, replace).await?)
        })
    }

    fn messages(&self) -> StoreFuture<'_, Option<Vec<Heard>>> {
        let messages = self.inner.clone().messages();
        Box::pin(async { Ok(Some(self.inner.messages.run(self.inner.limits.operation, messages).await?)) })
    }

    fn publish(&self, process: u64, body: Vec<u8>) -> StoreFuture<'_, ()> {
        let publish = self.inner.clone().publish(process, body);
        Box::pin(async { Ok(self.inner.messages.run(self.inner.limits.operation, publish).await?) })
    }
}

impl fmt::Debug for MongoStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MongoStore")
            .field("keys", &self.inner.keys.namespace().to_string())
            .finish_non_exhaustive()
    }
}
