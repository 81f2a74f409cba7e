//! What a key costs in memory.

use futures_util::FutureExt;
use tower_key_rotation::{Inject, KeyPool, KeyPoolBuilder, store::MemoryStore};

const KEYS: usize = 10_000;

fn id(number: usize) -> String {
    format!("key-{number:06}")
}

/// As long as those of the services in use.
fn secret(number: usize) -> String {
    format!("sk-{number:048}")
}

/// Bytes that are still there for each key after `make`, without its secret's.
fn bytes_per_key(make: impl FnOnce() -> KeyPool) -> usize {
    let mut pool = None;
    let allocated = allocation_counter::measure(|| pool = Some(make()));
    let pool = pool.expect("it was made");
    assert_eq!(pool.stats().healthy, KEYS);
    let held = usize::try_from(allocated.bytes_current).expect("some bytes are held");
    (held / KEYS).checked_sub(secret(0).len()).expect("the secrets are held, too")
}

fn built(inject: Inject) -> KeyPool {
    let keys = (0..KEYS).map(|number| (id(number), secret(number)));
    KeyPool::builder().keys(keys).inject(inject).build().expect("a pool")
}

#[test]
fn keys_take_at_most_256_bytes_excluding_secrets() {
    for inject in [Inject::bearer(), Inject::header("x-api-key")] {
        let bytes = bytes_per_key(|| built(inject));
        assert!(bytes <= 256, "{bytes}");
    }
}

#[test]
fn stored_keys_take_at_most_256_bytes() {
    let store = MemoryStore::new();
    let filled = KeyPool::builder().keys((0..KEYS).map(|number| (id(number), secret(number))));
    drop(open(filled, &store));
    let bytes = bytes_per_key(|| open(KeyPool::builder(), &store));
    assert!(bytes <= 256, "{bytes}");
}

/// Outside of a runtime, so that all is done, and counted, on this thread.
fn open(builder: KeyPoolBuilder, store: &MemoryStore) -> KeyPool {
    builder.open(store.clone()).now_or_never().expect("at once").expect("a store in memory")
}
