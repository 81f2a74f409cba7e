//! Encrypts documents in place.

use std::sync::Arc;

use ::mongodb::bson::{Bson, RawDocument, RawDocumentBuf, doc};
use tokio::sync::mpsc;

use super::{
    bulk::AT_ONCE,
    commands::Update,
    document::{self, shown_id, whole_number},
    error::Failure,
    expr::{cond, eq, literal, path},
    fields::{Fields, ours},
    inner::{Documents, Inner},
    lane::Lane,
    standby,
    store::MongoStore,
    words::hash_of,
};
use crate::{
    key::KeyId,
    store::{StoreError, Unreadable},
};

/// The server's digest of the secret, which tells whether it is still the one that was read.
const HASH: &str = "hash";

/// The outcome of [`MongoStore::encrypt_documents`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Encrypted {
    /// So many documents were encrypted, for the first time or with another data key than before.
    pub encrypted: u64,
    /// So many were encrypted with the current data key before.
    pub already: u64,
    /// So many were changed by somebody else meanwhile: it takes another run to know what they hold.
    pub changed: u64,
    /// These were left as they are: nothing that can be a key's secret was found in them, or it can't be decrypted.
    pub left: Vec<Unreadable>,
}

impl Encrypted {
    fn add(&mut self, other: Self) {
        self.encrypted += other.encrypted;
        self.already += other.already;
        self.changed += other.changed;
        self.left.extend(other.left);
    }
}

impl MongoStore {
    /// Encrypts, in keys and standby keys alike, every secret that is not encrypted with the current
    /// [data key](super::DataKeys) yet: those that other programs wrote as they are, and those that an older data
    /// key encrypted.
    ///
    /// Each document is changed by one atomic update, if it still holds what was read. So processes may go on
    /// meanwhile, as long as all of them have the data keys; and where it is stopped half-way, the next run does the
    /// rest. It does not reach what the database keeps of the past: backups, the oplog, logs. A secret that was in
    /// them is as safe as they are.
    ///
    /// # Errors
    ///
    /// Where the store has no data keys, or MongoDB fails, or takes longer than the limit of an operation for one
    /// part of it. What was encrypted by then stays so.
    pub async fn encrypt_documents(&self) -> Result<Encrypted, StoreError> {
        if !self.inner.at_rest.encrypts() {
            return Err(Failure::NoDataKeys.into());
        }
        let mut total = self.encrypt_all_of(&self.inner.keys, document::id).await?;
        if let Some(standby) = &self.inner.standby {
            total.add(self.encrypt_all_of(standby, standby::id).await?);
        }
        Ok(total)
    }

    async fn encrypt_all_of(&self, collection: &Documents, id_of: IdOf) -> Result<Encrypted, StoreError> {
        let work = |parts| encrypt(self.inner.clone(), collection.clone(), id_of, parts);
        let mut total = Encrypted::default();
        let limit = self.inner.limits.operation;
        Lane::default().run_in_parts(limit, work, |part| total.add(part)).await?;
        Ok(total)
    }
}

/// The key of a document, in a form that depends on the collection.
type IdOf = fn(&RawDocument) -> Option<KeyId>;

async fn encrypt(
    store: Arc<Inner>,
    collection: Documents,
    id_of: IdOf,
    parts: mpsc::Sender<Encrypted>,
) -> Result<(), Failure> {
    let api_key = &store.fields.api_key;
    let projection = doc! { api_key: 1, HASH: hash_of(api_key) };
    let mut documents = collection.find(doc! {}).projection(projection).await?;
    let mut read = Vec::new();
    while documents.advance().await? {
        read.push(documents.current().to_owned());
        if read.len() == AT_ONCE {
            let part = store.encrypt_some(&collection, id_of, std::mem::take(&mut read)).await?;
            parts.send(part).await.map_err(|_| Failure::BrokenOff)?;
        }
    }
    let part = store.encrypt_some(&collection, id_of, read).await?;
    parts.send(part).await.map_err(|_| Failure::BrokenOff)
}

impl Inner {
    async fn encrypt_some(
        &self,
        collection: &Documents,
        id_of: IdOf,
        documents: Vec<RawDocumentBuf>,
    ) -> Result<Encrypted, Failure> {
        let mut part = Encrypted::default();
        let (mut updates, mut shown) = (Vec::new(), Vec::new());
        for document in &documents {
            match self.encryption_of(document, id_of) {
                Ok(None) => part.already += 1,
                Ok(Some(update)) => {
                    updates.push(update.statement());
                    shown.push(shown_id(document));
                }
                Err(reason) => part.left.push(Unreadable::new(shown_id(document), reason)),
            }
        }
        let written = self.update_each(collection, updates).await?.if_only_documents_refuse()?;
        part.encrypted = written.modified;
        let refused = written.refused.iter().map(|refused| (&shown[refused.index], refused.code));
        part.left.extend(refused.map(|(id, code)| {
            Unreadable::new(id, format!("MongoDB refused to change it, with code {code}"))
        }));
        part.changed = (shown.len() - written.refused.len()) as u64 - part.encrypted;
        Ok(part)
    }

    /// None where it is encrypted with the current data key.
    fn encryption_of(&self, document: &RawDocument, id_of: IdOf) -> Result<Option<Update>, String> {
        let field = &self.fields.api_key;
        let stored = document::text(document, field)?;
        let id = id_of(document).ok_or("its _id can't be a key's")?;
        let secret = self.at_rest.secret(&id, stored)?;
        if self.at_rest.is_current(stored) {
            return Ok(None);
        }
        let sealed = self.at_rest.stored(&id, &secret).map_err(|failure| failure.to_string())?;
        let hash = whole_number(document, HASH).ok_or("the server gave no digest of it")?;
        let id = document::value(document, "_id").unwrap_or(Bson::Null);
        Ok(Some(self.fields.encrypt(id, hash, &sealed)))
    }
}

impl Fields {
    /// The stored secret in another form: it is the same secret.
    fn encrypt(&self, id: Bson, hash: i64, sealed: &str) -> Update {
        let has_been_absorbed = eq(path(ours::SECRET_HASH), hash);
        let hash_after = hash_of(&self.api_key);
        Update {
            filter: doc! { "_id": { "$eq": id }, "$expr": eq(hash_of(&self.api_key), hash) },
            pipeline: vec![
                doc! { "$set": { &self.api_key: literal(sealed) } },
                doc! { "$set": { ours::SECRET_HASH: cond(has_been_absorbed, hash_after, path(ours::SECRET_HASH)) } },
            ],
        }
    }
}
