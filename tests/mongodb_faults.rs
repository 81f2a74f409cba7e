//! A MongoDB that is down, dies, is late, steps down or answers half: what requests, marks and passes make of it.

mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{SocketAddr, ToSocketAddrs},
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use mongodb::{
    Database,
    bson::{Bson, Document, doc},
};
use support::{mongo::*, *};
use tokio::{
    net::{TcpSocket, TcpStream},
    time::{sleep, timeout},
};
use tower_key_rotation::{
    KeyPool, NoKeyAvailable, RecoveryConfig, RecoveryHandle, Report, Status, store::mongodb::MongoStore,
};

const SHORT: Duration = Duration::from_millis(300);

/// Enough to connect in, on a machine that has a lot to do.
const OPERATION_LIMIT: Duration = Duration::from_millis(800);

/// What a program of this crate calls itself to the server.
const OURS: &str = "tower-key-rotation";

/// A recovery that makes no pass unless it is asked to. Marks are written as always.
fn recovery_without_passes(pool: &KeyPool) -> RecoveryHandle {
    RecoveryHandle::spawn_with(pool, RecoveryConfig::new().start_jitter(1_000 * MINUTE).limit(2 * SECOND))
}

async fn open(store: MongoStore, cooldown: Duration) -> KeyPool {
    KeyPool::builder().cooldown(cooldown).open(store).await.unwrap()
}

/// A store that gives up on each operation after that long.
async fn connect(mongo: &Mongo, operation_limit: Duration, uri: &str) -> MongoStore {
    mongo.builder().operation_limit(operation_limit).connect(uri).await.unwrap()
}

fn passes(recovery: &RecoveryHandle) -> u64 {
    recovery.last_report().map_or(0, |report| report.pass)
}

/// Why a pass failed, in all its words.
fn failure_of(report: &Report) -> String {
    all_that_it_says(report.outcome.as_ref().unwrap_err())
}

fn has_panicked(report: &Report) -> bool {
    report.outcome.as_ref().is_err_and(|error| error.to_string() == "the pass panicked")
}

async fn a_pass_succeeds(recovery: &RecoveryHandle) {
    eventually_within(15 * SECOND, "a pass succeeds", || async {
        let report = in_time(recovery.sweep_now()).await;
        assert!(!has_panicked(&report));
        report.outcome.is_ok()
    })
    .await;
}

async fn no_mark_waits(pool: &KeyPool) {
    let none = || async { pool.stats().marks_waiting == 0 };
    eventually_within(15 * SECOND, "the marks are written", none).await;
}

/// Requests for that long, each of which has to be answered with 200.
async fn requests_succeed_for(time: Duration, pool: &KeyPool, server: &Server) {
    let (client, begun) = (rotating(pool), Instant::now());
    loop {
        assert_eq!(status(&client, &server.url()).await, 200);
        if begun.elapsed() >= time {
            return;
        }
        sleep(Duration::from_millis(5)).await;
    }
}

/// The store has the mark, and what is left is counted from when the response came, not from when it was written.
async fn rests_in_the_store(mongo: &Mongo, id: &str, cooldown: Duration, since: Instant) {
    assert_eq!(mongo.status(id).await, "rate_limited");
    let left = mongo.millis_left(id).await.unwrap();
    let expected = cooldown.saturating_sub(since.elapsed()).as_millis() as i64;
    assert!((left - expected).abs() < 700, "{id}: {left} ms are left, and not about {expected}");
}

async fn cool_down_by_hand(mongo: &Mongo, id: &str, time: Duration) {
    let until = doc! { "$add": ["$$NOW", time.as_millis() as i64] };
    let rests = vec![doc! { "$set": { "status": "rate_limited", "cooldownUntil": until } }];
    mongo.keys().update_one(doc! { "_id": id }, rests).await.unwrap();
}

/// A port that refuses connections, and that nobody else gets.
fn closed_port() -> (TcpSocket, SocketAddr) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = socket.local_addr().unwrap();
    (socket, address)
}

/// From now on, what connects to the port is connected to the server.
fn open_port(closed: TcpSocket, server: SocketAddr) {
    let listener = closed.listen(64).unwrap();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut server = TcpStream::connect(server).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
            });
        }
    });
}

fn address_of(mongo: &Mongo) -> SocketAddr {
    let uri = mongo.uri.trim_start_matches("mongodb://");
    uri.split(['/', '?']).next().unwrap().to_socket_addrs().unwrap().next().unwrap()
}

async fn proxy_to(mongo: &Mongo) -> Proxy {
    Proxy::to(address_of(mongo)).await
}

/// Has the server hold up these commands of this crate, and no one else's.
async fn block(server: &Mongod, commands: &[&str], time: Duration) {
    fail_command(server, "alwaysOn", held_up(commands, time)).await;
}

fn held_up(commands: &[&str], time: Duration) -> Document {
    doc! {
        "failCommands": commands.to_vec(),
        "appName": OURS,
        "blockConnection": true,
        "blockTimeMS": time.as_millis() as i64,
    }
}

/// Has the server fail these commands of this crate with a code.
async fn refuse(server: &Mongod, commands: &[&str], code: i32) {
    let data = doc! { "failCommands": commands.to_vec(), "appName": OURS, "errorCode": code };
    fail_command(server, "alwaysOn", data).await;
}

/// What this crate has under way on a server, by the server's own account.
async fn under_way(admin: &Database) -> Vec<String> {
    let ours = [doc! { "$currentOp": {} }, doc! { "$match": { "appName": OURS } }];
    let mut found = admin.aggregate(ours).await.unwrap();
    let mut names = Vec::new();
    while found.advance().await.unwrap() {
        let operation = Document::try_from(found.current()).unwrap();
        names.extend(operation.get_document("command").ok().and_then(name_of));
    }
    names
}

fn name_of(command: &Document) -> Option<String> {
    if let Ok(pipeline) = command.get_array("pipeline") {
        let is_a_stream = pipeline[0].as_document()?.contains_key("$changeStream");
        return (!is_a_stream).then(|| "load".to_owned());
    }
    if let Ok(filter) = command.get_document("query") {
        return Some(format!("change of {}", filter.get_str("_id").ok()?));
    }
    let update = command.get_array("updates").ok()?.first()?.as_document()?;
    Some(match (update.get("u"), update.get_document("q").ok()?.get("_id")) {
        (Some(Bson::Document(_)), _) => "usage".to_owned(),
        (_, Some(Bson::String(id))) => format!("insertion of {id}"),
        _ => "sweep".to_owned(),
    })
}

async fn is_under_way(admin: &Database, what: &str) {
    let is = || async { under_way(admin).await.iter().any(|name| name == what) };
    eventually_within(10 * SECOND, what, is).await;
}

/// The most of each that was ever under way at once, while something else goes on.
async fn most_at_once(admin: &Database, meanwhile: impl Future<Output = ()>) -> BTreeMap<String, usize> {
    let mut most = BTreeMap::new();
    let look = async {
        loop {
            let mut now = BTreeMap::<_, usize>::new();
            for name in under_way(admin).await {
                *now.entry(name).or_default() += 1;
            }
            for (name, count) in now {
                let before = most.entry(name).or_default();
                *before = count.max(*before);
            }
            sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::select! {
        () = meanwhile => {}
        () = look => {}
    }
    most
}

#[tokio::test]
async fn f01_connect_to_closed_port_fails_fast_naming_cause() {
    let (_closed, address) = closed_port();
    let uri = format!("mongodb://operator:canary@{address}/gateway?directConnection=true");
    let begun = Instant::now();
    let error = MongoStore::builder().operation_limit(SHORT).connect(uri).await.unwrap_err();
    let said = all_that_it_says(&error);
    assert!(said.contains("Connection refused") && !said.contains("canary"), "{said}");
    assert!(begun.elapsed() < 3 * SECOND, "{:?}", begun.elapsed());
}

#[tokio::test]
async fn f01_a_short_connect_limit_still_names_the_cause() {
    let (_closed, address) = closed_port();
    let connecting =
        MongoStore::builder().connect_limit(SECOND).connect(format!("mongodb://{address}/gateway"));
    let begun = Instant::now();
    let said = all_that_it_says(&connecting.await.unwrap_err());
    assert!(begun.elapsed() < 2 * SECOND, "{:?}", begun.elapsed());
    assert!(said.contains("Connection refused"), "{said}");
}

#[tokio::test]
async fn f01_connect_limit_covers_a_silent_server() {
    let mongo = Mongo::standalone().await;
    let proxy = proxy_to(&mongo).await;
    proxy.set(Fault::Silence);
    let begun = Instant::now();
    let error = mongo.builder().connect_limit(SHORT).connect(proxy.uri()).await.unwrap_err();
    assert!(error.is_unreachable(), "{error:?}");
    assert!(begun.elapsed() < 2 * SECOND, "{:?}", begun.elapsed());
}

#[tokio::test]
async fn f01_connect_limit_covers_an_unanswered_ping() {
    let server = own(Kind::Standalone).await;
    block(&server, &["ping"], 5 * SECOND).await;
    let begun = Instant::now();
    let connecting = MongoStore::builder().database("gateway").connect_limit(SECOND).connect(server.uri());
    let error = connecting.await.unwrap_err();
    assert_eq!(error.to_string(), "MongoDB gave no answer within 1s");
    assert!(begun.elapsed() < 3 * SECOND, "{:?}", begun.elapsed());
}

#[tokio::test]
async fn f01_open_with_unreachable_store_fails_fast_naming_cause() {
    let (_closed, address) = closed_port();
    let store =
        MongoStore::builder().operation_limit(SHORT).connect_later(format!("mongodb://{address}/gateway"));
    let begun = Instant::now();
    let error = KeyPool::builder().key("alpha", "sk-alpha").open(store.await.unwrap()).await.unwrap_err();
    let said = all_that_it_says(&error);
    assert!(said.contains("Connection refused") && !said.contains("sk-alpha"), "{said}");
    assert!(begun.elapsed() < 3 * SECOND, "{:?}", begun.elapsed());
}

#[tokio::test]
async fn f01_seed_keys_serve_until_mongodb_is_reachable() {
    let mongo = Mongo::standalone().await;
    mongo.insert_all(["beta", "gamma", "delta"]).await;
    mongo.set("beta", doc! { "apiKey": "sk-beta-of-mongodb" }).await;
    cool_down_by_hand(&mongo, "gamma", 90 * SECOND).await;
    let (closed, address) = closed_port();
    let store =
        mongo.builder().operation_limit(SHORT).connect_later(format!("mongodb://{address}/gateway")).await;
    let seeds = ["alpha", "beta", "gamma"].map(|id| (id, format!("sk-{id}")));
    let pool = KeyPool::builder().keys(seeds).cooldown(MINUTE).open_when_ready(store.unwrap()).unwrap();
    let recovery = RecoveryHandle::spawn(&pool);
    let server = Server::limiting(["alpha"]).await;

    let marked = Instant::now();
    assert_eq!(status(&rotating(&pool), &server.url()).await, 429);
    while passes(&recovery) < 2 {
        requests_succeed_for(SHORT, &pool, &server).await;
        assert!(marked.elapsed() < 10 * SECOND, "it is not tried again soon");
    }
    let used: BTreeSet<_> = server.keys().into_iter().collect();
    assert_eq!(used, ["alpha", "beta", "gamma"].map(String::from).into());
    assert!(failure_of(&recovery.last_report().unwrap()).contains("the key store failed"));
    assert_eq!((mongo.find("alpha").await, pool.stats().marks_waiting), (None, 1));

    open_port(closed, address_of(&mongo));
    let all_are_there = || async { pool.stats().keys.len() == 4 && pool.stats().marks_waiting == 0 };
    eventually_within(10 * SECOND, "the pool is open", all_are_there).await;
    assert_eq!(mongo.document("alpha").await.get_str("apiKey").unwrap(), "sk-alpha");
    rests_in_the_store(&mongo, "alpha", MINUTE, marked).await;
    assert_eq!(mongo.document("beta").await.get_str("apiKey").unwrap(), "sk-beta-of-mongodb");
    let left = time_left(&pool, "gamma").unwrap();
    assert!(left > 70 * SECOND && left <= 90 * SECOND, "{left:?}");

    let before = server.count();
    requests_succeed_for(SHORT, &pool, &server).await;
    let used: BTreeSet<_> = server.keys().split_off(before).into_iter().collect();
    assert_eq!(used, ["beta-of-mongodb", "delta"].map(String::from).into());
}

#[tokio::test]
async fn f01_processes_retry_mongodb_at_random_intervals() {
    let (_closed, address) = closed_port();
    let begun = Instant::now();
    let tries = (0..10).map(|_| async {
        let builder = MongoStore::builder().operation_limit(Duration::from_millis(50));
        let store = builder.connect_later(format!("mongodb://{address}/gateway")).await.unwrap();
        let pool = KeyPool::builder().key("alpha", "sk-alpha").open_when_ready(store).unwrap();
        let recovery = RecoveryHandle::spawn(&pool);
        let tried_twice = || async { passes(&recovery) >= 2 };
        eventually_within(10 * SECOND, "it is tried again", tried_twice).await;
        begun.elapsed()
    });
    let tries = join_all(tries).await;
    let (first, last) = (tries.iter().min().unwrap(), tries.iter().max().unwrap());
    assert!(*last - *first > Duration::from_millis(200), "in step: {tries:?}");
}

#[tokio::test]
async fn f02_requests_continue_during_an_outage_and_marks_follow() {
    let mongo = Mongo::standalone().await;
    mongo.insert_all(["alpha", "beta", "gamma"]).await;
    let proxy = proxy_to(&mongo).await;
    let pool = open(connect(&mongo, OPERATION_LIMIT, &proxy.uri()).await, MINUTE).await;
    let recovery = recovery_without_passes(&pool);
    // Slow with the 429s, so that all of them are under way before the first one is known.
    let server = Server::start(|request| async move {
        if key_of(&request) == Some("gamma") {
            return answer(200, "fine");
        }
        sleep(Duration::from_millis(100)).await;
        answer(429, "too many requests")
    })
    .await;

    proxy.set(Fault::Cut);
    let (client, url) = (rotating(&pool), server.url());
    let answers = join_all((0..12).map(|_| status(&client, &url))).await;
    let marked = Instant::now();
    assert_eq!(answers.iter().filter(|status| **status == 429).count(), 8);
    assert_eq!(pool.stats().marks_waiting, 2);
    requests_succeed_for(3 * SECOND / 2, &pool, &server).await;
    assert!(in_time(recovery.sweep_now()).await.outcome.is_err());
    assert_eq!(pool.stats().marks_waiting, 2);
    assert_eq!(mongo.count(doc! { "status": "healthy" }).await, 3);

    proxy.set(Fault::None);
    no_mark_waits(&pool).await;
    for id in ["alpha", "beta"] {
        rests_in_the_store(&mongo, id, MINUTE, marked).await;
    }
    assert_eq!(mongo.status("gamma").await, "healthy");
}

#[tokio::test]
async fn f02_a_cooldown_ends_on_time_during_an_outage() {
    const COOLDOWN: Duration = Duration::from_millis(400);
    let mongo = Mongo::standalone().await;
    mongo.insert_all(["alpha", "beta"]).await;
    let proxy = proxy_to(&mongo).await;
    let pool = open(connect(&mongo, OPERATION_LIMIT, &proxy.uri()).await, COOLDOWN).await;
    let recovery = recovery_without_passes(&pool);
    let server = Server::limiting(["alpha"]).await;

    proxy.set(Fault::Cut);
    let marked = Instant::now();
    assert_eq!(status(&rotating(&pool), &server.url()).await, 429);
    server.lift("alpha");
    while server.keys().iter().filter(|key| *key == "alpha").count() == 1 {
        requests_succeed_for(INSTANT, &pool, &server).await;
        assert!(marked.elapsed() < 5 * SECOND, "alpha does not come back");
    }
    assert!(marked.elapsed() >= COOLDOWN, "alpha was back after {:?}", marked.elapsed());

    proxy.set(Fault::None);
    eventually_within(10 * SECOND, "the store and the pool agree that alpha is back", || async {
        recovery.sweep_now().await.outcome.is_ok()
            && mongo.status("alpha").await == "healthy"
            && pool.stats().healthy == 2
    })
    .await;
}

#[tokio::test]
async fn f02_cooldowns_and_pending_marks_survive_a_mongod_restart() {
    let mut server = own(Kind::Standalone).await;
    let mongo = Mongo::at(&server.uri()).await;
    mongo.insert_all(["alpha", "beta", "gamma"]).await;
    let pool = open(connect(&mongo, OPERATION_LIMIT, &mongo.uri).await, MINUTE).await;
    let recovery = recovery_without_passes(&pool);
    let http = Server::limiting(["alpha", "beta"]).await;

    let alpha_marked = Instant::now();
    assert_eq!(status(&rotating(&pool), &http.url()).await, 429);
    no_mark_waits(&pool).await;
    server.kill();
    let beta_marked = Instant::now();
    assert_eq!(status(&rotating(&pool), &http.url()).await, 429);
    requests_succeed_for(3 * SECOND / 2, &pool, &http).await;
    assert_eq!(pool.stats().marks_waiting, 1);

    server.restart().await.unwrap();
    no_mark_waits(&pool).await;
    rests_in_the_store(&mongo, "alpha", MINUTE, alpha_marked).await;
    rests_in_the_store(&mongo, "beta", MINUTE, beta_marked).await;
    a_pass_succeeds(&recovery).await;
    assert_eq!((pool.stats().healthy, pool.stats().rate_limited), (1, 2));
}

#[tokio::test]
async fn f03_slow_mongodb_delays_no_requests_nor_overlaps_passes() {
    const LATE: Duration = Duration::from_millis(800);
    let server = own(Kind::Standalone).await;
    let mongo = Mongo::at(&server.uri()).await;
    let ids: Vec<_> = (0..20).map(|number| format!("key-{number}")).collect();
    mongo.keys().insert_many(ids.iter().map(|id| healthy(id))).await.unwrap();
    let pool = open(mongo.store().await, Duration::from_millis(200)).await;
    let http = Server::limiting(["key-0", "key-1"]).await;
    let config = RecoveryConfig::new().start_jitter(Duration::ZERO).interval(SECOND / 10).limit(SHORT);
    block(&server, &["update", "find", "findAndModify", "aggregate"], LATE).await;
    let recovery = RecoveryHandle::spawn_with(&pool, config);

    let mut times = Vec::new();
    let requests = async {
        let (client, begun) = (rotating(&pool), Instant::now());
        while begun.elapsed() < 7 * LATE / 2 {
            let sent = Instant::now();
            let status = status(&client, &http.url()).await;
            times.push((sent.elapsed(), status));
            sleep(Duration::from_millis(2)).await;
        }
    };
    let reloads = async { while pool.reload().await.is_ok() {} };
    let meanwhile = async {
        tokio::select! {
            () = requests => {}
            () = reloads => panic!("a reload failed"),
        }
    };
    let most = most_at_once(&server.admin().await.unwrap(), meanwhile).await;

    let limited = times.iter().filter(|(_, status)| *status == 429).count();
    assert!(limited > 5 && times.len() > 100, "{limited} of {}", times.len());
    times.sort_unstable();
    let (p99, longest) = (times[times.len() * 99 / 100].0, times.last().unwrap().0);
    assert!(p99 < LATE / 4 && longest < LATE * 3 / 4, "p99 {p99:?}, longest {longest:?}");

    let report = recovery.last_report().unwrap();
    let failure = report.outcome.as_ref().unwrap_err().to_string();
    assert_eq!(failure, format!("the pass took longer than {SHORT:?}"));
    assert!(report.pass > 3 && report.failures == report.pass, "{report:?}");
    for seen in ["load", "sweep", "change of key-0", "change of key-1"] {
        assert_eq!(most.get(seen), Some(&1), "{seen}: {most:?}");
    }
    assert!(most.values().all(|count| *count == 1), "{most:?}");

    stop_failing(&server).await;
    a_pass_succeeds(&recovery).await;
}

#[tokio::test]
async fn f03_timeouts_are_reported_and_start_no_overlapping_write() {
    const LATE: Duration = Duration::from_secs(3);
    let (logs, _guard) = Logs::capture();
    let server = own(Kind::Standalone).await;
    let mongo = Mongo::at(&server.uri()).await;
    mongo.insert_all(["alpha", "beta"]).await;
    let pool = open(connect(&mongo, OPERATION_LIMIT, &mongo.uri).await, MINUTE).await;
    let recovery = recovery_without_passes(&pool);
    let http = Server::limiting(["alpha"]).await;

    block(&server, &["update", "findAndModify"], LATE).await;
    assert_eq!(status(&rotating(&pool), &http.url()).await, 429);
    let meanwhile = async {
        let failure = all_that_it_says(&pool.insert("gamma", "sk-gamma").await.unwrap_err());
        assert!(failure.contains("MongoDB took longer than 800ms; it is not known"), "{failure}");
        assert!(recovery.sweep_now().await.outcome.is_err());
        requests_succeed_for(SHORT, &pool, &http).await;
    };
    let most = most_at_once(&server.admin().await.unwrap(), meanwhile).await;
    assert_eq!(most.get("change of alpha"), Some(&1), "{most:?}");
    assert!(most.values().all(|count| *count == 1), "{most:?}");
    assert_eq!(logs.count("marks could not be written"), 1, "{:?}", logs.ours());

    stop_failing(&server).await;
    no_mark_waits(&pool).await;
    assert_eq!(mongo.status("alpha").await, "rate_limited");
}

/// A pool of which a mark of `alpha` is on its way, and is held up on the server for 1.5 seconds.
async fn a_mark_is_held_up(server: &Mongod, mongo: &Mongo) -> (KeyPool, RecoveryHandle) {
    mongo.insert_all(["alpha", "beta"]).await;
    let pool = open(mongo.store().await, MINUTE).await;
    let recovery = recovery_without_passes(&pool);
    let http = Server::limiting(["alpha"]).await;
    fail_command(server, doc! { "times": 1 }, held_up(&["findAndModify"], 3 * SECOND / 2)).await;
    assert_eq!(status(&rotating(&pool), &http.url()).await, 429);
    is_under_way(&server.admin().await.unwrap(), "change of alpha").await;
    (pool, recovery)
}

#[tokio::test]
async fn f09_a_reset_wins_over_a_delayed_mark_write() {
    let server = own(Kind::Standalone).await;
    let mongo = Mongo::at(&server.uri()).await;
    let (here, _recovery) = a_mark_is_held_up(&server, &mongo).await;
    let there = open(mongo.store().await, MINUTE).await;
    there.reset("alpha").await.unwrap();
    assert_eq!(here.stats().marks_waiting, 1);
    no_mark_waits(&here).await;
    assert_eq!(mongo.status("alpha").await, "healthy");
}

#[tokio::test]
async fn f03_a_silent_network_blocks_no_request_or_operator() {
    let mongo = Mongo::standalone().await;
    mongo.insert_all(["alpha", "beta"]).await;
    let proxy = proxy_to(&mongo).await;
    let pool = open(connect(&mongo, OPERATION_LIMIT, &proxy.uri()).await, MINUTE).await;
    let recovery = recovery_without_passes(&pool);
    let server = Server::limiting(["alpha"]).await;

    proxy.set(Fault::Silence);
    assert_eq!(status(&rotating(&pool), &server.url()).await, 429);
    let begun = Instant::now();
    let (reload, insert, reset) =
        tokio::join!(pool.reload(), pool.insert("gamma", "sk-gamma"), pool.reset("beta"));
    assert!(reload.is_err());
    for refused in [insert, reset] {
        assert!(refused.unwrap_err().is_store_failure());
    }
    assert!(begun.elapsed() < 5 * SECOND, "{:?}", begun.elapsed());
    assert!(failure_of(&in_time(recovery.sweep_now()).await).contains("took longer than"));
    requests_succeed_for(SHORT, &pool, &server).await;
    assert_eq!((pool.stats().keys.len(), pool.stats().marks_waiting), (2, 1));

    proxy.set(Fault::None);
    no_mark_waits(&pool).await;
    assert_eq!(mongo.status("alpha").await, "rate_limited");
    a_pass_succeeds(&recovery).await;
    // It could not be known whether it was done, and it was not taken back.
    assert!(mongo.find("gamma").await.is_some() && pool.stats().keys.len() == 3);
}

/// An election among one, which takes about a second.
async fn step_down(admin: &Database) {
    let command = doc! { "replSetStepDown": 1, "secondaryCatchUpPeriodSecs": 0, "force": true };
    admin.run_command(command).await.unwrap();
}

/// How often a key's status became that, by the server's own log.
async fn times_set(mongo: &Mongo, id: &str, status: &str) -> u64 {
    let namespace = format!("{}.keys", mongo.database.name());
    let oplog = mongo.database.client().database("local").collection::<Document>("oplog.rs");
    let set = doc! { "op": "u", "ns": namespace, "o2._id": id, "o.diff.u.status": status };
    oplog.count_documents(set).await.unwrap()
}

#[tokio::test]
async fn f04_a_primary_stepdown_loses_and_duplicates_no_write() {
    let server = own(Kind::ReplicaSet).await;
    let admin = server.admin().await.unwrap();
    let mongo = Mongo::at(&server.uri()).await;
    mongo.insert_all(["alpha", "beta", "gamma"]).await;
    mongo.set("beta", doc! { "status": "rate_limited" }).await;
    mongo.end_cooldown("beta").await;
    // Not by polling, so that what is seen was told by a change stream.
    let store = mongo.builder().operation_limit(3 * SECOND).poll_interval(MINUTE).connect(&mongo.uri).await;
    let pool = open(store.unwrap(), MINUTE).await;
    let recovery = recovery_without_passes(&pool);
    let http = Server::limiting(["alpha"]).await;

    block(&server, &["update", "findAndModify"], SECOND).await;
    let middle = async {
        is_under_way(&admin, "sweep").await;
        let marked = Instant::now();
        assert_eq!(status(&rotating(&pool), &http.url()).await, 429);
        is_under_way(&admin, "change of alpha").await;
        step_down(&admin).await;
        stop_failing(&server).await;
        requests_succeed_for(SHORT, &pool, &http).await;
        marked
    };
    let (report, marked) = tokio::join!(recovery.sweep_now(), middle);
    assert!(!has_panicked(&report), "{report:?}");

    a_pass_succeeds(&recovery).await;
    no_mark_waits(&pool).await;
    // It may be later by as long as the write was on its way.
    let (left, since) = (mongo.millis_left("alpha").await.unwrap(), marked.elapsed().as_millis() as i64);
    assert!(left > 60_000 - since - 100 && left <= 60_000, "{left} ms are left after {since}");
    assert_eq!(mongo.status("beta").await, "healthy");
    assert_eq!(times_set(&mongo, "beta", "healthy").await, 1);
    assert_eq!(times_set(&mongo, "alpha", "rate_limited").await, 1);
    assert_eq!(stats_of(&pool, "alpha").status, Status::RateLimited);
    assert_eq!(pool.stats().healthy, 2);

    cool_down_by_hand(&mongo, "gamma", MINUTE).await;
    eventually("a change is still followed", || stats_of(&pool, "gamma").status == Status::RateLimited).await;
}

/// A pool of so many keys that reading them takes more than one answer of the server, and what somebody then does
/// to the first and the last of them.
async fn many_keys_and_changes(mongo: &Mongo, uri: &str) -> KeyPool {
    let ids = (0..300).map(|number| format!("key-{number}"));
    mongo.keys().insert_many(ids.map(|id| healthy(&id))).await.unwrap();
    let pool = open(connect(mongo, 3 * SECOND, uri).await, MINUTE).await;
    mongo.keys().delete_one(doc! { "_id": "key-0" }).await.unwrap();
    cool_down_by_hand(mongo, "key-1", MINUTE).await;
    mongo.set("key-299", doc! { "status": "disabled" }).await;
    mongo.insert("key-300").await;
    pool
}

async fn a_reload_fails_and_changes_nothing(pool: &KeyPool) {
    let before = pool.stats();
    assert_eq!((before.keys.len(), before.healthy), (300, 300));
    assert!(in_time(pool.reload()).await.is_err());
    assert_eq!(pool.stats(), before);
}

async fn a_reload_works(pool: &KeyPool) {
    in_time(pool.reload()).await.unwrap();
    let stats = pool.stats();
    assert_eq!((stats.keys.len(), stats.healthy, stats.rate_limited, stats.disabled), (300, 298, 1, 1));
}

#[tokio::test]
async fn f05_a_dying_cursor_leaves_the_keys_unchanged() {
    let server = own(Kind::Standalone).await;
    let mongo = Mongo::at(&server.uri()).await;
    let pool = many_keys_and_changes(&mongo, &mongo.uri).await;
    for death in [doc! { "errorCode": 11_601 }, doc! { "errorCode": 43 }, doc! { "closeConnection": true }] {
        let mut data = doc! { "failCommands": ["getMore"], "appName": OURS };
        data.extend(death);
        fail_command(&server, "alwaysOn", data).await;
        a_reload_fails_and_changes_nothing(&pool).await;
    }
    stop_failing(&server).await;
    a_reload_works(&pool).await;
}

#[tokio::test]
async fn f05_a_truncated_response_leaves_the_keys_unchanged() {
    let mongo = Mongo::standalone().await;
    let proxy = proxy_to(&mongo).await;
    let pool = many_keys_and_changes(&mongo, &proxy.uri()).await;
    for bytes in [0, 10, 500, 8_000] {
        proxy.set(Fault::Truncate(bytes));
        a_reload_fails_and_changes_nothing(&pool).await;
        proxy.set(Fault::None);
    }
    a_reload_works(&pool).await;
}

/// How much a reload has to do is not known beforehand, so only its parts have a limit: it takes each as it comes.
#[tokio::test]
async fn f29_operation_limit_bounds_each_batch_not_the_load() {
    const PAUSE: Duration = Duration::from_secs(2);
    let server = own(Kind::Standalone).await;
    let mongo = Mongo::at(&server.uri()).await;
    // The server gives at most 16 MB at once.
    let large = |number: usize| {
        let id = format!("key-{number:04}");
        let secret = format!("sk-{id}-{}", "x".repeat(15_000));
        doc! { "_id": id, "apiKey": secret, "status": "healthy" }
    };
    for from in (0..4_000).step_by(500) {
        mongo.keys().insert_many((from..from + 500).map(large)).await.unwrap();
    }
    // Three pauses come together to more than this, and each batch has three seconds beside its pause.
    let limit = 5 * SECOND;
    let store = connect(&mongo, limit, &mongo.uri).await;
    fail_command(&server, "alwaysOn", held_up(&["getMore"], PAUSE)).await;
    let began = Instant::now();
    let pool = open(store, MINUTE).await;
    assert!(began.elapsed() > limit, "{:?}", began.elapsed());
    assert_eq!(pool.stats().healthy, 4_000);
}

#[tokio::test]
async fn f14_a_new_pool_honours_stored_cooldowns() {
    let mongo = Mongo::standalone().await;
    mongo.insert_all(["alpha", "beta", "gamma"]).await;
    cool_down_by_hand(&mongo, "gamma", 90 * SECOND).await;
    let server = Server::limiting(["alpha"]).await;
    let before = open(mongo.store().await, 90 * SECOND).await;
    let recovery = recovery_without_passes(&before);
    assert_eq!(status(&rotating(&before), &server.url()).await, 429);
    recovery.shutdown().await.unwrap();
    drop(before);

    let pool = open(mongo.store().await, SECOND).await;
    let _recovery = RecoveryHandle::spawn_with(&pool, RecoveryConfig::new().start_jitter(Duration::ZERO));
    for id in ["alpha", "gamma"] {
        let left = time_left(&pool, id).unwrap();
        assert!(left > 75 * SECOND && left <= 90 * SECOND + SECOND / 10, "{id}: {left:?}");
    }
    requests_succeed_for(SHORT, &pool, &server).await;
    assert!(server.keys()[1..].iter().all(|key| key == "beta"));
}

#[tokio::test]
async fn f14_a_stored_cooldown_ends_on_time_without_sweeps() {
    const LEFT: Duration = Duration::from_secs(4);
    let mongo = Mongo::standalone().await;
    mongo.insert("alpha").await;
    let server = Server::limiting([]).await;
    // The server's clock has milliseconds, and cuts off what is less.
    let began = Instant::now() - Duration::from_millis(1);
    cool_down_by_hand(&mongo, "alpha", LEFT).await;
    let pool = open(mongo.store().await, MINUTE).await;

    let client = rotating(&pool);
    let error = get(&client, &server.url()).await.unwrap_err();
    assert!(NoKeyAvailable::find(&error).and_then(|error| error.retry_in()).is_some_and(|left| left <= LEFT));
    eventually_within(30 * SECOND, "alpha is back", || async { get(&client, &server.url()).await.is_ok() })
        .await;
    assert!(began.elapsed() >= LEFT, "{:?}", began.elapsed());
    assert_eq!(mongo.status("alpha").await, "rate_limited");
}

/// Gives up while the server holds it up: not before its turn has come, or nothing is done of it.
async fn given_up<T>(call: impl Future<Output = T>) {
    assert!(timeout(SECOND / 5, call).await.is_err(), "it was not held up");
}

async fn becomes(mongo: &Mongo, id: &str, status: Option<&str>) {
    let is = || async {
        mongo.find(id).await.as_ref().map(|document| document.get_str("status").unwrap()) == status
    };
    eventually_within(5 * SECOND, &format!("{id} becomes {status:?}"), is).await;
}

#[tokio::test]
async fn cancelled_operations_hold_no_lock_and_still_finish() {
    let server = own(Kind::Standalone).await;
    let mongo = Mongo::at(&server.uri()).await;
    mongo.insert_all(["alpha", "beta", "gamma"]).await;
    cool_down_by_hand(&mongo, "alpha", MINUTE).await;
    cool_down_by_hand(&mongo, "beta", MINUTE).await;
    let pool = open(mongo.store().await, MINUTE).await;
    let recovery = recovery_without_passes(&pool);

    block(&server, &["aggregate"], SECOND / 2).await;
    given_up(pool.reload()).await;
    // Not also what reads regularly: a call that gives up before its turn has come does nothing.
    block(&server, &["update", "findAndModify"], SECOND / 2).await;
    given_up(pool.insert("delta", "sk-delta")).await;
    in_time(pool.insert("epsilon", "sk-epsilon")).await.unwrap();
    becomes(&mongo, "delta", Some("healthy")).await;
    given_up(pool.reset("alpha")).await;
    becomes(&mongo, "alpha", Some("healthy")).await;
    given_up(pool.disable("beta")).await;
    becomes(&mongo, "beta", Some("disabled")).await;
    given_up(pool.remove("gamma")).await;
    becomes(&mongo, "gamma", None).await;
    given_up(recovery.sweep_now()).await;
    in_time(pool.enable("beta")).await.unwrap();
    stop_failing(&server).await;

    a_pass_succeeds(&recovery).await;
    let ids: BTreeSet<_> = pool.stats().keys.iter().map(|key| key.id.to_string()).collect();
    assert_eq!(ids, ["alpha", "beta", "delta", "epsilon"].map(String::from).into());
    assert_eq!((pool.stats().healthy, time_left(&pool, "beta").is_some()), (3, true));
}

#[tokio::test]
async fn refused_writes_log_their_code_without_blocking_reloads() {
    let (logs, _guard) = Logs::capture();
    let mongo = Mongo::standalone().await;
    mongo.insert_all(["alpha", "beta"]).await;
    let pool = open(mongo.store().await, MINUTE).await;
    let recovery = recovery_without_passes(&pool);
    let server = Server::limiting(["alpha"]).await;
    // So that the server quotes the secret when it says what is wrong.
    let validator = doc! { "$or": [{ "status": { "$ne": "rate_limited" } }, { "apiKey": "another" }] };
    mongo.database.run_command(doc! { "collMod": "keys", "validator": validator }).await.unwrap();
    let limited = doc! { "$set": { "status": "rate_limited" } };
    let refused = mongo.keys().update_one(doc! { "_id": "alpha" }, limited).await.unwrap_err();
    assert!(all_that_it_says(&refused).contains("sk-alpha"), "{refused:?}");
    let before = logs.ours().len();

    assert_eq!(status(&rotating(&pool), &server.url()).await, 429);
    eventually("a write was tried", || logs.count("marks could not be written") == 1).await;
    mongo.insert("gamma").await;
    let failure = failure_of(&recovery.sweep_now().await);
    assert!(failure.contains("code 121") && !failure.contains("sk-"), "{failure}");
    let ours = logs.ours().split_off(before);
    assert!(ours.iter().filter(|line| line.contains("code 121")).count() >= 2, "{ours:?}");
    assert!(ours.iter().all(|line| !line.contains("sk-")), "{ours:?}");
    assert_eq!((pool.stats().keys.len(), pool.stats().marks_waiting), (3, 1));
    requests_succeed_for(SHORT, &pool, &server).await;
}

#[tokio::test]
async fn lost_authorization_is_reported_by_code_without_secrets() {
    let (logs, _guard) = Logs::capture();
    let server = own(Kind::Standalone).await;
    let mongo = Mongo::at(&server.uri()).await;
    mongo.insert_all(["alpha", "beta"]).await;
    let pool = open(mongo.store().await, MINUTE).await;
    let recovery = recovery_without_passes(&pool);
    let http = Server::limiting(["alpha"]).await;

    refuse(&server, &["update", "find", "findAndModify", "aggregate"], 13).await;
    assert_eq!(status(&rotating(&pool), &http.url()).await, 429);
    let operated = [pool.insert("gamma", "sk-gamma").await, pool.reset("beta").await];
    let mut said: Vec<_> = operated.map(|done| all_that_it_says(&done.unwrap_err())).into();
    said.push(all_that_it_says(&pool.reload().await.unwrap_err()));
    said.push(failure_of(&recovery.sweep_now().await));
    eventually("a write was tried", || logs.count("marks could not be written") == 1).await;
    said.extend(logs.ours().into_iter().filter(|line| line.contains("WARN")));
    assert!(said.len() >= 6 && said.iter().all(|said| said.contains("code 13 (Unauthorized)")), "{said:?}");
    assert!(!said.concat().contains("sk-") && logs.ours().iter().all(|line| !line.contains("sk-")));

    stop_failing(&server).await;
    no_mark_waits(&pool).await;
    a_pass_succeeds(&recovery).await;
}
