//! The word of a document, and how it is joined: in expressions, since only the server sees both atomically.
//!
//! A document holds the word as `rest: { g, u, r }` (generation, until, reason), and beside it what other programs
//! read and write: status and date. BSON compares embedded documents field by field, so `$max` over words is the
//! join. Every write first **absorbs** what other programs have written since the last one, and at its end **shows**
//! them the word as status and date.

use ::mongodb::bson::{Bson, Document, doc};

use super::{
    expr::{
        NOW, REMOVE, all, any, cond, eq, is_a, is_date, is_one_of, is_whole_number, literal, not, path,
        replace_with, switch,
    },
    fields::{DISABLED, ERROR, EXHAUSTED, Fields, HEALTHY, KNOWN, RATE_LIMITED, ours},
    stored::{FOREVER, NEVER, NO_REASON, code},
};
use crate::{
    limit::{Rest, Words},
    store::Born,
};

/// How long a limited key rests, in milliseconds, if another program gave it no date.
const WITHOUT_A_DATE: i64 = 120_000;

/// How the error of a key begins that rests in scopes alone.
const SCOPES_REST: &str = "rests in ";

/// The BSON types of a date that is none. A value of any other type is another program's, and stays.
const NO_DATE: [&str; 4] = ["missing", "null", "undefined", "array"];

const GENERATION: &str = "$rest.g";
const UNTIL: &str = "$rest.u";
const REASON: &str = "$rest.r";
const REST: &str = "$rest";

pub(super) fn word(generation: impl Into<Bson>, until: impl Into<Bson>, reason: impl Into<Bson>) -> Document {
    doc! { "g": generation, "u": until, "r": reason }
}

/// The word of the next generation, in which nothing rests.
pub(super) fn reset() -> Document {
    word(next_generation(), NEVER, NO_REASON)
}

/// The word of the next generation, in which the key rests as before.
pub(super) fn next_generation_of_the_same() -> Document {
    word(next_generation(), UNTIL, REASON)
}

fn next_generation() -> Document {
    doc! { "$add": [GENERATION, 1_i64] }
}

/// The word of a new document.
pub(super) fn first() -> Document {
    word(0_i64, NEVER, NO_REASON)
}

/// The same word with a rest that only a reset ends.
pub(super) fn for_good() -> Document {
    word(GENERATION, FOREVER, doc! { "$max": [REASON, code(Rest::Exhausted)] })
}

pub(super) fn is_resting() -> Document {
    doc! { "$gt": [UNTIL, NOW] }
}

/// Whether the key is exhausted or revoked.
pub(super) fn has_failed() -> Document {
    all([is_resting(), doc! { "$gte": [REASON, code(Rest::Exhausted)] }])
}

fn own() -> Document {
    doc! { "u": UNTIL, "r": REASON }
}

/// Whether a document has a word at all.
fn has_word() -> Document {
    all([is_a(REST, "object"), is_whole_number(GENERATION), is_date(UNTIL), is_whole_number(REASON)])
}

/// The server's own digest of the stored secret. It tells whether another program has changed the secret, and no
/// statement has to carry that.
pub(super) fn hash_of(secret: &str) -> Document {
    doc! { "$toHashedIndexKey": path(secret) }
}

fn says(until: impl Into<Bson>, reason: i32) -> Document {
    doc! { "u": until, "r": reason }
}

impl Fields {
    /// Whether a document can be read as a key. One that cannot is never written to.
    pub(super) fn is_readable(&self) -> Document {
        all([is_a(&path(&self.status), "string"), is_a(&path(&self.api_key), "string")])
    }

    /// Whether a document is the key object that it was at the last write. It is another one if its secret was
    /// changed, or its own fields were removed.
    pub(super) fn is_same_key(&self) -> Document {
        let born = path(ours::BORN);
        let length = doc! { "$strLenBytes": cond(is_a(&born, "string"), born, "") };
        let is_born = eq(length, hex(Born(0)).len() as i32);
        all([has_word(), is_born, self.has_same_secret()])
    }

    fn has_same_secret(&self) -> Document {
        eq(path(ours::SECRET_HASH), hash_of(&self.api_key))
    }

    /// What status and date say, as `{ u, r }`.
    pub(super) fn said(&self) -> Document {
        let said = switch(
            [
                (eq("$$status", HEALTHY), says(NEVER, NO_REASON).into()),
                (eq("$$status", RATE_LIMITED), says(self.limited_until(), code(Rest::RateLimited)).into()),
                (eq("$$status", EXHAUSTED), says(self.exhausted_until(), code(Rest::Exhausted)).into()),
                (eq("$$status", ERROR), says(FOREVER, code(Rest::Revoked)).into()),
            ],
            // A key that is disabled, in whatever word, rests for what it rested for before.
            cond(has_word(), own(), says(NEVER, NO_REASON)),
        );
        doc! { "$let": { "vars": { "status": self.status_said() }, "in": said } }
    }

    /// The status, or the one beneath of a key that an earlier version of this crate disabled.
    fn status_said(&self) -> Document {
        let status = path(&self.status);
        let was_disabled_before = all([eq(&status, DISABLED), not(has_word())]);
        cond(was_disabled_before, path(ours::DISABLED_FROM), status)
    }

    /// A date of another type means nothing, but must not move the deadline with each look.
    fn limited_until(&self) -> Document {
        let date = path(&self.cooldown_until);
        let has_got_one = all([has_word(), eq(REASON, code(Rest::RateLimited))]);
        let from_now = doc! { "$add": [NOW, WITHOUT_A_DATE] };
        cond(is_date(&date), date, cond(has_got_one, UNTIL, from_now))
    }

    /// Other programs write dates of another meaning beside this status: only a date of this crate's ends it.
    fn exhausted_until(&self) -> Document {
        let date = path(&self.cooldown_until);
        let is_ours = all([has_word(), eq(REASON, code(Rest::Exhausted)), eq(UNTIL, &date)]);
        let earlier = path(ours::EXHAUSTED_UNTIL);
        let was_ours = all([is_date(&earlier), eq(earlier, &date)]);
        cond(any([is_ours, was_ours]), date, FOREVER)
    }

    /// Whether absorbing would change nothing.
    pub(super) fn is_settled(&self) -> Document {
        let agrees = eq(self.said(), own());
        all([self.is_same_key(), agrees, not(self.lacks_its_date())])
    }

    fn lacks_its_date(&self) -> Document {
        all([eq(path(&self.status), RATE_LIMITED), self.has_one_of(NO_DATE)])
    }

    /// Whether the date has one of these BSON types.
    fn has_one_of<const N: usize>(&self, bson_types: [&str; N]) -> Document {
        is_one_of(doc! { "$type": path(&self.cooldown_until) }, bson_types)
    }

    /// Takes in what other programs have written since the last write.
    fn absorb(&self, born: Born) -> [Document; 2] {
        let absorbed = cond(self.is_same_key(), absorb_same(), self.absorb_new(born));
        let absorbed = doc! { "$let": { "vars": { "said": self.said() }, "in": absorbed } };
        [doc! { "$replaceWith": replace_with(absorbed) }, doc! { "$unset": ours::FORMER.to_vec() }]
    }

    /// Of a document that this crate has not seen before, or that has another secret now.
    fn absorb_new(&self, born: Born) -> Document {
        doc! {
            ours::REST: word(0_i64, "$$said.u", "$$said.r"),
            ours::BORN: hex(born),
            ours::SECRET_HASH: hash_of(&self.api_key),
            // A backup has rests of scopes, too.
            ours::LIMITS: cond(self.has_same_secret(), live(), Bson::Array(Vec::new())),
        }
    }

    /// Absorbs and nothing more. Other programs see no difference, but that a limited key gets the date that it lacks.
    /// Ended rests are left to the sweep, which counts them.
    pub(super) fn settle(&self, born: Born) -> Vec<Document> {
        let unless_it_lacks =
            |field: &str, otherwise: &str| cond(self.lacks_its_date(), otherwise, path(field));
        let dated = doc! { "$set": {
            &self.cooldown_until: unless_it_lacks(&self.cooldown_until, UNTIL),
            &self.updated_at: unless_it_lacks(&self.updated_at, NOW),
            ours::LIMITS: limits_if_any(),
        } };
        let told = doc! { "$set": { ours::WORDS: self.rendered() } };
        self.absorb(born).into_iter().chain([dated, told]).collect()
    }

    /// Absorbs, changes the word, and shows it.
    pub(super) fn write(&self, born: Born, changes: impl IntoIterator<Item = Document>) -> Vec<Document> {
        self.absorb(born).into_iter().chain(changes).chain(self.show()).collect()
    }

    /// Whether the error is what [`scopes_rest`] says.
    fn says_that_scopes_rest(&self) -> Document {
        let last_error = path(&self.last_error);
        let text = cond(is_a(&last_error, "string"), last_error, "");
        eq(doc! { "$indexOfBytes": [text, SCOPES_REST] }, 0)
    }

    /// Whether date and error are this crate's to show. Beside another program's status they have a meaning of its own.
    pub(super) fn is_shown(&self) -> Document {
        is_one_of(path(&self.status), [HEALTHY, RATE_LIMITED, EXHAUSTED, ERROR, DISABLED])
    }

    /// Shows the word to other programs, as status and date, and to change streams. An ended rest is none from then on:
    /// that a sweep ended it must show in the word, or streams could not tell it from an edit by another program.
    pub(super) fn show(&self) -> [Document; 2] {
        let [status, date, last_error] =
            [&self.status, &self.cooldown_until, &self.last_error].map(|field| path(field));
        let due = switch(
            [
                (not(is_resting()), HEALTHY.into()),
                (eq(REASON, code(Rest::RateLimited)), RATE_LIMITED.into()),
                (eq(REASON, code(Rest::Exhausted)), EXHAUSTED.into()),
            ],
            ERROR,
        );
        let was_resting = is_one_of(&status, [RATE_LIMITED, EXHAUSTED, ERROR]);
        let has_rested = was_resting.clone();
        let has_failed_for_good = all([has_failed(), doc! { "$gte": [UNTIL, FOREVER] }]);
        let is_ours_to_set = any([is_date(&date), self.has_one_of(NO_DATE)]);
        let date_shown = switch(
            [
                (not(self.is_shown()), date.clone().into()),
                (not(is_resting()), cond(all([was_resting, is_date(&date)]), Bson::Null, &date).into()),
                // Beside a failure that has no end, a date is another program's.
                (has_failed_for_good, cond(eq(&status, due.clone()), &date, Bson::Null).into()),
                (is_ours_to_set, UNTIL.into()),
            ],
            date,
        );
        let if_failed = |field: &str, otherwise: Bson| cond(has_failed(), path(field), otherwise);
        let set = doc! {
            &self.status: cond(is_one_of(&status, KNOWN), due, status),
            &self.cooldown_until: date_shown,
            &self.last_error: switch(
                [
                    (any([is_resting(), not(self.is_shown())]), last_error.clone().into()),
                    (has_limits(), scopes_rest().into()),
                    (any([has_rested, self.says_that_scopes_rest()]), "".into()),
                ],
                last_error,
            ),
            ours::REST: cond(is_resting(), REST, word(GENERATION, NEVER, NO_REASON)),
            ours::LIMITS: limits_if_any(),
            ours::FAILED_AT: if_failed(ours::FAILED_AT, REMOVE.into()),
            ours::RETIRED_AT: if_failed(ours::RETIRED_AT, REMOVE.into()),
            ours::REPLACED_BY: if_failed(ours::REPLACED_BY, replacement_under_way().into()),
        };
        // A write that changes nothing is no update.
        let is_same = eq("$$words", path(ours::WORDS));
        let told = doc! {
            ours::WORDS: "$$words",
            &self.updated_at: cond(is_same, path(&self.updated_at), NOW),
        };
        let told = doc! { "$let": { "vars": { "words": self.rendered() }, "in": replace_with(told) } };
        [doc! { "$set": set }, doc! { "$replaceWith": told }]
    }
}

/// A rest that is shorter than the word's is a reset, if the word's has not ended. Any other one is of the same
/// generation.
fn absorb_same() -> Document {
    let is_reset = all([is_resting(), doc! { "$lt": ["$$said", own()] }]);
    doc! { "$let": {
        "vars": { "is_reset": is_reset },
        "in": {
            ours::REST: word(cond("$$is_reset", next_generation(), GENERATION), "$$said.u", "$$said.r"),
            ours::LIMITS: cond("$$is_reset", Bson::Array(Vec::new()), live()),
        },
    } }
}

/// A new document has no list.
fn has_limits() -> Document {
    let limits = path(ours::LIMITS);
    all([doc! { "$isArray": &limits }, doc! { "$ne": [limits, Bson::Array(Vec::new())] }])
}

/// For programs that know nothing of scopes: the status of such a key is that of a healthy one.
fn scopes_rest() -> Document {
    let count = doc! { "$toString": { "$size": path(ours::LIMITS) } };
    doc! { "$concat": [SCOPES_REST, count, " of its scopes, see ", ours::LIMITS] }
}

/// A list that is empty is none.
fn limits_if_any() -> Document {
    let limits = path(ours::LIMITS);
    cond(eq(&limits, Bson::Array(Vec::new())), REMOVE, limits)
}

/// The rests of scopes that have not ended.
fn live() -> Document {
    let limits = path(ours::LIMITS);
    let is_live = all([
        is_a("$$this.s", "string"),
        is_date("$$this.u"),
        is_whole_number("$$this.r"),
        doc! { "$gt": ["$$this.u", NOW] },
    ]);
    let list = cond(doc! { "$isArray": &limits }, limits, Bson::Array(Vec::new()));
    doc! { "$filter": { "input": list, "cond": is_live } }
}

/// The rest of a scope.
pub(super) fn limit(scope: &str, until: impl Into<Bson>, reason: i32) -> Document {
    doc! { "s": literal(scope), "u": until, "r": reason }
}

/// The rests of scopes, joined with those that a mark of that generation brings.
pub(super) fn join_limits(generation: i64, marked: Vec<Document>) -> Document {
    let limits = path(ours::LIMITS);
    if marked.is_empty() {
        return cond(doc! { "$gt": [generation, GENERATION] }, Bson::Array(Vec::new()), limits);
    }
    let one_of = |list: Bson, scope: &str| {
        let found = doc! { "$filter": { "input": list, "as": "other", "cond": eq("$$other.s", scope) } };
        doc! { "$arrayElemAt": [found, 0] }
    };
    let marked = Bson::from(marked);
    let longer = doc! { "$max": ["$$this", one_of("$$marked".into(), "$$this.s")] };
    let known = doc! { "$map": { "input": &limits, "in": longer } };
    let is_new = not(doc! { "$in": ["$$this.s", format!("{limits}.s")] });
    let new = doc! { "$filter": { "input": "$$marked", "cond": is_new } };
    let joined = switch(
        [
            (doc! { "$lt": [generation, GENERATION] }, limits.into()),
            (eq(generation, GENERATION), doc! { "$concatArrays": [known, new] }.into()),
        ],
        "$$marked",
    );
    let joined = doc! { "$let": { "vars": { "marked": marked }, "in": joined } };
    doc! { "$let": { "vars": { "joined": joined }, "in": without_the_first_to_end("$$joined") } }
}

/// As [`Words::join`] does.
fn without_the_first_to_end(limits: &str) -> Document {
    let most = Words::MOST_SCOPES as i32;
    let last_first = doc! { "$sortArray": { "input": limits, "sortBy": { "u": -1, "r": -1, "s": 1 } } };
    let is_too_many = doc! { "$gt": [{ "$size": limits }, most] };
    cond(is_too_many, doc! { "$slice": [last_first, most] }, limits)
}

/// The rests of scopes but for one.
pub(super) fn limits_without(scope: &str) -> Document {
    doc! { "$filter": { "input": path(ours::LIMITS), "cond": { "$ne": ["$$this.s", literal(scope)] } } }
}

/// The standby key that was planned for a key, unless it has taken the key's place: a claimed one is used for nothing
/// else.
pub(super) fn replacement_under_way() -> Document {
    cond(is_date(&path(ours::RETIRED_AT)), REMOVE, path(ours::REPLACED_BY))
}

pub(super) fn hex(born: Born) -> String {
    format!("{:016x}", born.0)
}
