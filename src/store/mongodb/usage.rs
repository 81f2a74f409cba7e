//! How much keys were used.
//!
//! Usage is a statistic: it counts nothing twice, and may lose what was on its way when a server failed. So documents do
//! not grow with the processes that write them.

use std::{
    collections::BTreeMap,
    mem,
    sync::{Arc, MutexGuard, PoisonError},
};

use ::mongodb::bson::{Document, doc};

use super::{
    bulk::AT_ONCE,
    document::is_id,
    error::Failure,
    expr::{NOW, all, cond, is_date, is_one_of, path},
    fields::Fields,
    inner::Inner,
};
use crate::{key::KeyId, store::Usage};

/// Adds usage up. Usage that the server certainly did not add is kept for the next call; usage that it may have added is
/// not.
pub(super) async fn add(inner: &Arc<Inner>, usage: Vec<Usage>) -> Result<(), Failure> {
    inner.keep(usage);
    let usage: Vec<_> = mem::take(&mut *inner.unsent()).into_values().collect();
    let mut parts = usage.chunks(AT_ONCE);
    while let Some(part) = parts.next() {
        let (store, sent) = (inner.clone(), part.to_vec());
        let add = async move { store.add_usage(&sent).await };
        let failure = match inner.usage.run(inner.limits.operation, add).await {
            Ok(None) => continue,
            Ok(Some(refusal)) => refusal,
            Err(failure) => {
                if failure.happened_before_sending() {
                    inner.keep(part.iter().cloned());
                }
                failure
            }
        };
        inner.keep(parts.flatten().cloned());
        return Err(failure);
    }
    Ok(())
}

impl Inner {
    fn unsent(&self) -> MutexGuard<'_, BTreeMap<KeyId, Usage>> {
        self.unsent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep(&self, usage: impl IntoIterator<Item = Usage>) {
        let mut unsent = self.unsent();
        for usage in usage {
            let kept = unsent.entry(usage.id.clone()).or_insert_with(|| Usage::new(usage.id, 0, 0));
            kept.requests = kept.requests.saturating_add(usage.requests);
            kept.tokens = kept.tokens.saturating_add(usage.tokens);
        }
    }

    /// Returns why the server refused a part, which is kept.
    async fn add_usage(&self, usage: &[Usage]) -> Result<Option<Failure>, Failure> {
        let statements = usage.iter().map(|usage| self.fields.add(usage)).collect();
        let mut refusal = None;
        for refused in self.update_each(&self.keys, statements).await?.refused {
            let Some(usage) = usage.get(refused.index) else { continue };
            if refused.is_about_the_document() {
                tracing::warn!(key = %usage.id, code = refused.code, "MongoDB refused to add usage up");
            } else {
                self.keep([usage.clone()]);
                refusal = Some(refused.failure());
            }
        }
        Ok(refusal)
    }
}

impl Fields {
    fn add(&self, usage: &Usage) -> Document {
        let more = [(&self.requests_count, usage.requests), (&self.tokens_used, usage.tokens)];
        let more = more.into_iter().filter(|(_, more)| *more > 0);
        let mut set: Document = more.map(|(field, more)| (field.clone(), sum(field, more).into())).collect();
        // To ten seconds: a field that stays as it is takes no room in the oplog.
        let now = doc! { "$dateTrunc": { "date": NOW, "unit": "second", "binSize": 10 } };
        let before = path(&self.last_used_at);
        let later = doc! { "$max": [&before, &now] };
        set.insert(&self.last_used_at, cond(is_date(&before), later, now));
        doc! { "q": { "_id": is_id(&usage.id) }, "u": [{ "$set": set }] }
    }
}

/// The sum of a field of any numeric type, or null, and a number. A field of another type, or one that is too large to
/// count further, is left as it is.
fn sum(field: &str, more: u64) -> Document {
    let field = path(field);
    let more = i64::try_from(more).unwrap_or(i64::MAX);
    let number = doc! { "$ifNull": [&field, 0_i64] };
    let is_number =
        is_one_of(doc! { "$type": &field }, ["int", "long", "double", "decimal", "missing", "null"]);
    let has_room = doc! { "$lte": [&number, i64::MAX - more] };
    cond(all([is_number, has_room]), doc! { "$add": [number, more] }, field)
}
