//! Reads keys, and absorbs what other programs have changed before it tells of them.

use std::{sync::Arc, time::Duration};

use ::mongodb::bson::{Document, RawDocument};
use tokio::{sync::mpsc, time::Instant};

use super::{
    bulk::AT_ONCE,
    commands::Update,
    document::{self, Read, decode, from_now},
    error::Failure,
    fields::computed,
    inner::Inner,
};
use crate::{
    key::KeyId,
    store::{Born, Loaded, Standing, Unreadable},
};

/// How often a document is absorbed that another program changes all the time.
const TRIES: usize = 5;

/// Loads these keys, or all. Each part of it has the limit of an operation: it may take as long as there are keys.
pub(super) async fn load(inner: &Arc<Inner>, only: Option<&[KeyId]>) -> Result<Loaded, Failure> {
    let (store, pipeline) = (inner.clone(), inner.fields.load(only));
    let loading = |parts| async move {
        let part = Loaded::default();
        Loading { store: &store, parts, part }.all(pipeline).await
    };
    let mut loaded = Loaded::default();
    let take = |part: Loaded| {
        loaded.records.extend(part.records);
        loaded.unreadable.extend(part.unreadable);
    };
    inner.loads.run_in_parts(inner.limits.operation, loading, take).await?;
    for record in &mut loaded.records {
        record.standing = inner.counted_from_now(record.standing.clone());
    }
    Ok(loaded)
}

struct Loading<'a> {
    store: &'a Inner,
    parts: mpsc::Sender<Loaded>,
    part: Loaded,
}

impl Loading<'_> {
    async fn all(mut self, pipeline: Vec<Document>) -> Result<(), Failure> {
        let mut unsettled = self.read(pipeline).await?;
        for _ in 0..TRIES {
            let mut again = Vec::new();
            for ids in unsettled.chunks(AT_ONCE) {
                self.pass_on().await?;
                let settled = self.settle(ids).await?;
                again.extend(self.read(self.store.fields.load(Some(&settled))).await?);
            }
            unsettled = again;
            if unsettled.is_empty() {
                return self.pass_on().await;
            }
        }
        Err(Failure::Unsettled(unsettled.len()))
    }

    /// Returns the keys that have to be absorbed first.
    async fn read(&mut self, pipeline: Vec<Document>) -> Result<Vec<KeyId>, Failure> {
        let sent = Instant::now();
        let mut cursor = self.store.keys.aggregate(pipeline).await?;
        let (mut unsettled, mut read) = (Vec::new(), 0);
        while cursor.advance().await? {
            let document = cursor.current();
            if read == 0 {
                self.store.heard(document, sent);
            }
            match decode(document, &self.store.fields, &self.store.at_rest) {
                Ok(Read::Key(record)) => self.part.records.push(*record),
                Ok(Read::Unsettled(id)) => unsettled.push(id),
                Err(unreadable) => self.part.unreadable.push(unreadable),
            }
            read += 1;
            // Also if all of them are unsettled: a part shows that the load goes on.
            if read % AT_ONCE == 0 {
                self.pass_on().await?;
            }
        }
        Ok(unsettled)
    }

    /// An error if nobody takes the parts any more.
    async fn pass_on(&mut self) -> Result<(), Failure> {
        let part = std::mem::take(&mut self.part);
        self.parts.send(part).await.map_err(|_| Failure::BrokenOff)
    }

    /// Returns the keys that were not refused. A document that is gone, or settled by now, is no concern of it.
    async fn settle(&mut self, ids: &[KeyId]) -> Result<Vec<KeyId>, Failure> {
        let update = |ids: &[KeyId]| self.store.fields.settle_some(ids, Born::now());
        match self.store.update_many(update(ids)).await {
            Err(failure) if failure.is_about_the_document() => {}
            done => return done.map(|_| ids.to_vec()),
        }
        let statements = ids.iter().map(|id| update(std::slice::from_ref(id)).statement()).collect();
        let updated = self.store.update_each(&self.store.keys, statements).await?;
        let refused = updated.if_only_documents_refuse()?.refused;
        let mut settled = ids.to_vec();
        for refused in refused.iter().rev() {
            let reason = format!("MongoDB refused to add this crate's fields, with code {}", refused.code);
            self.part.unreadable.push(Unreadable::new(settled.remove(refused.index).as_str(), reason));
        }
        Ok(settled)
    }
}

impl Inner {
    /// Takes the server's time out of an answer. Returns whether its clock is ahead of what it could be.
    pub(super) fn heard(&self, answer: &RawDocument, sent: Instant) -> bool {
        answer.get_datetime(computed::SERVER_TIME).is_ok_and(|said| self.clock.heard(said, sent))
    }

    pub(super) async fn update_many(&self, Update { filter, pipeline }: Update) -> Result<u64, Failure> {
        Ok(self.keys.update_many(filter, pipeline).await?.modified_count)
    }

    /// How a key stands now. `None` if its document was never absorbed.
    pub(super) fn standing_now(&self, document: &RawDocument) -> Option<Standing> {
        document::standing(document, &self.fields).map(|standing| self.counted_from_now(standing))
    }

    /// A key as it stands now, by the words of its document, which count from the epoch.
    fn counted_from_now(&self, standing: Standing) -> Standing {
        from_now(standing, self.clock.latest(Instant::now()).unwrap_or(Duration::ZERO))
    }
}
