//! The newest message of each process, for pools that share limits: one small document each.

use std::{sync::Arc, time::Duration};

use ::mongodb::{
    Database,
    bson::{Binary, Bson, RawDocument, doc, spec::BinarySubtype},
    options::{Acknowledgment, CollectionOptions, ReadConcern, WriteConcern},
};

use super::{
    error::Failure,
    inner::{Documents, Inner, Limits, primary},
};
use crate::store::Heard;

/// A document that was not written for so long is of a process that has ended.
const ENDED: Duration = Duration::from_secs(60);

/// The collection of messages. Losing one costs nothing: the next comes within a second. So no majority is waited for.
pub(super) fn collection(database: &Database, name: &str, limits: Limits) -> Documents {
    let one = WriteConcern::builder().w(Acknowledgment::Nodes(1)).w_timeout(limits.operation).build();
    let options = CollectionOptions::builder()
        .selection_criteria(primary())
        .read_concern(ReadConcern::local())
        .write_concern(one)
        .build();
    database.collection_with_options(name, options)
}

impl Inner {
    /// Reads all messages, and deletes those of processes that have ended.
    pub(super) async fn messages(self: Arc<Self>) -> Result<Vec<Heard>, Failure> {
        // Of a document by somebody else, the time may be no date.
        let has_a_date = doc! { "$match": { "at": { "$type": "date" } } };
        let age = doc! { "$project": { "body": 1, "age": { "$subtract": ["$$NOW", "$at"] } } };
        let mut cursor = self.processes.aggregate([has_a_date, age]).await?;
        let (mut heard, mut ended) = (Vec::new(), Vec::new());
        while cursor.advance().await? {
            match read(cursor.current()) {
                Some(message) if message.age < ENDED => heard.push(message),
                Some(message) => ended.push(message.process.cast_signed()),
                None => {}
            }
        }
        if !ended.is_empty() {
            // Another process may be quicker, and an ended one may be back.
            let is_old = doc! { "$gt": [{ "$subtract": ["$$NOW", "$at"] }, ENDED.as_millis() as i64] };
            self.processes.delete_many(doc! { "_id": { "$in": ended }, "$expr": is_old }).await?;
        }
        Ok(heard)
    }

    pub(super) async fn publish(self: Arc<Self>, process: u64, body: Vec<u8>) -> Result<(), Failure> {
        let body = Bson::Binary(Binary { subtype: BinarySubtype::Generic, bytes: body });
        let message = doc! { "$set": { "at": "$$NOW", "body": { "$literal": body } } };
        let id = doc! { "_id": process.cast_signed() };
        self.processes.update_one(id, vec![message]).upsert(true).await?;
        Ok(())
    }
}

/// `None` for a document of somebody else's.
fn read(document: &RawDocument) -> Option<Heard> {
    let process = document.get_i64("_id").ok()?.cast_unsigned();
    let age = u64::try_from(document.get_i64("age").ok()?).unwrap_or_default();
    let body = document.get_binary("body").ok()?.bytes.to_vec();
    Some(Heard::new(process, Duration::from_millis(age), body))
}
