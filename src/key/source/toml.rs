//! Keys in TOML: a `[[key]]` table each.

use std::{str, sync::Arc};

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{
    entry::Entries,
    fields::{Fields, Value},
};
use crate::key::rejected::{Place, Reason, Rejected};

/// `toml` describes errors in fixed words: it quotes the text only in what this function does not print.
pub(super) fn read(name: &Arc<str>, text: &[u8], entries: &mut Entries) -> Result<(), Rejected> {
    let wrong = |before: &[u8], error: &str| {
        let (line, column) = line_and_column(before);
        let reason = Reason::Syntax { format: "TOML", error: error.into() };
        Rejected::new(Place::Column(name.clone(), line, column), None, reason)
    };
    let text = str::from_utf8(text).map_err(|error| wrong(&text[..error.valid_up_to()], "not UTF-8"))?;
    let document = DeTable::parse(text).map_err(|error| {
        let at = error.span().map_or(0, |span| span.start.min(text.len()));
        wrong(&text.as_bytes()[..at], error.message())
    })?;
    let mut keys: Vec<_> = document
        .into_inner()
        .into_iter()
        .flat_map(
            |(name, value)| {
                if name.get_ref() == "key" { keys(value) } else { vec![no_key(name.span().start)] }
            },
        )
        .collect();
    keys.sort_by_key(|(at, _)| *at);
    let (mut line, mut from) = (1, 0);
    for (at, fields) in keys {
        line += text.as_bytes()[from..at].iter().filter(|byte| **byte == b'\n').count();
        from = at;
        entries.push(Place::Line(name.clone(), line), fields);
    }
    Ok(())
}

fn line_and_column(before: &[u8]) -> (usize, usize) {
    let lines = before.split(|byte| *byte == b'\n');
    let last = lines.clone().next_back().unwrap_or_default();
    (lines.count(), String::from_utf8_lossy(last).chars().count() + 1)
}

type At = (usize, Fields);

fn no_key(at: usize) -> At {
    (at, Fields::wrong(None, Reason::NoKeyTable))
}

fn keys(value: Spanned<DeValue<'_>>) -> Vec<At> {
    let at = value.span().start;
    let DeValue::Array(keys) = value.into_inner() else { return vec![no_key(at)] };
    keys.into_iter().map(key).collect()
}

fn key(value: Spanned<DeValue<'_>>) -> At {
    let at = value.span().start;
    let DeValue::Table(table) = value.into_inner() else { return no_key(at) };
    let mut fields = Fields::default();
    for (name, value) in table {
        fields.set(name.get_ref(), of(value.into_inner()));
    }
    (at, fields)
}

fn of(value: DeValue<'_>) -> Value {
    match value {
        DeValue::String(text) => Value::Text(text.into_owned()),
        DeValue::Integer(number) => {
            u64::from_str_radix(number.as_str(), number.radix()).map_or(Value::Other, Value::Number)
        }
        _ => Value::Other,
    }
}
