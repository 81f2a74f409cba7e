//! How much keys were used: added up in the database, once, whatever goes wrong on the way.

mod support;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    },
    time::Instant,
};

use futures_util::future::join_all;
use mongodb::bson::{Bson, DateTime, Document, doc};
use support::{mongo::*, *};
use tower_key_rotation::{
    KeyId, KeyPool, KeyRotation, RecoveryHandle,
    store::mongodb::{MongoStore, MongoStoreBuilder},
};

/// A process that makes no pass but those that it is asked for, and whose requests are all answered with 200.
struct Process {
    pool: KeyPool,
    recovery: RecoveryHandle,
    client: KeyRotation<reqwest::Client>,
    server: Server,
}

impl Process {
    async fn over(store: MongoStore) -> Self {
        let pool = KeyPool::builder().open(store).await.unwrap();
        Self {
            recovery: RecoveryHandle::spawn_with(&pool, passes_by_hand()),
            client: rotating(&pool),
            server: Server::answering(|| answer(200, "fine")).await,
            pool,
        }
    }

    async fn requests(&self, count: usize) {
        for _ in 0..count {
            assert_eq!(status(&self.client, &self.server.url()).await, 200);
        }
    }

    fn tokens(&self, key: &str, tokens: u64) {
        self.pool.record_usage(&KeyId::new(key).unwrap(), tokens);
    }

    async fn pass(&self) {
        self.recovery.sweep_now().await.outcome.unwrap();
    }

    async fn pass_fails(&self) -> bool {
        self.recovery.sweep_now().await.outcome.is_err()
    }

    async fn pass_until_it_works(&self) {
        eventually_within(20 * SECOND, "a pass works again", async || !self.pass_fails().await).await;
    }
}

async fn process<const N: usize>(keys: [&str; N]) -> (Mongo, Process) {
    let mongo = Mongo::standalone().await;
    mongo.insert_all(keys).await;
    let process = Process::over(mongo.store().await).await;
    (mongo, process)
}

fn impatient(mongo: &Mongo) -> MongoStoreBuilder {
    mongo.builder().operation_limit(SECOND).poll_interval(60 * MINUTE)
}

/// What is counted on top of what [`healthy`] begins with.
async fn counted(mongo: &Mongo, key: &str) -> (i64, i64) {
    let document = mongo.document(key).await;
    let number = |field| match document.get(field) {
        Some(Bson::Int64(number)) => *number,
        Some(Bson::Int32(number)) => (*number).into(),
        Some(Bson::Double(number)) => *number as i64,
        other => panic!("{key}: {field} is {other:?}"),
    };
    (number("requestsCount") - 2, number("tokensUsed") - 7)
}

async fn server_now(mongo: &Mongo) -> DateTime {
    let hello = mongo.database.run_command(doc! { "hello": 1 }).await.unwrap();
    *hello.get_datetime("localTime").unwrap()
}

#[tokio::test]
async fn passes_and_shutdown_write_pending_usage() {
    let (mongo, process) = process(["alpha"]).await;
    let began = server_now(&mongo).await;
    process.requests(3).await;
    process.tokens("alpha", 10);
    assert_eq!(counted(&mongo, "alpha").await, (0, 0));
    process.pass().await;
    assert_eq!(counted(&mongo, "alpha").await, (3, 10));
    let document = mongo.document("alpha").await;
    let used = *document.get_datetime("lastUsedAt").unwrap();
    // It is exact to ten seconds.
    let earliest = DateTime::from_millis(began.timestamp_millis() - 10_000);
    assert!(earliest <= used && used <= server_now(&mongo).await, "{began} {used}");

    process.pass().await;
    assert_eq!(mongo.document("alpha").await, document);
    process.requests(2).await;
    process.tokens("alpha", 5);
    process.tokens("alpha", 6);
    process.pass().await;
    assert_eq!(counted(&mongo, "alpha").await, (5, 21));
    assert!(*mongo.document("alpha").await.get_datetime("lastUsedAt").unwrap() >= used);

    process.requests(4).await;
    process.tokens("alpha", 1);
    process.recovery.shutdown().await.unwrap();
    assert_eq!(counted(&mongo, "alpha").await, (9, 22));
}

#[tokio::test]
async fn usage_leaves_all_other_fields_alone() {
    let (mongo, process) = process(["alpha", "beta"]).await;
    let before = mongo.document("alpha").await;
    process.requests(2).await;
    process.pass().await;
    let ours = ["requestsCount", "tokensUsed", "lastUsedAt"];
    let others = |document: Document| -> Vec<_> {
        document.into_iter().filter(|(field, _)| !ours.contains(&field.as_str())).collect()
    };
    assert_eq!(others(mongo.document("alpha").await), others(before));
}

#[tokio::test]
async fn numeric_counts_are_added_up_and_others_stay() {
    let (mongo, process) = process([
        "int32", "int64", "double", "decimal", "null", "missing", "text", "list", "nan", "infinite",
    ])
    .await;
    let numbers: [(&str, Bson); 5] = [
        ("int32", 40_i32.into()),
        ("int64", 40_i64.into()),
        ("double", 40.0.into()),
        ("decimal", Bson::Decimal128("40".parse().unwrap())),
        ("null", Bson::Null),
    ];
    let others: [(&str, Bson); 4] = [
        ("text", "40".into()),
        ("list", vec![Bson::from(40)].into()),
        ("nan", f64::NAN.into()),
        ("infinite", f64::INFINITY.into()),
    ];
    for (id, value) in numbers.iter().chain(&others) {
        mongo.set(id, doc! { "requestsCount": value, "tokensUsed": value }).await;
    }
    let unset = doc! { "$unset": { "requestsCount": "", "tokensUsed": "" } };
    mongo.keys().update_one(doc! { "_id": "missing" }, unset).await.unwrap();

    process.requests(10).await;
    for key in process.pool.stats().keys {
        assert_eq!(key.requests, 1);
        process.tokens(key.id.as_str(), 100);
    }
    process.pass().await;
    let fields = async |id: &str| {
        let mut document = mongo.document(id).await;
        ["requestsCount", "tokensUsed"].map(|field| document.remove(field).unwrap())
    };
    for id in ["int32", "int64"] {
        assert_eq!(fields(id).await, [Bson::Int64(41), Bson::Int64(140)], "{id}");
    }
    assert_eq!(fields("double").await, [Bson::Double(41.0), Bson::Double(140.0)]);
    let decimal = |text: &str| Bson::Decimal128(text.parse().unwrap());
    assert_eq!(fields("decimal").await, [decimal("41"), decimal("140")]);
    for id in ["null", "missing"] {
        assert_eq!(fields(id).await, [Bson::Int64(1), Bson::Int64(100)], "{id}");
    }
    for (id, value) in others {
        // NaN is not equal to itself.
        let [requests, tokens] = fields(id).await.map(|value| format!("{value:?}"));
        assert_eq!((requests, tokens), (format!("{value:?}"), format!("{value:?}")), "{id}");
    }
}

#[tokio::test]
async fn f03_requests_write_nothing_and_need_no_server() {
    let mut mongod = own(Kind::Standalone).await;
    let mongo = Mongo::at(&mongod.uri()).await;
    mongo.insert("alpha").await;
    let process = Process::over(impatient(&mongo).connect(&mongo.uri).await.unwrap()).await;
    process.requests(10).await;
    let operations = async || {
        let status = mongo.database.run_command(doc! { "serverStatus": 1 }).await.unwrap();
        let counters = status.get_document("opcounters").unwrap().clone();
        ["insert", "query", "update", "delete", "getmore"].map(|kind| counters.get(kind).unwrap().clone())
    };
    let before = operations().await;
    process.requests(100).await;
    process.tokens("alpha", 50);
    settle().await;
    assert_eq!(operations().await, before);

    mongod.kill();
    let began = Instant::now();
    process.requests(100).await;
    process.tokens("alpha", 50);
    let took = began.elapsed();
    assert!(took < 5 * SECOND, "{took:?}");
    assert!(process.pass_fails().await);
    process.requests(10).await;

    mongod.restart().await.unwrap();
    process.pass_until_it_works().await;
    process.pass().await;
    // A write that met the dead server on its way may have been made, so it is not repeated.
    let counted = counted(&mongo, "alpha").await;
    assert!([(220, 100), (10, 0)].contains(&counted), "{counted:?}");
}

#[tokio::test]
async fn lost_write_responses_never_double_usage() {
    let mongo = Mongo::standalone().await;
    mongo.insert("alpha").await;
    let address = mongo.uri.trim_start_matches("mongodb://").split('/').next().unwrap();
    let proxy = Proxy::to(address.parse().unwrap()).await;
    let here = Process::over(impatient(&mongo).connect(proxy.uri()).await.unwrap()).await;
    let there = Process::over(impatient(&mongo).connect(&mongo.uri).await.unwrap()).await;
    for round in 1..=4 {
        here.requests(3).await;
        here.tokens("alpha", 10);
        proxy.set(Fault::Truncate(0));
        let before = counted(&mongo, "alpha").await;
        assert!(here.pass_fails().await, "round {round}");

        there.requests(1).await;
        there.pass().await;
        here.requests(2).await;
        proxy.set(Fault::None);
        here.pass_until_it_works().await;
        let counted = counted(&mongo, "alpha").await;
        let added = (counted.0 - before.0, counted.1 - before.1);
        // A write whose answer is lost is not repeated: its usage may be missing, and is never counted twice.
        assert!(matches!(added, (6, 10) | (3, 0)), "round {round}: {added:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shared_usage_stays_exact_under_random_write_failures() {
    let mongod = own(Kind::Standalone).await;
    let mongo = Mongo::at(&mongod.uri()).await;
    mongo.insert_all(["alpha", "beta", "gamma"]).await;
    let processes: Vec<_> = join_all(
        (0..2).map(|_| async { Process::over(impatient(&mongo).connect(&mongo.uri).await.unwrap()).await }),
    )
    .await;
    let not_safe_yet = doc! { "code": 64, "codeName": "WriteConcernFailed", "errmsg": "waiting" };
    let at_random = doc! { "activationProbability": 0.3 };
    // The first of these comes after the update was made. The other one, not the primary, comes before.
    let faults = [doc! { "writeConcernError": not_safe_yet }, doc! { "errorCode": 10_107 }];
    let fault = |number: usize| {
        let mut fault = faults[number % faults.len()].clone();
        fault.insert("failCommands", vec!["update"]);
        fault
    };
    fail_command(&mongod, doc! { "times": 1 }, fault(0)).await;
    processes[0].requests(3).await;
    assert!(processes[0].pass_fails().await);

    let failed = AtomicU32::new(0);
    for round in 0..30 {
        fail_command(&mongod, at_random.clone(), fault(round)).await;
        join_all(processes.iter().map(async |process| {
            process.requests(3).await;
            process.tokens("beta", 100);
            failed.fetch_add(process.pass_fails().await.into(), Relaxed);
        }))
        .await;
    }
    stop_failing(&mongod).await;
    for process in &processes {
        process.pass_until_it_works().await;
        // What was used while an older batch was unsettled.
        process.pass().await;
    }
    println!("{} of 60 passes failed", failed.load(Relaxed));
    assert!(failed.load(Relaxed) >= 5);
    let mut requests = 0;
    for key in ["alpha", "beta", "gamma"] {
        requests += counted(&mongo, key).await.0;
    }
    assert_eq!(requests, 3 + 2 * 30 * 3);
    assert_eq!(counted(&mongo, "beta").await.1, 2 * 30 * 100);
}

#[tokio::test]
async fn temporarily_refused_usage_is_counted_later() {
    let mongod = own(Kind::ReplicaSet).await;
    let mongo = Mongo::at(&mongod.uri()).await;
    mongo.insert_all(["alpha", "beta"]).await;
    let process = Process::over(mongo.store().await).await;
    let block_writes = async |block: bool| {
        let command = doc! { "setUserWriteBlockMode": 1, "global": block };
        mongod.admin().await.unwrap().run_command(command).await.unwrap();
    };
    process.requests(2).await;
    block_writes(true).await;
    assert!(process.pass_fails().await);
    process.requests(2).await;
    assert!(process.pass_fails().await);
    block_writes(false).await;
    process.pass().await;
    for key in ["alpha", "beta"] {
        assert_eq!(counted(&mongo, key).await, (2, 0));
    }
}

#[tokio::test]
async fn f16_usage_of_a_deleted_key_is_dropped_silently() {
    let (mongo, process) = process(["alpha", "beta"]).await;
    process.requests(4).await;
    process.tokens("alpha", 10);
    process.tokens("beta", 20);
    mongo.keys().delete_one(doc! { "_id": "alpha" }).await.unwrap();
    process.pass().await;
    assert_eq!(mongo.find("alpha").await, None);
    assert_eq!(counted(&mongo, "beta").await, (2, 20));
    process.requests(3).await;
    process.recovery.shutdown().await.unwrap();
    assert_eq!(counted(&mongo, "beta").await, (5, 20));
}

#[tokio::test]
async fn usage_stays_exact_when_a_middle_command_fails() {
    const KEYS: usize = 1_200;
    let mongod = own(Kind::Standalone).await;
    let mongo = Mongo::at(&mongod.uri()).await;
    let ids: Vec<_> = (0..KEYS).map(|number| format!("key-{number}")).collect();
    mongo.keys().insert_many(ids.iter().map(|id| healthy(id))).await.unwrap();
    let process = Process::over(mongo.store().await).await;
    let use_all = async || {
        for (tokens, id) in (1..).zip(&ids) {
            process.tokens(id, tokens);
        }
        process.requests(KEYS).await;
    };
    use_all().await;
    process.pass().await;
    // The sweep sends two updates. Then the first keys of the batch have it, and the others not yet.
    fail_command(&mongod, doc! { "skip": 3 }, doc! { "failCommands": ["update"], "errorCode": 10_107 }).await;
    use_all().await;
    assert!(process.pass_fails().await);
    let some = mongo.count(doc! { "requestsCount": 4 }).await;
    assert!(0 < some && some < KEYS as u64, "{some}");

    stop_failing(&mongod).await;
    process.pass_until_it_works().await;
    assert_eq!(mongo.count(doc! { "requestsCount": 4 }).await, KEYS as u64);
    let exact = doc! { "$eq": ["$tokensUsed", { "$add": [7, { "$multiply": [2, { "$add": [1, {
        "$toInt": { "$arrayElemAt": [{ "$split": ["$_id", "-"] }, 1] },
    }] }] }] }] };
    assert_eq!(mongo.count(doc! { "$expr": exact }).await, KEYS as u64);
}

#[tokio::test]
async fn f17_a_new_secret_keeps_the_keys_usage_count() {
    let (mongo, process) = process(["alpha"]).await;
    process.requests(2).await;
    process.pass().await;
    process.requests(3).await;
    process.tokens("alpha", 10);
    mongo.set("alpha", doc! { "apiKey": "sk-new" }).await;
    process.pool.reload().await.unwrap();
    process.requests(4).await;
    process.tokens("alpha", 5);
    assert_eq!(process.server.keys()[5..], ["new", "new", "new", "new"]);
    process.pass().await;
    assert_eq!(counted(&mongo, "alpha").await, (9, 15));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f17_changing_a_secret_keeps_the_usage() {
    let (mongo, process) = process(["alpha"]).await;
    let (pool, stop) = (process.pool.clone(), Arc::new(AtomicBool::new(false)));
    let stopped = stop.clone();
    let recording = std::thread::spawn(move || {
        let alpha = KeyId::new("alpha").unwrap();
        let mut recorded = 0;
        while !stopped.load(Relaxed) {
            pool.record_usage(&alpha, 1);
            recorded += 1;
        }
        recorded
    });
    for number in 0..200 {
        mongo.set("alpha", doc! { "apiKey": format!("sk-{number}") }).await;
        process.pool.reload().await.unwrap();
    }
    stop.store(true, Relaxed);
    let recorded = recording.join().unwrap();
    process.pass().await;
    // Usage is a statistic: what is recorded in the moment of a replacement may be lost, and nothing is counted twice.
    let (_, tokens) = counted(&mongo, "alpha").await;
    let recorded = recorded as i64;
    assert!(tokens <= recorded && recorded - tokens < recorded / 100, "{tokens} of {recorded}");
}
