//! Keys as people write them down: in an environment variable, a file, JSON.

use std::{fmt, path::Path};

use serde_json::Value;

use super::{
    inject::UnusableSecret,
    secret::{InvalidKeyId, KeyId, Secret},
};

/// A key as it was given, not yet checked.
#[derive(Debug)]
pub(crate) struct Candidate {
    pub(crate) place: Place,
    pub(crate) id: Option<String>,
    pub(crate) secret: Result<Secret, Rejection>,
}

/// Something given to the builder that can't be used as a key.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Rejected {
    /// Where it stands: a file and line, for example.
    pub place: Place,
    /// Its id, if it has a usable one.
    pub id: Option<KeyId>,
    /// What is wrong with it.
    pub reason: Rejection,
}

impl fmt::Display for Rejected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.place)?;
        if let Some(id) = &self.id {
            write!(f, "key {id}: ")?;
        }
        self.reason.fmt(f)
    }
}

/// Where a key was given.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Place {
    /// In code, as the key of that number.
    Code(usize),
    /// In an environment variable, as its entry of that number, from 1.
    Env(String, usize),
    /// In a file, on that line.
    Line(String, usize),
    /// In a JSON file, as its entry of that number, from 1.
    Entry(String, usize),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(number) => write!(f, "key {number} in code"),
            Self::Env(variable, entry) => write!(f, "{variable}, entry {entry}"),
            Self::Line(file, line) => write!(f, "{file}, line {line}"),
            Self::Entry(file, entry) => write!(f, "{file}, entry {entry}"),
        }
    }
}

/// Why something can't be used as a key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Rejection {
    /// Its id can't be one.
    #[error(transparent)]
    Id(#[from] InvalidKeyId),
    /// No request could carry its secret.
    #[error(transparent)]
    Secret(#[from] UnusableSecret),
    /// Another key has its id.
    #[error("another key has this id")]
    DuplicateId,
    /// Another key, the one named, has its secret.
    #[error("key {0} has the same secret")]
    DuplicateSecret(KeyId),
    /// A JSON entry that is neither a secret nor `{"id": …, "secret": …}`.
    #[error("neither a string nor an object with a string \"secret\", and perhaps a string \"id\"")]
    Form,
}

/// `id=secret,…` or bare secrets. Spaces after a comma belong to the comma.
pub(crate) fn env(variable: &str, text: &str) -> Vec<Candidate> {
    (1..)
        .zip(text.split(','))
        .map(|(number, entry)| (number, entry.trim_start()))
        .filter(|(_, entry)| !entry.is_empty())
        .map(|(number, entry)| {
            // The first `=` divides, unless all behind it is the padding of a base64 secret.
            let divided =
                entry.split_once('=').filter(|(_, secret)| !is_padding(secret) || !is_padded(entry));
            candidate(Place::Env(variable.to_owned(), number), divided, entry)
        })
        .collect()
}

fn is_padding(rest: &str) -> bool {
    matches!(rest, "" | "=")
}

/// Long enough for a secret, of which something may stand before the base64. Anything shorter is rather a name whose
/// secret is missing.
fn is_padded(entry: &str) -> bool {
    entry.len() >= 16
}

/// `id|secret` or a bare secret a line; empty lines and those that begin with `#` are skipped.
pub(crate) fn lines(file: &Path, text: &str) -> Vec<Candidate> {
    (1..)
        .zip(without_byte_order_mark(text).lines())
        .filter(|(_, line)| !line.trim().is_empty() && !line.trim_start().starts_with('#'))
        .map(|(number, line)| {
            candidate(Place::Line(file.display().to_string(), number), line.split_once('|'), line)
        })
        .collect()
}

fn candidate(place: Place, divided: Option<(&str, &str)>, whole: &str) -> Candidate {
    let (id, secret) = match divided {
        Some((id, secret)) => (Some(id.trim().to_owned()), secret),
        None => (None, whole),
    };
    Candidate { place, id, secret: Ok(secret.into()) }
}

/// Whether a file's text is JSON rather than lines.
pub(crate) fn is_json(file: &Path, text: &str) -> bool {
    let named = file.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json"));
    named || without_byte_order_mark(text).trim_start().starts_with(['[', '{'])
}

/// `["secret", …]`, `[{"id": "…", "secret": "…"}, …]` or `{"id": "secret", …}`.
pub(crate) fn json(file: &Path, text: &str) -> Result<Vec<Candidate>, serde_json::Error> {
    let entries: Vec<(Option<String>, Value)> = match serde_json::from_str(without_byte_order_mark(text))? {
        Value::Object(entry)
            if entry.len() == 2 && entry.contains_key("id") && entry.contains_key("secret") =>
        {
            vec![divided_entry(Value::Object(entry))]
        }
        Value::Object(entries) => entries.into_iter().map(|(id, secret)| (Some(id), secret)).collect(),
        Value::Array(entries) => entries.into_iter().map(divided_entry).collect(),
        other => vec![(None, other)],
    };
    Ok((1..)
        .zip(entries)
        .map(|(number, (id, secret))| Candidate {
            place: Place::Entry(file.display().to_string(), number),
            id,
            secret: match secret {
                Value::String(secret) => Ok(secret.into()),
                _ => Err(Rejection::Form),
            },
        })
        .collect())
}

fn divided_entry(entry: Value) -> (Option<String>, Value) {
    match entry {
        Value::Object(mut entry) => match (entry.remove("id"), entry.remove("secret")) {
            (None, Some(secret)) => (None, secret),
            (Some(Value::String(id)), Some(secret)) => (Some(id), secret),
            _ => (None, Value::Null),
        },
        bare => (None, bare),
    }
}

fn without_byte_order_mark(text: &str) -> &str {
    text.strip_prefix('\u{feff}').unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(candidates: &[Candidate]) -> Vec<(String, Option<&str>, Option<&str>)> {
        candidates
            .iter()
            .map(|key| {
                (key.place.to_string(), key.id.as_deref(), key.secret.as_ref().ok().map(Secret::expose))
            })
            .collect()
    }

    fn row<'a>(
        place: &str,
        id: Option<&'a str>,
        secret: &'a str,
    ) -> (String, Option<&'a str>, Option<&'a str>) {
        (place.to_owned(), id, Some(secret))
    }

    #[test]
    fn a_variable_holds_named_and_bare_keys() {
        assert_eq!(
            shown(&env(
                "KEYS",
                "alpha=sk-1, beta=sk=2,,sk-3,c2VjcmV0c2VjcmV=,c2VjcmV0c2Vjcg==,gamma=,sk-c2VjcmV0c2VjcmU=,"
            )),
            [
                row("KEYS, entry 1", Some("alpha"), "sk-1"),
                row("KEYS, entry 2", Some("beta"), "sk=2"),
                row("KEYS, entry 4", None, "sk-3"),
                row("KEYS, entry 5", None, "c2VjcmV0c2VjcmV="),
                row("KEYS, entry 6", None, "c2VjcmV0c2Vjcg=="),
                row("KEYS, entry 7", Some("gamma"), ""),
                row("KEYS, entry 8", None, "sk-c2VjcmV0c2VjcmU="),
            ]
        );
    }

    #[test]
    fn a_name_whose_secret_is_missing_is_not_taken_for_a_secret_with_padding_unless_it_is_as_long_as_one() {
        assert_eq!(
            shown(&env("KEYS", "one=,of-accounting=,the-key-of-accounting=,alpha=sk-1234567")),
            [
                row("KEYS, entry 1", Some("one"), ""),
                row("KEYS, entry 2", Some("of-accounting"), ""),
                // As an id, it would be shown if it is a secret after all.
                row("KEYS, entry 3", None, "the-key-of-accounting="),
                row("KEYS, entry 4", Some("alpha"), "sk-1234567"),
            ]
        );
    }

    #[test]
    fn a_file_holds_a_key_a_line_with_comments_and_either_kind_of_line_end() {
        let text = "\u{feff}# ours\r\nalpha|sk-1\r\n\r\n  # theirs\nbeta |sk|2 \nsk-3";
        assert_eq!(
            shown(&lines(Path::new("keys.txt"), text)),
            [
                row("keys.txt, line 2", Some("alpha"), "sk-1"),
                row("keys.txt, line 5", Some("beta"), "sk|2 "),
                row("keys.txt, line 6", None, "sk-3"),
            ]
        );
    }

    #[test]
    fn json_holds_secrets_or_objects_or_one_object_of_them() {
        let read = |text| json(Path::new("k.json"), text).unwrap();
        assert_eq!(shown(&read(r#"["sk-1"]"#)), [row("k.json, entry 1", None, "sk-1")]);
        assert_eq!(
            shown(&read(r#"[{"id":"a","secret":"sk-1"},{"secret":"sk-2","note":1}]"#)),
            [row("k.json, entry 1", Some("a"), "sk-1"), row("k.json, entry 2", None, "sk-2")]
        );
        assert_eq!(shown(&read(r#"{"a":"sk-1"}"#)), [row("k.json, entry 1", Some("a"), "sk-1")]);
        assert_eq!(
            shown(&read(r#"{"id":"a","secret":"sk-1"}"#)),
            [row("k.json, entry 1", Some("a"), "sk-1")]
        );
    }

    #[test]
    fn keys_may_be_called_id_or_secret() {
        for [one, other] in [["a", "b"], ["id", "other"], ["other", "secret"]] {
            let read = json(Path::new("k.json"), &format!(r#"{{"{one}":"sk-1","{other}":"sk-2"}}"#)).unwrap();
            assert_eq!(
                shown(&read),
                [row("k.json, entry 1", Some(one), "sk-1"), row("k.json, entry 2", Some(other), "sk-2")]
            );
        }
    }

    #[test]
    fn a_json_entry_of_another_form_is_rejected_and_the_others_are_read() {
        let read = json(Path::new("k.json"), r#"[1, {"id": 2, "secret": "x"}, "sk-3"]"#).unwrap();
        let reasons: Vec<_> = read.into_iter().map(|key| key.secret.err()).collect();
        assert_eq!(reasons, [Some(Rejection::Form), Some(Rejection::Form), None]);
    }

    #[test]
    fn json_is_known_by_its_name_or_its_first_character() {
        assert!(is_json(Path::new("keys.JSON"), "sk"));
        assert!(is_json(Path::new("keys"), " [\"sk\"]"));
        assert!(!is_json(Path::new("keys.txt"), "a|sk"));
    }
}
