//! Checks that `docs/RELIABILITY.md` has every promise, and that its tests exist and have a row in `docs/MUTATIONS.md`.

use std::{collections::BTreeMap, fs, path::Path};

fn read(path: &str) -> Option<String> {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).ok()
}

/// Returns the texts between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// Returns the file and name of each row's tests.
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

#[test]
fn every_promise_is_named_and_no_other() {
    let failures = (1..=47).map(|number| format!("f{number:02}"));
    let promises = failures.chain((1..=10).map(|number| format!("s{number:02}")));
    assert_eq!(rows().into_keys().collect::<Vec<_>>(), promises.collect::<Vec<_>>());
}

/// A name that ends in `_` stands for all tests with that prefix.
#[test]
fn every_named_test_exists_with_a_mutation() {
    let mutations = read("docs/MUTATIONS.md").expect("docs/MUTATIONS.md is there");
    for (id, tests) in rows() {
        assert!(!tests.is_empty(), "{id} names no test");
        for (file, name) in tests {
            assert!(name.starts_with(&format!("{id}_")), "{name} does not begin with {id}");
            let is_prefix = name.ends_with('_');
            let source = read(&file).unwrap_or_else(|| panic!("there is no {file}"));
            let end = if is_prefix { "" } else { "(" };
            assert!(source.contains(&format!("fn {name}{end}")), "no {name} in {file}");
            let end = if is_prefix { "" } else { "`" };
            assert!(mutations.contains(&format!("| `{name}{end}")), "{name} has no row in docs/MUTATIONS.md");
        }
    }
}
