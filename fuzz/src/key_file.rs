//! Key files and environment variables. Each input is read as a file of lines, as JSON, as TOML, and as an
//! environment variable.

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
    KeyId, KeyPool, KeyPoolBuilder, KeyRotationLayer, KeySpec, Rejected, ServedBy, Traits,
};

use crate::{can_be_sent, now};

/// The part of each seed's secrets that no error may show.
const CANARY: &str = "canary";

const VARIABLE: &str = "TOWER_KEY_ROTATION_FUZZ";

pub fn check(input: &[u8]) {
    for extension in ["txt", "json", "toml"] {
        let path = folder().join(format!("tower-key-rotation-fuzz-{}.{extension}", process::id()));
        fs::write(&path, input).unwrap();
        check_file(&path, input);
        fs::remove_file(&path).unwrap();
    }
    check_one(input);
    if let Ok(text) = str::from_utf8(input)
        && !text.contains('\0')
    {
        // SAFETY: whatever reads the environment of this process does so through `std::env`, which has a lock.
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
    let text = input.strip_prefix("\u{feff}".as_bytes()).unwrap_or(input);
    let file = path.display().to_string();
    let is_table = |line: &[u8]| line.trim_ascii() == b"[[key]]";
    if file.ends_with(".toml") || !file.ends_with(".json") && text.split(|byte| *byte == b'\n').any(is_table)
    {
        return check_toml(builder, text);
    }
    if !file.ends_with(".json") && !matches!(text.trim_ascii_start().first(), Some(b'[' | b'{')) {
        return check_keys(builder, &lines(&file, text));
    }
    match serde_json::from_slice(text) {
        Ok(value) => check_json(builder, &file, &value),
        // In a field that a key does not have, some of what `Value` refuses is not looked at.
        Err(_) => drop(built(builder)),
    }
}

/// The pool, or an error without a secret.
fn built(builder: impl Fn() -> KeyPoolBuilder) -> Option<KeyPool> {
    builder().build().map_err(|error| assert!(!all_that_it_says(&error).contains(CANARY), "{error:?}")).ok()
}

fn all_that_it_says(error: &(dyn Error + 'static)) -> String {
    let sources = iter::successors(Some(error), |error| (*error).source());
    sources.map(|error| format!("{error} / {error:?}\n")).collect()
}

/// An entry, and its possible meanings: each an optional id and an optional secret.
struct Entry {
    place: String,
    meanings: Vec<(Option<String>, Option<String>)>,
}

fn lines(file: &str, text: &[u8]) -> Vec<Entry> {
    let lines = (1..).zip(text.split(|byte| *byte == b'\n'));
    lines
        .map(|(number, line)| (number, line.strip_suffix(b"\r").unwrap_or(line)))
        .filter(|(_, line)| !matches!(String::from_utf8_lossy(line).trim().chars().next(), None | Some('#')))
        .map(|(number, line)| Entry {
            place: format!("{file}, line {number}"),
            meanings: vec![of_line(line)],
        })
        .collect()
}

fn of_line(line: &[u8]) -> (Option<String>, Option<String>) {
    if let Ok(line) = str::from_utf8(line) {
        return divided(line, '|').unwrap_or((None, Some(line.to_owned())));
    }
    let id = line.split(|byte| *byte == b'|').next().and_then(|id| str::from_utf8(id).ok());
    (id.map(|id| id.trim().to_owned()), None)
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
            Entry { place: format!("{VARIABLE}, entry {number}"), meanings }
        })
        .collect()
}

fn divided(entry: &str, by: char) -> Option<(Option<String>, Option<String>)> {
    let (id, secret) = entry.split_once(by)?;
    Some((Some(id.trim().to_owned()), Some(secret.to_owned())))
}

fn text(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

/// The id and the secret of an entry in JSON. There is no secret if a field is wrong, or has no effect yet.
fn of_value(value: &Value) -> (Option<String>, Option<String>) {
    let Some(fields) = value.as_object() else { return (None, text(value)) };
    let is_good = fields.iter().all(|(name, value)| match name.as_str() {
        "id" | "secret" | "note" | "group" => value.is_string(),
        "weight" | "max_in_flight" => {
            value.as_u64().is_some_and(|count| u32::try_from(count).is_ok_and(|count| count > 0))
        }
        "tier" => value.as_u64().is_some_and(|tier| u8::try_from(tier).is_ok()),
        _ => false,
    });
    let field = |name| fields.get(name).and_then(text);
    (field("id"), field("secret").filter(|_| is_good))
}

fn check_json(builder: impl Fn() -> KeyPoolBuilder, file: &str, value: &Value) {
    let is_a_key =
        |members: &serde_json::Map<_, _>| members.contains_key("id") && members.contains_key("secret");
    let meanings: Vec<_> = match value {
        Value::Array(entries) => entries.iter().map(of_value).collect(),
        Value::Object(members) if !is_a_key(members) => {
            members.iter().map(|(id, secret)| (Some(id.clone()), text(secret))).collect()
        }
        single => vec![of_value(single)],
    };
    // `Value` drops all but the last member of a name, and sorts them.
    let is_exact = value.is_array() || meanings.len() == 1;
    let pool = built(&builder).expect("JSON");
    let count = pool.stats().keys.len() + pool.rejected().len();
    if !is_exact || count != meanings.len() {
        assert!(value.is_object() && count >= meanings.len(), "{count} of {}", meanings.len());
        return check_hidden(&pool);
    }
    let entries = (1..).zip(meanings).map(|(number, meaning): (usize, _)| Entry {
        place: format!("{file}, entry {number}"),
        meanings: vec![meaning],
    });
    check_keys(builder, &entries.collect::<Vec<_>>());
}

fn check_toml(builder: impl Fn() -> KeyPoolBuilder, text: &[u8]) {
    let table = str::from_utf8(text).ok().and_then(|text| text.parse::<toml::Table>().ok());
    let pool = built(&builder);
    // `Table` refuses numbers that are too large, in fields, too, that a key does not have.
    let (Some(table), Some(pool)) = (table.as_ref(), pool.as_ref()) else {
        assert!(table.is_none() || pool.is_some(), "{table:?}");
        return;
    };
    let keys = table.get("key").and_then(toml::Value::as_array);
    let others = table.len() - usize::from(keys.is_some());
    let count = pool.stats().keys.len() + pool.rejected().len();
    assert_eq!(count, keys.map_or(0, Vec::len) + others);
    for (id, secret) in sent_by(pool) {
        let is_written = |key: &toml::Value| {
            let text = |name| key.get(name).and_then(toml::Value::as_str);
            let is_named = text("id").map_or(id.as_str().starts_with("key-"), |own| {
                own.trim() == id.as_str() || own == id.as_str()
            });
            is_named && text("secret") == Some(&secret)
        };
        assert!(keys.is_some_and(|keys| keys.iter().any(is_written)), "{id}");
    }
    check_hidden(pool);
}

/// One key alone, as JSON.
fn check_one(input: &[u8]) {
    match KeySpec::from_json(input) {
        Ok(spec) => {
            let fields: Value = serde_json::from_slice(input).unwrap();
            assert_eq!(fields["id"], spec.id.as_str());
            assert_eq!(fields["secret"], spec.secret.expose());
        }
        Err(rejected) => assert_hidden(&rejected, &[]),
    }
}

fn check_hidden(pool: &KeyPool) {
    let keys = sent_by(pool);
    for rejected in pool.rejected() {
        assert_hidden(rejected, &keys);
    }
}

fn check_keys(builder: impl Fn() -> KeyPoolBuilder, entries: &[Entry]) {
    let pool = builder().build().unwrap();
    let rejected = pool.rejected();
    match builder().strict().build() {
        Ok(_) => assert!(rejected.is_empty()),
        Err(error) => assert_eq!(error.rejected(), rejected, "{error}"),
    }

    let keys = sent_by(&pool);
    assert_eq!(keys.len() + rejected.len(), entries.len());
    // A pool orders its keys by tiers, so a key is looked for wherever it is.
    let (mut keys, mut rejected) = (keys, rejected.iter().peekable());
    let mut before = Vec::new();
    for (number, entry) in (1..).zip(entries) {
        let meanings = entry
            .meanings
            .iter()
            .map(|(id, secret)| (id.clone().unwrap_or_else(|| format!("key-{number}")), secret.as_deref()));
        let place = format!("{}: ", entry.place);
        if let Some(rejected) = rejected.next_if(|rejected| rejected.to_string().starts_with(&place)) {
            assert!(
                meanings.clone().any(|(id, secret)| is_right(rejected, &id, secret, &before)),
                "{rejected}"
            );
            assert_hidden(rejected, &before);
        } else {
            let is_meant = |key: &(KeyId, String)| {
                meanings.clone().any(|(id, secret)| id == key.0.as_str() && secret == Some(&key.1))
            };
            let found = keys.iter().position(is_meant);
            let key = keys.remove(found.unwrap_or_else(|| panic!("{} is missing", entry.place)));
            before.push(key);
        }
    }
    let ids: HashSet<_> = before.iter().map(|(id, _)| id).collect();
    let secrets: HashSet<_> = before.iter().map(|(_, secret)| secret).collect();
    assert_eq!((ids.len(), secrets.len()), (before.len(), before.len()));
}

/// Each key of a pool, as a request has it.
fn sent_by(pool: &KeyPool) -> Vec<(KeyId, String)> {
    let client = service_fn(|request: Request<()>| ready(Ok::<_, Infallible>(Response::new(request))));
    let client = KeyRotationLayer::new(pool).expose_key().layer(client);
    let stats = pool.stats();
    stats
        .keys
        .iter()
        .map(|key| {
            // By name: a key of a later tier has no turn while others have room.
            let traits = Traits::new().key(key.id.clone());
            let request = Request::get("https://api.example.com").extension(traits).body(()).unwrap();
            let response = now(client.clone().oneshot(request)).unwrap();
            let ServedBy(id) = response.extensions().get().unwrap();
            assert_eq!(id, &key.id);
            let value = response.body().headers()[AUTHORIZATION].to_str().unwrap();
            (id.clone(), value.strip_prefix("Bearer ").unwrap().to_owned())
        })
        .collect()
}

/// Whether this is the right reason for a key of that id and secret, behind those before it.
fn is_right(rejected: &Rejected, id: &str, secret: Option<&str>, before: &[(KeyId, String)]) -> bool {
    let known = KeyId::new(id).ok();
    let reason = rejected.reason().to_string();
    let is_duplicate = |(own, same): &(KeyId, String)| {
        reason == format!("key {own} has the same secret") && Some(same.as_str()) == secret
    };
    rejected.id() == known.as_ref()
        && match secret {
            _ if reason.ends_with("is given twice") => true,
            None => !reason.starts_with("the secret "),
            Some(_) if reason.starts_with("a key id has ") => known.is_none(),
            Some(secret) if reason.starts_with("the secret ") => !can_be_sent(secret),
            Some(_) if reason == "another key has this id" => {
                before.iter().any(|(other, _)| Some(other) == known.as_ref())
            }
            Some(_) => before.iter().any(is_duplicate),
        }
}

/// An error does not show a secret, unless the input has it as an id, or as a field's name that looks harmless.
fn assert_hidden(rejected: &Rejected, before: &[(KeyId, String)]) {
    let shown = format!("{rejected}\n{rejected:?}");
    let ids = before.iter().map(|(id, _)| id).chain(rejected.id());
    let is_named = ids.clone().any(|id| id.as_str().contains(CANARY)) || shown.contains("unknown field `");
    assert!(is_named || !shown.contains(CANARY), "{shown}");
    assert_eq!(shown.lines().count(), 2, "{shown}");
}
