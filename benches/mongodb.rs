//! Cost of 100,000 keys in MongoDB: load time, memory, and latency of requests during loads.
//!
//! ```text
//! cargo bench --all-features --bench mongodb
//! ```
//!
//! The benchmark starts its own MongoDB unless `MONGODB_URI` is set.

#[path = "../examples/local/mongod.rs"]
mod mongod;

mod support;

use std::{
    alloc::System,
    env,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use http::StatusCode;
use mongodb::{
    Client, Collection,
    bson::{DateTime, Document, doc},
};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use support::{
    GivesBack, Turns,
    compare::{Bar, is_benchmark},
    times::Times,
};
use tower::Layer;
use tower_key_rotation::{
    KeyId, KeyPool, KeyRotationLayer, RecoveryConfig, RecoveryHandle,
    store::{KeyStore, mongodb::MongoStore},
};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const KEYS: usize = 100_000;
/// The usual length of a secret.
const SECRET_BYTES: usize = 51;
const DATABASE: &str = "key_rotation_benchmark";
const REPETITIONS: usize = 7;

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    // `cargo test --benches` only checks that the benchmark compiles and starts.
    if !is_benchmark() {
        return;
    }
    let (uri, server) = match env::var("MONGODB_URI") {
        Ok(uri) => (uri, None),
        Err(_) => {
            let server = mongod::Mongod::start(mongod::Kind::ReplicaSet)
                .await
                .unwrap_or_else(|error| panic!("{error}"));
            (server.uri(), Some(server))
        }
    };
    let database = Client::with_uri_str(&uri).await.unwrap().database(DATABASE);
    database.drop().await.unwrap();
    let documents: Collection<Document> = database.collection("keys");
    for chunk in (0..KEYS).collect::<Vec<_>>().chunks(10_000) {
        documents.insert_many(chunk.iter().map(|number| healthy(*number))).await.unwrap();
    }
    let store = MongoStore::builder().database(DATABASE).connect(&uri).await.unwrap();
    store.ensure_indexes().await.unwrap();

    println!("{KEYS} keys, medians of {REPETITIONS}");
    let region = Region::new(ALLOCATOR);
    let started = Instant::now();
    let pool = KeyPool::builder().open(store.clone()).await.unwrap();
    row("open a pool", started.elapsed());
    tokio::time::sleep(Duration::from_millis(500)).await;
    let change = region.change();
    let bytes = change.bytes_allocated - change.bytes_deallocated;
    println!("{:<42} {:>10} B", "memory per key, without the secret", bytes / KEYS - SECRET_BYTES);

    let mut reloads = Vec::new();
    for _ in 0..REPETITIONS {
        let started = Instant::now();
        pool.reload().await.unwrap();
        reloads.push(started.elapsed());
    }
    row("reload without changes", median(reloads));

    passes(&pool, &documents).await;
    changes(&store).await;

    let quiet = requests(&pool, Duration::from_secs(2));
    let stop = Arc::new(AtomicBool::new(false));
    let reloading = tokio::spawn(reload_until(stop.clone(), pool.clone()));
    let loaded = requests(&pool, Duration::from_secs(6));
    stop.store(true, Relaxed);
    let reloads = reloading.await.unwrap();
    Times::print_head("a request");
    quiet.print("idle");
    loaded.print(&format!("during {reloads} reloads"));
    println!();
    Bar::AtMost(3.0).print("p99 of a request, during reloads / idle", loaded.at(0.99) / quiet.at(0.99), "");

    database.drop().await.unwrap();
    drop(server);
}

fn healthy(number: usize) -> Document {
    doc! {
        "_id": format!("key-{number:06}"),
        "apiKey": format!("sk-{number:0>width$}", width = SECRET_BYTES - 3),
        "status": "healthy",
        "tokensUsed": 0_i64,
        "requestsCount": 0_i64,
        "createdAt": DateTime::from_millis(1_700_000_000_000),
    }
}

fn row(what: &str, time: Duration) {
    println!("{what:<42} {:>10.1} ms", time.as_secs_f64() * 1_000.0);
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

async fn passes(pool: &KeyPool, documents: &Collection<Document>) {
    // No pass starts by itself, so that each pass is timed.
    let config = RecoveryConfig::new().start_jitter(Duration::MAX).limit(Duration::from_secs(60));
    let recovery = RecoveryHandle::spawn_with(pool, config);
    let (mut idle, mut busy) = (Vec::new(), Vec::new());
    for _ in 0..REPETITIONS {
        idle.push(recovery.sweep_now().await.duration);
    }
    for _ in 0..3 {
        let expired =
            doc! { "status": "rate_limited", "cooldownUntil": DateTime::from_millis(1_700_000_000_000) };
        let every_second = doc! { "_id": { "$regex": "[02468]$" } };
        documents.update_many(every_second, doc! { "$set": expired }).await.unwrap();
        let report = recovery.sweep_now().await;
        assert_eq!(report.outcome.unwrap().count, KEYS as u64 / 2);
        busy.push(report.duration);
    }
    row("recovery pass without changes", median(idle));
    row("recovery pass that resets half of the keys", median(busy));
}

/// Times the load of one key, as after a change by another process.
async fn changes(store: &MongoStore) {
    let mut times = Vec::new();
    for number in 0..REPETITIONS {
        let id = KeyId::new(format!("key-{number:06}")).unwrap();
        let started = Instant::now();
        assert_eq!(store.load(Some(&[id])).await.unwrap().records.len(), 1);
        times.push(started.elapsed());
    }
    row("load of one changed key", median(times));
}

async fn reload_until(stop: Arc<AtomicBool>, pool: KeyPool) -> usize {
    let mut reloads = 0;
    while !stop.load(Relaxed) {
        pool.reload().await.unwrap();
        reloads += 1;
    }
    reloads
}

/// Times many requests on a separate thread.
fn requests(pool: &KeyPool, time: Duration) -> Times {
    let mut client = KeyRotationLayer::new(pool).layer(GivesBack);
    let measure = move || {
        let mut turns = Turns::new();
        Times::of(time, move || turns.take(&mut client, StatusCode::OK))
    };
    tokio::task::block_in_place(|| thread::spawn(measure).join().unwrap())
}
