//! How much keys were used.
//!
//! Usage is a statistic: it counts nothing twice, and may lose what was on its way when a server failed. So it takes
//! nothing but increments, and documents do not grow with the processes that write them.

use std::sync::Arc;

use ::mongodb::bson::{Bson, Document, doc};

use super::{
    bulk::AT_ONCE,
    error::Failure,
    expr::{NOW, any, cond, eq, is_one_of, path},
    fields::Fields,
    inner::Inner,
};
use crate::store::Usage;

/// Adds usage up. Usage that the server certainly did not add is kept for the next call; usage that it may have added is
/// not.
pub(super) async fn add(inner: &Arc<Inner>, usage: Vec<Usage>) -> Result<(), Failure> {
    inner.unsent.keep(usage);
    let mut usage = inner.unsent.take();
    while !usage.is_empty() {
        let rest = usage.split_off(usage.len().min(AT_ONCE));
        let part = std::mem::replace(&mut usage, rest);
        let (store, sent) = (inner.clone(), part.clone());
        let add = |_| async move { store.add_usage(&sent).await };
        if let Err(failure) = inner.usage.run(inner.limits.operation, add).await {
            if failure.happened_before_sending() {
                inner.unsent.keep(part);
            }
            inner.unsent.keep(usage);
            return Err(failure);
        }
    }
    Ok(())
}

impl Inner {
    async fn add_usage(&self, usage: &[Usage]) -> Result<(), Failure> {
        let statements = usage.iter().map(|usage| self.fields.increment(usage)).collect();
        let refused = self.update_each(&self.keys, statements).await?.refused;
        // `$inc` takes numbers alone, and other programs write null.
        let (odd, others): (Vec<_>, Vec<_>) =
            refused.into_iter().partition(|refused| refused.is_about_the_document());
        self.unsent.keep(others.iter().filter_map(|refused| usage.get(refused.index)).cloned());
        let odd: Vec<_> = odd.iter().filter_map(|refused| usage.get(refused.index)).collect();
        let statements = odd.iter().map(|usage| self.fields.add(usage)).collect();
        for refused in self.update_each(&self.keys, statements).await?.refused {
            let key = odd.get(refused.index).map(|usage| &usage.id);
            tracing::warn!(?key, code = refused.code, "MongoDB refused to add usage up");
        }
        others.first().map_or(Ok(()), |refused| Err(refused.failure()))
    }
}

impl Fields {
    fn increment(&self, usage: &Usage) -> Document {
        let more = [(&self.requests_count, usage.requests), (&self.tokens_used, usage.tokens)];
        let more = more.into_iter().filter(|(_, more)| *more > 0);
        let more: Document = more.map(|(field, more)| (field.clone(), Bson::from(long(more)))).collect();
        let mut change = doc! { "$currentDate": { &self.last_used_at: true } };
        if !more.is_empty() {
            change.insert("$inc", more);
        }
        doc! { "q": { "_id": usage.id.as_str() }, "u": change }
    }

    /// The same for a document with counts of other types. What is no number stays as it is.
    fn add(&self, usage: &Usage) -> Document {
        let set = doc! {
            &self.requests_count: sum(&self.requests_count, usage.requests),
            &self.tokens_used: sum(&self.tokens_used, usage.tokens),
            &self.last_used_at: NOW,
        };
        doc! { "q": { "_id": usage.id.as_str() }, "u": [{ "$set": set }] }
    }
}

/// The sum of a field of any numeric type, or null, and a number. A field of another type, or one that is too large to
/// count further, is left as it is.
fn sum(field: &str, more: u64) -> Document {
    let field = path(field);
    let number =
        doc! { "$convert": { "input": &field, "to": "long", "onError": Bson::Null, "onNull": 0_i64 } };
    let is_number =
        is_one_of(doc! { "$type": &field }, ["int", "long", "double", "decimal", "missing", "null"]);
    let is_too_large = doc! { "$gt": ["$$number", i64::MAX - long(more)] };
    let stays = any([eq("$$number", Bson::Null), is_too_large]);
    let sum = cond(stays, field, doc! { "$add": ["$$number", long(more)] });
    doc! { "$let": { "vars": { "number": cond(is_number, number, Bson::Null) }, "in": sum } }
}

fn long(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
