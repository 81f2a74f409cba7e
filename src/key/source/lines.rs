//! Keys in one line each, and those of an environment variable.

use std::{str, sync::Arc};

use super::{
    entry::{Entries, Unnamed},
    fields::Fields,
};
use crate::key::rejected::{ParsedKey, Place, Reason, Rejected};

/// `id|secret` or a bare secret a line. Empty lines and those that begin with `#` are skipped.
pub(super) fn read(name: &Arc<str>, text: &[u8], entries: &mut Entries) {
    for (number, line) in (1..).zip(text.split(|byte| *byte == b'\n')) {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if !is_skipped(line) {
            entries.push(Place::Line(name.clone(), number), fields(line));
        }
    }
}

fn is_skipped(line: &[u8]) -> bool {
    let line = String::from_utf8_lossy(line);
    let line = line.trim_start();
    line.is_empty() || line.starts_with('#')
}

/// A line that is not UTF-8 has an id all the same, if that part is.
fn fields(line: &[u8]) -> Fields {
    let (id, secret) = match line.iter().position(|byte| *byte == b'|') {
        Some(at) => (Some(&line[..at]), &line[at + 1..]),
        None => (None, line),
    };
    let id = id.map(|id| str::from_utf8(id).map(|id| id.trim().to_owned())).transpose();
    match (id, str::from_utf8(secret)) {
        (Ok(id), Ok(secret)) => Fields::new(id, secret),
        (id, _) => Fields::wrong(id.ok().flatten(), Reason::NotUtf8),
    }
}

/// `id=secret,…` or bare secrets. Spaces after a comma belong to the comma.
pub(crate) fn variable(name: &str, text: &str, unnamed: Unnamed) -> Result<Vec<ParsedKey>, Rejected> {
    let name: Arc<str> = name.into();
    let mut entries = Entries::new(unnamed);
    for (number, entry) in (1..).zip(text.split(',').map(str::trim_start)) {
        if entry.is_empty() {
            continue;
        }
        let fields = match entry.split_once('=').filter(|(_, rest)| divides(entry, rest)) {
            Some((id, secret)) => Fields::new(Some(id.trim().to_owned()), secret),
            None => Fields::new(None, entry),
        };
        entries.push(Place::Entry(name.clone(), number), fields);
    }
    entries.all(name)
}

/// Whether the first `=` of an entry divides id and secret, rather than being the padding of a bare base64 secret. A
/// base64 secret has some length: a short entry that ends with `=` is an id whose secret is missing.
fn divides(entry: &str, behind: &str) -> bool {
    const SHORTEST_SECRET: usize = 16;
    !matches!(behind, "" | "=") || entry.len() < SHORTEST_SECRET
}
