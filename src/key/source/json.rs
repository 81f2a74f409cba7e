//! Keys in JSON.

use std::{fmt, sync::Arc};

use serde_core::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::{
    entry::Entries,
    fields::{Fields, Value},
};
use crate::key::rejected::{Place, Reason, Rejected};

/// Reads `["secret", …]`, `[{"id": "…", "secret": "…", …}, …]`, `{"id": "secret", …}` or one key alone.
pub(super) fn read(name: &Arc<str>, text: &[u8], entries: &mut Entries) -> Result<(), Rejected> {
    let in_text = |error: serde_json::Error| syntax_error(name, &error);
    let mut push = |fields| {
        let place = Place::Entry(name.clone(), entries.len() + 1);
        entries.push(place, fields);
    };
    match first(text) {
        Some(b'[') => {
            let list: Vec<&RawValue> = serde_json::from_slice(text).map_err(in_text)?;
            list.into_iter().map(|entry| fields(entry.get())).for_each(push);
        }
        Some(b'{') => {
            let members: Members<'_> = serde_json::from_slice(text).map_err(in_text)?;
            if members.are_one_key() {
                push(members.into_fields());
            } else {
                members.0.into_iter().map(|(id, secret)| named(id, secret.get())).for_each(push);
            }
        }
        _ => {
            let single: &RawValue = serde_json::from_slice(text).map_err(in_text)?;
            push(fields(single.get()));
        }
    }
    Ok(())
}

/// Reads an object that is one key.
pub(super) fn one(name: &Arc<str>, text: &[u8]) -> Result<Fields, Rejected> {
    let value: &RawValue = serde_json::from_slice(text).map_err(|error| syntax_error(name, &error))?;
    Ok(if value.get().starts_with('{') { fields(value.get()) } else { Fields::wrong(None, Reason::Form) })
}

fn first(text: &[u8]) -> Option<u8> {
    text.trim_ascii_start().first().copied()
}

/// `serde_json` describes errors in the syntax in fixed words, and quotes the text only in others.
fn syntax_error(name: &Arc<str>, error: &serde_json::Error) -> Rejected {
    let (line, column) = (error.line(), error.column());
    let said = error.to_string();
    let said = match said.strip_suffix(&format!(" at line {line} column {column}")) {
        Some(said) if !error.is_data() => said,
        _ => "unexpected content",
    };
    let reason = Reason::Syntax { format: "JSON", error: said.into() };
    Rejected::new(Place::Column(name.clone(), line, column), None, reason)
}

/// The fields of an entry: an object, or a bare secret.
fn fields(entry: &str) -> Fields {
    match value(entry) {
        Value::Text(secret) => Fields::new(None, secret),
        _ => match serde_json::from_str(entry) {
            Ok::<Members<'_>, _>(members) => members.into_fields(),
            Err(_) => Fields::wrong(None, Reason::Form),
        },
    }
}

fn named(id: String, secret: &str) -> Fields {
    match value(secret).text() {
        Some(secret) => Fields::new(Some(id), secret),
        None => Fields::wrong(Some(id), Reason::Form),
    }
}

fn value(json: &str) -> Value {
    if let Ok(text) = serde_json::from_str(json) {
        Value::Text(text)
    } else if let Ok(number) = serde_json::from_str(json) {
        Value::Number(number)
    } else {
        Value::Other
    }
}

/// The members of an object in their order. `serde_json::Map` would drop all but the last of the same name, unnoticed.
struct Members<'a>(Vec<(String, &'a RawValue)>);

impl Members<'_> {
    /// An object with both an `id` and a `secret` is one key. Were it two keys of these names, a mistyped third field would
    /// send the key's id as a secret.
    fn are_one_key(&self) -> bool {
        ["id", "secret"].iter().all(|name| self.0.iter().any(|(own, _)| own == name))
    }

    fn into_fields(self) -> Fields {
        let mut fields = Fields::default();
        for (name, json) in self.0 {
            fields.set(&name, value(json.get()));
        }
        fields
    }
}

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OfAnObject;

        impl<'de> Visitor<'de> for OfAnObject {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Members<'de>, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = object.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }

        deserializer.deserialize_map(OfAnObject)
    }
}
