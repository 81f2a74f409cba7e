//! What each target does with an input. `fuzz_targets` gives it what the fuzzer makes up, `tests/corpus.rs` what
//! is kept in `corpus`.

pub mod inject;
pub mod key_file;
pub mod mongodb_document;
pub mod retry_after;
mod text;

use std::future::Future;

use futures_util::FutureExt;

/// What a future gives that has nothing to wait for.
fn now<F: Future>(future: F) -> F::Output {
    future.now_or_never().expect("it waits")
}

/// Whether a secret is one that a request can carry in any of its places.
fn can_be_sent(secret: &str) -> bool {
    !secret.is_empty()
        && !secret.starts_with("encrypted.v")
        && secret.bytes().all(|byte| matches!(byte, b' '..=b'~'))
        && secret.trim() == secret
}
