//! The word as one text: the field that change streams carry.
//!
//! The server logs an update as the parts of sub-fields that changed. A stream that passed those on would tell half a
//! word, so each write renders the whole of it into one scalar field. Ids and scopes have no control characters, so
//! control characters divide its parts.

use ::mongodb::bson::{Document, doc};

use super::{
    expr::{cond, is_one_of, path},
    fields::{DISABLED, Fields, KNOWN, ours},
    stored::resting,
};
use crate::{
    limit::{Scope, Words},
    store::{Born, Standing},
};

/// Divides the parts of a rest.
const UNIT: char = '\u{1f}';
/// Divides the rests of scopes.
const RECORD: char = '\u{1e}';

impl Fields {
    /// Renders the word of a document.
    pub(super) fn rendered(&self) -> Document {
        let unit = UNIT.to_string();
        let text = |value: &str| doc! { "$toString": value };
        let millis = |date: &str| doc! { "$toString": { "$toLong": date } };
        let scope = doc! { "$concat": [
            "$$value", RECORD.to_string(), "$$this.s", &unit, millis("$$this.u"), &unit, text("$$this.r"),
        ] };
        let limits = doc! { "$ifNull": [path(ours::LIMITS), []] };
        doc! { "$concat": [
            path(ours::BORN), &unit, text("$rest.g"), &unit, millis("$rest.u"), &unit, text("$rest.r"), &unit,
            cond(is_one_of(path(&self.status), KNOWN), "", DISABLED),
            { "$reduce": { "input": limits, "initialValue": "", "in": scope } },
        ] }
    }
}

/// Reads it again, with times that count from the epoch. `None` if another program has made something else of it.
pub(super) fn parse(rendered: &str) -> Option<Standing> {
    let mut records = rendered.split(RECORD);
    let key: Vec<_> = records.next()?.split(UNIT).collect();
    let [born, generation, until, reason, disabled] = key[..] else { return None };
    let mut words = Words { generation: generation.parse().ok()?, ..Words::default() };
    words.key = resting(until.parse().ok()?, reason.parse().ok()?);
    for record in records {
        let scope: Vec<_> = record.split(UNIT).collect();
        let [name, until, reason] = scope[..] else { return None };
        let resting = resting(until.parse().ok()?, reason.parse().ok()?)?;
        words.scopes.insert(Scope::new(name).ok()?, resting);
    }
    Some(Standing::new(Born(u64::from_str_radix(born, 16).ok()?), words, disabled == DISABLED))
}
