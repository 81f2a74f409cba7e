//! Many keys at once: one `id|secret` a line, or JSON. What can't be read of one is no matter for the others.

use std::{fmt, iter, str};

use axum::http::StatusCode;
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{MapAccess, SeqAccess, Visitor},
};
use serde_json::Value;
use tower_key_rotation::{KeyId, KeyPool, OperateError, Secret};

use super::{
    action::{Action, cannot_name},
    refusal::Refusal,
};

/// A line, or an entry of JSON, and the key that it has.
pub(super) struct Line {
    number: usize,
    key: Result<(String, Secret), &'static str>,
}

/// What became of all of them.
#[derive(Serialize)]
pub(super) struct Imported {
    added: usize,
    refused: usize,
    lines: Vec<Outcome>,
}

#[derive(Serialize)]
struct Outcome {
    line: usize,
    id: Option<KeyId>,
    error: Option<String>,
}

pub(super) fn read(media_type: &str, body: &[u8]) -> Result<Vec<Line>, Refusal> {
    match media_type {
        "text/plain" => Ok(lines(body)),
        "application/json" => json(body),
        _ => Err(Refusal::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "it is text/plain or application/json")),
    }
}

pub(super) async fn add(pool: &KeyPool, lines: Vec<Line>) -> Imported {
    let (mut outcomes, mut named, mut keys) = (Vec::new(), Vec::new(), Vec::new());
    for Line { number, key } in lines {
        match key {
            Err(reason) => outcomes.push(Outcome::refused(number, None, reason)),
            Ok((id, secret)) => match cannot_name(&id) {
                Some(reason) => outcomes.push(Outcome::refused(number, KeyId::new(id).ok(), reason)),
                None => {
                    named.push((number, id.clone()));
                    keys.push((id, secret));
                }
            },
        }
    }
    let added = pool.insert_all(keys).await;
    outcomes.extend(named.into_iter().zip(added).map(|((line, id), added)| Outcome::of(line, id, added)));
    outcomes.sort_by_key(|outcome| outcome.line);
    Imported::of(outcomes)
}

impl Outcome {
    fn refused(line: usize, id: Option<KeyId>, reason: &str) -> Self {
        Self { line, id, error: Some(reason.to_owned()) }
    }

    fn of(line: usize, id: String, added: Result<(), OperateError>) -> Self {
        Action::Add.log(&id, &added);
        let error = added.err().map(|error| Action::Add.failed(&error));
        // What can't be an id is not repeated: it may be a secret that came to a wrong place.
        Self { line, id: KeyId::new(id).ok(), error }
    }
}

impl Imported {
    fn of(lines: Vec<Outcome>) -> Self {
        let added = lines.iter().filter(|line| line.error.is_none()).count();
        let refused = lines.len() - added;
        tracing::info!(added, refused, "keys imported by the admin");
        Self { added, refused, lines }
    }
}

fn lines(text: &[u8]) -> Vec<Line> {
    let text = text.strip_prefix("\u{feff}".as_bytes()).unwrap_or(text);
    (1..)
        .zip(text.split(|byte| *byte == b'\n'))
        .map(|(number, line)| (number, line.strip_suffix(b"\r").unwrap_or(line)))
        .filter(|(_, line)| !line.trim_ascii().is_empty() && !line.trim_ascii().starts_with(b"#"))
        .map(|(number, line)| Line { number, key: divided(line) })
        .collect()
}

fn divided(line: &[u8]) -> Result<(String, Secret), &'static str> {
    let line = str::from_utf8(line).map_err(|_| "it is not UTF-8")?;
    let (id, secret) = line.split_once('|').ok_or("there is no | between an id and a secret")?;
    Ok((id.trim().to_owned(), secret.into()))
}

/// `[{"id": …, "secret": …}, …]` or `{"id": "secret", …}`.
fn json(text: &[u8]) -> Result<Vec<Line>, Refusal> {
    let keys: Vec<_> = match serde_json::from_slice(text) {
        Ok(Entries::Named(keys)) => keys.into_iter().map(|(id, secret)| named(id, secret)).collect(),
        Ok(Entries::Listed(entries)) => entries.into_iter().map(entry).collect(),
        Err(error) if error.is_data() => vec![Err(FORM)],
        Err(error) => return Err(no_json(&error)),
    };
    Ok((1..).zip(keys).map(|(number, key)| Line { number, key }).collect())
}

/// All of them, also where two have the same name.
enum Entries {
    Named(Vec<(String, Value)>),
    Listed(Vec<Value>),
}

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OfEither;

        impl<'de> Visitor<'de> for OfEither {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object or a list")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                iter::from_fn(|| map.next_entry().transpose()).collect::<Result<_, _>>().map(Entries::Named)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Entries, A::Error> {
                iter::from_fn(|| list.next_element().transpose())
                    .collect::<Result<_, _>>()
                    .map(Entries::Listed)
            }
        }

        deserializer.deserialize_any(OfEither)
    }
}

/// Where it isn't, and not what stands there.
fn no_json(error: &serde_json::Error) -> Refusal {
    Refusal::bad_request(format!("it is no JSON from line {}, column {} on", error.line(), error.column()))
}

const FORM: &str = "it is not an object with an \"id\" and a \"secret\", both text";

fn entry(entry: Value) -> Result<(String, Secret), &'static str> {
    match entry {
        Value::Object(mut entry) => match (entry.remove("id"), entry.remove("secret")) {
            (Some(Value::String(id)), Some(secret)) => named(id, secret),
            _ => Err(FORM),
        },
        _ => Err(FORM),
    }
}

fn named(id: String, secret: Value) -> Result<(String, Secret), &'static str> {
    match secret {
        Value::String(secret) => Ok((id, secret.into())),
        _ => Err(FORM),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(lines: Vec<Line>) -> Vec<(usize, Option<(String, String)>)> {
        let key = |line: Line| line.key.ok().map(|(id, secret)| (id, secret.expose().to_owned()));
        lines.into_iter().map(|line| (line.number, key(line))).collect()
    }

    fn read_json(text: &[u8]) -> Vec<Line> {
        json(text).unwrap_or_else(|_| panic!("it is JSON"))
    }

    fn key(id: &str, secret: &str) -> Option<(String, String)> {
        Some((id.to_owned(), secret.to_owned()))
    }

    #[test]
    fn a_line_without_a_bar_is_refused_and_the_others_are_read() {
        assert_eq!(
            shown(lines(b"\xef\xbb\xbf# ours\r\nalpha|sk-1\r\n\nsk-2\n\xff|sk-3\n beta |sk|4 ")),
            [(2, key("alpha", "sk-1")), (4, None), (5, None), (6, key("beta", "sk|4 "))]
        );
    }

    #[test]
    fn an_entry_of_another_form_is_refused_and_the_others_are_read() {
        assert_eq!(
            shown(read_json(
                br#"[{"id":"alpha","secret":"sk-1"}, "sk-2", {"id":"beta"}, {"id":"gamma","secret":4}]"#
            )),
            [(1, key("alpha", "sk-1")), (2, None), (3, None), (4, None)]
        );
        assert_eq!(shown(read_json(br#"{"alpha":"sk-1","beta":2}"#)), [(1, key("alpha", "sk-1")), (2, None)]);
        assert_eq!(
            shown(read_json(br#"{"beta":"sk-1","alpha":"sk-2","beta":"sk-3"}"#)),
            [(1, key("beta", "sk-1")), (2, key("alpha", "sk-2")), (3, key("beta", "sk-3"))]
        );
        assert_eq!(shown(read_json(b"4")), [(1, None)]);
        assert!(json(b"{").is_err());
    }
}
