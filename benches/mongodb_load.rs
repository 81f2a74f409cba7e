//! The load that 1, 10 and 50 processes put on a MongoDB: idle, with 100 marks a second, and with usage.
//!
//! ```text
//! cargo bench --bench mongodb_load --features full
//! ```
//!
//! Each process is a pool with a recovery, over a client and a change stream of its own. Commands, oplog and the server's
//! CPU time are the server's own figures. It starts a `mongod` of its own, which has to be on this machine. `SECONDS`
//! sets the time for each row, 30 by default: a pass of each process. `PROCESSES` sets other numbers of processes.

#[path = "../examples/local/mongod.rs"]
mod mongod;

use std::{
    env, fs,
    time::{Duration, Instant},
};

use mongodb::{
    Client, Collection, Database,
    bson::{Bson, DateTime, Document, Timestamp, doc},
};
use tokio::time::{interval, sleep};
use tower_key_rotation::{
    KeyId, KeyPool, RecoveryHandle, Rest,
    store::{Born, KeyStore, Mark, Resting, Until, Usage, Words, mongodb::MongoStore},
};

const DATABASE: &str = "key_rotation_load";
const MARKED_KEYS: usize = 300;
const USED_KEYS: usize = 1_000;
const MARKS_A_SECOND: u32 = 100;
const INCREMENTS_A_SECOND: u32 = 1_000;

struct Process {
    store: MongoStore,
    recovery: RecoveryHandle,
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    // `cargo test --benches` only wants to know whether it runs.
    if !env::args().any(|argument| argument == "--bench") {
        return;
    }
    let seconds = env::var("SECONDS").map_or(30, |seconds| seconds.parse().expect("a number of seconds"));
    let time = Duration::from_secs(seconds);
    let server =
        mongod::Mongod::start(mongod::Kind::ReplicaSet).await.unwrap_or_else(|error| panic!("{error}"));
    let client = Client::with_uri_str(server.uri()).await.unwrap();
    println!(
        "| processes | | commands/s/process | of these getMore | hello | oplog kB/s | mongod, % of a core |\n\
         |---|---|---|---|---|---|---|"
    );
    let counts = env::var("PROCESSES").unwrap_or_else(|_| "1,10,50".to_owned());
    for count in counts.split(',').map(|count| count.parse().expect("numbers of processes")) {
        let database = client.database(DATABASE);
        database.drop().await.unwrap();
        let keys: Collection<Document> = database.collection("keys");
        keys.insert_many((0..USED_KEYS).map(healthy)).await.unwrap();
        let processes = start(count, &server.uri()).await;
        let bench = Bench { database, keys, processes, time };
        bench.row("idle", sleep(time)).await;
        bench.row("100 marks a second", bench.marks()).await;
        bench.row("usage of 1,000 keys in 30 s each", bench.usage()).await;
        bench.row("1,000 increments a second by others", bench.increments()).await;
        for process in bench.processes {
            process.recovery.shutdown().await.unwrap();
        }
    }
}

async fn start(count: usize, uri: &str) -> Vec<Process> {
    let mut processes = Vec::new();
    for _ in 0..count {
        let store = MongoStore::builder().database(DATABASE).connect(uri).await.unwrap();
        let pool = KeyPool::builder().open(store.clone()).await.unwrap();
        processes.push(Process { store, recovery: RecoveryHandle::spawn(&pool) });
    }
    // The streams begin, and everything is loaded once more.
    sleep(Duration::from_secs(3)).await;
    processes
}

fn id(number: usize) -> KeyId {
    KeyId::new(format!("key-{number:06}")).unwrap()
}

fn healthy(number: usize) -> Document {
    doc! {
        "_id": id(number).as_str(),
        "apiKey": format!("sk-{number:048}"),
        "status": "healthy",
        "tokensUsed": 0_i64,
        "requestsCount": 0_i64,
        "createdAt": DateTime::from_millis(1_700_000_000_000),
    }
}

struct Bench {
    database: Database,
    keys: Collection<Document>,
    processes: Vec<Process>,
    time: Duration,
}

impl Bench {
    async fn row(&self, what: &str, work: impl Future<Output = ()>) {
        let before = Figures::of(&self.database).await;
        work.await;
        let after = Figures::of(&self.database).await;
        let seconds = (after.at - before.at).as_secs_f64();
        let processes = self.processes.len() as f64;
        let rate = |count: fn(&Figures) -> i64| (count(&after) - count(&before)) as f64 / seconds / processes;
        let oplog = oplog_bytes(&self.database, before.time, after.time).await as f64 / 1_000.0 / seconds;
        let cpu = (after.cpu - before.cpu).as_secs_f64() / seconds * 100.0;
        println!(
            "| {processes} | {what} | {:.2} | {:.2} | {:.2} | {oplog:.1} | {cpu:.1} |",
            rate(|figures| figures.commands),
            rate(|figures| figures.get_mores),
            rate(|figures| figures.hellos),
        );
    }

    /// Each mark by another process, and of another key.
    async fn marks(&self) {
        let loaded = self.processes[0].store.load(None).await.unwrap();
        let born: Vec<Born> =
            loaded.records[..MARKED_KEYS].iter().map(|record| record.standing.born).collect();
        let mut ticks = interval(Duration::from_secs(1) / MARKS_A_SECOND);
        let ended = Instant::now() + self.time;
        let mut marks = tokio::task::JoinSet::new();
        for number in 0.. {
            ticks.tick().await;
            if Instant::now() > ended {
                break;
            }
            let left = Until::After(Duration::from_secs(120));
            let key = Some(Resting { until: left, reason: Rest::RateLimited });
            let record = &loaded.records[number % MARKED_KEYS];
            let mark = Mark::new(
                record.spec.id.clone(),
                born[number % MARKED_KEYS],
                Words { key, ..Words::default() },
            );
            let store = self.processes[number % self.processes.len()].store.clone();
            marks.spawn(async move { store.merge(mark).await.unwrap().unwrap() });
        }
        marks.join_all().await;
    }

    async fn usage(&self) {
        let batch: Vec<_> = (0..USED_KEYS).map(|number| Usage::new(id(number), 3, 1_500)).collect();
        let each = self.processes.iter().enumerate().map(|(number, process)| {
            let (batch, store) = (batch.clone(), process.store.clone());
            let offset = Duration::from_secs(30) * number as u32 / self.processes.len() as u32;
            let time = self.time;
            tokio::spawn(async move {
                sleep(offset.min(time)).await;
                store.add_usage(batch).await.unwrap();
            })
        });
        let each: Vec<_> = each.collect();
        sleep(self.time).await;
        for one in each {
            one.await.unwrap();
        }
    }

    /// As another program counts.
    async fn increments(&self) {
        let mut ticks = interval(Duration::from_secs(10) / INCREMENTS_A_SECOND);
        let ended = Instant::now() + self.time;
        while Instant::now() < ended {
            ticks.tick().await;
            let updates = (0..10).map(|_| {
                let id = id(fastrand::usize(..USED_KEYS));
                doc! { "q": { "_id": id.as_str() }, "u": { "$inc": { "requestsCount": 1_i64 } } }
            });
            let command = doc! { "update": self.keys.name(), "updates": updates.collect::<Vec<_>>() };
            self.database.run_command(command).await.unwrap();
        }
    }
}

/// The server's own figures.
struct Figures {
    at: Instant,
    time: Timestamp,
    commands: i64,
    get_mores: i64,
    hellos: i64,
    cpu: Duration,
}

impl Figures {
    async fn of(database: &Database) -> Self {
        let status = database.run_command(doc! { "serverStatus": 1 }).await.unwrap();
        let commands = status.get_document("metrics").unwrap().get_document("commands").unwrap();
        let total = |name: &str| {
            let command = commands.get_document(name).ok();
            command.and_then(|command| command.get_i64("total").ok()).unwrap_or_default()
        };
        let all = commands.keys().map(|name| total(name)).sum::<i64>();
        let pid = status.get("pid").and_then(Bson::as_i64).unwrap();
        let time = status.get_document("$clusterTime").unwrap().get_timestamp("clusterTime").unwrap();
        Self {
            at: Instant::now(),
            time,
            commands: all - total("hello") - total("isMaster"),
            get_mores: total("getMore"),
            hellos: total("hello") + total("isMaster"),
            cpu: cpu_time(pid),
        }
    }
}

/// User and system time, of which the kernel counts hundredths of a second.
fn cpu_time(pid: i64) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("the server is not on this machine");
    let after_the_name = stat.rsplit_once(')').unwrap().1;
    let ticks = |field: usize| after_the_name.split_whitespace().nth(field).unwrap().parse::<u64>().unwrap();
    Duration::from_millis((ticks(11) + ticks(12)) * 10)
}

async fn oplog_bytes(database: &Database, from: Timestamp, to: Timestamp) -> i64 {
    let pipeline = [
        doc! { "$match": { "ts": { "$gt": from, "$lte": to }, "ns": { "$regex": format!("^{DATABASE}") } } },
        doc! { "$group": { "_id": Bson::Null, "bytes": { "$sum": { "$bsonSize": "$$ROOT" } } } },
    ];
    let oplog = database.client().database("local").collection::<Document>("oplog.rs");
    let mut found = oplog.aggregate(pipeline).await.unwrap();
    if !found.advance().await.unwrap() {
        return 0;
    }
    let bytes = Document::try_from(found.current()).unwrap();
    bytes.get_i64("bytes").unwrap_or_else(|_| bytes.get_i32("bytes").unwrap().into())
}
