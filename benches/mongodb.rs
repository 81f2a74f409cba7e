//! What 100,000 keys in MongoDB cost: to load, to keep in memory, and to requests while they are loaded.
//!
//! ```text
//! cargo bench --bench mongodb --features full
//! ```
//!
//! It starts a MongoDB of its own, unless `MONGODB_URI` names one.

#[path = "../examples/local/mongod.rs"]
mod mongod;

use std::{
    alloc::System,
    convert::Infallible,
    env,
    future::{Ready, ready},
    hint::black_box,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{Context, Poll},
    thread,
    time::{Duration, Instant},
};

use http::{Request, Response};
use mongodb::{
    Client, Collection,
    bson::{DateTime, Document, doc},
};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use tower::{Layer, Service};
use tower_key_rotation::{
    KeyId, KeyPool, KeyRotationLayer, RecoveryConfig, RecoveryHandle,
    store::{KeyStore, MongoStore},
};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const KEYS: usize = 100_000;
/// As long as those of the services in use.
const SECRET_BYTES: usize = 51;
const DATABASE: &str = "key_rotation_benchmark";
const REPETITIONS: usize = 7;

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    // `cargo test --benches` only wants to know whether it runs.
    if !env::args().any(|argument| argument == "--bench") {
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
    let documents: Collection<Document> = database.collection("ohmygpt_keys");
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
    let bytes =
        change.bytes_allocated + change.bytes_reallocated.max(0).unsigned_abs() - change.bytes_deallocated;
    println!("{:<42} {:>10} B", "memory per key, without its secret's bytes", bytes / KEYS - SECRET_BYTES);

    let mut reloads = Vec::new();
    for _ in 0..REPETITIONS {
        let started = Instant::now();
        pool.reload().await.unwrap();
        reloads.push(started.elapsed());
    }
    row("reload, nothing has changed", median(reloads));

    passes(&pool, &documents).await;
    changes(&store).await;

    let quiet = calls(&pool, Duration::from_secs(2));
    let stop = Arc::new(AtomicBool::new(false));
    let reloading = tokio::spawn(reload_until(stop.clone(), pool.clone()));
    let loaded = calls(&pool, Duration::from_secs(6));
    stop.store(true, Relaxed);
    let reloads = reloading.await.unwrap();
    println!("\na request through the layer, in ns     p50      p99    p99.9      max");
    quiet.print("nothing else going on");
    loaded.print(&format!("during {reloads} reloads"));
    println!("p99 during reloads / without: {:.2}", loaded.at(0.99) / quiet.at(0.99));

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
    // Passes are made by hand alone.
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
    row("a pass with nothing to do", median(idle));
    row("a pass that resets half of the keys", median(busy));
}

/// What it takes to follow another process's change of one key.
async fn changes(store: &MongoStore) {
    let mut times = Vec::new();
    for number in 0..REPETITIONS {
        let id = KeyId::new(format!("key-{number:06}")).unwrap();
        let started = Instant::now();
        assert_eq!(store.load_some(&[id]).await.unwrap().records.len(), 1);
        times.push(started.elapsed());
    }
    row("read one key that has changed", median(times));
}

async fn reload_until(stop: Arc<AtomicBool>, pool: KeyPool) -> usize {
    let mut reloads = 0;
    while !stop.load(Relaxed) {
        pool.reload().await.unwrap();
        reloads += 1;
    }
    reloads
}

#[derive(Clone)]
struct Answers;

impl Service<Request<()>> for Answers {
    type Response = Response<()>;
    type Error = Infallible;
    type Future = Ready<Result<Response<()>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<()>) -> Self::Future {
        black_box(&request);
        ready(Ok(Response::new(())))
    }
}

struct Times(Vec<u64>);

/// How long each of very many requests takes, on a thread of their own.
fn calls(pool: &KeyPool, time: Duration) -> Times {
    let mut service = KeyRotationLayer::new(pool).layer(Answers);
    let measure = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let mut times = Vec::with_capacity(64 * 1024 * 1024);
        let end = Instant::now() + time;
        runtime.block_on(async {
            loop {
                let request = Request::get("https://api.example.com/v1").body(()).unwrap();
                let started = Instant::now();
                let answer = service.call(request).await;
                let elapsed = started.elapsed();
                assert!(answer.is_ok());
                times.push(elapsed.as_nanos() as u64);
                if started > end || times.len() == times.capacity() {
                    break;
                }
            }
        });
        times.sort_unstable();
        Times(times)
    };
    tokio::task::block_in_place(|| thread::spawn(measure).join().unwrap())
}

impl Times {
    fn at(&self, share: f64) -> f64 {
        self.0[((self.0.len() - 1) as f64 * share) as usize] as f64
    }

    fn print(&self, when: &str) {
        let columns: Vec<_> =
            [0.5, 0.99, 0.999, 1.0].iter().map(|share| format!("{:>8}", self.at(*share))).collect();
        println!("{when:<33} {}", columns.join(" "));
    }
}
