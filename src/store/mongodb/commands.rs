//! What is asked of MongoDB: filters and pipelines, made by pure functions.
//!
//! All times are the server's: a client says how much is left or has passed, and `$$NOW` is what that counts
//! from. A string that came from outside stands in a filter as a value, or behind `$literal`: an id or a secret
//! may begin with `$`.

use std::time::Duration;

use ::mongodb::bson::{Bson, DateTime, Document, doc};

use super::{
    document::{
        self, DISABLED, ERROR, EXHAUSTED, EXHAUSTION_IS_DATED, HEALTHY, LEFT, RATE_LIMITED, WITHOUT_A_DATE,
    },
    fields::{Fields, ours},
};
use crate::{
    key::KeyId,
    limit::Rest,
    store::{Mark, Usage, UsageBatch},
};

const NOW: &str = "$$NOW";

/// A writer's last batch is remembered for that long after it. One that arrived in an outage longer than this, and
/// could not be told to have, would be counted twice.
const WRITERS_REMEMBERED_FOR: Duration = Duration::from_secs(24 * 60 * 60);

/// One update: which document, and what becomes of it.
pub(super) struct Update {
    pub(super) filter: Document,
    pub(super) pipeline: Vec<Document>,
}

impl Fields {
    fn path(name: &str) -> String {
        format!("${name}")
    }

    /// The status that a key has, or would have if it were not disabled; an exhaustion that is over is none, swept
    /// or not.
    fn status_beneath(&self) -> Document {
        let status = Self::path(&self.status);
        let beneath = doc! { "$cond": [{ "$eq": [&status, DISABLED] }, self.disabled_from(), &status] };
        let is_over = doc! { "$and": [
            { "$eq": ["$$beneath", EXHAUSTED] },
            self.exhaustion_is_dated(),
            { "$lt": [Self::path(&self.cooldown_until), NOW] },
        ] };
        let status = doc! { "$cond": [is_over, HEALTHY, "$$beneath"] };
        doc! { "$let": { "vars": { "beneath": beneath }, "in": status } }
    }

    fn disabled_from(&self) -> Document {
        let from = Self::path(ours::DISABLED_FROM);
        doc! { "$cond": [{ "$eq": [{ "$type": &from }, "string"] }, from, HEALTHY] }
    }

    /// Sets the status of a key, or what it would be if it were not disabled.
    fn set_status_beneath(&self, status: &Bson) -> Document {
        let current = Self::path(&self.status);
        let is_disabled = doc! { "$eq": [&current, DISABLED] };
        doc! {
            &self.status: { "$cond": [&is_disabled, DISABLED, status] },
            ours::DISABLED_FROM: { "$cond": [is_disabled, status, "$$REMOVE"] },
        }
    }

    /// Of a document that holds the secret in one of these forms. `observed` is when the response arrived, as far as
    /// that is known by the server's clock. The mark's age alone would have it too late by the time that the command
    /// is on its way.
    pub(super) fn mark(&self, mark: &Mark, stored: Vec<String>, observed: Option<DateTime>) -> Update {
        let is_exhausted = doc! { "$eq": [self.status_beneath(), EXHAUSTED] };
        let can_be_marked = doc! { "$in": [self.status_beneath(), [HEALTHY, RATE_LIMITED, EXHAUSTED]] };
        let mut condition = vec![can_be_marked, self.not_reset_since(mark.age, observed)];
        if mark.rest != Rest::Revoked {
            // One without a date is exhausted until somebody resets it.
            condition.push(doc! { "$or": [{ "$not": [&is_exhausted] }, self.exhaustion_is_dated()] });
        }
        let (status, dates) = match mark.rest {
            Rest::RateLimited => {
                let until = later_of(self.date_while_it_rests(), mark.left);
                let exhausted_until =
                    doc! { "$cond": [&is_exhausted, &until, Self::path(ours::EXHAUSTED_UNTIL)] };
                let dates = doc! { &self.cooldown_until: until, ours::EXHAUSTED_UNTIL: exhausted_until };
                (doc! { "$cond": [is_exhausted, EXHAUSTED, RATE_LIMITED] }.into(), dates)
            }
            Rest::Exhausted => {
                (EXHAUSTED.into(), self.set_failed(later_of(self.date_while_it_rests(), mark.left)))
            }
            Rest::Revoked => (ERROR.into(), self.set_failed(Bson::Null)),
        };
        let mut set = self.set_status_beneath(&status);
        set.extend(doc! { &self.last_error: said(mark), &self.updated_at: NOW });
        set.extend(dates);
        Update {
            filter: doc! {
                "_id": mark.id.as_str(),
                &self.api_key: { "$in": stored },
                "$expr": { "$and": condition },
            },
            pipeline: vec![doc! { "$set": set }],
        }
    }

    /// A key that fails anew may be replaced; one that has failed already keeps what was done about it.
    fn set_failed(&self, until: Bson) -> Document {
        let anew = doc! { "$in": [self.status_beneath(), [HEALTHY, RATE_LIMITED]] };
        let kept = |field: &str, anew_it_is: Bson| doc! { "$cond": [&anew, anew_it_is, Self::path(field)] };
        let retired = doc! { "$and": [{ "$not": [&anew] }, is_date(ours::RETIRED_AT)] };
        let until = doc! { "$cond": [retired, Bson::Null, until] };
        doc! {
            ours::EXHAUSTED_UNTIL: &until,
            &self.cooldown_until: &until,
            ours::FAILED_AT: kept(ours::FAILED_AT, NOW.into()),
            ours::REPLACED_BY: kept(ours::REPLACED_BY, replacement_under_way().into()),
            ours::RETIRED_AT: kept(ours::RETIRED_AT, "$$REMOVE".into()),
        }
    }

    /// What an earlier rest left behind doesn't count: an admin may have set the status to healthy and nothing else.
    fn date_while_it_rests(&self) -> Document {
        let rests = doc! { "$in": [self.status_beneath(), [RATE_LIMITED, EXHAUSTED]] };
        doc! { "$cond": [rests, date_or_null(&self.cooldown_until), Bson::Null] }
    }

    fn not_reset_since(&self, age: Duration, observed: Option<DateTime>) -> Document {
        let reset = Self::path(&self.reset_at);
        let at_the_latest = doc! { "$subtract": [NOW, millis(age)] };
        let observed = doc! { "$min": [observed.map_or(Bson::Null, Bson::from), at_the_latest] };
        let is_none = doc! { "$not": [is_date(&self.reset_at)] };
        // A reset that is yet to come is none.
        doc! { "$or": [is_none, { "$lte": [&reset, observed] }, { "$gt": [&reset, NOW] }] }
    }

    /// Whether it is this crate's word until when a key is exhausted: nobody has changed the date since.
    fn exhaustion_is_dated(&self) -> Document {
        let same = doc! { "$eq": [Self::path(ours::EXHAUSTED_UNTIL), Self::path(&self.cooldown_until)] };
        doc! { "$and": [is_date(ours::EXHAUSTED_UNTIL), same] }
    }

    /// What has expired: limited keys, and exhausted ones of which it is known until when.
    pub(super) fn expired(&self) -> Document {
        // What stands before the expression is for the index. It also matches arrays, which the expression doesn't.
        let past = |status: &str, more: Document| {
            let expr = doc! { "$and": [
                { "$eq": [Self::path(&self.status), status] },
                is_date(&self.cooldown_until),
                { "$lt": [Self::path(&self.cooldown_until), NOW] },
                more,
            ] };
            doc! { &self.status: status, &self.cooldown_until: { "$type": "date" }, "$expr": expr }
        };
        doc! { "$or": [past(RATE_LIMITED, doc! {}), past(EXHAUSTED, self.exhaustion_is_dated())] }
    }

    pub(super) fn sweep(&self) -> Update {
        let set = doc! {
            &self.status: HEALTHY,
            &self.last_error: "",
            &self.cooldown_until: Bson::Null,
            &self.updated_at: NOW,
        };
        let forget = vec![ours::EXHAUSTED_UNTIL, ours::FAILED_AT];
        Update { filter: self.expired(), pipeline: vec![doc! { "$set": set }, doc! { "$unset": forget }] }
    }

    /// A limited key that somebody left without a date would never be swept: it gets one.
    pub(super) fn date_the_undated(&self) -> Update {
        let undated = doc! { &self.status: RATE_LIMITED, "$expr": { "$and": [
            { "$eq": [Self::path(&self.status), RATE_LIMITED] },
            { "$not": [is_date(&self.cooldown_until)] },
        ] } };
        let set = doc! { &self.cooldown_until: from_now(WITHOUT_A_DATE), &self.updated_at: NOW };
        Update { filter: undated, pipeline: vec![doc! { "$set": set }] }
    }

    /// What a load reads of each document.
    pub(super) fn load(&self, only: Option<&[KeyId]>) -> Vec<Document> {
        let date = Self::path(&self.cooldown_until);
        // The earliest date that there is, less now, would overflow.
        let left = doc! { "$cond": [{ "$gt": [&date, NOW] }, { "$subtract": [date, NOW] }, 0_i64] };
        let project = doc! { "$project": {
            &self.api_key: 1,
            &self.status: 1,
            ours::DISABLED_FROM: 1,
            document::SERVER_TIME: NOW,
            LEFT: { "$cond": [is_date(&self.cooldown_until), left, Bson::Null] },
            EXHAUSTION_IS_DATED: self.exhaustion_is_dated(),
        } };
        match only {
            None => vec![project],
            Some(ids) => {
                let ids: Vec<_> = ids.iter().map(KeyId::as_str).collect();
                vec![doc! { "$match": { "_id": { "$in": ids } } }, project]
            }
        }
    }

    /// A document that no one has, with the secret as it is to be stored: as an upsert, it is inserted or refused as a
    /// duplicate.
    pub(super) fn insert(&self, id: &KeyId, stored: &str, replaced: Option<&str>) -> Update {
        let mut key = doc! {
            "_id": { "$literal": id.as_str() },
            &self.api_key: { "$literal": stored },
            &self.status: HEALTHY,
            &self.cooldown_until: Bson::Null,
            &self.last_error: "",
            &self.tokens_used: 0_i64,
            &self.requests_count: 0_i64,
            &self.created_at: NOW,
            &self.updated_at: NOW,
        };
        if let Some(replaced) = replaced {
            key.insert(ours::REPLACED_KEY, doc! { "$literal": replaced });
        }
        let never: [Bson; 0] = [];
        Update {
            filter: doc! { "_id": id.as_str(), &self.created_at: { "$in": never } },
            pipeline: vec![doc! { "$replaceWith": key }],
        }
    }

    pub(super) fn reset(&self, id: &KeyId) -> Update {
        let status = Self::path(&self.status);
        let known = doc! { "$in": [&status, [HEALTHY, RATE_LIMITED, EXHAUSTED, ERROR]] };
        let set = doc! {
            // What is disabled, by us or in another program's word, stays so.
            &self.status: { "$cond": [known, HEALTHY, &status] },
            &self.cooldown_until: Bson::Null,
            &self.last_error: "",
            &self.updated_at: NOW,
            &self.reset_at: NOW,
            ours::REPLACED_BY: replacement_under_way(),
        };
        let forget = vec![ours::EXHAUSTED_UNTIL, ours::DISABLED_FROM, ours::FAILED_AT, ours::RETIRED_AT];
        Update {
            filter: doc! { "_id": id.as_str() },
            pipeline: vec![doc! { "$set": set }, doc! { "$unset": forget }],
        }
    }

    pub(super) fn set_disabled(&self, id: &KeyId, disabled: bool) -> Update {
        let status = Self::path(&self.status);
        let known = doc! { "$in": [&status, [HEALTHY, RATE_LIMITED, EXHAUSTED, ERROR]] };
        let set = if disabled {
            doc! {
                &self.status: DISABLED,
                ours::DISABLED_FROM: { "$cond": [known, &status, Self::path(ours::DISABLED_FROM)] },
            }
        } else {
            doc! {
                &self.status: { "$cond": [known, &status, self.disabled_from()] },
                ours::DISABLED_FROM: "$$REMOVE",
            }
        };
        Update {
            filter: doc! { "_id": id.as_str() },
            pipeline: vec![doc! { "$set": set }, doc! { "$set": { &self.updated_at: NOW } }],
        }
    }

    /// Adds usage up, unless the document has that batch already.
    ///
    /// `$inc` would do for the sums, but could not be tried again.
    pub(super) fn add_usage(&self, batch: &UsageBatch, usage: &Usage) -> Update {
        let writers = Self::path(ours::USAGE_WRITERS);
        let number = long(batch.number);
        let has_it = doc! { "$elemMatch": { "w": &batch.writer, "n": { "$gte": number } } };
        let others = doc! { "$filter": {
            "input": { "$cond": [{ "$isArray": &writers }, &writers, []] },
            "cond": { "$and": [
                { "$ne": ["$$this.w", { "$literal": &batch.writer }] },
                { "$gt": ["$$this.at", { "$subtract": [NOW, millis(WRITERS_REMEMBERED_FOR)] }] },
            ] },
        } };
        let this = doc! { "w": { "$literal": &batch.writer }, "n": number, "at": NOW };
        let used_at = doc! { "$subtract": [NOW, millis(batch.age)] };
        let set = doc! {
            &self.requests_count: sum(&self.requests_count, usage.requests),
            &self.tokens_used: sum(&self.tokens_used, usage.tokens),
            &self.last_used_at: { "$max": [date_or_null(&self.last_used_at), used_at] },
            ours::USAGE_WRITERS: { "$concatArrays": [others, [this]] },
        };
        Update {
            filter: doc! { "_id": usage.id.as_str(), ours::USAGE_WRITERS: { "$not": has_it } },
            pipeline: vec![doc! { "$set": set }],
        }
    }

    /// Changes that a load would see; usage is none.
    pub(super) fn changes(&self) -> Vec<Document> {
        let fields =
            [&*self.api_key, &self.status, &self.cooldown_until, ours::EXHAUSTED_UNTIL, ours::DISABLED_FROM];
        let updated = fields
            .map(|field| doc! { format!("updateDescription.updatedFields.{field}"): { "$exists": true } });
        let removed = doc! { "updateDescription.removedFields": { "$in": fields.to_vec() } };
        let other = doc! { "operationType": { "$ne": "update" } };
        let any: Vec<_> = updated.into_iter().chain([removed, other]).collect();
        vec![
            doc! { "$match": { "$or": any } },
            doc! { "$project": { "_id": 1, "operationType": 1, "ns": 1, "documentKey": 1 } },
        ]
    }
}

fn said(mark: &Mark) -> String {
    let what = match mark.rest {
        Rest::RateLimited => "rate limited",
        Rest::Exhausted => "quota exhausted",
        Rest::Revoked => "no longer accepted",
    };
    match mark.http_status {
        Some(status) => format!("{what} (HTTP {status})"),
        None => what.to_owned(),
    }
}

/// The standby key that was planned for a key, unless it has taken its place: it may have been claimed, and is used
/// for nothing else then.
fn replacement_under_way() -> Document {
    doc! { "$cond": [is_date(ours::RETIRED_AT), "$$REMOVE", format!("${}", ours::REPLACED_BY)] }
}

fn is_date(field: &str) -> Document {
    doc! { "$eq": [{ "$type": format!("${field}") }, "date"] }
}

fn date_or_null(field: &str) -> Document {
    doc! { "$cond": [is_date(field), format!("${field}"), Bson::Null] }
}

/// The later of a stored date and what is left from now on; no date where it rests until somebody resets it.
fn later_of(before: Document, left: Option<Duration>) -> Bson {
    left.map_or(Bson::Null, |left| doc! { "$max": [before, from_now(left)] }.into())
}

fn from_now(left: Duration) -> Document {
    // A date has milliseconds: up rather than down, never early. Ten thousand years are enough for any.
    const LONGEST: i64 = 10_000 * 365 * 24 * 60 * 60 * 1_000;
    doc! { "$add": [NOW, (millis(left) + 1).min(LONGEST)] }
}

/// A number that somebody may have written in any numeric type, and more; as an int64. What is no number, or
/// too large to be counted further, is left as it is.
fn sum(field: &str, more: u64) -> Document {
    let path = format!("${field}");
    let numeric = ["int", "long", "double", "decimal", "missing", "null"];
    let number =
        doc! { "$convert": { "input": &path, "to": "long", "onError": Bson::Null, "onNull": 0_i64 } };
    let number = doc! { "$cond": [{ "$in": [{ "$type": &path }, numeric.to_vec()] }, number, Bson::Null] };
    let sum = doc! { "$add": ["$$number", long(more)] };
    let stays = doc! { "$or": [
        { "$eq": ["$$number", Bson::Null] },
        { "$gt": ["$$number", i64::MAX - long(more)] },
    ] };
    let added = doc! { "$cond": [stays, path, sum] };
    doc! { "$let": { "vars": { "number": number }, "in": added } }
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX / 2).min(i64::MAX / 2)
}

fn long(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rest_of_a_thousand_years_is_written_as_it_is_and_an_endless_one_as_ten_thousand() {
        let millis = 1_000_i64 * 365 * 24 * 60 * 60 * 1_000;
        let thousand_years = Duration::from_millis(millis as u64);
        assert_eq!(from_now(thousand_years), doc! { "$add": [NOW, millis + 1] });
        assert_eq!(from_now(Duration::MAX), doc! { "$add": [NOW, 10 * millis] });
    }
}
