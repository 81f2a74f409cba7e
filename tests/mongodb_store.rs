//! The keys of a pool in MongoDB: marks, sweeps, reloads and what operators do, on documents of other programs,
//! and what becomes of them when these meet.

mod support;

use std::{
    convert::Infallible,
    future::{Future, ready},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use http::{Request, Response, header::RETRY_AFTER};
use mongodb::bson::{Bson, DateTime, Document, doc};
use proptest::{
    prelude::*,
    test_runner::{TestCaseResult, TestRunner},
};
use support::{mongo::*, *};
use tokio::{
    sync::{Barrier, Semaphore},
    task::{JoinHandle, JoinSet},
    time::sleep,
};
use tower::{Layer, Service, service_fn};
use tower_key_rotation::{
    Error, KeyId, KeyPool, KeyPoolBuilder, KeyRotation, KeyRotationLayer, KeyStats, RecoveryHandle, Status,
    store::{
        KeyStore, Recovered,
        mongodb::{MongoStore, MongoStoreBuilder},
    },
};

const MS: Duration = Duration::from_millis(1);
const HOUR: Duration = Duration::from_secs(60 * 60);
/// How much a busy machine may take off a cooldown before a test has looked at it.
const SLACK: Duration = Duration::from_secs(25);

fn is_about(left: Duration, expected: Duration) -> bool {
    left <= expected + 2 * MS && left + SLACK >= expected
}

fn millis_are_about(left: i64, expected: Duration) -> bool {
    u64::try_from(left).is_ok_and(|left| is_about(Duration::from_millis(left), expected))
}

/// A pool over a store of its own, as each process has it. Nothing happens by itself but that marks are written.
struct Process {
    pool: KeyPool,
    client: KeyRotation<reqwest::Client>,
    recovery: RecoveryHandle,
}

impl Process {
    async fn start(mongo: &Mongo) -> Self {
        Self::start_with(quiet(mongo), &mongo.uri, KeyPool::builder()).await
    }

    async fn start_with(store: MongoStoreBuilder, uri: &str, builder: KeyPoolBuilder) -> Self {
        let pool = builder.open(store.connect(uri).await.unwrap()).await.unwrap();
        Self { client: rotating(&pool), recovery: RecoveryHandle::spawn_with(&pool, passes_by_hand()), pool }
    }

    async fn get(&self, server: &Server) -> u16 {
        status(&self.client, &server.url()).await
    }

    fn of(&self, id: &str) -> KeyStats {
        stats_of(&self.pool, id)
    }

    fn has(&self, id: &str) -> bool {
        self.pool.stats().keys.iter().any(|key| key.id.as_str() == id)
    }

    async fn written(&self) {
        eventually("the marks are written", || self.pool.stats().marks_waiting == 0).await;
    }

    async fn sweep(&self) -> Recovered {
        self.recovery.sweep_now().await.outcome.unwrap()
    }
}

/// A store that is read when the test says so.
fn quiet(mongo: &Mongo) -> MongoStoreBuilder {
    mongo.builder().poll_interval(HOUR)
}

async fn quiet_store(mongo: &Mongo) -> MongoStore {
    quiet(mongo).connect(&mongo.uri).await.unwrap()
}

fn gateway(pool: &KeyPool) -> KeyRotation<reqwest::Client, ByStatus> {
    KeyRotationLayer::new(pool).classify(ByStatus).layer(http())
}

/// A database with the key `alpha`, a process over it that was answered so, and the document before and after.
async fn marked(http_status: u16) -> (Mongo, Process, Document, Document) {
    let mongo = Mongo::standalone().await;
    mongo.insert_all(["alpha", "beta"]).await;
    let process = Process::start(&mongo).await;
    let before = mongo.document("alpha").await;
    let server = Server::answering(move || answer(http_status, "no, sk-alpha is too busy")).await;
    assert_eq!(status(&gateway(&process.pool), &server.url()).await, http_status);
    process.written().await;
    let after = mongo.document("alpha").await;
    (mongo, process, before, after)
}

/// All but what a mark is about.
fn besides_the_mark(mut document: Document) -> Document {
    for field in ["status", "cooldownUntil", "lastError", "updatedAt", "rest", "words", "failedAt"] {
        document.remove(field);
    }
    document
}

fn is_recent(document: &Document, field: &str) -> bool {
    let date = document.get_datetime(field).unwrap();
    (date.timestamp_millis() - DateTime::now().timestamp_millis()).unsigned_abs() < 60_000
}

fn text<'a>(document: &'a Document, field: &str) -> &'a str {
    document.get_str(field).unwrap()
}

fn says(document: &Document, what: &str) -> bool {
    let said = text(document, "lastError");
    said.contains(what) && !said.contains("sk-") && said.len() < 100
}

#[tokio::test]
async fn marks_use_server_time_and_touch_nothing_else() {
    let (mongo, _process, before, after) = marked(429).await;
    assert_eq!(text(&after, "status"), "rate_limited");
    assert!(after.get_datetime("cooldownUntil").is_ok());
    assert!(millis_are_about(mongo.millis_left("alpha").await.unwrap(), 2 * MINUTE));
    assert!(says(&after, "429") && is_recent(&after, "updatedAt"), "{after}");
    assert!(!after.contains_key("failedAt"), "{after}");
    assert_eq!(besides_the_mark(after), besides_the_mark(before));
    assert_eq!(besides_the_mark(theirs(mongo.document("beta").await)), besides_the_mark(healthy("beta")));
}

#[tokio::test]
async fn an_exhausted_key_rests_for_24_hours() {
    let (mongo, _process, before, after) = marked(402).await;
    assert_eq!(text(&after, "status"), "exhausted");
    assert_eq!(after.get_document("rest").unwrap().get("u"), after.get("cooldownUntil"));
    assert!(millis_are_about(mongo.millis_left("alpha").await.unwrap(), 24 * HOUR));
    assert!(says(&after, "402") && is_recent(&after, "updatedAt") && is_recent(&after, "failedAt"));
    assert_eq!(besides_the_mark(after), besides_the_mark(before));
}

#[tokio::test]
async fn a_revoked_key_has_no_end() {
    let (mongo, process, before, after) = marked(401).await;
    assert_eq!(text(&after, "status"), "error");
    assert_eq!(after.get("cooldownUntil"), Some(&Bson::Null));
    assert!(says(&after, "401") && is_recent(&after, "updatedAt") && is_recent(&after, "failedAt"));
    assert_eq!(besides_the_mark(after), besides_the_mark(before));
    assert_eq!(process.sweep().await.count, 0);
    assert_eq!(mongo.status("alpha").await, "error");
    assert_eq!(process.of("alpha").status, Status::Revoked);
}

#[tokio::test]
async fn only_keys_exhausted_by_this_crate_recover() {
    let (mongo, process, ..) = marked(402).await;
    mongo.insert("theirs").await;
    let past = ago(5 * SECOND);
    mongo.set("theirs", doc! { "status": "exhausted", "cooldownUntil": past }).await;
    assert_eq!(process.sweep().await.count, 0);

    mongo.end_cooldown("alpha").await;
    let recovered = process.sweep().await;
    assert_eq!((recovered.count, recovered.ids), (1, vec![KeyId::new("alpha").unwrap()]));
    let late = Process::start(&mongo).await;
    assert_eq!(late.of("alpha").status, Status::Healthy);
    for process in [process, late] {
        assert_eq!(process.of("theirs").status, Status::Exhausted);
    }
    let alpha = mongo.document("alpha").await;
    assert_eq!((text(&alpha, "status"), text(&alpha, "lastError")), ("healthy", ""));
    assert!(!alpha.contains_key("failedAt"), "{alpha}");
    let theirs = mongo.document("theirs").await;
    assert_eq!((text(&theirs, "status"), theirs.get("cooldownUntil")), ("exhausted", Some(&past.into())));
}

#[tokio::test]
async fn f10_a_429_after_exhaustion_counts_before_any_sweep() {
    let mongo = Mongo::standalone().await;
    mongo.insert("alpha").await;
    mongo.set("alpha", doc! { "status": "exhausted" }).await;
    let past = ago(5 * SECOND);
    mongo.set("alpha", doc! { "cooldownUntil": past, "exhaustedUntil": past, "failedAt": past }).await;
    let process = Process::start(&mongo).await;
    let server = Server::answering(|| answer(429, "")).await;
    assert_eq!(process.get(&server).await, 429);
    process.written().await;
    assert_eq!(mongo.status("alpha").await, "rate_limited");
    assert_eq!(process.sweep().await.count, 0);
    assert_eq!(process.of("alpha").status, Status::RateLimited);
}

#[tokio::test]
async fn f10_a_longer_rate_limit_extends_an_exhaustion() {
    let mongo = Mongo::standalone().await;
    mongo.insert("alpha").await;
    let late = Process::start(&mongo).await;
    let quota = KeyPool::builder().exhausted_for(MINUTE);
    let process = Process::start_with(quiet(&mongo), &mongo.uri, quota).await;
    let server = Server::answering(|| answer(402, "")).await;
    assert_eq!(status(&gateway(&process.pool), &server.url()).await, 402);
    process.written().await;
    let server = Server::answering(|| answer_with(429, [("retry-after", "600")], "")).await;
    assert_eq!(late.get(&server).await, 429);
    late.written().await;

    assert_eq!(mongo.status("alpha").await, "rate_limited");
    assert!(millis_are_about(mongo.millis_left("alpha").await.unwrap(), 10 * MINUTE));
    for process in [&process, &late] {
        process.pool.reload().await.unwrap();
        assert!(is_about(process.of("alpha").time_left.unwrap(), 10 * MINUTE));
    }
}

#[tokio::test]
async fn a_429_never_overwrites_a_worse_stored_status() {
    let mongo = Mongo::standalone().await;
    let words = ["exhausted", "error", "using_failover", "Healthy", ""];
    for word in words {
        mongo.insert(&format!("key-{word}")).await;
    }
    let process = Process::start(&mongo).await;
    for word in words {
        mongo.set(&format!("key-{word}"), doc! { "status": word, "cooldownUntil": "tomorrow" }).await;
    }
    let before = documents_of_others(&mongo).await;
    let server = Server::answering(|| answer(429, "")).await;
    for _ in words {
        assert_eq!(process.get(&server).await, 429);
    }
    process.written().await;
    assert_eq!(documents_of_others(&mongo).await, before);
    process.pool.reload().await.unwrap();
    let stats = process.pool.stats();
    assert_eq!((stats.exhausted, stats.revoked, stats.disabled), (1, 1, 3));
}

/// Without the date of the last change, too.
async fn documents_of_others(mongo: &Mongo) -> Vec<Document> {
    let mut documents: Vec<_> = all_documents(mongo).await.into_iter().map(theirs).collect();
    documents.iter_mut().for_each(|document| _ = document.remove("updatedAt"));
    documents
}

#[tokio::test]
async fn a_mark_on_a_disabled_key_is_kept() {
    let mongo = Mongo::standalone().await;
    mongo.insert("alpha").await;
    let process = Process::start(&mongo).await;
    mongo.set("alpha", doc! { "status": "disabled" }).await;
    assert_eq!(process.get(&Server::limiting(["alpha"]).await).await, 429);
    process.written().await;
    assert_eq!(mongo.status("alpha").await, "disabled");
    process.pool.reload().await.unwrap();
    assert_eq!(process.of("alpha").status, Status::Disabled);

    process.pool.enable("alpha").await.unwrap();
    assert_eq!(mongo.status("alpha").await, "rate_limited");
    assert!(millis_are_about(mongo.millis_left("alpha").await.unwrap(), 2 * MINUTE));
    assert_eq!(process.of("alpha").status, Status::RateLimited);
}

async fn all_documents(mongo: &Mongo) -> Vec<Document> {
    let mut found = mongo.keys().find(doc! {}).sort(doc! { "_id": 1 }).await.unwrap();
    let mut documents = Vec::new();
    while found.advance().await.unwrap() {
        documents.push(Document::try_from(found.current()).unwrap());
    }
    documents
}

fn ago(time: Duration) -> DateTime {
    DateTime::from_millis(DateTime::now().timestamp_millis() - time.as_millis() as i64)
}

fn in_the_future(time: Duration) -> DateTime {
    DateTime::from_millis(DateTime::now().timestamp_millis() + time.as_millis() as i64)
}

async fn insert_limited(mongo: &Mongo, id: &str, until: impl Into<Bson>) {
    mongo.insert(id).await;
    let limited = doc! { "status": "rate_limited", "cooldownUntil": until, "lastError": "HTTP 429" };
    mongo.set(id, limited).await;
}

#[tokio::test]
async fn a_sweep_resets_only_expired_cooldowns() {
    let mongo = Mongo::standalone().await;
    let store = quiet_store(&mongo).await;
    for id in ["long ago", "just now"] {
        insert_limited(&mongo, id, ago(if id == "just now" { MS } else { HOUR })).await;
    }
    insert_limited(&mongo, "not yet", in_the_future(60 * SECOND)).await;
    for word in ["healthy", "exhausted", "error", "disabled", "using_failover"] {
        insert_limited(&mongo, word, ago(HOUR)).await;
        mongo.set(word, doc! { "status": word }).await;
    }
    let before = all_documents(&mongo).await;

    let recovered = store.sweep().await.unwrap();
    assert_eq!(recovered.count, 2);
    let mut ids: Vec<_> = recovered.ids.iter().map(KeyId::as_str).collect();
    ids.sort_unstable();
    assert_eq!(ids, ["just now", "long ago"]);
    for before in before {
        let id = before.get_str("_id").unwrap();
        let after = mongo.document(id).await;
        if !ids.contains(&id) {
            assert_eq!(after, before);
            continue;
        }
        let after = theirs(after);
        assert_eq!((text(&after, "status"), text(&after, "lastError")), ("healthy", ""));
        assert_eq!(after.get("cooldownUntil"), Some(&Bson::Null));
        assert!(is_recent(&after, "updatedAt"));
        assert_eq!(besides_the_mark(after), besides_the_mark(before));
    }
    let swept = all_documents(&mongo).await;
    assert_eq!(store.sweep().await.unwrap(), Recovered::default());
    assert_eq!(all_documents(&mongo).await, swept);
}

#[tokio::test]
async fn f15_undated_limited_keys_rest_2_minutes_then_recover() {
    let mongo = Mongo::standalone().await;
    let ids = ["null", "missing"];
    for id in ids {
        insert_limited(&mongo, id, Bson::Null).await;
    }
    let unset = doc! { "$unset": { "cooldownUntil": 1 } };
    mongo.keys().update_one(doc! { "_id": "missing" }, unset).await.unwrap();
    let process = Process::start(&mongo).await;
    assert_eq!(process.pool.stats().rate_limited, ids.len());
    assert_eq!(process.sweep().await, Recovered::default());
    for id in ids {
        let left = mongo.millis_left(id).await.unwrap_or_else(|| panic!("{id} got no date"));
        assert!(millis_are_about(left, 2 * MINUTE), "{id}: {left}");
        assert!(is_about(process.of(id).time_left.unwrap(), 2 * MINUTE), "{id}");
        let document = mongo.document(id).await;
        assert_eq!((text(&document, "status"), text(&document, "lastError")), ("rate_limited", "HTTP 429"));
        mongo.end_cooldown(id).await;
    }
    assert_eq!(process.sweep().await.count, ids.len() as u64);
    assert_eq!(mongo.count(doc! { "status": "healthy", "cooldownUntil": null }).await, ids.len() as u64);
}

#[tokio::test]
async fn sweep_log_omits_ids_of_more_than_five() {
    let (logs, _guard) = Logs::capture();
    let mongo = Mongo::standalone().await;
    for number in 0..6 {
        insert_limited(&mongo, &format!("key-{number}"), ago(MINUTE)).await;
    }
    let process = Process::start(&mongo).await;
    let recovered = process.sweep().await;
    assert_eq!((recovered.count, recovered.ids.len()), (6, 0));
    let line = logs.ours().into_iter().find(|line| line.contains("keys recovered")).unwrap();
    assert!(line.contains("count=6") && line.contains("ids=[]") && line.contains("duration_ms="), "{line}");

    for number in 0..5 {
        let limited = doc! { "status": "rate_limited", "cooldownUntil": ago(MINUTE) };
        mongo.set(&format!("key-{number}"), limited).await;
    }
    let recovered = process.sweep().await;
    assert_eq!((recovered.count, recovered.ids.len()), (5, 5));
    let line = logs.ours().into_iter().rfind(|line| line.contains("keys recovered")).unwrap();
    assert!((0..5).all(|number| line.contains(&format!("\"key-{number}\""))), "{line}");

    assert_eq!(process.sweep().await.count, 0);
    assert_eq!(logs.count("keys recovered"), 2);
    assert!(!logs.text().contains("sk-key"));
}

// ---- f07: a sweep and a fresh mark ----

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f07_a_fresh_mark_survives_concurrent_sweeps() {
    const ROUNDS: u64 = 80;
    let mongo = Mongo::standalone().await;
    mongo.insert("alpha").await;
    let (here, there) = (Process::start(&mongo).await, Process::start(&mongo).await);
    let third = quiet_store(&mongo).await;
    let server = Server::limiting(["alpha"]).await;
    let mut swept = 0;
    for round in 0..ROUNDS {
        expire_in(&mongo, "alpha", round as i64 % 7 - 3).await;
        here.pool.reload().await.unwrap();
        there.pool.reload().await.unwrap();
        sleep(here.pool.next_return().unwrap()).await;
        let request = async {
            sleep(MS * (round % 3) as u32).await;
            here.get(&server).await
        };
        let sweep = async {
            sleep(MS * (round % 4) as u32).await;
            third.sweep().await.unwrap().count
        };
        let (answered, by_us, by_them, by_third) = tokio::join!(request, here.sweep(), there.sweep(), sweep);
        assert_eq!(answered, 429);
        swept += by_us.count + by_them.count + by_third;
        while here.pool.stats().marks_waiting > 0 {
            swept += here.sweep().await.count;
        }
        there.pool.reload().await.unwrap();
        assert_eq!(mongo.status("alpha").await, "rate_limited", "round {round}");
        assert!(millis_are_about(mongo.millis_left("alpha").await.unwrap(), 2 * MINUTE), "round {round}");
        for process in [&here, &there] {
            assert!(is_about(process.of("alpha").time_left.unwrap(), 2 * MINUTE), "round {round}");
        }
    }
    assert!(swept > 0 && swept <= ROUNDS, "{swept} of {ROUNDS} cooldowns were swept");
}

async fn expire_in(mongo: &Mongo, id: &str, millis: i64) {
    let set = doc! { "status": "rate_limited", "cooldownUntil": { "$add": ["$$NOW", millis] } };
    mongo.keys().update_one(doc! { "_id": id }, vec![doc! { "$set": set }]).await.unwrap();
}

/// Something that waits for the test.
#[derive(Debug)]
struct Gate {
    arrived: AtomicUsize,
    open: Semaphore,
}

impl Gate {
    fn new() -> Self {
        Self { arrived: AtomicUsize::new(0), open: Semaphore::new(0) }
    }

    async fn pass(&self) {
        self.arrived.fetch_add(1, SeqCst);
        self.open.acquire().await.unwrap().forget();
    }

    fn let_one_pass(&self) {
        self.open.add_permits(1);
    }

    fn arrived(&self) -> usize {
        self.arrived.load(SeqCst)
    }
}

/// What a service in this process answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Reply {
    status: u16,
    retry_after: Option<u64>,
}

impl Reply {
    fn limited(retry_after: Duration) -> Self {
        Self { status: 429, retry_after: Some(retry_after.as_secs()) }
    }

    const EXHAUSTED: Self = Self { status: 402, retry_after: None };
}

/// A request that has its key, and is answered when this is awaited.
fn answered(pool: &KeyPool, reply: Reply) -> impl Future<Output = u16> + Send + use<> {
    let mut response = Response::builder().status(reply.status);
    if let Some(seconds) = reply.retry_after {
        response = response.header(RETRY_AFTER, seconds);
    }
    let response = response.body(()).unwrap();
    let inner = service_fn(move |_: Request<()>| ready(Ok::<_, Infallible>(response.clone())));
    let mut service = KeyRotationLayer::new(pool).classify(ByStatus).layer(inner);
    let response = service.call(Request::get("https://api.example.com/").body(()).unwrap());
    async { response.await.unwrap().status().as_u16() }
}

// ---- f08: a reload and a mark that is not written ----

/// A server of the test's own with the key `alpha`, and a process that it can tell from others.
async fn ill_treated() -> (Mongod, Mongo, Process) {
    let server = own(Kind::Standalone).await;
    let mongo = Mongo::at(&server.uri()).await;
    mongo.insert("alpha").await;
    let uri = format!("{}&appName=slow", mongo.uri);
    let process = Process::start_with(quiet(&mongo), &uri, KeyPool::builder()).await;
    (server, mongo, process)
}

#[tokio::test]
async fn a_queued_mark_counts_from_its_creation() {
    let server = own(Kind::Standalone).await;
    let mongo = Mongo::at(&server.uri()).await;
    mongo.insert("alpha").await;
    let store = quiet(&mongo).connect(format!("{}&appName=slow", mongo.uri)).await.unwrap();
    store.load_all().await;
    fail_command(&server, doc! { "times": 1 }, held_up(1_000)).await;
    let second = async {
        sleep(100 * MS).await;
        let made = DateTime::now().timestamp_millis();
        store.limit("alpha", MINUTE).await.unwrap();
        made
    };
    let (_, made) = tokio::join!(store.limit("alpha", SECOND), second);
    assert!(DateTime::now().timestamp_millis() - made > 700, "it waited for the first one");
    let until = mongo.document("alpha").await.get_datetime("cooldownUntil").unwrap().timestamp_millis();
    assert!((60_000..61_000).contains(&(until - made)), "{}", until - made);
}

/// Writes of marks by the application `slow` take that many milliseconds longer.
fn held_up(millis: i32) -> Document {
    doc! {
        "failCommands": ["findAndModify"], "blockConnection": true, "blockTimeMS": millis, "appName": "slow",
    }
}

async fn reset_by_an_admin_page(mongo: &Mongo, id: &str) {
    mongo.set(id, doc! { "status": "healthy", "lastError": null, "cooldownUntil": null }).await;
}

#[tokio::test]
async fn f08_a_reload_keeps_a_mark_still_being_written() {
    let (mongod, mongo, process) = ill_treated().await;
    fail_command(&mongod, doc! { "times": 1 }, held_up(1_500)).await;
    assert_eq!(process.get(&Server::limiting(["alpha"]).await).await, 429);
    for _ in 0..3 {
        sleep(50 * MS).await;
        process.pool.reload().await.unwrap();
        assert!(is_about(time_left(&process.pool, "alpha").unwrap(), 2 * MINUTE));
    }
    assert_eq!(process.pool.stats().marks_waiting, 1);
    assert_eq!(mongo.status("alpha").await, "healthy");

    process.written().await;
    assert_eq!(mongo.status("alpha").await, "rate_limited");
    process.pool.reload().await.unwrap();
    assert!(is_about(time_left(&process.pool, "alpha").unwrap(), 2 * MINUTE));
    reset_by_an_admin_page(&mongo, "alpha").await;
    process.pool.reload().await.unwrap();
    assert_eq!(process.of("alpha").status, Status::Healthy);
}

#[tokio::test]
async fn f08_a_reload_keeps_a_mark_whose_write_failed() {
    let (mongod, mongo, process) = ill_treated().await;
    let refuse = doc! { "failCommands": ["findAndModify"], "errorCode": 8_000, "appName": "slow" };
    fail_command(&mongod, "alwaysOn", refuse).await;
    assert_eq!(process.get(&Server::limiting(["alpha"]).await).await, 429);
    for _ in 0..3 {
        assert!(process.recovery.sweep_now().await.outcome.is_err());
        process.pool.reload().await.unwrap();
        assert!(is_about(time_left(&process.pool, "alpha").unwrap(), 2 * MINUTE));
    }
    assert_eq!(process.pool.stats().marks_waiting, 1);
    assert_eq!(mongo.status("alpha").await, "healthy");

    stop_failing(&mongod).await;
    process.sweep().await;
    assert_eq!(
        (process.pool.stats().marks_waiting, mongo.status("alpha").await.as_str()),
        (0, "rate_limited")
    );
    expire_in(&mongo, "alpha", 30_000).await;
    process.pool.reload().await.unwrap();
    assert!(time_left(&process.pool, "alpha").unwrap() <= 30 * SECOND);
}

// ---- f09: an operator's reset ----

/// The key `alpha`; a process that gets to the database through a proxy, and one that has a way of its own.
async fn behind_a_proxy() -> (Mongo, Proxy, Process, Process) {
    let mongo = Mongo::standalone().await;
    mongo.insert("alpha").await;
    let proxy = Proxy::to(address_of(&mongo.uri)).await;
    let store = quiet(&mongo).operation_limit(250 * MS);
    let far = Process::start_with(store, &proxy.uri(), KeyPool::builder()).await;
    let near = Process::start(&mongo).await;
    (mongo, proxy, far, near)
}

fn address_of(uri: &str) -> std::net::SocketAddr {
    let host = uri.strip_prefix("mongodb://").unwrap().split('/').next().unwrap();
    host.parse().expect("these tests need a server at an address of its own")
}

#[tokio::test]
async fn f09_a_reset_wins_over_an_unwritten_earlier_mark() {
    let (mongo, proxy, far, near) = behind_a_proxy().await;
    proxy.set(Fault::Cut);
    assert_eq!(far.get(&Server::limiting(["alpha"]).await).await, 429);
    assert!(far.recovery.sweep_now().await.outcome.is_err());
    near.pool.reset("alpha").await.unwrap();
    // Until no write is under way that began before the reset.
    sleep(600 * MS).await;
    assert_eq!((far.pool.stats().marks_waiting, far.of("alpha").status), (1, Status::RateLimited));

    proxy.set(Fault::None);
    eventually_within(10 * SECOND, "a pass of the process behind the proxy", || async {
        far.recovery.sweep_now().await.outcome.is_ok() && far.pool.stats().marks_waiting == 0
    })
    .await;
    let document = mongo.document("alpha").await;
    assert_eq!(text(&document, "status"), "healthy");
    far.pool.reload().await.unwrap();
    assert_eq!(far.of("alpha").status, Status::Healthy);
}

#[tokio::test]
async fn f09_a_reset_wins_over_an_in_flight_mark() {
    let (mongo, proxy, far, near) = behind_a_proxy().await;
    proxy.set(Fault::Silence);
    assert_eq!(far.get(&Server::limiting(["alpha"]).await).await, 429);
    sleep(200 * MS).await;
    near.pool.reset("alpha").await.unwrap();
    proxy.set(Fault::None);
    far.written().await;
    assert_eq!(mongo.status("alpha").await, "healthy");
    far.pool.reload().await.unwrap();
    assert_eq!(far.of("alpha").status, Status::Healthy);
}

#[tokio::test]
async fn f09_marks_observed_after_a_known_reset_count() {
    let mongo = Mongo::standalone().await;
    mongo.insert("alpha").await;
    let (here, there) = (Process::start(&mongo).await, Process::start(&mongo).await);
    there.pool.reset("alpha").await.unwrap();
    here.pool.reload().await.unwrap();
    assert_eq!(here.get(&Server::limiting(["alpha"]).await).await, 429);
    here.written().await;
    assert_eq!(mongo.status("alpha").await, "rate_limited");
    there.pool.reload().await.unwrap();
    assert_eq!(there.of("alpha").status, Status::RateLimited);
}

#[tokio::test]
async fn f09_a_reset_ends_any_cooldown_in_every_process() {
    for http_status in [429, 402, 401] {
        let (mongo, process, before, _) = marked(http_status).await;
        let other = Process::start(&mongo).await;
        other.pool.reset("alpha").await.unwrap();
        let after = mongo.document("alpha").await;
        assert_eq!((text(&after, "status"), text(&after, "lastError")), ("healthy", ""));
        assert_eq!(after.get("cooldownUntil"), Some(&Bson::Null));
        assert!(!after.contains_key("failedAt"), "{after}");
        assert_eq!(besides_the_mark(after), besides_the_mark(before));
        process.pool.reload().await.unwrap();
        assert_eq!(process.of("alpha").status, Status::Healthy, "{http_status}");
    }
}

#[tokio::test]
async fn f09_a_reset_clears_the_cooldown_but_not_disabled() {
    let (mongo, process, ..) = marked(429).await;
    process.pool.disable("alpha").await.unwrap();
    process.pool.reset("alpha").await.unwrap();
    assert_eq!(mongo.status("alpha").await, "disabled");
    process.pool.reload().await.unwrap();
    assert_eq!((process.of("alpha").status, process.of("alpha").time_left), (Status::Disabled, None));
    process.pool.enable("alpha").await.unwrap();
    process.pool.reload().await.unwrap();
    assert_eq!(
        (process.of("alpha").status, mongo.status("alpha").await.as_str()),
        (Status::Healthy, "healthy")
    );
}

#[tokio::test]
async fn f09_a_reset_by_an_admin_page_counts() {
    for http_status in [429, 402, 401] {
        let (mongo, process, ..) = marked(http_status).await;
        reset_by_an_admin_page(&mongo, "alpha").await;
        process.sweep().await;
        assert_eq!(process.of("alpha").status, Status::Healthy, "{http_status}");
        assert_eq!(mongo.status("alpha").await, "healthy");
        let server = Server::limiting([]).await;
        assert_eq!((process.get(&server).await, process.get(&server).await), (200, 200));
        assert!(server.keys().contains(&"alpha".to_owned()));
    }
}

// ---- f10: deadlines only move later ----

fn reply() -> impl Strategy<Value = Reply> {
    prop_oneof![
        8 => (2..=60u32).prop_map(|minutes| Reply::limited(MINUTE * minutes)),
        1 => Just(Reply::EXHAUSTED),
    ]
}

/// What a key does after these, in whatever order they came.
fn longest(replies: &[Reply]) -> (Status, Option<Duration>) {
    if replies.contains(&Reply::EXHAUSTED) {
        (Status::Exhausted, Some(24 * HOUR))
    } else {
        let seconds = replies.iter().filter_map(|reply| reply.retry_after).max().unwrap();
        (Status::RateLimited, Some(Duration::from_secs(seconds)))
    }
}

struct Several {
    mongo: Mongo,
    processes: Vec<Process>,
}

impl Several {
    async fn start(count: usize) -> Self {
        let mongo = Mongo::standalone().await;
        mongo.insert("alpha").await;
        let mut processes = Vec::new();
        for _ in 0..count {
            processes.push(Process::start(&mongo).await);
        }
        Self { mongo, processes }
    }

    async fn begin_anew(&self) {
        self.mongo.keys().replace_one(doc! { "_id": "alpha" }, healthy("alpha")).await.unwrap();
        for process in &self.processes {
            process.pool.reload().await.unwrap();
            assert_eq!(process.of("alpha").status, Status::Healthy);
        }
    }

    /// Each reply reaches one process or another, all of them at the same time.
    async fn answer(&self, replies: &[Reply]) {
        let processes = self.processes.iter().cycle();
        let together = Arc::new(Barrier::new(replies.len()));
        let mut answers = JoinSet::new();
        for (reply, process) in replies.iter().zip(processes) {
            let (together, answer) = (together.clone(), answered(&process.pool, *reply));
            answers.spawn(async move {
                together.wait().await;
                answer.await
            });
        }
        answers.join_all().await;
        for process in &self.processes {
            process.sweep().await;
        }
    }

    async fn check(&self, replies: &[Reply]) -> TestCaseResult {
        self.begin_anew().await;
        self.answer(replies).await;
        let (status, left) = longest(replies);
        let late = Process::start(&self.mongo).await;
        for process in self.processes.iter().chain([&late]) {
            process.pool.reload().await.unwrap();
            let key = process.of("alpha");
            prop_assert_eq!(key.status, status);
            prop_assert_eq!(key.time_left.is_some(), left.is_some());
            if let (Some(found), Some(left)) = (key.time_left, left) {
                prop_assert!(is_about(found, left), "{:?} is not {:?}", found, left);
            }
        }
        prop_assert_eq!(self.mongo.count(doc! {}).await, 1);
        Ok(())
    }
}

#[test]
fn f10_the_latest_deadline_wins_in_memory_and_store() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let several = runtime.block_on(Several::start(4));
    let config = ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() };
    let replies = prop::collection::vec(reply(), 1..10);
    let result = TestRunner::new(config).run(&replies, |replies| runtime.block_on(several.check(&replies)));
    result.unwrap_or_else(|failure| panic!("{failure}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f10_eight_processes_agree_on_the_latest_deadline() {
    let several = Several::start(8).await;
    for longest in [0u32, 3, 7] {
        let minutes = |process| if process == longest { 59 } else { 3 + process };
        let replies: Vec<_> = (0..8).map(|process| Reply::limited(MINUTE * minutes(process))).collect();
        several.check(&replies).await.unwrap();
        assert!(millis_are_about(several.mongo.millis_left("alpha").await.unwrap(), 59 * MINUTE));
        assert_eq!(several.mongo.status("alpha").await, "rate_limited");
    }
}

#[tokio::test]
async fn f10_an_exhaustion_never_shortens_a_longer_rate_limit() {
    let mongo = Mongo::standalone().await;
    mongo.insert("alpha").await;
    let here = Process::start(&mongo).await;
    let pool = KeyPool::builder().exhausted_for(10 * MINUTE);
    let there = Process::start_with(quiet(&mongo), &mongo.uri, pool).await;
    let used_up = answered(&there.pool, Reply::EXHAUSTED);
    answered(&here.pool, Reply::limited(HOUR)).await;
    here.written().await;
    used_up.await;
    there.written().await;
    let late = Process::start(&mongo).await;
    for process in [here, there, late] {
        process.pool.reload().await.unwrap();
        let left = process.of("alpha").time_left.unwrap();
        assert!(is_about(left, HOUR), "{left:?}");
    }
}

#[tokio::test]
async fn f10_dates_before_an_admin_reset_extend_no_cooldown() {
    let (mongo, process, ..) = marked(402).await;
    reset_by_an_admin_page(&mongo, "alpha").await;
    let pool = KeyPool::builder().exhausted_for(10 * MINUTE);
    let other = Process::start_with(quiet(&mongo), &mongo.uri, pool).await;
    for key in ["alpha", "beta"] {
        assert_eq!(answered(&other.pool, Reply::EXHAUSTED).await, 402, "{key}");
    }
    other.written().await;
    process.pool.reload().await.unwrap();
    for key in ["alpha", "beta"] {
        let found = process.of(key);
        assert_eq!(found.status, Status::Exhausted);
        assert!(is_about(found.time_left.unwrap(), 10 * MINUTE), "{found:?}");
    }
}

#[tokio::test]
async fn f10_stale_dates_of_healthy_keys_extend_no_cooldown() {
    let (mongo, process, ..) = marked(402).await;
    mongo.set("alpha", doc! { "status": "healthy" }).await;
    process.pool.reload().await.unwrap();
    for _ in ["alpha", "beta"] {
        assert_eq!(answered(&process.pool, Reply { status: 429, retry_after: None }).await, 429);
    }
    process.written().await;
    assert_eq!(mongo.status("alpha").await, "rate_limited");
    let left = mongo.millis_left("alpha").await.unwrap();
    assert!(millis_are_about(left, 2 * MINUTE), "{left}");
}

// ---- f16, f17: keys that change while they are used ----

/// Answers 429 to that secret once the test lets it, and 200 to all others at once.
async fn holding_back(secret: &'static str) -> (Server, Arc<Gate>) {
    let gate = Arc::new(Gate::new());
    let held = gate.clone();
    let server = Server::start(move |request| {
        let held = held.clone();
        async move {
            if request.headers()["authorization"] != format!("Bearer {secret}") {
                return answer(200, "fine");
            }
            held.pass().await;
            answer(429, "too many requests")
        }
    })
    .await;
    (server, gate)
}

/// A request with that secret that has reached the server.
async fn under_way(process: &Process, server: &Server, gate: &Gate) -> JoinHandle<u16> {
    let (client, url) = (process.client.clone(), server.url());
    let request = tokio::spawn(async move { status(&client, &url).await });
    eventually("the request is under way", || gate.arrived() == 1).await;
    request
}

async fn finish(request: JoinHandle<u16>, gate: &Gate) {
    gate.let_one_pass();
    assert_eq!(in_time(request).await.unwrap(), 429);
}

#[tokio::test]
async fn f16_a_mark_never_reinserts_a_deleted_key() {
    let mongo = Mongo::standalone().await;
    mongo.insert_all(["alpha", "beta"]).await;
    let process = Process::start(&mongo).await;
    let (server, gate) = holding_back("sk-alpha").await;
    let request = under_way(&process, &server, &gate).await;
    mongo.keys().delete_one(doc! { "_id": "alpha" }).await.unwrap();
    finish(request, &gate).await;
    process.written().await;
    process.sweep().await;
    assert_eq!(all_documents(&mongo).await.len(), 1);
    assert!(!process.has("alpha"));
    assert_eq!((process.get(&server).await, process.get(&server).await), (200, 200));
    assert_eq!(server.keys(), ["alpha", "beta", "beta"]);
}

#[tokio::test]
async fn f16_a_request_outlives_its_key() {
    let mongo = Mongo::standalone().await;
    mongo.insert("alpha").await;
    let (here, there) = (Process::start(&mongo).await, Process::start(&mongo).await);
    let (server, gate) = holding_back("sk-alpha").await;
    let request = under_way(&here, &server, &gate).await;
    there.pool.remove("alpha").await.unwrap();
    here.pool.reload().await.unwrap();
    assert!(!here.has("alpha"));
    finish(request, &gate).await;
    here.sweep().await;
    assert_eq!((here.pool.stats().marks_waiting, mongo.count(doc! {}).await), (0, 0));
}

#[tokio::test]
async fn f17_a_late_429_never_marks_the_new_secret() {
    let mongo = Mongo::standalone().await;
    mongo.insert("alpha").await;
    let process = Process::start(&mongo).await;
    let (server, gate) = holding_back("sk-alpha").await;
    let request = under_way(&process, &server, &gate).await;
    mongo.set("alpha", doc! { "apiKey": "sk-new" }).await;
    process.pool.reload().await.unwrap();
    let before = mongo.document("alpha").await;
    finish(request, &gate).await;
    settle().await;
    assert_eq!(process.of("alpha").status, Status::Healthy);
    assert_eq!(process.get(&server).await, 200);
    process.recovery.shutdown().await.unwrap();
    assert_eq!(process.pool.stats().healthy, 1);
    assert_eq!(server.keys(), ["alpha", "new"]);
    let after = mongo.document("alpha").await;
    for field in ["status", "apiKey", "cooldownUntil", "lastError", "updatedAt"] {
        assert_eq!(after.get(field), before.get(field), "{field}");
    }
}

#[tokio::test]
async fn f17_old_secrets_429_never_overwrites_the_new_one() {
    let mongo = Mongo::standalone().await;
    mongo.insert("alpha").await;
    let process = Process::start(&mongo).await;
    mongo.set("alpha", doc! { "apiKey": "sk-new" }).await;
    assert_eq!(process.get(&Server::limiting(["alpha"]).await).await, 429);
    process.written().await;
    process.pool.reload().await.unwrap();
    let document = mongo.document("alpha").await;
    assert_eq!((text(&document, "status"), document.get("lastError")), ("healthy", None));
    assert_eq!((process.of("alpha").status, process.of("alpha").time_left), (Status::Healthy, None));
}

#[tokio::test]
async fn f17_a_new_secret_takes_its_cooldown_from_store() {
    let (mongo, process, ..) = marked(429).await;
    mongo.set("alpha", doc! { "apiKey": "sk-new", "status": "healthy", "cooldownUntil": null }).await;
    process.pool.reload().await.unwrap();
    assert_eq!(process.of("alpha").status, Status::Healthy);

    let until = in_the_future(50 * SECOND);
    let newest = doc! { "apiKey": "sk-newest", "status": "rate_limited", "cooldownUntil": until };
    mongo.set("alpha", newest).await;
    process.pool.reload().await.unwrap();
    assert!(is_about(time_left(&process.pool, "alpha").unwrap(), 50 * SECOND));
}

// ---- operators ----

#[tokio::test]
async fn an_inserted_key_serves_other_processes_after_reload() {
    let mongo = Mongo::standalone().await;
    let (here, there) = (Process::start(&mongo).await, Process::start(&mongo).await);
    here.pool.insert("alpha", "sk-alpha").await.unwrap();
    let server = Server::limiting([]).await;
    assert_eq!(here.get(&server).await, 200);
    there.pool.reload().await.unwrap();
    assert_eq!(there.get(&server).await, 200);
    assert_eq!(server.keys(), ["alpha", "alpha"]);

    let document = mongo.document("alpha").await;
    let expected = doc! {
        "_id": "alpha", "apiKey": "sk-alpha", "status": "healthy", "cooldownUntil": null, "lastError": "",
        "tokensUsed": 0_i64, "requestsCount": 0_i64,
    };
    for (field, value) in &expected {
        assert_eq!(document.get(field), Some(value), "{field}");
    }
    assert!(is_recent(&document, "createdAt") && is_recent(&document, "updatedAt"));
    assert_eq!(theirs(document).len(), expected.len() + 2);
}

#[tokio::test]
async fn inserting_a_taken_id_leaves_its_document_unchanged() {
    let mongo = Mongo::standalone().await;
    let process = Process::start(&mongo).await;
    mongo.insert("alpha").await;
    let unreadable = doc! { "_id": "beta", "apiKey": 7, "note": "not finished" };
    mongo.keys().insert_one(&unreadable).await.unwrap();
    for id in ["alpha", "beta"] {
        let refused = process.pool.insert(id, "sk-other").await.unwrap_err();
        assert!(refused.is_taken());
        assert_eq!(refused.to_string(), format!("there is a key {id} already"));
    }
    assert!(process.pool.stats().keys.is_empty());
    assert_eq!(all_documents(&mongo).await, [healthy("alpha"), unreadable]);

    process.pool.reload().await.unwrap();
    assert_eq!(process.get(&Server::limiting(["alpha"]).await).await, 429);
    assert!(process.pool.insert("alpha", "sk-other").await.unwrap_err().is_taken());
}

#[tokio::test]
async fn concurrent_inserts_of_one_key_succeed_once() {
    let several = Several::start(6).await;
    let mut inserts = JoinSet::new();
    for (number, process) in several.processes.iter().enumerate() {
        let pool = process.pool.clone();
        inserts.spawn(
            async move { pool.insert("beta", format!("sk-{number}")).await.is_ok().then_some(number) },
        );
    }
    let inserted: Vec<_> = inserts.join_all().await.into_iter().flatten().collect();
    assert_eq!(inserted.len(), 1);
    let document = several.mongo.document("beta").await;
    assert_eq!(text(&document, "apiKey"), format!("sk-{}", inserted[0]));
}

#[tokio::test]
async fn a_removed_key_leaves_other_processes_after_reload() {
    let mongo = Mongo::standalone().await;
    mongo.insert_all(["alpha", "beta"]).await;
    let (here, there) = (Process::start(&mongo).await, Process::start(&mongo).await);
    here.pool.remove("alpha").await.unwrap();
    assert!(mongo.find("alpha").await.is_none() && !here.has("alpha") && there.has("alpha"));
    there.pool.reload().await.unwrap();
    assert!(!there.has("alpha") && there.has("beta"));
    for unknown in
        [there.pool.remove("alpha").await, there.pool.reset("alpha").await, there.pool.disable("alpha").await]
    {
        assert!(unknown.unwrap_err().is_unknown_key());
    }
    mongo.keys().delete_one(doc! { "_id": "beta" }).await.unwrap();
    for unknown in [there.pool.reset("beta").await, there.pool.disable("beta").await] {
        assert!(unknown.unwrap_err().is_unknown_key());
    }
    assert_eq!(mongo.count(doc! {}).await, 0);
}

#[tokio::test]
async fn enabling_a_key_restores_its_status_and_cooldown() {
    for (http_status, word) in [(429, "rate_limited"), (402, "exhausted"), (401, "error")] {
        let (mongo, here, _, marked) = marked(http_status).await;
        let there = Process::start(&mongo).await;
        there.pool.disable("alpha").await.unwrap();
        let disabled = mongo.document("alpha").await;
        assert_eq!(text(&disabled, "status"), "disabled");
        for field in ["cooldownUntil", "lastError", "rest"] {
            assert_eq!(disabled.get(field), marked.get(field), "{word}: {field}");
        }
        here.pool.reload().await.unwrap();
        assert_eq!(here.of("alpha").status, Status::Disabled);

        here.pool.enable("alpha").await.unwrap();
        there.pool.reload().await.unwrap();
        assert_eq!(there.of("alpha").status, here.of("alpha").status);
        let mut enabled = mongo.document("alpha").await;
        assert_eq!(text(&enabled, "status"), word);
        enabled.insert("updatedAt", marked.get("updatedAt").unwrap());
        assert_eq!(enabled, marked);
    }
}

#[tokio::test]
async fn s04_query_operators_in_ids_and_secrets_are_data() {
    let mongo = Mongo::standalone().await;
    mongo.insert("innocent").await;
    mongo.set("innocent", doc! { "status": "disabled" }).await;
    let (here, there) = (Process::start(&mongo).await, Process::start(&mongo).await);
    let server = Server::answering(|| answer(429, "")).await;
    let hostile = [
        ("$set", "$ne"),
        ("$$NOW", "$$ROOT"),
        ("$apiKey", "$_id"),
        ("a.b.c", "sk.with.dots"),
        ("{\"$gt\":\"\"}", "{\"$ne\":null}"),
        ("'; db.dropDatabase(); //", "$literal"),
    ];
    for (id, secret) in hostile {
        here.pool.insert(id, secret).await.unwrap();
        assert_eq!(text(&mongo.document(id).await, "apiKey"), secret);
        assert_eq!(here.get(&server).await, 429);
        assert_eq!(server.requests().pop().unwrap().headers()["authorization"], format!("Bearer {secret}"));
        here.sweep().await;
        let marked = mongo.document(id).await;
        assert_eq!(
            (text(&marked, "status"), marked.get("requestsCount")),
            ("rate_limited", Some(&1_i64.into()))
        );

        there.pool.reload().await.unwrap();
        there.pool.reset(id).await.unwrap();
        assert_eq!(mongo.status(id).await, "healthy");
        there.pool.disable(id).await.unwrap();
        assert_eq!(mongo.status(id).await, "disabled");
        there.pool.enable(id).await.unwrap();
        assert_eq!(mongo.status(id).await, "healthy");
        there.pool.remove(id).await.unwrap();
        assert!(mongo.find(id).await.is_none());
        here.pool.reload().await.unwrap();
        let innocent = Document::from_iter([("status".to_owned(), "disabled".into())]);
        let left = all_documents(&mongo).await.into_iter().map(theirs).map(besides_the_mark);
        assert_eq!(left.collect::<Vec<_>>(), [besides_the_mark(merged(healthy("innocent"), innocent))]);
        assert_eq!(mongo.status("innocent").await, "disabled");
    }
}

fn merged(mut document: Document, fields: Document) -> Document {
    document.extend(fields);
    document
}

#[tokio::test]
async fn no_key_available_reports_the_stored_retry_time() {
    let mongo = Mongo::standalone().await;
    insert_limited(&mongo, "alpha", in_the_future(90 * SECOND)).await;
    let process = Process::start(&mongo).await;
    let refused = get(&process.client, "http://127.0.0.1:9/").await.unwrap_err();
    let Error::NoKeyAvailable(refused) = refused else { panic!("{refused:?}") };
    assert!(is_about(refused.retry_in().unwrap(), 90 * SECOND));
}

#[tokio::test]
async fn recover_omits_ids_of_more_than_five_keys() {
    let mongo = Mongo::standalone().await;
    let store = mongo.store().await;
    for keys in [5, 6] {
        let ids: Vec<_> = (0..keys).map(|number| format!("{keys}-{number}")).collect();
        for id in &ids {
            mongo.insert(id).await;
            mongo.set(id, doc! { "status": "rate_limited", "cooldownUntil": DateTime::from_millis(0) }).await;
        }
        let recovered = store.sweep().await.unwrap();
        assert_eq!(recovered.count, keys);
        let mut named: Vec<_> = recovered.ids.iter().map(KeyId::to_string).collect();
        named.sort();
        assert_eq!(named, if keys == 5 { ids } else { Vec::new() });
    }
}

#[tokio::test]
async fn a_unique_index_violation_is_a_store_error() {
    let mongo = Mongo::standalone().await;
    let unique = doc! { "key": { "apiKey": 1 }, "name": "secrets", "unique": true };
    let command = doc! { "createIndexes": "keys", "indexes": [unique] };
    mongo.database.run_command(command).await.unwrap();
    let pool = KeyPool::builder().open(mongo.store().await).await.unwrap();
    // The pool has not heard of it.
    mongo.insert("alpha").await;
    let error = pool.insert("beta", "sk-alpha").await.unwrap_err();
    assert!(error.is_store_failure(), "{error:?}");
    assert_eq!(mongo.find("beta").await, None);
}
