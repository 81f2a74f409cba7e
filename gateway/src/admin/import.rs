//! Import of many keys, from lines, JSON or TOML. A key that can't be added does not stop the others.

use axum::http::StatusCode;
use serde::Serialize;
use tower_key_rotation::{KeyId, KeySpec, OperateError, Rejected};

use super::{
    action::{Action, cannot_name},
    refusal::Refusal,
    upstreams::Named,
};
use crate::audit::AUDIT;

/// Most keys of one import.
const MOST: usize = 20_000;

/// The outcome of an import.
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

/// A key, or the reason why it is none, with its line.
type Line = (usize, Result<KeySpec, Rejected>);

pub(super) fn read(media_type: &str, body: &[u8]) -> Result<Vec<Line>, Refusal> {
    // With this name, the parser detects JSON and TOML by content, as in a key file.
    let name = match media_type {
        "text/plain" => "import",
        "application/json" => "import.json",
        "application/toml" => "import.toml",
        _ => {
            let accepted = "the content type must be text/plain, application/json or application/toml";
            return Err(Refusal::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, accepted));
        }
    };
    let too_many = || Refusal::bad_request(format!("more than {MOST} keys: send them in parts"));
    // Before it is parsed: each line of text can be a key, and its outcome takes more memory than the line.
    if media_type == "text/plain" && body.iter().filter(|byte| **byte == b'\n').count() > 4 * MOST {
        return Err(too_many());
    }
    let keys = KeySpec::parse_all(name, body).map_err(|error| Refusal::bad_request(error.to_string()))?;
    if keys.len() > MOST { Err(too_many()) } else { Ok(keys) }
}

pub(super) async fn add(named: &Named, keys: Vec<Line>) -> Imported {
    let (mut outcomes, mut specs) = (Vec::new(), Vec::new());
    for (line, key) in keys {
        let (id, error) = match key {
            Err(rejected) => (rejected.id().cloned(), Some(rejected.reason().to_string())),
            Ok(spec) => {
                let (id, error) = (spec.id.clone(), cannot_name(spec.id.as_str()));
                if error.is_none() {
                    specs.push((outcomes.len(), spec));
                }
                (Some(id), error.map(str::to_owned))
            }
        };
        outcomes.push(Outcome { line, id, error });
    }
    let (places, specs): (Vec<_>, Vec<_>) = specs.into_iter().unzip();
    for (place, added) in places.into_iter().zip(named.pool().insert_all(specs).await) {
        outcomes[place].settle(added);
    }
    Imported::of(named, outcomes)
}

impl Outcome {
    fn settle(&mut self, added: Result<(), OperateError>) {
        tracing::debug!(
            key = self.id.as_ref().map(KeyId::as_str),
            is_added = added.is_ok(),
            "imported by the admin"
        );
        self.error = added.err().map(|error| Action::Add.failed(&error));
    }
}

impl Imported {
    fn of(named: &Named, lines: Vec<Outcome>) -> Self {
        let added = lines.iter().filter(|line| line.error.is_none()).count();
        let refused = lines.len() - added;
        let (upstream, from) = (named.name(), named.from());
        tracing::info!(target: AUDIT, added, refused, upstream, from, "keys imported by the admin");
        Self { added, refused, lines }
    }
}
