//! The filters, pipelines and projections of the commands that MongoDB gets, made by pure functions.
//!
//! No command but an insertion carries a secret: commands end up in the server's logs and profiles.

use std::time::Duration;

use ::mongodb::bson::{Bson, DateTime, Document, doc};

use super::{
    document::{is_id, is_one_of_ids},
    expr::{NOW, REMOVE, all, any, cond, is_date, is_one_of, literal, not, path},
    fields::{DISABLED, EXHAUSTED, Fields, HEALTHY, KNOWN, RATE_LIMITED, computed, ours},
    stored::{FOREVER, NEVER, NO_REASON, code},
    words::{
        first, for_good, has_failed, hash_of, hex, is_resting, join_limits, limit, limits_without,
        next_generation_of_the_same, replacement_under_way, reset, word,
    },
};
use crate::{
    key::{KeyId, KeySpec},
    limit::{Rest, Scope, Until},
    store::{Born, Mark},
};

/// One update: which documents, and what becomes of them.
pub(super) struct Update {
    pub(super) filter: Document,
    pub(super) pipeline: Vec<Document>,
}

impl Update {
    /// As a statement of an `update` command.
    pub(super) fn statement(self) -> Document {
        doc! { "q": self.filter, "u": self.pipeline }
    }
}

/// What the deadlines of a mark count from.
#[derive(Clone, Copy)]
pub(super) struct Called {
    /// The latest that the server's clock can have shown at the call, since the epoch, if that is known.
    pub(super) at: Option<Duration>,
    /// How long the call has waited before its command was made.
    pub(super) waited: Duration,
}

impl Fields {
    /// Of the key object that the mark is about, and no other one.
    pub(super) fn merge(&self, mark: &Mark, called: Called) -> Update {
        let generation = i64::try_from(mark.words.generation).unwrap_or(i64::MAX);
        let marked = match mark.words.key {
            None => word(generation, NEVER, NO_REASON),
            Some(resting) => word(generation, deadline(resting.until, called), code(resting.reason)),
        };
        let wins = doc! { "$gt": [&marked, "$rest"] };
        let limits = mark.words.scopes.iter();
        let limits = limits.map(|(scope, resting)| {
            limit(scope.as_str(), deadline(resting.until, called), code(resting.reason))
        });
        let shows = all([wins.clone(), self.is_shown()]);
        let join = doc! { "$set": {
            &self.last_error: cond(shows.clone(), literal(&said(mark)), path(&self.last_error)),
            // In the place of whatever type it has.
            &self.cooldown_until: cond(shows, Bson::Null, path(&self.cooldown_until)),
            ours::LIMITS: join_limits(generation, limits.collect()),
            ours::REST: { "$max": ["$rest", marked] },
        } };
        let may_fail = mark.words.key.is_some_and(|resting| resting.reason != Rest::RateLimited);
        let failed = may_fail.then(|| set_failed(wins));
        let pipeline = self.write(mark.born, failed.into_iter().chain([join]));
        let is_it = all([self.is_readable(), self.is_same_key()]);
        let filter = doc! { "_id": is_id(&mark.id), ours::BORN: hex(mark.born), "$expr": is_it };
        Update { filter, pipeline }
    }

    /// Ends all rests, or that of a scope.
    pub(super) fn reset(&self, id: &KeyId, scope: Option<&Scope>, born: Born) -> Update {
        let set = match scope {
            None => doc! {
                ours::REST: reset(),
                ours::LIMITS: [],
                &self.cooldown_until: Bson::Null,
                &self.last_error: "",
            },
            Some(scope) => doc! {
                ours::REST: next_generation_of_the_same(),
                ours::LIMITS: limits_without(scope.as_str()),
            },
        };
        self.operation(id, set, born)
    }

    pub(super) fn disable(&self, id: &KeyId, born: Born) -> Update {
        self.operation(id, doc! { &self.status: DISABLED }, born)
    }

    pub(super) fn enable(&self, id: &KeyId, born: Born) -> Update {
        let status = path(&self.status);
        let is_enabled = is_one_of(&status, KNOWN);
        let keeps_date = any([is_enabled.clone(), is_resting()]);
        let set = doc! {
            &self.cooldown_until: cond(keeps_date, path(&self.cooldown_until), Bson::Null),
            &self.status: cond(is_enabled, status, HEALTHY),
        };
        self.operation(id, set, born)
    }

    fn operation(&self, id: &KeyId, set: Document, born: Born) -> Update {
        let filter = doc! { "_id": is_id(id), "$expr": self.is_readable() };
        Update { filter, pipeline: self.write(born, [doc! { "$set": set }]) }
    }

    /// A document that no one has. As an upsert it is inserted, or refused as a duplicate.
    pub(super) fn insert(&self, spec: &KeySpec, stored: &str, born: Born, replaced: Option<&str>) -> Update {
        let mut key = doc! {
            "_id": literal(spec.id.as_str()),
            &self.api_key: literal(stored),
            &self.status: HEALTHY,
            &self.cooldown_until: Bson::Null,
            &self.last_error: "",
            &self.tokens_used: 0_i64,
            &self.requests_count: 0_i64,
            &self.created_at: NOW,
            ours::REST: first(),
            ours::BORN: hex(born),
        };
        key.extend(spec_of(spec).map(|spec| (ours::SPEC.to_owned(), Bson::from(doc! { "$literal": spec }))));
        key.extend(replaced.map(|replaced| (ours::REPLACED_KEY.to_owned(), literal(replaced).into())));
        let mut pipeline = vec![
            doc! { "$replaceWith": key },
            doc! { "$set": { ours::SECRET_HASH: hash_of(&self.api_key) } },
        ];
        pipeline.extend(self.show());
        let never: [Bson; 0] = [];
        Update { filter: doc! { "_id": spec.id.as_str(), &self.created_at: { "$in": never } }, pipeline }
    }

    /// Absorbs what other programs did to these documents.
    pub(super) fn settle_some(&self, ids: &[KeyId], born: Born) -> Update {
        let unsettled = all([self.is_readable(), not(self.is_settled())]);
        let filter = doc! { "_id": is_one_of_ids(ids), "$expr": unsettled };
        Update { filter, pipeline: self.settle(born) }
    }

    /// Keys whose rest has ended.
    pub(super) fn expired(&self) -> Document {
        let has_ended = doc! { "$lte": ["$$said.u", NOW] };
        let has_ended = doc! { "$let": { "vars": { "said": self.said() }, "in": has_ended } };
        let has_passed = all([doc! { "$lte": [path(&self.cooldown_until), NOW] }, has_ended.clone()]);
        let dated = self.with_status([RATE_LIMITED, EXHAUSTED], doc! { "$type": "date" }, has_passed);
        doc! { "$or": [dated, self.with_status([RATE_LIMITED], without_date(), has_ended)] }
    }

    /// Keys of which the rest of a scope has ended at that time since the epoch. If that is too late, the sweep leaves alone
    /// what has not ended by the server's clock.
    pub(super) fn expired_in_scopes(&self, at: Duration) -> Document {
        let at = DateTime::from_millis(i64::try_from(at.as_millis()).unwrap_or(i64::MAX));
        // For the index.
        let until = format!("{}.u", ours::LIMITS);
        doc! { until: { "$lte": at }, "$expr": self.is_readable() }
    }

    /// Shows these keys, as [`expired`](Self::expired) or [`expired_in_scopes`](Self::expired_in_scopes) finds them, as they
    /// are by now.
    pub(super) fn sweep(&self, expired: Document, born: Born) -> Update {
        Update { filter: expired, pipeline: self.write(born, []) }
    }

    /// A limited key without a date would never be swept: it gets one.
    pub(super) fn date_the_undated(&self, born: Born) -> Update {
        let is_undated = not(is_date(&path(&self.cooldown_until)));
        let more = all([is_undated, not(self.is_settled())]);
        let filter = self.with_status([RATE_LIMITED], without_date(), more);
        Update { filter, pipeline: self.settle(born) }
    }

    /// The fields before the expression are for the index. They also match arrays, and the expression does not.
    fn with_status<const N: usize>(&self, statuses: [&str; N], date: Document, more: Document) -> Document {
        let expression = all([self.is_readable(), more]);
        doc! { &self.status: { "$in": statuses.to_vec() }, &self.cooldown_until: date, "$expr": expression }
    }

    /// The fields that a load reads of each document, or of these.
    pub(super) fn load(&self, only: Option<&[KeyId]>) -> Vec<Document> {
        let mut project = self.standing();
        project.extend(doc! { &self.api_key: 1, ours::SPEC: 1, computed::IS_SETTLED: self.is_settled() });
        let only = only.map(|ids| doc! { "$match": { "_id": is_one_of_ids(ids) } });
        only.into_iter().chain([doc! { "$project": project }]).collect()
    }

    /// The fields that say how a key stands.
    pub(super) fn standing(&self) -> Document {
        doc! {
            &self.status: 1,
            ours::BORN: 1,
            ours::REST: 1,
            ours::LIMITS: 1,
            computed::SERVER_TIME: NOW,
        }
    }

    /// A failed key stays out of service for good: a standby key has its place.
    pub(super) fn retire(&self, filter: Document, born: Born) -> Update {
        let set = doc! {
            ours::RETIRED_AT: NOW,
            ours::REST: for_good(),
            &self.cooldown_until: Bson::Null,
        };
        Update { filter, pipeline: self.write(born, [doc! { "$set": set }]) }
    }

    /// Changes that concern a pool: the word, which the writes of this crate carry, and edits of other programs. Every
    /// field that is looked for costs time with each change that passes by, counts of usage above all.
    pub(super) fn changes(&self) -> Vec<Document> {
        let updated = |field: &str| format!("updateDescription.updatedFields.{field}");
        let fields = [ours::WORDS, &self.status, &self.cooldown_until, &self.api_key, ours::SPEC];
        let has = |field: &str| doc! { updated(field): { "$exists": true } };
        let removed = doc! { "updateDescription.removedFields": { "$in": [&self.api_key, ours::BORN] } };
        let other = doc! { "operationType": { "$ne": "update" } };
        let any: Vec<_> = fields.map(has).into_iter().chain([removed, other]).collect();
        let words = path(&updated(ours::WORDS));
        let project = doc! { "_id": 1, "operationType": 1, "ns": 1, "documentKey": 1, ours::WORDS: words };
        vec![doc! { "$match": { "$or": any } }, doc! { "$project": project }]
    }
}

/// A key that fails anew may be replaced; one that has failed already keeps what was done about it.
fn set_failed(wins: Document) -> Document {
    let anew = all([wins, not(has_failed())]);
    let kept = |field: &str, anew_it_is: Bson| cond(anew.clone(), anew_it_is, path(field));
    doc! { "$set": {
        ours::FAILED_AT: kept(ours::FAILED_AT, NOW.into()),
        ours::REPLACED_BY: kept(ours::REPLACED_BY, replacement_under_way().into()),
        ours::RETIRED_AT: kept(ours::RETIRED_AT, REMOVE.into()),
    } }
}

fn said(mark: &Mark) -> String {
    let reason = match mark.words.key.map(|resting| resting.reason) {
        None => return String::new(),
        Some(Rest::RateLimited) => "rate limited",
        Some(Rest::Exhausted) => "quota exhausted",
        Some(Rest::Revoked) => "no longer accepted",
    };
    match mark.http_status {
        Some(status) => format!("{reason} (HTTP {status})"),
        None => reason.to_owned(),
    }
}

/// The earlier of two dates: the server's time when it gets the mark, with what is left by then, and the server's time
/// at the call, with all that was left. Only the second one does not depend on how long the mark was on its way.
fn deadline(until: Until, called: Called) -> Bson {
    // A date has milliseconds: up rather than down, never early. Five thousand years are enough.
    const LONGEST: i64 = 5_000 * 365 * 24 * 60 * 60 * 1_000;
    let millis = |time: Duration| i64::try_from(time.as_millis()).unwrap_or(LONGEST);
    let Until::After(left) = until else { return FOREVER.into() };
    let left = (millis(left) + 1).min(LONGEST);
    let from_now = doc! { "$add": [NOW, left.saturating_sub(millis(called.waited)).max(0)] };
    match called.at {
        None => from_now.into(),
        Some(at) => doc! { "$min": [from_now, DateTime::from_millis(millis(at) + left)] }.into(),
    }
}

fn spec_of(spec: &KeySpec) -> Option<Document> {
    let number = |number: u32| Bson::from(i64::from(number));
    let fields = [
        ("group", spec.group.clone().map(Bson::from)),
        ("tier", spec.tier.map(|tier| number(tier.into()))),
        ("weight", spec.weight.map(|weight| number(weight.get()))),
        ("maxInFlight", spec.max_in_flight.map(|requests| number(requests.get()))),
        ("endpoint", spec.endpoint.clone().map(Bson::from)),
    ];
    let said: Document =
        fields.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect();
    (!said.is_empty()).then_some(said)
}

/// An index finds these by everything that is less or more than any date, and so no arrays: a load sees to them.
fn without_date() -> Document {
    doc! { "$not": { "$gte": DateTime::MIN } }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn f12_only_the_servers_clock_decides_deadlines() {
        let called = Called { at: None, waited: SECOND };
        let from_now = deadline(Until::After(5 * SECOND), called);
        assert_eq!(from_now, doc! { "$add": [NOW, 4_001_i64] }.into());
    }

    #[test]
    fn deadlines_never_exceed_call_time_plus_rest() {
        let called = Called { at: Some(100 * SECOND), waited: 9 * SECOND };
        let bounded = doc! { "$min": [{ "$add": [NOW, 0_i64] }, DateTime::from_millis(105_001)] };
        assert_eq!(deadline(Until::After(5 * SECOND), called), bounded.into());
    }

    #[test]
    fn rests_until_reset_are_the_latest_of_all() {
        let called = Called { at: None, waited: Duration::ZERO };
        assert_eq!(deadline(Until::Reset, called), FOREVER.into());
        let five_thousand_years = 5_000 * 365 * 24 * 60 * 60 * 1_000_i64;
        assert_eq!(
            deadline(Until::After(Duration::MAX), called),
            doc! { "$add": [NOW, five_thousand_years] }.into()
        );
    }
}
