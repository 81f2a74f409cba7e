//! Runs each target once on each of its seeds in `corpus`, without a fuzzer.

use std::{fs, path::Path};

use tower_key_rotation_fuzz::{inject, key_file, mongodb_document, retry_after};

fn check_corpus(target: &str, check: impl Fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        println!("{}", path.display());
        check(&fs::read(path).unwrap());
    }
}

#[test]
fn every_seed_of_inject_passes() {
    check_corpus("inject", inject::check);
}

#[test]
fn every_seed_of_key_file_passes() {
    check_corpus("key_file", key_file::check);
}

#[test]
fn every_seed_of_mongodb_document_passes() {
    check_corpus("mongodb_document", mongodb_document::check);
}

#[test]
fn every_seed_of_retry_after_passes() {
    check_corpus("retry_after", retry_after::check);
}
