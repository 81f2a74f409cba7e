//! Latency of requests while the pool reloads 100,000 keys.
//!
//! ```text
//! cargo bench --all-features --bench reload
//! ```

mod support;

use std::{
    sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    thread,
    time::Duration,
};

use http::StatusCode;
use support::{
    GivesBack, Turns,
    compare::{Bar, is_benchmark},
    times::Times,
};
use tower::Layer;
use tower_key_rotation::{
    KeyId, KeyPool, KeyRotationLayer, KeySpec,
    store::{KeyStore, MemoryStore, Operation},
};

const KEYS: usize = 100_000;

fn main() {
    let (keys, time) = match is_benchmark() {
        true => (KEYS, Duration::from_secs(4)),
        false => (100, Duration::from_millis(1)),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let store = MemoryStore::new();
    let pool = runtime.block_on(KeyPool::builder().keys(support::keys(keys)).open(store.clone())).unwrap();

    let requests = |pool: &KeyPool| {
        let mut client = KeyRotationLayer::new(pool).layer(GivesBack);
        let mut turns = Turns::new();
        Times::of(time, move || turns.take(&mut client, StatusCode::OK))
    };
    let alone = requests(&pool);
    let beside_work = beside(&|| _ = std::hint::black_box((0..100_000_u64).sum::<u64>()), || requests(&pool));
    let (changes, reloads) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let reload = || {
        // Each reload finds a new key, as if another process had inserted it, so that the pool replaces its snapshot.
        let id = KeyId::new(format!("more-{}", changes.fetch_add(1, Relaxed))).unwrap();
        runtime.block_on(async {
            let spec = KeySpec::new(id.clone(), format!("sk-{id}"));
            store.operate(id, Operation::Insert(spec)).await.unwrap().unwrap();
            pool.reload().await.unwrap();
        });
        reloads.fetch_add(1, Relaxed);
    };
    let reloading = beside(&reload, || requests(&pool));

    Times::print_head("a request");
    alone.print("idle");
    beside_work.print("during other work on a second thread");
    reloading.print(&format!("during {} reloads of {keys} keys", reloads.into_inner()));
    println!();
    let ratio = reloading.at(0.99) / alone.at(0.99);
    Bar::AtMost(3.0).print("p99 of a request, during reloads / idle", ratio, "");
    println!(
        "p99 of a request, during reloads / during other work: {:.2}",
        reloading.at(0.99) / beside_work.at(0.99)
    );
}

/// Runs `measure` while another thread repeats `work`.
fn beside<T>(work: &(impl Fn() + Sync), measure: impl FnOnce() -> T) -> T {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Relaxed) {
                work();
            }
        });
        let measured = measure();
        stop.store(true, Relaxed);
        measured
    })
}
