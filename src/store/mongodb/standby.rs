//! Standby keys take the place of keys that failed.
//!
//! Each step is one atomic change that any process can make, and that making again changes nothing: the plan
//! (the failed key names its standby key), the claim (the standby key names the failed key), the insertion, and
//! the retirement of the failed key. Who finds a replacement half done goes on where it stands, so a crash loses
//! no key; and since the plan comes first and is there once, two processes claim one standby key between them.

use std::sync::Arc;

use ::mongodb::{
    bson::{Bson, Document, RawDocument, RawDocumentBuf, doc},
    options::ReturnDocument,
};

use super::{
    document::{self, shown_id, value, whole_number},
    error::Failure,
    expr::{NOW, cond, eq, literal, path},
    fields::{ERROR, EXHAUSTED, Fields, ours},
    inner::{Documents, Inner},
    words::hash_of,
};
use crate::{
    key::{KeyId, KeySpec, Secret, inject},
    store::{Born, Replaced},
};

/// The most keys that one pass replaces.
const AT_ONCE: i64 = 100;

/// How often another standby key is tried for a failed one within a pass.
const TRIES: usize = 10;

const IS_USED: &str = "isUsed";
const ACTIVATED: &str = "activated";
const USED_FOR: &str = "usedFor";
const USED_AT: &str = "usedAt";
const CREATED_AT: &str = "createdAt";

enum Outcome {
    Replaced(KeyId),
    /// It is healthy again, or gone, or another process did it.
    NothingToDo,
    NoStandbyKey,
}

struct Claimed {
    key: KeySpec,
    /// The server's digest of the secret as it is stored.
    hash: i64,
}

const HASH: &str = "hash";

pub(super) async fn replace_failed(store: Arc<Inner>, standby: Documents) -> Result<Vec<Replaced>, Failure> {
    let replacement = Replacement { store: &store, standby: &standby };
    let mut replaced = Vec::new();
    let mut refused = None;
    for (failed, planned) in replacement.failed_keys().await? {
        match replacement.replace(&failed, planned).await {
            Ok(Outcome::Replaced(by)) => replaced.push(Replaced::new(failed, by)),
            Ok(Outcome::NothingToDo) => {}
            // Those that have a plan have come before.
            Ok(Outcome::NoStandbyKey) => break,
            // What the server has against this one is nothing against the others.
            Err(failure) if failure.is_about_the_document() => _ = refused.get_or_insert(failure),
            Err(failure) => return Err(failure),
        }
    }
    match refused {
        Some(failure) if replaced.is_empty() => Err(failure),
        Some(failure) => {
            tracing::warn!(%failure, "a failed key could not be replaced");
            Ok(replaced)
        }
        None => Ok(replaced),
    }
}

struct Replacement<'a> {
    store: &'a Inner,
    standby: &'a Documents,
}

impl Replacement<'_> {
    /// Those that a mark of this crate says have failed, and that no standby key has replaced.
    fn to_be_replaced(&self) -> Document {
        doc! {
            &self.store.fields.status: { "$in": [ERROR, EXHAUSTED] },
            ours::FAILED_AT: { "$type": "date" },
            ours::RETIRED_AT: { "$not": { "$type": "date" } },
        }
    }

    fn this_one(&self, failed: &KeyId) -> Document {
        let mut filter = self.to_be_replaced();
        filter.insert("_id", document::is_id(failed));
        filter
    }

    fn planned(&self, failed: &KeyId, standby: &Bson) -> Document {
        let mut filter = self.this_one(failed);
        filter.insert(ours::REPLACED_BY, doc! { "$eq": standby });
        filter
    }

    /// Each with the standby key that is planned for it, if there is one; those come first.
    async fn failed_keys(&self) -> Result<Vec<(KeyId, Option<Bson>)>, Failure> {
        let found = self.store.keys.find(self.to_be_replaced()).projection(doc! { ours::REPLACED_BY: 1 });
        let mut found = found.sort(doc! { ours::REPLACED_BY: -1, ours::FAILED_AT: 1 }).limit(AT_ONCE).await?;
        let mut keys = Vec::new();
        while found.advance().await? {
            let key = found.current();
            if let Some(id) = document::id(key) {
                keys.push((id, value(key, ours::REPLACED_BY)));
            }
        }
        Ok(keys)
    }

    async fn replace(&self, failed: &KeyId, mut planned: Option<Bson>) -> Result<Outcome, Failure> {
        for _ in 0..TRIES {
            let standby = match planned.take() {
                Some(standby) => standby,
                None => {
                    let Some(candidate) = self.candidate().await? else { return Ok(Outcome::NoStandbyKey) };
                    let Some(standby) = self.plan(failed, candidate).await? else {
                        return Ok(Outcome::NothingToDo);
                    };
                    standby
                }
            };
            if let Some(claimed) = self.claim(failed, &standby).await?
                && self.insert(failed, &claimed).await?
            {
                return Ok(if self.retire(failed, &standby).await? {
                    Outcome::Replaced(claimed.key.id)
                } else {
                    Outcome::NothingToDo
                });
            }
            self.give_up(failed, &standby).await?;
        }
        Ok(Outcome::NothingToDo)
    }

    /// The oldest standby key that nobody uses.
    async fn candidate(&self) -> Result<Option<Bson>, Failure> {
        let unused = self.standby.find_one(doc! { IS_USED: { "$ne": true } });
        let unused = unused.sort(doc! { CREATED_AT: 1, "_id": 1 }).projection(doc! { "_id": 1 }).await?;
        Ok(unused.as_ref().and_then(|standby| value(standby, "_id")))
    }

    /// The standby key that the failed one is to be replaced by: the candidate, unless there was one before.
    async fn plan(&self, failed: &KeyId, candidate: Bson) -> Result<Option<Bson>, Failure> {
        let plan = doc! { "$ifNull": [path(ours::REPLACED_BY), { "$literal": candidate }] };
        let plan = vec![doc! { "$set": { ours::REPLACED_BY: plan } }];
        let key = self.store.keys.find_one_and_update(self.this_one(failed), plan);
        let key =
            key.return_document(ReturnDocument::After).projection(doc! { ours::REPLACED_BY: 1 }).await?;
        Ok(key.as_ref().and_then(|key| value(key, ours::REPLACED_BY)))
    }

    /// `None` if the standby key is not to be had after all.
    async fn claim(&self, failed: &KeyId, standby: &Bson) -> Result<Option<Claimed>, Failure> {
        let free = doc! { IS_USED: { "$ne": true } };
        let for_this_one = doc! { USED_FOR: failed.as_str() };
        let filter = doc! { "_id": { "$eq": standby }, "$or": [free, for_this_one] };
        let claim = doc! { "$set": {
            IS_USED: true,
            ACTIVATED: true,
            USED_FOR: literal(failed.as_str()),
            USED_AT: cond(eq(path(IS_USED), true), path(USED_AT), NOW),
        } };
        let claimed = self.standby.find_one_and_update(filter, vec![claim]);
        let api_key = &self.store.fields.api_key;
        let claimed = claimed.projection(doc! { api_key: 1, HASH: hash_of(api_key) });
        let Some(claimed) = claimed.return_document(ReturnDocument::After).await? else { return Ok(None) };
        let key = self.key_of(&claimed, standby);
        Ok(key.inspect_err(|reason| warn_unusable(&shown_id(&claimed), reason)).ok())
    }

    fn key_of(&self, claimed: &RawDocument, id: &Bson) -> Result<Claimed, String> {
        let id = key_id(id).ok_or("its _id can't be a key's")?;
        let stored = document::text(claimed, &self.store.fields.api_key)?;
        let secret = self.store.at_rest.secret(&id, stored)?;
        inject::check(secret.expose()).map_err(|reason| reason.to_string())?;
        let hash = whole_number(claimed, HASH).ok_or("the server gave no digest of its secret")?;
        Ok(Claimed { key: KeySpec::new(id, secret), hash })
    }

    /// Whether the key is there now, inserted by this process or another.
    async fn insert(&self, failed: &KeyId, claimed: &Claimed) -> Result<bool, Failure> {
        let key = &claimed.key;
        let fields = &self.store.fields;
        // Twice: if the id is taken, another process may just have inserted the same key.
        for _ in 0..2 {
            let reason = match self.store.find_by_secret(&key.secret, claimed.hash).await? {
                Some(found) if document::id(&found).as_ref() != Some(&key.id) => "another key has its secret",
                Some(found) if matches!(found.get_str(&fields.status), Ok(ERROR | EXHAUSTED)) => {
                    "it has failed itself"
                }
                Some(_) => return Ok(true),
                None if self.store.insert(key, Born::now(), Some(failed.as_str())).await? => return Ok(true),
                None => continue,
            };
            warn_unusable(key.id.as_str(), reason);
            return Ok(false);
        }
        warn_unusable(key.id.as_str(), "another key has its id");
        Ok(false)
    }

    /// Whether this process took the failed key out of service for good.
    async fn retire(&self, failed: &KeyId, standby: &Bson) -> Result<bool, Failure> {
        let retire = self.store.fields.retire(self.planned(failed, standby), Born::now());
        Ok(self.store.keys.update_one(retire.filter, retire.pipeline).await?.modified_count == 1)
    }

    async fn give_up(&self, failed: &KeyId, standby: &Bson) -> Result<(), Failure> {
        let filter = self.planned(failed, standby);
        self.store.keys.update_one(filter, doc! { "$unset": { ours::REPLACED_BY: "" } }).await?;
        Ok(())
    }
}

fn warn_unusable(standby: &str, reason: &str) {
    tracing::warn!(%standby, %reason, "not used as a standby key");
}

/// The key that a standby key's document will be.
#[cfg(feature = "encryption")]
pub(super) fn id(document: &RawDocument) -> Option<KeyId> {
    value(document, "_id").and_then(|id| key_id(&id))
}

/// What the key is called in its new place.
fn key_id(id: &Bson) -> Option<KeyId> {
    match id {
        Bson::String(id) => KeyId::new(id).ok(),
        Bson::ObjectId(id) => KeyId::new(id.to_hex()).ok(),
        _ => None,
    }
}

impl Inner {
    /// A key that has this secret, with its status. The server compares digests: no command carries the secret. An
    /// encrypted secret is another value in each document, so all of them are read.
    async fn find_by_secret(&self, secret: &Secret, hash: i64) -> Result<Option<RawDocumentBuf>, Failure> {
        let Fields { api_key, status, .. } = &self.fields;
        let filter = if self.at_rest.encrypts() {
            doc! {}
        } else {
            doc! { "$expr": eq(hash_of(api_key), hash) }
        };
        let mut keys = self.keys.find(filter).projection(doc! { api_key: 1, status: 1 }).await?;
        while keys.advance().await? {
            let key = keys.current();
            let stored = document::id(key).zip(document::text(key, api_key).ok());
            if stored.is_some_and(|(id, stored)| self.at_rest.secret(&id, stored).as_ref() == Ok(secret)) {
                return Ok(Some(key.to_owned()));
            }
        }
        Ok(None)
    }
}
