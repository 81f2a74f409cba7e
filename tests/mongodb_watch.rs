//! What one process, or another program, changes in the database is seen by the others without any pass.

mod support;

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use mongodb::{
    bson::{Document, doc},
    options::{Acknowledgment, WriteConcern},
};
use support::{mongo::*, *};
use tokio::{sync::mpsc, time::sleep};
use tower_key_rotation::{
    KeyId, KeyPool, KeyRotation, RecoveryHandle, Status,
    store::{
        Change, KeyStore, Loaded, Mark, Operation, Recovered, Replaced, Standing, StoreFuture, Usage,
        mongodb::MongoStore,
    },
};

const MILLISECOND: Duration = Duration::from_millis(1);

/// A change takes less than a second, on a machine that is not overloaded.
const SOON: Duration = Duration::from_secs(15);

/// Counts how often keys are read.
#[derive(Clone, Debug)]
struct Counting {
    inner: MongoStore,
    loads: Arc<AtomicUsize>,
}

impl KeyStore for Counting {
    fn load<'a>(&'a self, only: Option<&'a [KeyId]>) -> StoreFuture<'a, Loaded> {
        self.loads.fetch_add(1, SeqCst);
        self.inner.load(only)
    }

    fn merge(&self, mark: Mark) -> StoreFuture<'_, Option<Standing>> {
        self.inner.merge(mark)
    }

    fn operate(&self, id: KeyId, operation: Operation) -> StoreFuture<'_, Option<Standing>> {
        self.inner.operate(id, operation)
    }

    fn sweep(&self) -> StoreFuture<'_, Recovered> {
        self.inner.sweep()
    }

    fn changes(&self) -> Option<mpsc::Receiver<Change>> {
        self.inner.changes()
    }

    fn add_usage(&self, usage: Vec<Usage>) -> StoreFuture<'_, ()> {
        self.inner.add_usage(usage)
    }

    fn replace_failed(&self) -> StoreFuture<'_, Vec<Replaced>> {
        self.inner.replace_failed()
    }
}

/// A process that makes no pass but those that it is asked for.
struct Process {
    pool: KeyPool,
    recovery: RecoveryHandle,
    client: KeyRotation<reqwest::Client>,
    loads: Arc<AtomicUsize>,
}

impl Process {
    async fn over(store: MongoStore) -> Self {
        let (pool, loads) = opened(store).await;
        Self::following(pool, loads)
    }

    fn following(pool: KeyPool, loads: Arc<AtomicUsize>) -> Self {
        Self {
            recovery: RecoveryHandle::spawn_with(&pool, passes_by_hand()),
            client: rotating(&pool),
            loads,
            pool,
        }
    }

    fn loads(&self) -> usize {
        self.loads.load(SeqCst)
    }

    fn status(&self, key: &str) -> Option<Status> {
        self.pool.stats().keys.into_iter().find(|stats| stats.id.as_str() == key).map(|stats| stats.status)
    }

    /// Waits until this process has opened its change stream: something changes, and it notices.
    async fn follows(&self, mongo: &Mongo) {
        // How soon is for the tests to say: a stream that is opened beside all the others may take its time.
        const LIMIT: Duration = Duration::from_secs(30);
        mongo.insert("probe").await;
        sees(LIMIT, "the probe comes", || self.status("probe").is_some()).await;
        mongo.keys().delete_one(doc! { "_id": "probe" }).await.unwrap();
        sees(LIMIT, "the probe goes", || self.status("probe").is_none()).await;
    }
}

/// A pool that does not follow yet, and how often it has read its keys.
async fn opened(store: MongoStore) -> (KeyPool, Arc<AtomicUsize>) {
    let loads = Arc::default();
    let store = Counting { inner: store, loads: Arc::clone(&loads) };
    (KeyPool::builder().open(store).await.unwrap(), loads)
}

/// Waits until something is seen, and says how long it took.
async fn sees(limit: Duration, what: &str, holds: impl Fn() -> bool) -> Duration {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < limit, "this was not seen within {limit:?}: {what}");
        sleep(MILLISECOND).await;
    }
    let took = began.elapsed();
    println!("{what}: {took:?}");
    took
}

/// Two processes over a replica set, of which the second one follows what changes.
async fn two_processes(keys: &[&str]) -> (Mongo, Process, Process) {
    let mongo = Mongo::replica_set().await;
    for key in keys {
        mongo.insert(key).await;
    }
    let here = Process::over(mongo.store().await).await;
    let there = Process::over(mongo.store().await).await;
    there.follows(&mongo).await;
    (mongo, here, there)
}

#[tokio::test]
async fn another_process_honours_a_mark_within_a_second() {
    let (_mongo, here, there) = two_processes(&["alpha", "beta"]).await;
    let server = Server::limiting(["alpha"]).await;
    assert_eq!(status(&here.client, &server.url()).await, 429);
    let limited = || there.status("alpha") == Some(Status::RateLimited);
    sees(SOON, "the mark is honoured there", limited).await;
    let left = time_left(&there.pool, "alpha").unwrap();
    assert!((110 * SECOND..=2 * MINUTE).contains(&left), "{left:?}");
    for _ in 0..3 {
        assert_eq!(status(&there.client, &server.url()).await, 200);
    }
    assert_eq!(server.keys()[1..], ["beta", "beta", "beta"]);
}

#[tokio::test]
async fn other_processes_see_operator_changes_within_a_second() {
    let (_mongo, here, there) = two_processes(&["alpha"]).await;
    let server = Server::limiting(["alpha"]).await;
    assert_eq!(status(&here.client, &server.url()).await, 429);
    let alpha_is = |status| there.status("alpha") == Some(status);
    sees(SOON, "a mark", || alpha_is(Status::RateLimited)).await;

    here.pool.reset("alpha").await.unwrap();
    sees(SOON, "a reset", || alpha_is(Status::Healthy)).await;
    here.pool.insert("beta", "sk-beta").await.unwrap();
    sees(SOON, "a new key", || there.status("beta") == Some(Status::Healthy)).await;
    here.pool.disable("alpha").await.unwrap();
    sees(SOON, "a key taken out of service", || alpha_is(Status::Disabled)).await;
    assert_eq!(status(&there.client, &server.url()).await, 200);
    assert_eq!(server.keys().last().unwrap(), "beta");
    here.pool.enable("alpha").await.unwrap();
    sees(SOON, "a key put back into service", || alpha_is(Status::Healthy)).await;
    here.pool.remove("alpha").await.unwrap();
    sees(SOON, "a key removed", || there.status("alpha").is_none()).await;
}

#[tokio::test]
async fn changes_by_other_programs_appear_within_a_second() {
    let (mongo, _here, there) = two_processes(&["alpha"]).await;
    let server = Server::limiting([]).await;
    let words = [("error", Status::Revoked), ("paused", Status::Disabled), ("healthy", Status::Healthy)];
    for (word, status) in words {
        mongo.set("alpha", doc! { "status": word }).await;
        sees(SOON, word, || there.status("alpha") == Some(status)).await;
    }
    let rest = doc! { "status": "rate_limited", "cooldownUntil": { "$add": ["$$NOW", 50_000] } };
    mongo.keys().update_one(doc! { "_id": "alpha" }, vec![doc! { "$set": rest }]).await.unwrap();
    sees(SOON, "a cooldown", || there.status("alpha") == Some(Status::RateLimited)).await;
    let longer = doc! { "cooldownUntil": { "$add": ["$$NOW", 500_000] } };
    mongo.keys().update_one(doc! { "_id": "alpha" }, vec![doc! { "$set": longer }]).await.unwrap();
    let longer = || time_left(&there.pool, "alpha") > Some(400 * SECOND);
    sees(SOON, "a longer cooldown", longer).await;

    let mut replacement = healthy("alpha");
    replacement.insert("apiKey", "sk-new");
    mongo.keys().replace_one(doc! { "_id": "alpha" }, replacement).await.unwrap();
    sees(SOON, "another document", || there.status("alpha") == Some(Status::Healthy)).await;
    assert_eq!(status(&there.client, &server.url()).await, 200);
    mongo.set("alpha", doc! { "apiKey": "sk-newer", "note.owner": "nobody" }).await;
    eventually_within(SOON, "a new secret is used", async || {
        status(&there.client, &server.url()).await;
        server.keys().last().unwrap() == "newer"
    })
    .await;
    assert_eq!(server.keys()[0], "new");

    let unset = doc! { "$unset": { "apiKey": "" } };
    mongo.keys().update_one(doc! { "_id": "alpha" }, unset).await.unwrap();
    sees(SOON, "a key without a secret", || there.status("alpha").is_none()).await;
    assert_eq!(there.pool.stats().unreadable, 1);
    mongo.keys().delete_many(doc! {}).await.unwrap();
    sees(SOON, "a document that is gone", || there.pool.stats().unreadable == 0).await;
}

#[tokio::test]
async fn many_changes_at_once_are_all_seen() {
    let (mongo, _here, there) = two_processes(&[]).await;
    mongo.keys().insert_many((0..3_000).map(|number| healthy(&format!("key-{number}")))).await.unwrap();
    sees(60 * SECOND, "3,000 new keys", || there.pool.stats().healthy == 3_000).await;
    mongo.keys().update_many(doc! {}, doc! { "$set": { "status": "error" } }).await.unwrap();
    sees(60 * SECOND, "3,000 revoked keys", || there.pool.stats().revoked == 3_000).await;
    mongo.keys().delete_many(doc! { "_id": { "$ne": "key-7" } }).await.unwrap();
    sees(60 * SECOND, "2,999 removed keys", || there.pool.stats().keys.len() == 1).await;
}

#[tokio::test]
async fn usage_writes_trigger_no_reload_in_other_processes() {
    let (mongo, here, there) = two_processes(&["alpha", "beta"]).await;
    let server = Server::limiting([]).await;
    // What follows the probe's end may still be on its way.
    let mut before = 0;
    while before != there.loads() {
        before = there.loads();
        sleep(SECOND).await;
    }
    for _ in 0..5 {
        assert_eq!(status(&here.client, &server.url()).await, 200);
        assert_eq!(status(&here.client, &server.url()).await, 200);
        here.recovery.sweep_now().await.outcome.unwrap();
    }
    assert_eq!(mongo.count(doc! { "requestsCount": 7 }).await, 2);
    // The stream keeps the order: what is seen now comes after all of that.
    mongo.set("alpha", doc! { "status": "error" }).await;
    sees(SOON, "a change", || there.status("alpha") == Some(Status::Revoked)).await;
    assert_eq!(there.loads(), before + 1);
}

#[tokio::test]
async fn changes_during_an_outage_appear_after_reconnecting() {
    assert_seen_after_outages("", 300 * MILLISECOND).await;
}

#[tokio::test]
async fn changes_appear_after_outages_beyond_driver_retries() {
    assert_seen_after_outages("&serverSelectionTimeoutMS=1000", 1_500 * MILLISECOND).await;
}

async fn assert_seen_after_outages(options: &str, outage_lasts: Duration) {
    let mongo = Mongo::replica_set().await;
    mongo.insert_all(["alpha", "beta"]).await;
    let address = mongo.uri.trim_start_matches("mongodb://").split('/').next().unwrap();
    let proxy = Proxy::to(address.parse().unwrap()).await;
    let there = Process::over(mongo.store_through(&(proxy.uri() + options)).await).await;
    there.follows(&mongo).await;
    for outage in 1..=2 {
        proxy.set(Fault::Cut);
        mongo.set("alpha", doc! { "status": "error" }).await;
        mongo.keys().delete_one(doc! { "_id": "beta" }).await.unwrap();
        mongo.insert("gamma").await;
        sleep(outage_lasts).await;
        assert_eq!(there.status("alpha"), Some(Status::Healthy), "outage {outage}");

        proxy.set(Fault::None);
        let all_seen = || {
            there.status("alpha") == Some(Status::Revoked)
                && there.status("beta").is_none()
                && there.status("gamma") == Some(Status::Healthy)
        };
        sees(4 * SOON, "what changed during the outage", all_seen).await;
        mongo.set("alpha", doc! { "status": "healthy" }).await;
        mongo.insert("beta").await;
        mongo.keys().delete_one(doc! { "_id": "gamma" }).await.unwrap();
        let all_undone = || {
            there.status("alpha") == Some(Status::Healthy)
                && there.status("beta") == Some(Status::Healthy)
                && there.status("gamma").is_none()
        };
        sees(SOON, "what changed after it", all_undone).await;
    }
}

#[tokio::test]
async fn changes_not_yet_acknowledged_by_a_majority_are_seen() {
    let mongod = own(Kind::ReplicaSet).await;
    let mongo = Mongo::at(&mongod.uri()).await;
    mongo.insert("alpha").await;
    let (pool, loads) = opened(mongo.store().await).await;
    let admin = mongod.admin().await.unwrap();
    let majority_lags = |mode| doc! { "configureFailPoint": "disableSnapshotting", "mode": mode };
    admin.run_command(majority_lags("alwaysOn")).await.unwrap();
    for key in ["beta", "gamma"] {
        let one = WriteConcern::builder().w(Acknowledgment::Nodes(1)).build();
        mongo.keys().insert_one(healthy(key)).write_concern(one).await.unwrap();
    }
    let there = Process::following(pool, loads);
    sees(10 * SOON, "the load after the stream has begun", || there.loads() >= 2).await;
    assert_eq!(there.status("beta"), None);
    admin.run_command(majority_lags("off")).await.unwrap();
    // A majority acknowledges with the next write, which may be the server's own, 10 seconds later.
    mongo.insert("delta").await;
    let both = || there.status("beta").is_some() && there.status("gamma").is_some();
    sees(SOON, "what a majority has acknowledged since", both).await;
}

#[tokio::test]
async fn changes_right_after_a_mongod_restart_are_seen() {
    let mut mongod = own(Kind::ReplicaSet).await;
    let mongo = Mongo::at(&mongod.uri()).await;
    mongo.insert_all(["alpha", "beta"]).await;
    let there = Process::over(mongo.store().await).await;
    there.follows(&mongo).await;
    mongod.kill();
    let server = Server::limiting([]).await;
    assert_eq!(status(&there.client, &server.url()).await, 200);
    mongod.restart().await.unwrap();
    let other =
        Mongo { database: mongod.admin().await.unwrap().client().database(mongo.database.name()), ..mongo };
    other.set("alpha", doc! { "status": "error" }).await;
    sees(10 * SOON, "a change after the restart", || there.status("alpha") == Some(Status::Revoked)).await;
    other.set("alpha", doc! { "status": "healthy" }).await;
    sees(SOON, "the next change", || there.status("alpha") == Some(Status::Healthy)).await;
}

#[tokio::test]
async fn the_pool_follows_a_dropped_and_recreated_collection() {
    let (mongo, _here, there) = two_processes(&["alpha", "beta"]).await;
    for _ in 0..2 {
        mongo.keys().drop().await.unwrap();
        sees(SOON, "the collection is gone", || there.pool.stats().keys.is_empty()).await;
        mongo.insert("gamma").await;
        sees(SOON, "a key in its place", || there.status("gamma") == Some(Status::Healthy)).await;
        mongo.set("gamma", doc! { "status": "error" }).await;
        sees(SOON, "a change of it", || there.status("gamma") == Some(Status::Revoked)).await;
    }
}

#[tokio::test]
async fn without_change_streams_the_store_is_polled() {
    let mongo = Mongo::standalone().await;
    mongo.insert_all(["alpha", "beta"]).await;
    let here = Process::over(mongo.store().await).await;
    let often = mongo.builder().poll_interval(300 * MILLISECOND).connect(&mongo.uri).await.unwrap();
    let there = Process::over(often).await;
    let server = Server::limiting(["alpha"]).await;
    assert_eq!(status(&here.client, &server.url()).await, 429);
    let limited = || there.status("alpha") == Some(Status::RateLimited);
    sees(SOON, "the mark is honoured there", limited).await;
    mongo.insert("gamma").await;
    let known = || there.status("gamma") == Some(Status::Healthy);
    sees(SOON, "a key of another program", known).await;

    let (before, began) = (there.loads(), Instant::now());
    sees(SOON, "polls go on", || there.loads() >= before + 2).await;
    sleep(1_500 * MILLISECOND).await;
    let (loads, took) = (there.loads() - before, began.elapsed());
    assert!(loads as u128 <= 1 + took.as_millis() / 300, "{loads} loads in {took:?}");
}

#[tokio::test]
async fn the_poll_interval_defaults_to_five_seconds() {
    let (logs, _guard) = Logs::capture();
    let mongo = Mongo::standalone().await;
    mongo.insert("alpha").await;
    let process = Process::over(mongo.store().await).await;
    eventually("it is said", || logs.count("no change stream:") == 1).await;
    let line = logs.ours().into_iter().find(|line| line.contains("no change stream:")).unwrap();
    assert!(line.contains("interval_ms=5000"), "{line}");
    let loads = process.loads();
    sleep(500 * MILLISECOND).await;
    assert_eq!(process.loads(), loads);
}

#[tokio::test]
async fn f31_a_dropped_handle_stops_polling() {
    let mongo = Mongo::standalone().await;
    mongo.insert("alpha").await;
    let often = mongo.builder().poll_interval(20 * MILLISECOND).connect(&mongo.uri).await.unwrap();
    let Process { pool, recovery, loads, .. } = Process::over(often).await;
    eventually("it is polled", || loads.load(SeqCst) > 5).await;
    drop(recovery);
    settle().await;
    let before = loads.load(SeqCst);
    mongo.set("alpha", doc! { "status": "error" }).await;
    sleep(400 * MILLISECOND).await;
    assert_eq!(loads.load(SeqCst), before);
    assert_eq!(stats_of(&pool, "alpha").status, Status::Healthy);
}

/// The cursors that are open on the keys: change streams, where nothing is loaded.
async fn open_cursors(mongo: &Mongo) -> usize {
    let operations = doc! { "$currentOp": { "allUsers": true, "idleCursors": true } };
    let on_keys = doc! { "$match": {
        "ns": format!("{}.keys", mongo.database.name()),
        "cursor": { "$exists": true },
    } };
    let admin = mongo.database.client().database("admin");
    let mut found = admin.aggregate([operations, on_keys]).await.unwrap();
    let mut cursors: Vec<Document> = Vec::new();
    while found.advance().await.unwrap() {
        cursors.push(found.deserialize_current().unwrap());
    }
    cursors.len()
}

#[tokio::test]
async fn f31_drop_and_shutdown_close_the_change_stream() {
    for shut_down in [false, true] {
        let (mongo, here, there) = two_processes(&["alpha"]).await;
        here.follows(&mongo).await;
        eventually_within(SOON, "both follow", async || open_cursors(&mongo).await == 2).await;
        let Process { pool, recovery, loads, .. } = there;
        match shut_down {
            true => recovery.shutdown().await.unwrap(),
            false => drop(recovery),
        }
        settle().await;
        let before = loads.load(SeqCst);
        mongo.set("alpha", doc! { "status": "error" }).await;
        sees(SOON, "the other one goes on", || here.status("alpha") == Some(Status::Revoked)).await;
        eventually_within(3 * SOON, "one stream is left", async || open_cursors(&mongo).await == 1).await;
        assert_eq!(loads.load(SeqCst), before);
        assert_eq!(stats_of(&pool, "alpha").status, Status::Healthy);
    }
}
