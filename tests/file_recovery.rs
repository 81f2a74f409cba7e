//! All that `recovery.rs` tests, over a store in a file.

#[path = "recovery.rs"]
mod recovery;
