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
    time::{Duration, Instant},
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
    task::{JoinHandle, JoinSet, yield_now},
    time::sleep,
};
use tower::{Layer, Service, service_fn};
use tower_key_rotation::{
    Error, KeyId, KeyPool, KeyPoolBuilder, KeyRotation, KeyRotationLayer, KeyStats, OperateError,
    RecoveryHandle, Rest, Secret, Status,
    classify::LlmGateway,
    clock::ManualClock,
    store::{
        KeyStore, Loaded, Mark, MemoryStore, MongoStore, Recovered, StoreError, StoreFuture,
        mongodb::MongoStoreBuilder,
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

fn gateway(pool: &KeyPool) -> KeyRotation<reqwest::Client, LlmGateway> {
    KeyRotationLayer::new(pool).classify(LlmGateway::new()).layer(http())
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
    for field in ["status", "cooldownUntil", "lastError", "updatedAt", "exhaustedUntil", "failedAt"] {
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
async fn a_limited_key_rests_by_the_servers_clock_and_nothing_else_of_its_document_is_touched() {
    let (mongo, _process, before, after) = marked(429).await;
    assert_eq!(text(&after, "status"), "rate_limited");
    assert!(after.get_datetime("cooldownUntil").is_ok());
    assert!(millis_are_about(mongo.millis_left("alpha").await.unwrap(), 2 * MINUTE));
    assert!(says(&after, "429") && is_recent(&after, "updatedAt"), "{after}");
    assert!(!after.contains_key("exhaustedUntil") && !after.contains_key("failedAt"), "{after}");
    assert_eq!(besides_the_mark(after), besides_the_mark(before));
    assert_eq!(mongo.document("beta").await, healthy("beta"));
}

#[tokio::test]
async fn an_exhausted_key_rests_for_24_hours() {
    let (mongo, _process, before, after) = marked(402).await;
    assert_eq!(text(&after, "status"), "exhausted");
    assert_eq!(after.get_datetime("exhaustedUntil").unwrap(), after.get_datetime("cooldownUntil").unwrap());
    assert!(millis_are_about(mongo.millis_left("alpha").await.unwrap(), 24 * HOUR));
    assert!(says(&after, "402") && is_recent(&after, "updatedAt") && is_recent(&after, "failedAt"));
    assert_eq!(besides_the_mark(after), besides_the_mark(before));
}

#[tokio::test]
async fn a_revoked_key_has_no_end() {
    let (mongo, process, before, after) = marked(401).await;
    assert_eq!(text(&after, "status"), "error");
    assert_eq!(after.get("cooldownUntil"), Some(&Bson::Null));
    assert!(after.get_datetime("exhaustedUntil").is_err(), "{after}");
    assert!(says(&after, "401") && is_recent(&after, "updatedAt") && is_recent(&after, "failedAt"));
    assert_eq!(besides_the_mark(after), besides_the_mark(before));
    assert_eq!(process.sweep().await.count, 0);
    assert_eq!(mongo.status("alpha").await, "error");
    assert_eq!(process.of("alpha").status, Status::Revoked);
}

#[tokio::test]
async fn an_exhausted_key_comes_back_where_this_crate_marked_it_and_not_where_another_program_did() {
    let (mongo, process, ..) = marked(402).await;
    mongo.insert("theirs").await;
    let past = ago(5 * SECOND);
    mongo.set("theirs", doc! { "status": "exhausted", "cooldownUntil": past }).await;
    assert_eq!(process.sweep().await.count, 0);

    mongo.set("alpha", doc! { "exhaustedUntil": past, "cooldownUntil": past }).await;
    let recovered = process.sweep().await;
    assert_eq!((recovered.count, recovered.ids), (1, vec![KeyId::new("alpha").unwrap()]));
    assert_eq!(process.of("alpha").status, Status::Healthy);
    assert_eq!(process.of("theirs").status, Status::Exhausted);
    let alpha = mongo.document("alpha").await;
    assert_eq!((text(&alpha, "status"), text(&alpha, "lastError")), ("healthy", ""));
    assert!(!alpha.contains_key("exhaustedUntil") && !alpha.contains_key("failedAt"), "{alpha}");
    let theirs = mongo.document("theirs").await;
    assert_eq!((text(&theirs, "status"), theirs.get("cooldownUntil")), ("exhausted", Some(&past.into())));
}

#[tokio::test]
async fn f10_a_429_on_a_key_that_is_back_from_an_exhaustion_counts_also_before_a_sweep() {
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
async fn f10_a_limit_that_lasts_longer_than_an_exhaustion_makes_it_longer() {
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

    assert_eq!(mongo.status("alpha").await, "exhausted");
    assert!(millis_are_about(mongo.millis_left("alpha").await.unwrap(), 10 * MINUTE));
    for process in [&process, &late] {
        process.pool.reload().await.unwrap();
        assert!(is_about(process.of("alpha").time_left.unwrap(), 10 * MINUTE));
    }
}

#[tokio::test]
async fn a_429_does_not_touch_what_somebody_said_worse_of_the_key_in_the_meantime() {
    let mongo = Mongo::standalone().await;
    let words = ["exhausted", "error", "using_failover", "Healthy", ""];
    for word in words {
        mongo.insert(&format!("key-{word}")).await;
    }
    let process = Process::start(&mongo).await;
    for word in words {
        mongo.set(&format!("key-{word}"), doc! { "status": word, "cooldownUntil": "tomorrow" }).await;
    }
    let before = all_documents(&mongo).await;
    let server = Server::answering(|| answer(429, "")).await;
    for _ in words {
        assert_eq!(process.get(&server).await, 429);
    }
    process.written().await;
    assert_eq!(process.pool.stats().rate_limited, words.len());
    assert_eq!(all_documents(&mongo).await, before);
}

#[tokio::test]
async fn a_mark_on_a_disabled_key_lies_beneath() {
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
async fn a_sweep_resets_what_has_ended_and_nothing_else() {
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

    let recovered = store.recover().await.unwrap();
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
        assert_eq!((text(&after, "status"), text(&after, "lastError")), ("healthy", ""));
        assert_eq!(after.get("cooldownUntil"), Some(&Bson::Null));
        assert!(is_recent(&after, "updatedAt"));
        assert_eq!(besides_the_mark(after), besides_the_mark(before));
    }
    let swept = all_documents(&mongo).await;
    assert_eq!(store.recover().await.unwrap(), Recovered::default());
    assert_eq!(all_documents(&mongo).await, swept);
}

/// Broken once: with such keys given no date, it failed.
#[tokio::test]
async fn f15_a_limited_key_without_a_usable_date_rests_for_2_minutes_and_is_swept_then() {
    let mongo = Mongo::standalone().await;
    let odd = [
        ("null", Bson::Null),
        ("a string", "2020-01-01T00:00:00Z".into()),
        ("a number", 1_577_836_800_000_i64.into()),
        ("a document", doc! { "$date": 0 }.into()),
        ("an array", vec![1].into()),
        ("no dates", Bson::Array(Vec::new())),
    ];
    let ids: Vec<_> = odd.iter().map(|(id, _)| *id).chain(["missing"]).collect();
    for (id, until) in odd.clone() {
        insert_limited(&mongo, id, until).await;
    }
    insert_limited(&mongo, "missing", Bson::Null).await;
    mongo
        .keys()
        .update_one(doc! { "_id": "missing" }, doc! { "$unset": { "cooldownUntil": 1 } })
        .await
        .unwrap();
    heal(&mongo, &ids).await;
}

#[tokio::test]
async fn f15_dates_in_an_array_are_no_usable_date_either() {
    let mongo = Mongo::standalone().await;
    let ids = ["past", "future"];
    for (id, until) in ids.into_iter().zip([ago(HOUR), in_the_future(HOUR)]) {
        insert_limited(&mongo, id, vec![until]).await;
    }
    heal(&mongo, &ids).await;
}

/// These limited keys have no usable date: they rest for 2 minutes from the first sweep on.
async fn heal(mongo: &Mongo, ids: &[&str]) {
    let process = Process::start(mongo).await;
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
    assert_eq!(process.pool.stats().healthy, ids.len());
    assert_eq!(mongo.count(doc! { "status": "healthy", "cooldownUntil": null }).await, ids.len() as u64);
}

#[tokio::test]
async fn a_sweep_names_what_it_reset_where_it_is_five_or_fewer() {
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

/// Broken once: with a sweep that reads who has expired and then resets those, it failed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f07_a_fresh_mark_survives_every_sweep_that_it_meets() {
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
            third.recover().await.unwrap().count
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

/// One process's way to a store that others have as well. Each of its steps waits to be let.
#[derive(Clone, Debug)]
struct SteppedStore {
    memory: MemoryStore,
    before_write: Arc<Gate>,
    after_write: Arc<Gate>,
    after_read: Arc<Gate>,
}

impl SteppedStore {
    fn over(memory: &MemoryStore) -> Self {
        let gate = || Arc::new(Gate::new());
        Self { memory: memory.clone(), before_write: gate(), after_write: gate(), after_read: gate() }
    }
}

impl KeyStore for SteppedStore {
    fn load(&self) -> StoreFuture<'_, Loaded> {
        Box::pin(async {
            let loaded = self.memory.load().await;
            self.after_read.pass().await;
            loaded
        })
    }

    fn write(&self, mark: Mark) -> StoreFuture<'_, ()> {
        Box::pin(async {
            self.before_write.pass().await;
            self.memory.write(mark).await?;
            self.after_write.pass().await;
            Ok(())
        })
    }

    fn recover(&self) -> StoreFuture<'_, Recovered> {
        self.memory.recover()
    }

    operators_of!(memory);
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Mark(usize),
    Write(usize),
    Acknowledge(usize),
    Sweep,
    Read(usize),
    Apply(usize),
}

const fn mark_of(process: usize) -> [Step; 3] {
    [Step::Mark(process), Step::Write(process), Step::Acknowledge(process)]
}

const fn pass_of(process: usize) -> [Step; 3] {
    [Step::Sweep, Step::Read(process), Step::Apply(process)]
}

/// Every order in which these can happen, each of them in its own order.
fn interleavings(sequences: &[&[Step]]) -> Vec<Vec<Step>> {
    if sequences.iter().all(|steps| steps.is_empty()) {
        return vec![Vec::new()];
    }
    let mut all = Vec::new();
    for (index, steps) in sequences.iter().enumerate() {
        let Some((first, rest)) = steps.split_first() else { continue };
        let mut others = sequences.to_vec();
        others[index] = rest;
        let mut orders = interleavings(&others);
        orders.iter_mut().for_each(|order| order.insert(0, *first));
        all.append(&mut orders);
    }
    all
}

/// A process of the model, with a request under way that will be answered by 429.
struct Stepped {
    pool: KeyPool,
    store: SteppedStore,
    answer: Option<Pending>,
    reload: Option<JoinHandle<Result<(), StoreError>>>,
    marked: bool,
    _recovery: RecoveryHandle,
}

type Pending = std::pin::Pin<Box<dyn Future<Output = u16> + Send>>;

impl Stepped {
    async fn over(memory: &MemoryStore, clock: &ManualClock) -> Self {
        let store = SteppedStore::over(memory);
        store.after_read.let_one_pass();
        let pool = KeyPool::builder().clock(clock.clone()).open(store.clone()).await.unwrap();
        let _recovery = RecoveryHandle::spawn_with(&pool, passes_by_hand());
        Self { pool, store, answer: None, reload: None, marked: false, _recovery }
    }

    fn send(&mut self, retry_after: Duration) {
        self.answer = Some(Box::pin(answered(&self.pool, Reply::limited(retry_after))));
    }

    async fn step(&mut self, step: Step) {
        match step {
            Step::Mark(_) => {
                let begun = self.store.before_write.arrived();
                assert_eq!(self.answer.take().unwrap().await, 429);
                self.marked = true;
                // There is nothing to write where a reload has brought a later deadline before.
                if self.waits() {
                    until(step, || self.store.before_write.arrived() > begun).await;
                }
            }
            Step::Write(_) if self.waits() => {
                let written = self.store.after_write.arrived();
                self.store.before_write.let_one_pass();
                until(step, || self.store.after_write.arrived() > written).await;
            }
            Step::Acknowledge(_) if self.waits() => {
                self.store.after_write.let_one_pass();
                until(step, || !self.waits()).await;
            }
            Step::Write(_) | Step::Acknowledge(_) => {}
            Step::Sweep => _ = self.store.recover().await.unwrap(),
            Step::Read(_) => {
                let read = self.store.after_read.arrived();
                let pool = self.pool.clone();
                self.reload = Some(tokio::spawn(async move { pool.reload().await }));
                until(step, || self.store.after_read.arrived() > read).await;
            }
            Step::Apply(_) => {
                self.store.after_read.let_one_pass();
                self.reload.take().unwrap().await.unwrap().unwrap();
            }
        }
    }

    fn waits(&self) -> bool {
        self.pool.stats().marks_waiting > 0
    }

    async fn reload(&mut self) {
        self.step(Step::Read(0)).await;
        self.step(Step::Apply(0)).await;
    }
}

/// Lets everything else run until something holds.
async fn until(step: Step, holds: impl Fn() -> bool) {
    for _ in 0..10_000 {
        if holds() {
            return;
        }
        yield_now().await;
    }
    panic!("a step of the model did not come about: {step:?}");
}

/// Two processes, and a cooldown that has just ended in both and in the store, where it is not swept yet.
async fn play(order: &[Step]) {
    let clock = ManualClock::new();
    let memory = MemoryStore::with_clock(Arc::new(clock.clone()));
    assert!(memory.insert(KeyId::new("alpha").unwrap(), "sk-alpha".into()).await.unwrap());
    let mut processes = [Stepped::over(&memory, &clock).await, Stepped::over(&memory, &clock).await];
    processes[0].send(2 * MINUTE);
    for step in mark_of(0) {
        processes[0].step(step).await;
    }
    processes[1].reload().await;
    clock.advance(2 * MINUTE);

    let cooldowns = [5 * MINUTE, 10 * MINUTE];
    for (process, cooldown) in processes.iter_mut().zip(cooldowns) {
        process.marked = false;
        process.send(cooldown);
    }
    for step in order {
        let process = match step {
            Step::Sweep => 0,
            Step::Mark(at) | Step::Write(at) | Step::Acknowledge(at) | Step::Read(at) | Step::Apply(at) => {
                *at
            }
        };
        processes[process].step(*step).await;
        for (process, cooldown) in processes.iter().zip(cooldowns).filter(|(process, _)| process.marked) {
            let left = time_left(&process.pool, "alpha");
            assert!(left >= Some(cooldown), "{left:?} after {step:?} of {order:?}");
        }
    }
    memory.recover().await.unwrap();
    let longest = processes.iter().zip(cooldowns).filter(|(process, _)| process.marked);
    let longest = longest.map(|(_, cooldown)| cooldown).max();
    let stored = memory.load().await.unwrap().records.remove(0);
    assert_eq!(stored.rest, Some((Rest::RateLimited, longest)), "{order:?}");
    for process in &mut processes {
        process.reload().await;
        assert_eq!(time_left(&process.pool, "alpha"), longest, "{order:?}");
    }
}

async fn play_all(sequences: &[&[Step]], count: usize) {
    let orders = interleavings(sequences);
    assert_eq!(orders.len(), count);
    for order in orders {
        play(&order).await;
    }
}

#[tokio::test]
async fn f07_in_every_order_a_mark_survives_a_pass_of_its_own_process() {
    play_all(&[&mark_of(0), &pass_of(0)], 20).await;
}

/// Broken once: with a reload that always believes the store, it failed.
#[tokio::test]
async fn f07_in_every_order_a_mark_survives_the_passes_of_two_processes() {
    play_all(&[&mark_of(0), &pass_of(0), &pass_of(1)], 1_680).await;
}

#[tokio::test]
async fn f07_in_every_order_two_processes_marks_survive_a_pass() {
    play_all(&[&mark_of(0), &mark_of(1), &pass_of(0)], 1_680).await;
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
    const REVOKED: Self = Self { status: 401, retry_after: None };
}

/// A request that has its key, and is answered when this is awaited.
fn answered(pool: &KeyPool, reply: Reply) -> impl Future<Output = u16> + Send + use<> {
    let mut response = Response::builder().status(reply.status);
    if let Some(seconds) = reply.retry_after {
        response = response.header(RETRY_AFTER, seconds);
    }
    let response = response.body(()).unwrap();
    let inner = service_fn(move |_: Request<()>| ready(Ok::<_, Infallible>(response.clone())));
    let mut service = KeyRotationLayer::new(pool).classify(LlmGateway::new()).layer(inner);
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

/// Broken once: with what was left of the rest, or with its age, as it was before the wait, it failed.
#[tokio::test]
async fn a_mark_that_waits_for_another_of_its_key_counts_from_when_it_was_made() {
    let server = own(Kind::Standalone).await;
    let mongo = Mongo::at(&server.uri()).await;
    mongo.insert("alpha").await;
    let store = quiet(&mongo).connect(format!("{}&appName=slow", mongo.uri)).await.unwrap();
    store.load().await.unwrap();
    let alpha = KeyId::new("alpha").unwrap();
    let mark = |left| Mark::new(alpha.clone(), "sk-alpha".into(), Rest::RateLimited, Some(left));
    let block =
        doc! { "failCommands": ["update"], "blockConnection": true, "blockTimeMS": 1_000, "appName": "slow" };
    for reset_meanwhile in [false, true] {
        fail_command(&server, doc! { "times": 1 }, block.clone()).await;
        let reset = async {
            if reset_meanwhile {
                sleep(400 * MS).await;
                mongo.store().await.reset(&alpha).await.unwrap();
            }
        };
        let second = async {
            sleep(100 * MS).await;
            let made = Instant::now();
            store.write(mark(MINUTE)).await.unwrap();
            made
        };
        let (first, made, ()) = tokio::join!(store.write(mark(SECOND)), second, reset);
        first.unwrap();
        let age = made.elapsed();
        assert!(age > 700 * MS, "it waited for the first one");
        match (reset_meanwhile, store.load().await.unwrap().records[0].rest) {
            (true, rest) => assert_eq!(rest, None),
            (false, rest) => assert!(is_about(rest.unwrap().1.unwrap(), MINUTE - age), "{rest:?}, {age:?}"),
        }
    }
}

async fn reset_by_an_admin_page(mongo: &Mongo, id: &str) {
    mongo.set(id, doc! { "status": "healthy", "lastError": null, "cooldownUntil": null }).await;
}

/// Broken once: with a reload that always believes the store, it failed.
#[tokio::test]
async fn f08_a_reload_does_not_take_a_mark_back_whose_write_is_under_way() {
    let (mongod, mongo, process) = ill_treated().await;
    let block =
        doc! { "failCommands": ["update"], "blockConnection": true, "blockTimeMS": 1_500, "appName": "slow" };
    fail_command(&mongod, doc! { "times": 1 }, block).await;
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
async fn f08_a_reload_does_not_take_a_mark_back_that_could_not_be_written() {
    let (mongod, mongo, process) = ill_treated().await;
    let refuse = doc! { "failCommands": ["update"], "errorCode": 8_000, "appName": "slow" };
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
async fn f09_a_reset_wins_over_a_mark_that_could_not_be_written_before_it() {
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
    assert!(is_recent(&document, "resetAt"));
    far.pool.reload().await.unwrap();
    assert_eq!(far.of("alpha").status, Status::Healthy);
}

/// Broken once: with a mark's age alone for when it was observed, it failed.
#[tokio::test]
async fn f09_a_reset_wins_over_a_mark_that_was_on_its_way() {
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
async fn f09_a_mark_that_was_observed_after_a_reset_counts() {
    let mongo = Mongo::standalone().await;
    mongo.insert("alpha").await;
    let (here, there) = (Process::start(&mongo).await, Process::start(&mongo).await);
    there.pool.reset("alpha").await.unwrap();
    // In doubt, by as long as the load took that this process knows the server's clock from, the reset wins.
    sleep(400 * MS).await;
    assert_eq!(here.get(&Server::limiting(["alpha"]).await).await, 429);
    here.written().await;
    assert_eq!(mongo.status("alpha").await, "rate_limited");
    there.pool.reload().await.unwrap();
    assert_eq!(there.of("alpha").status, Status::RateLimited);
}

#[tokio::test]
async fn f09_a_reset_ends_a_rest_of_any_kind_in_every_process() {
    for http_status in [429, 402, 401] {
        let (mongo, process, before, _) = marked(http_status).await;
        let other = Process::start(&mongo).await;
        other.pool.reset("alpha").await.unwrap();
        let after = mongo.document("alpha").await;
        assert_eq!((text(&after, "status"), text(&after, "lastError")), ("healthy", ""));
        assert_eq!(after.get("cooldownUntil"), Some(&Bson::Null));
        assert!(is_recent(&after, "resetAt"));
        assert!(!after.contains_key("exhaustedUntil") && !after.contains_key("failedAt"), "{after}");
        let mut others = besides_the_mark(after);
        others.remove("resetAt");
        assert_eq!(others, besides_the_mark(before));
        process.pool.reload().await.unwrap();
        assert_eq!(process.of("alpha").status, Status::Healthy, "{http_status}");
    }
}

#[tokio::test]
async fn f09_a_reset_of_a_disabled_key_ends_its_rest_and_keeps_it_disabled() {
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
async fn f09_a_reset_by_an_admin_page_is_honoured_too() {
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
        1 => Just(Reply::REVOKED),
    ]
}

/// What a key does after these, in whatever order they came.
fn longest(replies: &[Reply]) -> (Status, Option<Duration>) {
    if replies.contains(&Reply::REVOKED) {
        (Status::Revoked, None)
    } else if replies.contains(&Reply::EXHAUSTED) {
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

/// Broken once: with the last deadline in place of the latest, in memory and then in the store, it failed.
#[test]
fn f10_whatever_the_order_of_marks_the_latest_deadline_holds_in_memory_and_in_the_store() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let several = runtime.block_on(Several::start(4));
    let config = ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() };
    let replies = prop::collection::vec(reply(), 1..10);
    let result = TestRunner::new(config).run(&replies, |replies| runtime.block_on(several.check(&replies)));
    result.unwrap_or_else(|failure| panic!("{failure}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f10_eight_processes_that_mark_one_key_leave_one_document_with_the_latest_deadline() {
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
async fn f10_a_used_up_quota_does_not_end_a_longer_limit_sooner() {
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
async fn f10_what_ended_with_a_reset_by_an_admin_page_does_not_prolong_a_later_rest() {
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

/// Broken once: with a mark that believes whatever date is there, the second rest was the rest of a day.
#[tokio::test]
async fn f10_a_date_that_an_admin_left_beside_healthy_does_not_prolong_a_later_rest() {
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

/// Broken once: with a mark that inserts the key it does not find, it failed.
#[tokio::test]
async fn f16_the_mark_of_a_key_that_was_deleted_meanwhile_inserts_nothing() {
    let mongo = Mongo::standalone().await;
    mongo.insert_all(["alpha", "beta"]).await;
    let process = Process::start(&mongo).await;
    let (server, gate) = holding_back("sk-alpha").await;
    let request = under_way(&process, &server, &gate).await;
    mongo.keys().delete_one(doc! { "_id": "alpha" }).await.unwrap();
    finish(request, &gate).await;
    process.written().await;
    assert!(process.has("alpha"));

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

/// Broken once: with a reload that goes by ids alone, it failed.
#[tokio::test]
async fn f17_a_late_429_of_the_old_secret_does_not_touch_the_new_one() {
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

/// Broken once: with marks that go by ids alone, it failed.
#[tokio::test]
async fn f17_a_429_of_the_old_secret_is_not_written_over_the_new_one_before_it_is_known_here() {
    let mongo = Mongo::standalone().await;
    mongo.insert("alpha").await;
    let process = Process::start(&mongo).await;
    mongo.set("alpha", doc! { "apiKey": "sk-new" }).await;
    let before = mongo.document("alpha").await;
    assert_eq!(process.get(&Server::limiting(["alpha"]).await).await, 429);
    process.written().await;
    assert_eq!(process.of("alpha").status, Status::RateLimited);
    assert_eq!(mongo.document("alpha").await, before);
    process.pool.reload().await.unwrap();
    assert_eq!((process.of("alpha").status, process.of("alpha").time_left), (Status::Healthy, None));
}

#[tokio::test]
async fn f17_a_new_secret_has_the_rest_that_the_store_says_and_not_the_one_of_the_old_secret() {
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
async fn a_key_that_is_inserted_serves_here_at_once_and_elsewhere_after_a_reload() {
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
    assert_eq!(document.len(), expected.len() + 2, "{document}");
}

#[tokio::test]
async fn an_id_that_is_taken_in_the_store_is_left_to_whom_it_belongs() {
    let mongo = Mongo::standalone().await;
    let process = Process::start(&mongo).await;
    mongo.insert("alpha").await;
    let unreadable = doc! { "_id": "beta", "apiKey": 7, "note": "not finished" };
    mongo.keys().insert_one(&unreadable).await.unwrap();
    for id in ["alpha", "beta"] {
        let refused = process.pool.insert(id, "sk-other").await;
        assert!(matches!(refused, Err(OperateError::KeyExists(taken)) if taken.as_str() == id));
    }
    assert!(process.pool.stats().keys.is_empty());
    assert_eq!(all_documents(&mongo).await, [healthy("alpha"), unreadable]);

    process.pool.reload().await.unwrap();
    assert_eq!(process.get(&Server::limiting(["alpha"]).await).await, 429);
    assert!(matches!(process.pool.insert("alpha", "sk-other").await, Err(OperateError::KeyExists(_))));
}

#[tokio::test]
async fn one_of_many_processes_that_insert_the_same_key_has_inserted_it() {
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
async fn a_key_that_is_removed_is_gone_elsewhere_after_a_reload() {
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
        assert!(matches!(unknown, Err(OperateError::UnknownKey(id)) if id == "alpha"));
    }
    mongo.keys().delete_one(doc! { "_id": "beta" }).await.unwrap();
    for unknown in [there.pool.reset("beta").await, there.pool.disable("beta").await] {
        assert!(matches!(unknown, Err(OperateError::UnknownKey(id)) if id == "beta"));
    }
    assert_eq!(mongo.count(doc! {}).await, 0);
}

#[tokio::test]
async fn a_disabled_key_keeps_its_cooldown_and_has_its_status_back_when_it_is_enabled() {
    for (http_status, word) in [(429, "rate_limited"), (402, "exhausted"), (401, "error")] {
        let (mongo, here, _, marked) = marked(http_status).await;
        let there = Process::start(&mongo).await;
        there.pool.disable("alpha").await.unwrap();
        let disabled = mongo.document("alpha").await;
        assert_eq!(text(&disabled, "status"), "disabled");
        for field in ["cooldownUntil", "lastError", "exhaustedUntil"] {
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
async fn a_cooldown_that_ends_while_the_key_is_disabled_is_over_when_it_is_enabled() {
    let (mongo, process, ..) = marked(429).await;
    process.pool.disable("alpha").await.unwrap();
    mongo.end_cooldown("alpha").await;
    assert_eq!(process.sweep().await.count, 0);
    assert_eq!(mongo.status("alpha").await, "disabled");
    process.pool.enable("alpha").await.unwrap();
    assert_eq!(process.of("alpha").status, Status::Healthy);
    assert_eq!(process.sweep().await.count, 1);
    assert_eq!(mongo.status("alpha").await, "healthy");
}

/// Broken once: with an id and a secret put into a pipeline as they are, it failed.
#[tokio::test]
async fn s04_ids_and_secrets_that_look_like_operators_are_data() {
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
        assert_eq!(all_documents(&mongo).await, [merged(healthy("innocent"), innocent)]);
    }
}

fn merged(mut document: Document, fields: Document) -> Document {
    document.extend(fields);
    document
}

#[tokio::test]
async fn a_pool_without_a_key_to_use_says_when_the_first_one_in_the_store_is_back() {
    let mongo = Mongo::standalone().await;
    insert_limited(&mongo, "alpha", in_the_future(90 * SECOND)).await;
    let process = Process::start(&mongo).await;
    let refused = get(&process.client, "http://127.0.0.1:9/").await.unwrap_err();
    let Error::NoKeyAvailable(refused) = refused else { panic!("{refused:?}") };
    assert!(is_about(refused.retry_in().unwrap(), 90 * SECOND));
}

/// Broken once: with four asked for, it failed.
#[tokio::test]
async fn a_sweep_names_the_keys_that_it_reset_where_they_are_5_or_fewer() {
    let mongo = Mongo::standalone().await;
    let store = mongo.store().await;
    for keys in [5, 6] {
        let ids: Vec<_> = (0..keys).map(|number| format!("{keys}-{number}")).collect();
        for id in &ids {
            mongo.insert(id).await;
            mongo.set(id, doc! { "status": "rate_limited", "cooldownUntil": DateTime::from_millis(0) }).await;
        }
        let recovered = store.recover().await.unwrap();
        assert_eq!(recovered.count, keys);
        let mut named: Vec<_> = recovered.ids.iter().map(KeyId::to_string).collect();
        named.sort();
        assert_eq!(named, if keys == 5 { ids } else { Vec::new() });
    }
}

/// Broken once: with the answer of `remove` turned round, it failed.
#[tokio::test]
async fn a_store_says_whether_a_key_was_inserted_and_whether_one_was_removed() {
    let mongo = Mongo::standalone().await;
    let store = mongo.store().await;
    let id = |name: &str| KeyId::new(name).unwrap();
    assert!(store.insert(id("alpha"), "sk-alpha".into()).await.unwrap());
    assert!(!store.insert(id("alpha"), "sk-other".into()).await.unwrap());
    assert!(store.remove(&id("alpha")).await.unwrap());
    assert!(!store.remove(&id("alpha")).await.unwrap());
}

/// Broken once: without the look for the id, it failed.
#[tokio::test]
async fn a_key_that_a_unique_index_of_somebody_elses_refuses_is_not_said_to_be_there() {
    let mongo = Mongo::standalone().await;
    let unique = doc! { "key": { "apiKey": 1 }, "name": "secrets", "unique": true };
    let command = doc! { "createIndexes": "ohmygpt_keys", "indexes": [unique] };
    mongo.database.run_command(command).await.unwrap();
    let pool = KeyPool::builder().open(mongo.store().await).await.unwrap();
    // The pool has not heard of it.
    mongo.insert("alpha").await;
    let error = pool.insert("beta", "sk-alpha").await.unwrap_err();
    assert!(matches!(error, OperateError::Store(_)), "{error:?}");
    assert_eq!(mongo.find("beta").await, None);
}
