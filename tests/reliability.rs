//! `docs/RELIABILITY.md` names every promise, and only tests that exist, in any package of this repository.

use std::{collections::BTreeMap, fs, path::Path};

fn read(path: &str) -> Option<String> {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).ok()
}

/// The parts of a text between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// The tests of each row: their files, from the root of the repository, and their names.
fn rows() -> BTreeMap<String, Vec<(String, String)>> {
    let document = read("docs/RELIABILITY.md").expect("docs/RELIABILITY.md is there");
    let (_, promises) = document.split_once("## Promises").expect("it has a section on promises");
    let promises = promises.split("\n## ").next().expect("the section");
    let mut rows = BTreeMap::new();
    for line in promises.lines().filter(|line| line.starts_with("| f") || line.starts_with("| s")) {
        let cells: Vec<_> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        let [id, _, _, tests] = cells[..] else { panic!("not four cells: {line}") };
        let mut file = "";
        let mut named = Vec::new();
        for name in quoted(tests) {
            if name.ends_with(".rs") {
                file = name;
            } else {
                named.push((file.to_owned(), name.to_owned()));
            }
        }
        assert!(rows.insert(id.to_owned(), named).is_none(), "{id} is there twice");
    }
    rows
}

/// The comment above the function of this name, or above the first function with this prefix if the name ends in `_`.
fn comment_above<'a>(source: &'a str, name: &str) -> Option<&'a str> {
    let end = if name.ends_with('_') { "" } else { "(" };
    let (above, _) = source.split_once(&format!("fn {name}{end}"))?;
    Some(above.rsplit_once("\n\n").map_or(above, |(_, comment)| comment))
}

/// Broken once: without the row f12, it failed.
#[test]
fn every_promise_is_named_and_no_other() {
    let promises =
        (1..=33).map(|number| format!("f{number:02}")).chain((1..=5).map(|number| format!("s{number:02}")));
    assert_eq!(rows().into_keys().collect::<Vec<_>>(), promises.collect::<Vec<_>>());
}

/// Broken once: with a name that no test has, and again with a test whose comment says nothing of it, it failed.
#[test]
fn every_test_that_is_named_is_there_and_says_how_it_was_seen_to_fail() {
    for (id, tests) in rows() {
        assert!(!tests.is_empty(), "{id} names no test");
        for (file, name) in tests {
            assert!(name.starts_with(&format!("{id}_")), "{name} is not called after {id}");
            let Some(source) = read(&file) else {
                // A file that does not exist yet is named with the prefix of its tests.
                assert!(name.ends_with('_'), "there is no {file}");
                continue;
            };
            let comment = comment_above(&source, &name).unwrap_or_else(|| panic!("no {name} in {file}"));
            assert!(
                name.ends_with('_') || comment.contains("Broken once:"),
                "{file}: {name} was never broken"
            );
        }
    }
}
