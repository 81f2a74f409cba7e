//! Standby keys: what takes the place of a key that failed, when, and only once.

mod support;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex},
    time::Instant,
};

use futures_util::future::join_all;
use mongodb::bson::{Bson, DateTime, Document, doc, oid::ObjectId};
use support::{mongo::*, *};
use tower::Layer;
use tower_key_rotation::{KeyPool, KeyRotation, KeyRotationLayer, RecoveryHandle, Status, store::KeyStore};

const COLLECTION: &str = "standby_keys";
const LONG_AGO: i64 = 1_700_000_000_000;

/// A database of keys, and the service that they are for.
struct Bench {
    mongo: Mongo,
    server: Server,
    answers: Arc<Mutex<HashMap<String, u16>>>,
}

impl Bench {
    async fn new(keys: &[&str], standby: &[&str]) -> Self {
        let answers: Arc<Mutex<HashMap<String, u16>>> = Arc::default();
        let server = Server::by_key(&answers).await;
        let bench = Self { mongo: Mongo::standalone().await, server, answers };
        bench.fill(keys, standby).await;
        bench
    }

    /// Adds healthy keys, and unused standby keys, of which the first is the oldest.
    async fn fill(&self, keys: &[&str], standby: &[&str]) {
        for key in keys {
            self.mongo.insert(key).await;
        }
        for (number, id) in (0..).zip(standby) {
            self.add_standby(created(id, number)).await;
        }
    }

    async fn clear(&self) {
        self.mongo.keys().delete_many(doc! {}).await.unwrap();
        self.mongo.standby().delete_many(doc! {}).await.unwrap();
    }

    async fn add_standby(&self, document: Document) {
        self.mongo.standby().insert_one(document).await.unwrap();
    }

    /// From now on the service answers that to requests with this key.
    fn says(&self, key: &str, status: u16) {
        self.answers.lock().unwrap().insert(key.into(), status);
    }

    /// A process of its own over the database. It makes no pass but those that it is asked for.
    async fn process(&self) -> Process {
        let store = self.mongo.builder().standby_collection(COLLECTION).poll_interval(60 * MINUTE);
        let store = store.connect(&self.mongo.uri).await.unwrap();
        let pool = KeyPool::builder().open(store).await.unwrap();
        Process {
            recovery: RecoveryHandle::spawn_with(&pool, passes_by_hand()),
            client: KeyRotationLayer::new(&pool).classify(ByStatus).layer(http()),
            url: self.server.url(),
            pool,
        }
    }

    async fn processes(&self, count: usize) -> Vec<Process> {
        join_all((0..count).map(|_| self.process())).await
    }

    async fn standby(&self, id: impl Into<Bson>) -> Document {
        self.mongo.standby().find_one(doc! { "_id": id.into() }).await.unwrap().unwrap()
    }

    /// The standby keys that are used, and what for.
    async fn claims(&self) -> BTreeMap<String, String> {
        let used = self.all(&self.mongo.standby(), doc! { "isUsed": true }).await;
        let text = |document: &Document, field| document.get_str(field).unwrap().to_owned();
        used.iter().map(|standby| (text(standby, "_id"), text(standby, "usedFor"))).collect()
    }

    async fn key_ids(&self) -> Vec<String> {
        let keys = self.all(&self.mongo.keys(), doc! {}).await;
        keys.iter().map(|key| key.get_str("_id").unwrap().to_owned()).collect()
    }

    /// All that is in the database.
    async fn everything(&self) -> [Vec<Document>; 2] {
        [self.all(&self.mongo.keys(), doc! {}).await, self.all(&self.mongo.standby(), doc! {}).await]
    }

    async fn all(&self, collection: &mongodb::Collection<Document>, filter: Document) -> Vec<Document> {
        let mut found = collection.find(filter).sort(doc! { "_id": 1 }).await.unwrap();
        let mut documents = Vec::new();
        while found.advance().await.unwrap() {
            documents.push(found.deserialize_current().unwrap());
        }
        documents
    }

    async fn is_retired(&self, failed: &str) -> bool {
        self.mongo.document(failed).await.get_datetime("retiredAt").is_ok()
    }

    async fn assert_replaced(&self, failed: &str, by: &str) {
        let key = self.mongo.document(by).await;
        let told = ["status", "apiKey", "replacedKey"].map(|field| key.get_str(field).unwrap());
        assert_eq!(told, ["healthy", &format!("sk-{by}"), failed]);

        let standby = self.standby(by).await;
        assert_eq!(["isUsed", "activated"].map(|field| standby.get_bool(field).unwrap()), [true, true]);
        assert_eq!(standby.get_str("usedFor").unwrap(), failed);
        assert!(standby.get_datetime("usedAt").is_ok(), "{standby}");

        let out = self.mongo.document(failed).await;
        assert!(["error", "exhausted"].contains(&out.get_str("status").unwrap()), "{out}");
        assert!(out.get_datetime("retiredAt").is_ok(), "{out}");
    }
}

struct Process {
    pool: KeyPool,
    recovery: RecoveryHandle,
    client: KeyRotation<reqwest::Client, ByStatus>,
    url: String,
}

impl Process {
    async fn get(&self) -> u16 {
        status(&self.client, &self.url).await
    }

    /// Sends requests until this key has failed, as the service has it.
    async fn sees_fail(&self, key: &str) {
        for _ in 0..10 {
            if self.status(key) != Some(Status::Healthy) {
                return;
            }
            self.get().await;
        }
        panic!("{key} has not failed");
    }

    async fn pass(&self) {
        self.recovery.sweep_now().await.outcome.unwrap();
    }

    fn status(&self, key: &str) -> Option<Status> {
        self.pool.stats().keys.into_iter().find(|stats| stats.id.as_str() == key).map(|stats| stats.status)
    }
}

async fn all_pass(processes: &[Process]) {
    join_all(processes.iter().map(Process::pass)).await;
}

fn created(id: &str, number: i64) -> Document {
    let mut document = standby(id);
    document.insert("createdAt", DateTime::from_millis(LONG_AGO + number));
    document
}

/// A key that a mark took out of service, as the mark left it.
fn failed(id: &str) -> Document {
    let mut document = healthy(id);
    document.extend(doc! {
        "status": "error",
        "lastError": "no longer accepted (HTTP 401)",
        "cooldownUntil": null,
        "failedAt": DateTime::from_millis(LONG_AGO),
    });
    document
}

/// A standby key that was taken for that key.
fn claimed(id: &str, failed: &str) -> Document {
    let mut document = standby(id);
    document.extend(doc! {
        "isUsed": true,
        "activated": true,
        "usedFor": failed,
        "usedAt": DateTime::from_millis(LONG_AGO + 5),
    });
    document
}

#[tokio::test]
async fn oldest_standby_key_replaces_revoked_or_exhausted_keys() {
    for refusal in [401, 402] {
        let bench = Bench::new(&["alpha"], &["zulu", "bravo"]).await;
        let mut taken_before = claimed("ancient", "somebody");
        taken_before.insert("createdAt", DateTime::from_millis(0));
        bench.add_standby(taken_before.clone()).await;
        let (here, there) = (bench.process().await, bench.process().await);
        bench.says("alpha", refusal);

        assert_eq!(here.get().await, refusal);
        let failed_at = Instant::now();
        eventually_within(2 * SECOND, "the key is replaced", || bench.is_retired("alpha")).await;
        eventually("the new key is used here", || here.status("zulu") == Some(Status::Healthy)).await;
        let took = failed_at.elapsed();
        println!("replaced and reloaded {took:?} after the {refusal}");
        assert!(took < 2 * SECOND, "{took:?}");

        bench.assert_replaced("alpha", "zulu").await;
        assert_eq!(bench.standby("bravo").await, created("bravo", 1));
        assert_eq!(bench.standby("ancient").await, taken_before);
        assert_eq!([here.get().await, here.get().await], [200, 200]);
        there.pool.reload().await.unwrap();
        assert_eq!([there.get().await, there.get().await], [200, 200]);
        assert_eq!(bench.server.keys(), ["alpha", "zulu", "zulu", "zulu", "zulu"]);
        assert_ne!(there.status("alpha"), Some(Status::Healthy));
    }
}

#[tokio::test]
async fn a_limited_key_takes_no_standby_key() {
    let bench = Bench::new(&["alpha"], &["one"]).await;
    let process = bench.process().await;
    bench.says("alpha", 429);
    process.sees_fail("alpha").await;
    eventually("the mark is written", || process.pool.stats().marks_waiting == 0).await;
    process.pass().await;
    assert_eq!(bench.mongo.status("alpha").await, "rate_limited");
    assert_eq!(bench.standby("one").await, created("one", 0));
    assert_eq!(bench.key_ids().await, ["alpha"]);
}

#[tokio::test]
async fn keys_failed_by_other_programs_get_no_replacement() {
    let bench = Bench::new(&["alpha"], &["one", "two"]).await;
    let before = [("exhausted", Bson::Null), ("error", Bson::Null), ("exhausted", DateTime::now().into())];
    for (number, (status, cooldown)) in before.into_iter().enumerate() {
        let id = format!("old-{number}");
        bench.mongo.insert(&id).await;
        bench.mongo.set(&id, doc! { "status": status, "cooldownUntil": cooldown }).await;
    }
    let process = bench.process().await;
    let [keys, _] = bench.everything().await;
    process.pass().await;
    assert_eq!(bench.everything().await[0], keys);
    assert_eq!(bench.claims().await.len(), 0);

    bench.says("alpha", 401);
    process.sees_fail("alpha").await;
    process.pass().await;
    assert_eq!(bench.claims().await, BTreeMap::from([("one".into(), "alpha".into())]));
}

/// The keys fail in every process at once, again and again.
async fn race(processes: usize, keys: &[&str], rounds: usize) {
    const STANDBY: [&str; 4] = ["one", "two", "three", "four"];
    let bench = Bench::new(&[], &[]).await;
    let processes = bench.processes(processes).await;
    for key in keys {
        bench.says(key, 401);
    }
    for round in 0..rounds {
        bench.clear().await;
        bench.fill(keys, &STANDBY).await;
        join_all(processes.iter().map(|process| process.pool.reload())).await;
        join_all(processes.iter().map(async |process| {
            join_all(keys.iter().map(|key| process.sees_fail(key))).await;
            process.pass().await;
        }))
        .await;
        let claims = bench.claims().await;
        let taken: Vec<_> = claims.keys().map(String::as_str).collect();
        let mut expected = STANDBY[..keys.len()].to_vec();
        expected.sort_unstable();
        assert_eq!(taken, expected, "round {round}: {claims:?}");
        let mut replaced: Vec<_> = claims.values().map(String::as_str).collect();
        replaced.sort_unstable();
        assert_eq!(replaced, keys, "round {round}: {claims:?}");
        assert_eq!(bench.key_ids().await.len(), 2 * keys.len(), "round {round}");
        for (by, failed) in &claims {
            bench.assert_replaced(failed, by).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_processes_replace_a_failed_key_once() {
    race(2, &["alpha"], 25).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eight_processes_replace_a_failed_key_once() {
    race(8, &["alpha"], 10).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_failing_simultaneously_are_each_replaced() {
    race(2, &["alpha", "beta"], 20).await;
}

#[tokio::test]
async fn keys_failing_in_different_processes_are_each_replaced() {
    let bench = Bench::new(&["alpha", "beta"], &["one", "two", "three"]).await;
    let processes = bench.processes(2).await;
    // So that the next request of each goes out with another key.
    processes[1].get().await;
    bench.says("alpha", 401);
    bench.says("beta", 402);
    assert_eq!(join_all(processes.iter().map(Process::get)).await, [401, 402]);
    eventually_within(2 * SECOND, "both are replaced", async || {
        bench.is_retired("alpha").await && bench.is_retired("beta").await
    })
    .await;
    let claims = bench.claims().await;
    assert_eq!(claims.keys().collect::<Vec<_>>(), ["one", "two"]);
    for (by, failed) in claims {
        bench.assert_replaced(&failed, &by).await;
    }
}

#[tokio::test]
async fn a_failed_key_waits_for_a_standby_key() {
    let bench = Bench::new(&["alpha"], &[]).await;
    let process = bench.process().await;
    bench.says("alpha", 401);
    process.sees_fail("alpha").await;
    for _ in 0..2 {
        process.pass().await;
        let alpha = bench.mongo.document("alpha").await;
        // It is the last key, so it is not revoked for good.
        assert_eq!(alpha.get_str("status").unwrap(), "exhausted");
        assert!(!alpha.contains_key("retiredAt") && !alpha.contains_key("replacedBy"), "{alpha}");
        assert_eq!(bench.key_ids().await, ["alpha"]);
    }
    bench.add_standby(standby("one")).await;
    process.pass().await;
    bench.assert_replaced("alpha", "one").await;
    assert_eq!(process.get().await, 200);
    assert_eq!(bench.server.keys().last().unwrap(), "one");
}

/// What a crash left is finished by the next passes, of two processes at once, and then stays as it is.
async fn assert_finished(bench: &Bench, by: &str) {
    let processes = bench.processes(2).await;
    all_pass(&processes).await;
    bench.assert_replaced("alpha", by).await;
    assert_eq!(bench.mongo.document("alpha").await.get_str("replacedBy").unwrap(), by);
    let finished = bench.everything().await;
    all_pass(&processes).await;
    assert_eq!(bench.everything().await, finished);
    assert_eq!(processes[0].get().await, 200);
    assert_eq!(bench.server.keys(), [by]);
}

fn planned(by: impl Into<Bson>) -> Document {
    let mut document = failed("alpha");
    document.insert("replacedBy", by.into());
    document
}

async fn crashed(alpha: Document, standby: impl IntoIterator<Item = Document>) -> Bench {
    let bench = Bench::new(&[], &[]).await;
    bench.mongo.keys().insert_one(alpha).await.unwrap();
    for document in standby {
        bench.add_standby(document).await;
    }
    bench
}

#[tokio::test]
async fn a_resumed_replacement_claims_its_planned_standby_key() {
    let older = created("older", -1);
    let bench = crashed(planned("one"), [standby("one"), older.clone()]).await;
    assert_finished(&bench, "one").await;
    assert_eq!(bench.standby("older").await, older);
}

#[tokio::test]
async fn a_resumed_replacement_inserts_its_claimed_standby_key() {
    for others in [vec![created("older", -1)], vec![]] {
        let standby = others.clone().into_iter().chain([claimed("one", "alpha")]);
        let bench = crashed(planned("one"), standby).await;
        assert_finished(&bench, "one").await;
        assert_eq!(bench.standby("one").await, claimed("one", "alpha"));
        for other in others {
            assert_eq!(bench.standby("older").await, other);
        }
    }
}

#[tokio::test]
async fn a_resumed_replacement_retires_the_failed_key() {
    let bench = crashed(planned("one"), [claimed("one", "alpha"), created("older", -1)]).await;
    let mut inserted = healthy("one");
    inserted.extend(doc! { "replacedKey": "alpha", "requestsCount": 41_i64 });
    bench.mongo.keys().insert_one(&inserted).await.unwrap();
    assert_finished(&bench, "one").await;
    assert_eq!(theirs(bench.mongo.document("one").await), theirs(inserted));
    assert_eq!(bench.claims().await.len(), 1);
}

#[tokio::test]
async fn recovery_skips_an_inserted_standby_key_that_failed() {
    let bench = crashed(planned("one"), [claimed("one", "alpha"), created("two", 1)]).await;
    let mut inserted = healthy("one");
    inserted.extend(doc! { "replacedKey": "alpha", "status": "error" });
    bench.mongo.keys().insert_one(&inserted).await.unwrap();
    assert_finished(&bench, "two").await;
    assert_eq!(theirs(bench.mongo.document("one").await), theirs(inserted));
}

#[tokio::test]
async fn planned_standby_keys_claimed_elsewhere_stay_untouched() {
    let taken = claimed("one", "somebody");
    let bench = crashed(planned("one"), [taken.clone(), created("two", 1)]).await;
    assert_finished(&bench, "two").await;
    assert_eq!(bench.standby("one").await, taken);
}

#[tokio::test]
async fn another_standby_key_replaces_a_deleted_planned_one() {
    let bench = crashed(planned("one"), [created("two", 1)]).await;
    assert_finished(&bench, "two").await;
}

#[tokio::test]
async fn an_unfulfillable_plan_yields_to_later_standby_keys() {
    let bench = crashed(planned("one"), [claimed("one", "somebody")]).await;
    bench.process().await.pass().await;
    assert!(!bench.mongo.document("alpha").await.contains_key("replacedBy"));
    bench.add_standby(standby("two")).await;
    assert_finished(&bench, "two").await;
}

#[tokio::test]
async fn missing_standby_keys_block_no_started_replacement() {
    let bench = crashed(failed("aardvark"), [claimed("one", "alpha")]).await;
    bench.mongo.keys().insert_one(planned("one")).await.unwrap();
    bench.process().await.pass().await;
    bench.assert_replaced("alpha", "one").await;
}

#[tokio::test]
async fn a_claimed_standby_key_survives_an_operators_reset() {
    let bench = crashed(planned("one"), [claimed("one", "alpha")]).await;
    let process = bench.process().await;
    process.pool.reset("alpha").await.unwrap();
    bench.says("alpha", 401);
    process.sees_fail("alpha").await;
    process.pass().await;
    assert_eq!(bench.key_ids().await, ["alpha", "one"]);
    assert_eq!(process.status("one"), Some(Status::Healthy));
}

#[tokio::test]
async fn unusable_standby_keys_are_skipped_with_a_warning() {
    let (logs, _guard) = Logs::capture();
    let bench = Bench::new(&["alpha", "occupied"], &[]).await;
    let mut ids: Vec<String> = Vec::new();
    for (number, secret) in [(0, None), (1, Some(Bson::from(5))), (2, Some(Bson::from("")))] {
        let mut document = created(&format!("unusable-{number}"), number);
        document.remove("apiKey");
        document.extend(secret.map(|secret| ("apiKey".to_owned(), secret)));
        ids.push(format!("unusable-{number}"));
        bench.add_standby(document).await;
    }
    let mut numbered = created("unusable", 3);
    numbered.extend(doc! { "_id": 4711, "apiKey": "sk-canary-of-4711" });
    bench.add_standby(numbered).await;
    let mut occupied = created("occupied", 4);
    occupied.insert("apiKey", "sk-canary-of-another");
    bench.add_standby(occupied).await;
    ids.extend(["4711".into(), "occupied".into()]);
    bench.add_standby(created("one", 5)).await;
    let before = bench.mongo.document("occupied").await;

    let process = bench.process().await;
    bench.says("alpha", 401);
    process.sees_fail("alpha").await;
    process.pass().await;
    bench.assert_replaced("alpha", "one").await;
    assert_eq!(bench.key_ids().await, ["alpha", "occupied", "one"]);
    assert_eq!(theirs(bench.mongo.document("occupied").await), theirs(before));
    let warnings: Vec<_> = logs.ours().into_iter().filter(|line| line.contains("WARN")).collect();
    for id in ids {
        let about = |line: &&String| line.contains("standby") && line.contains(&format!("standby={id}"));
        assert_eq!(warnings.iter().filter(about).count(), 1, "{id}: {warnings:#?}");
    }
    for secret in ["canary", "sk-alpha", "sk-one", "sk-occupied"] {
        assert!(!logs.text().contains(secret), "{secret}");
    }
}

#[tokio::test]
async fn standby_keys_with_duplicate_secrets_are_skipped() {
    let bench = Bench::new(&["alpha", "beta"], &[]).await;
    for (id, original) in [("a-copy", "alpha"), ("b-copy", "beta"), ("one", "one")] {
        let mut copy = standby(id);
        copy.insert("apiKey", format!("sk-{original}"));
        bench.mongo.standby().insert_one(copy).await.unwrap();
    }
    let process = bench.process().await;
    bench.says("alpha", 401);
    process.sees_fail("alpha").await;
    process.pass().await;
    bench.assert_replaced("alpha", "one").await;
    assert_eq!(bench.key_ids().await, ["alpha", "beta", "one"]);
}

#[tokio::test]
async fn a_refused_replacement_blocks_no_other_replacement() {
    let bench = Bench::new(&["alpha", "beta"], &["a-refused-one", "one"]).await;
    let validator = doc! { "collMod": "keys", "validator": { "_id": { "$ne": "a-refused-one" } } };
    bench.mongo.database.run_command(validator).await.unwrap();
    let process = bench.process().await;
    for key in ["alpha", "beta"] {
        bench.says(key, 401);
        process.sees_fail(key).await;
    }
    for _ in 0..2 {
        process.recovery.sweep_now().await.outcome.ok();
    }
    bench.assert_replaced("beta", "one").await;
    assert_eq!(bench.key_ids().await, ["alpha", "beta", "one"]);
}

#[tokio::test]
async fn a_refused_replacement_errors_unless_another_key_succeeds() {
    let bench = Bench::new(&[], &["a-refused-one", "one"]).await;
    bench.mongo.keys().insert_many([failed("alpha"), failed("beta")]).await.unwrap();
    let validator = doc! { "collMod": "keys", "validator": { "_id": { "$ne": "a-refused-one" } } };
    bench.mongo.database.run_command(validator).await.unwrap();
    let store = bench.mongo.builder().standby_collection(COLLECTION);
    let store = store.connect(&bench.mongo.uri).await.unwrap();
    let replaced = store.replace_failed().await.unwrap();
    assert_eq!(replaced.iter().map(|replaced| replaced.by.as_str()).collect::<Vec<_>>(), ["one"]);
    assert!(store.replace_failed().await.is_err());
}

#[tokio::test]
async fn s04_query_operators_in_replaced_by_are_ignored() {
    let bench = Bench::new(&["alpha"], &["one"]).await;
    let process = bench.process().await;
    let failed = doc! { "status": "error", "failedAt": DateTime::now(), "replacedBy": { "$ne": null } };
    bench.mongo.set("alpha", failed).await;
    process.pass().await;
    bench.assert_replaced("alpha", "one").await;
}

#[tokio::test]
async fn a_reset_key_can_be_replaced_again() {
    let bench = Bench::new(&["alpha"], &["one", "two", "three"]).await;
    let process = bench.process().await;
    bench.says("alpha", 402);
    process.sees_fail("alpha").await;
    process.pass().await;
    bench.assert_replaced("alpha", "one").await;

    bench.says("alpha", 200);
    process.pool.reset("alpha").await.unwrap();
    process.pass().await;
    let alpha = bench.mongo.document("alpha").await;
    assert_eq!(alpha.get_str("status").unwrap(), "healthy");
    for field in ["failedAt", "replacedBy", "retiredAt"] {
        assert!(!alpha.contains_key(field), "{field}");
    }
    assert_eq!([process.get().await, process.get().await], [200, 200]);
    let mut used = bench.server.keys().split_off(1);
    used.sort_unstable();
    assert_eq!(used, ["alpha", "one"]);
    assert_eq!(bench.claims().await.len(), 1);

    bench.says("alpha", 401);
    process.sees_fail("alpha").await;
    process.pass().await;
    bench.assert_replaced("alpha", "two").await;
    assert_eq!(bench.key_ids().await, ["alpha", "one", "two"]);
    assert_eq!(bench.claims().await.len(), 2);
}

#[tokio::test]
async fn a_retired_key_takes_no_second_standby_key() {
    let bench = Bench::new(&["alpha"], &["one", "two"]).await;
    let (early, late) = (bench.process().await, bench.process().await);
    bench.says("alpha", 402);
    early.sees_fail("alpha").await;
    early.pass().await;
    bench.assert_replaced("alpha", "one").await;
    let retired_at = *bench.mongo.document("alpha").await.get_datetime("retiredAt").unwrap();

    bench.says("alpha", 401);
    late.sees_fail("alpha").await;
    late.pass().await;
    early.pass().await;
    assert_eq!(bench.mongo.status("alpha").await, "exhausted");
    bench.assert_replaced("alpha", "one").await;
    assert_eq!(bench.mongo.document("alpha").await.get_datetime("retiredAt").unwrap(), &retired_at);
    assert_eq!(bench.claims().await, BTreeMap::from([("one".into(), "alpha".into())]));
}

#[tokio::test]
async fn a_retired_exhausted_key_never_recovers_automatically() {
    let bench = Bench::new(&["alpha"], &["one"]).await;
    let process = bench.process().await;
    bench.says("alpha", 402);
    process.sees_fail("alpha").await;
    process.pass().await;
    assert!(!bench.mongo.document("alpha").await.contains_key("exhaustedUntil"));
    process.pass().await;
    let alpha = stats_of(&process.pool, "alpha");
    assert_eq!((alpha.status, alpha.time_left), (Status::Exhausted, None));
}

#[tokio::test]
async fn standby_object_ids_become_hexadecimal_key_ids() {
    let id = ObjectId::new();
    let of_a_tool = |extra: Document| {
        let mut document = standby("one");
        document.insert("_id", id);
        document.extend(extra);
        document
    };
    let taken = doc! { "isUsed": true, "usedFor": "alpha", "usedAt": DateTime::from_millis(LONG_AGO) };
    for (alpha, extra) in [(failed("alpha"), doc! {}), (planned(id), doc! {}), (planned(id), taken)] {
        let bench = crashed(alpha, [of_a_tool(extra)]).await;
        let process = bench.process().await;
        process.pass().await;
        process.pass().await;
        let key = bench.mongo.document(&id.to_hex()).await;
        assert_eq!(["apiKey", "replacedKey"].map(|field| key.get_str(field).unwrap()), ["sk-one", "alpha"]);
        assert_eq!(bench.standby(id).await.get_str("usedFor").unwrap(), "alpha");
        assert!(bench.is_retired("alpha").await);
        assert_eq!(process.get().await, 200);
        assert_eq!(bench.server.keys(), ["one"]);
    }
}

#[tokio::test]
async fn failed_keys_are_only_marked_without_standby_collection() {
    let bench = Bench::new(&["alpha"], &["one"]).await;
    let pool = KeyPool::builder().open(bench.mongo.store().await).await.unwrap();
    let recovery = RecoveryHandle::spawn(&pool);
    let client = KeyRotationLayer::new(&pool).classify(ByStatus).layer(http());
    bench.says("alpha", 401);
    assert_eq!(status(&client, &bench.server.url()).await, 401);
    recovery.sweep_now().await.outcome.unwrap();
    assert_eq!(bench.mongo.status("alpha").await, "exhausted");
    assert_eq!(bench.standby("one").await, created("one", 0));
    assert_eq!(bench.key_ids().await, ["alpha"]);
}
