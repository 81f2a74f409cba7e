//! Expressions that the server evaluates.

use ::mongodb::bson::{Bson, Document, doc};

/// The server's time, the same throughout a command.
pub(super) const NOW: &str = "$$NOW";

/// A field that is set to this value is removed.
pub(super) const REMOVE: &str = "$$REMOVE";

/// The value of a field.
pub(super) fn path(field: &str) -> String {
    format!("${field}")
}

/// A text from outside: an id, a scope or a secret may begin with `$`.
pub(super) fn literal(text: &str) -> Document {
    doc! { "$literal": text }
}

pub(super) fn cond(
    condition: impl Into<Bson>,
    then: impl Into<Bson>,
    otherwise: impl Into<Bson>,
) -> Document {
    doc! { "$cond": [condition, then, otherwise] }
}

/// The value of the first case that holds.
pub(super) fn switch<const N: usize>(cases: [(Document, Bson); N], otherwise: impl Into<Bson>) -> Document {
    let branches = cases.map(|(case, then)| doc! { "case": case, "then": then });
    doc! { "$switch": { "branches": branches.to_vec(), "default": otherwise } }
}

pub(super) fn all<const N: usize>(conditions: [Document; N]) -> Document {
    doc! { "$and": conditions.to_vec() }
}

pub(super) fn any<const N: usize>(conditions: [Document; N]) -> Document {
    doc! { "$or": conditions.to_vec() }
}

pub(super) fn not(condition: impl Into<Bson>) -> Document {
    doc! { "$not": [condition] }
}

pub(super) fn eq(one: impl Into<Bson>, other: impl Into<Bson>) -> Document {
    doc! { "$eq": [one, other] }
}

pub(super) fn is_one_of<const N: usize>(value: impl Into<Bson>, values: [&str; N]) -> Document {
    doc! { "$in": [value, values.to_vec()] }
}

/// Whether a value has this BSON type. A filter's `$type` would look into arrays, too.
pub(super) fn is_a(value: &str, bson_type: &str) -> Document {
    eq(doc! { "$type": value }, bson_type)
}

pub(super) fn is_date(value: &str) -> Document {
    is_a(value, "date")
}

pub(super) fn is_whole_number(value: &str) -> Document {
    is_one_of(doc! { "$type": value }, ["int", "long"])
}

/// The fields of the document, with these in the place of their namesakes. A field without a value stays as it is.
pub(super) fn replace_with(fields: impl Into<Bson>) -> Document {
    doc! { "$mergeObjects": ["$$ROOT", fields] }
}
