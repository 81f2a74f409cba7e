//! Key files and environment variables. Each input is read as a file of lines, as JSON, and as an environment
//! variable.

use std::{
    collections::HashSet,
    convert::Infallible,
    env,
    error::Error,
    fs,
    future::ready,
    iter,
    path::{Path, PathBuf},
    process,
};

use http::{Request, Response, header::AUTHORIZATION};
use serde_json::Value;
use tower::{Layer, ServiceExt, service_fn};
use tower_key_rotation::{
    BuildError, KeyId, KeyPool, KeyPoolBuilder, KeyRotationLayer, Place, Rejected, Rejection, ServedBy,
};

use crate::{can_be_sent, now};

/// The part of each seed's secrets that no error may show.
const CANARY: &str = "canary";

const VARIABLE: &str = "TOWER_KEY_ROTATION_FUZZ";

pub fn check(input: &[u8]) {
    for extension in ["txt", "json"] {
        let path = folder().join(format!("tower-key-rotation-fuzz-{}.{extension}", process::id()));
        fs::write(&path, input).unwrap();
        check_file(&path, input);
        fs::remove_file(&path).unwrap();
    }
    if let Ok(text) = str::from_utf8(input)
        && !text.contains('\0')
    {
        // SAFETY: all code in this process reads the environment through `std::env`, which takes a lock.
        unsafe { env::set_var(VARIABLE, text) };
        check_keys(|| KeyPool::builder().keys_from_env(VARIABLE), &variable(text));
    }
}

/// Returns a folder in memory if possible: with a folder on disk, the fuzzer runs at a thirtieth of the speed.
fn folder() -> PathBuf {
    let in_memory = PathBuf::from("/dev/shm");
    if in_memory.is_dir() { in_memory } else { env::temp_dir() }
}

fn check_file(path: &Path, input: &[u8]) {
    let builder = || KeyPool::builder().keys_from_file(path);
    let Ok(text) = str::from_utf8(input) else {
        assert!(matches!(builder().build(), Err(BuildError::File { .. })));
        return;
    };
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let file = path.display().to_string();
    if file.ends_with(".txt") && !text.trim_start().starts_with(['[', '{']) {
        return check_keys(builder, &lines(&file, text));
    }
    match serde_json::from_str(text) {
        Ok(value) => check_keys(builder, &json(&file, value)),
        Err(_) => {
            let error = builder().build().unwrap_err();
            assert!(matches!(error, BuildError::Json { .. }), "{error:?}");
            assert!(!all_that_it_says(&error).contains(CANARY), "{error:?}");
        }
    }
}

fn all_that_it_says(error: &(dyn Error + 'static)) -> String {
    let sources = iter::successors(Some(error), |error| (*error).source());
    sources.map(|error| format!("{error} / {error:?}\n")).collect()
}

/// An entry, and its possible meanings: each an optional id and an optional secret.
struct Entry {
    place: Place,
    meanings: Vec<(Option<String>, Option<String>)>,
}

fn lines(file: &str, text: &str) -> Vec<Entry> {
    let lines = (1..).zip(text.lines());
    lines
        .filter(|(_, line)| !matches!(line.trim().chars().next(), None | Some('#')))
        .map(|(number, line)| {
            let meaning = divided(line, '|').unwrap_or((None, Some(line.to_owned())));
            Entry { place: Place::Line(file.to_owned(), number), meanings: vec![meaning] }
        })
        .collect()
}

fn variable(text: &str) -> Vec<Entry> {
    let entries = (1..).zip(text.split(',').map(str::trim_start));
    entries
        .filter(|(_, entry)| !entry.is_empty())
        .map(|(number, entry)| {
            let whole = (None, Some(entry.to_owned()));
            let meanings = match divided(entry, '=') {
                None => vec![whole],
                // A bare base64 secret may end in `=`.
                Some(divided) if entry.trim_end_matches('=').contains('=') => vec![divided],
                Some(divided) => vec![divided, whole],
            };
            Entry { place: Place::Env(VARIABLE.to_owned(), number), meanings }
        })
        .collect()
}

fn divided(entry: &str, by: char) -> Option<(Option<String>, Option<String>)> {
    let (id, secret) = entry.split_once(by)?;
    Some((Some(id.trim().to_owned()), Some(secret.to_owned())))
}

fn json(file: &str, value: Value) -> Vec<Entry> {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let is_a_key = |value: &Value| {
        value.as_object().is_some_and(|members| members.len() == 2)
            && value.get("id").is_some()
            && value.get("secret").is_some()
    };
    let entry = |value: &Value| match (value.get("id"), value.get("secret")) {
        (None, Some(secret)) => (None, text(secret)),
        (Some(Value::String(id)), Some(secret)) => (Some(id.clone()), text(secret)),
        _ => (None, text(value)),
    };
    let meanings = match &value {
        Value::Array(entries) => entries.iter().map(entry).collect(),
        Value::Object(members) if !is_a_key(&value) => {
            members.iter().map(|(id, secret)| (Some(id.clone()), text(secret))).collect()
        }
        single => vec![entry(single)],
    };
    let numbered = (1..).zip(meanings);
    numbered
        .map(|(number, meaning)| Entry {
            place: Place::Entry(file.to_owned(), number),
            meanings: vec![meaning],
        })
        .collect()
}

fn check_keys(builder: impl Fn() -> KeyPoolBuilder, entries: &[Entry]) {
    let pool = builder().build().unwrap();
    let rejected = pool.rejected();
    match builder().strict().build() {
        Ok(_) => assert!(rejected.is_empty()),
        Err(BuildError::Rejected(listed)) => assert_eq!(listed, rejected),
        Err(error) => panic!("{error}"),
    }

    let keys = sent_by(&pool);
    assert_eq!(keys.len() + rejected.len(), entries.len());
    let (mut keys, mut rejected) = (keys.into_iter(), rejected.iter().peekable());
    let mut before = Vec::new();
    for (number, entry) in (1..).zip(entries) {
        let meanings = entry
            .meanings
            .iter()
            .map(|(id, secret)| (id.clone().unwrap_or_else(|| format!("key-{number}")), secret.as_deref()));
        if let Some(rejected) = rejected.next_if(|rejected| rejected.place == entry.place) {
            assert!(
                meanings.clone().any(|(id, secret)| is_right(rejected, &id, secret, &before)),
                "{rejected}"
            );
            assert_hidden(rejected, &before);
        } else {
            let key = keys.next().unwrap();
            assert!(
                meanings.clone().any(|(id, secret)| id == key.0.as_str() && secret == Some(&key.1)),
                "{}",
                key.0
            );
            before.push(key);
        }
    }
    let ids: HashSet<_> = before.iter().map(|(id, _)| id).collect();
    let secrets: HashSet<_> = before.iter().map(|(_, secret)| secret).collect();
    assert_eq!((ids.len(), secrets.len()), (before.len(), before.len()));
}

/// Returns the id and secret of each key, as requests carry them.
fn sent_by(pool: &KeyPool) -> Vec<(KeyId, String)> {
    let client = service_fn(|request: Request<()>| ready(Ok::<_, Infallible>(Response::new(request))));
    let client = KeyRotationLayer::new(pool).expose_key().layer(client);
    let stats = pool.stats();
    stats
        .keys
        .iter()
        .map(|key| {
            let request = Request::get("https://api.example.com").body(()).unwrap();
            let response = now(client.clone().oneshot(request)).unwrap();
            let ServedBy(id) = response.extensions().get().unwrap();
            assert_eq!(id, &key.id);
            let value = response.body().headers()[AUTHORIZATION].to_str().unwrap();
            (id.clone(), value.strip_prefix("Bearer ").unwrap().to_owned())
        })
        .collect()
}

/// Returns whether the rejection is right for this id and secret, given the keys `before` them.
fn is_right(rejected: &Rejected, id: &str, secret: Option<&str>, before: &[(KeyId, String)]) -> bool {
    let known = KeyId::new(id).ok();
    rejected.id == known
        && match &rejected.reason {
            Rejection::Id(_) => known.is_none(),
            Rejection::Form => secret.is_none(),
            Rejection::Secret(_) => secret.is_some_and(|secret| !can_be_sent(secret)),
            Rejection::DuplicateId => before.iter().any(|(other, _)| Some(other) == known.as_ref()),
            Rejection::DuplicateSecret(other) => {
                before.iter().any(|(id, own)| id == other && Some(own.as_str()) == secret)
            }
            _ => false,
        }
}

/// Asserts that a rejection does not show the secret. An id that contains the canary may be shown.
fn assert_hidden(rejected: &Rejected, before: &[(KeyId, String)]) {
    let shown = format!("{rejected}\n{rejected:?}");
    let ids = before.iter().map(|(id, _)| id).chain(&rejected.id);
    let is_named = ids.clone().any(|id| id.as_str().contains(CANARY));
    assert!(is_named || !shown.contains(CANARY), "{shown}");
    assert_eq!(shown.lines().count(), 2, "{shown}");
}
