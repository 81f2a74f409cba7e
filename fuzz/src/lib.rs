//! The checks of all fuzz targets. `fuzz_targets` runs them on the fuzzer's inputs, `tests/corpus.rs` on the seeds.

pub mod inject;
pub mod key_file;
pub mod mongodb_document;
pub mod retry_after;
mod text;

use std::future::Future;

use futures_util::FutureExt;

/// Returns the output of a future that is ready at the first poll.
fn now<F: Future>(future: F) -> F::Output {
    future.now_or_never().expect("the future is ready")
}

/// Returns whether a request can carry this secret in any place.
fn can_be_sent(secret: &str) -> bool {
    !secret.is_empty()
        && !secret.starts_with("encrypted.v")
        && secret.bytes().all(|byte| matches!(byte, b' '..=b'~'))
        && secret.trim() == secret
}
