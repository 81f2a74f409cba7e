//! Rests of single scopes in MongoDB: how processes share them, what other programs see of them, and how they end.

mod support;

use std::time::Duration;

use mongodb::bson::{Bson, Document, doc};
use support::{mongo::*, *};
use tower_key_rotation::{
    KeyId, KeyPool, PassedOver, RecoveryHandle, Rest, Traits,
    classify::Verdict,
    store::{
        KeyStore, Mark, Operation, Recovered, Resting, Scope, Standing, Until, Usage, Words,
        mongodb::MongoStore,
    },
};

const HOUR: Duration = Duration::from_secs(3_600);

/// How long a change may take on a busy machine.
const SEEN_WITHIN: Duration = Duration::from_secs(30);

/// A process that makes a pass only when asked. It writes marks and follows changes by itself.
struct Process {
    pool: KeyPool,
    recovery: RecoveryHandle,
}

impl Process {
    async fn over(mongo: &Mongo) -> Self {
        let pool = KeyPool::builder().open(mongo.store().await).await.unwrap();
        Self { recovery: RecoveryHandle::spawn_with(&pool, passes_by_hand()), pool }
    }

    /// A request of that scope finds the key's quota used up for so long.
    fn meets_quota(&self, id: &str, name: &str, left: Duration) {
        let lease = self.pool.lease(&pinned(id, name)).unwrap();
        lease.answered_with(Verdict::ScopeExhausted { wait: Some(left) });
    }

    fn serves(&self, id: &str, name: &str) -> bool {
        self.pool.lease(&pinned(id, name)).is_ok()
    }

    async fn has_written(&self) {
        eventually("marks are written", || self.pool.stats().marks_waiting == 0).await;
    }
}

fn pinned(id: &str, name: &str) -> Traits {
    Traits::new().scope(name).key(key(id))
}

fn key(id: &str) -> KeyId {
    KeyId::new(id).unwrap()
}

async fn sees(what: &str, holds: impl Fn() -> bool) {
    eventually_within(SEEN_WITHIN, what, || std::future::ready(holds())).await;
}

async fn standing(store: &MongoStore, id: &str) -> Standing {
    store.load(Some(&[key(id)])).await.unwrap().records.remove(0).standing
}

/// Has the rests of a key's scopes end, as if time had passed.
async fn let_scopes_end(mongo: &Mongo, id: &str) {
    let ended = doc! { "$map": { "input": "$limits", "in": {
        "s": "$$this.s", "u": { "$subtract": ["$$NOW", 1_000] }, "r": "$$this.r",
    } } };
    let set = vec![doc! { "$set": { "limits": ended } }];
    mongo.keys().update_one(doc! { "_id": id }, set).await.unwrap();
}

fn text<'a>(document: &'a Document, field: &str) -> &'a str {
    document.get_str(field).unwrap_or_else(|error| panic!("{error}: {document}"))
}

#[tokio::test]
async fn other_processes_join_scope_rests_and_their_end() {
    let mongo = Mongo::replica_set().await;
    mongo.insert_all(["alpha", "beta"]).await;
    let (one, other) = (Process::over(&mongo).await, Process::over(&mongo).await);
    let hostile = format!("$apiKey.{{}}\"{}", "x".repeat(116));
    assert!(other.serves("alpha", "gpt-5"), "this scope is in use there, and the other is not");
    one.meets_quota("alpha", "gpt-5", HOUR);
    one.meets_quota("alpha", &hostile, HOUR);
    for name in ["gpt-5", &hostile] {
        sees("the scope rests in the other process", || !other.serves("alpha", name)).await;
    }
    assert!(other.serves("alpha", "gpt-5-mini") && other.serves("beta", "gpt-5"));

    other.pool.reset("alpha").await.unwrap();
    for name in ["gpt-5", &hostile] {
        sees("the scope serves in the first process", || one.serves("alpha", name)).await;
        assert!(other.serves("alpha", name));
    }
    assert!(!mongo.document("alpha").await.contains_key("limits"));
}

#[tokio::test]
async fn f42_a_daily_quota_outlives_processes_in_mongodb() {
    let mongo = Mongo::standalone().await;
    mongo.insert_all(["alpha", "beta"]).await;
    let one = Process::over(&mongo).await;
    one.meets_quota("alpha", "gemini-pro", 10 * HOUR);
    one.recovery.shutdown().await.unwrap();
    drop(one.pool);

    let next = Process::over(&mongo).await;
    let traits = Traits::new().scope("gemini-pro");
    let alpha = next.pool.explain(&traits).keys.into_iter().find(|known| known.id == key("alpha")).unwrap();
    assert_eq!(alpha.passed_over, Some(PassedOver::RestingInScope));
    let opens_in = alpha.opens_in.unwrap();
    assert!(opens_in <= 10 * HOUR + SECOND && opens_in > 9 * HOUR, "{opens_in:?}");
    for _ in 0..4 {
        assert_eq!(next.pool.lease(&traits).unwrap().id().as_str(), "beta");
    }
}

#[tokio::test]
async fn other_programs_see_that_a_healthy_key_rests_in_scopes() {
    let mongo = Mongo::standalone().await;
    mongo.insert("alpha").await;
    let one = Process::over(&mongo).await;
    for (name, hours) in [("a", 1), ("b", 2)] {
        one.meets_quota("alpha", name, hours * HOUR);
    }
    one.has_written().await;
    let document = mongo.document("alpha").await;
    assert_eq!(text(&document, "status"), "healthy");
    assert_eq!(text(&document, "lastError"), "rests in 2 of its scopes, see limits");
    let limits: Vec<_> = document.get_array("limits").unwrap().iter().filter_map(Bson::as_document).collect();
    assert_eq!(limits.iter().map(|limit| text(limit, "s")).collect::<Vec<_>>(), ["a", "b"]);
    let resting = doc! { "limits.s": "a" };
    assert_eq!(mongo.count(resting).await, 1);

    let_scopes_end(&mongo, "alpha").await;
    let swept = one.recovery.sweep_now().await.outcome.unwrap();
    assert_eq!(swept, Recovered::new(1, vec![key("alpha")]));
    let document = mongo.document("alpha").await;
    assert!(!document.contains_key("limits") && text(&document, "lastError").is_empty(), "{document}");
    assert_eq!(one.recovery.sweep_now().await.outcome.unwrap(), Recovered::default());
}

#[tokio::test]
async fn errors_of_other_programs_on_healthy_keys_stay() {
    let mongo = Mongo::standalone().await;
    mongo.insert("alpha").await;
    mongo.set("alpha", doc! { "lastError": "theirs" }).await;
    let store = mongo.store().await;
    let born = standing(&store, "alpha").await.born;
    store.merge(Mark::new(key("alpha"), born, scopes(1..=1))).await.unwrap().unwrap();
    let_scopes_end(&mongo, "alpha").await;
    mongo.set("alpha", doc! { "lastError": "theirs" }).await;
    store.sweep().await.unwrap();
    assert_eq!(text(&mongo.document("alpha").await, "lastError"), "theirs");
}

#[tokio::test]
async fn f09_a_reset_by_another_program_ends_scope_rests() {
    let mongo = Mongo::replica_set().await;
    mongo.insert("alpha").await;
    let one = Process::over(&mongo).await;
    one.meets_quota("alpha", "a", HOUR);
    one.has_written().await;
    let unset = doc! { "$unset": { "limits": "", "born": "" } };
    mongo.keys().update_one(doc! { "_id": "alpha" }, unset).await.unwrap();
    sees("the scope serves again", || one.serves("alpha", "a")).await;

    one.meets_quota("alpha", "a", HOUR);
    let lease = one.pool.lease(&pinned("alpha", "b")).unwrap();
    lease.answered_with(Verdict::Exhausted { wait: Some(HOUR) });
    one.has_written().await;
    assert_eq!(mongo.status("alpha").await, "exhausted");
    mongo.set("alpha", doc! { "status": "healthy" }).await;
    sees("the scope serves after a usual reset, too", || one.serves("alpha", "a")).await;
}

/// That many scopes, each of which rests a minute longer than the one before.
fn scopes(numbers: std::ops::RangeInclusive<u32>) -> Words {
    let rest = |number: u32| Resting { until: Until::After(HOUR + number * MINUTE), reason: Rest::Exhausted };
    let scope = |number: u32| Scope::new(format!("scope-{number:02}")).unwrap();
    Words { scopes: numbers.map(|number| (scope(number), rest(number))).collect(), ..Words::default() }
}

#[tokio::test]
async fn a_document_holds_the_64_rests_that_end_last() {
    let mongo = Mongo::standalone().await;
    mongo.insert("alpha").await;
    let store = mongo.store().await;
    let born = standing(&store, "alpha").await.born;
    let mut joined = Words::default();
    for part in [1..=40, 30..=70, 1..=5] {
        joined.join(&scopes(part.clone()));
        store.merge(Mark::new(key("alpha"), born, scopes(part))).await.unwrap().unwrap();
    }
    assert_eq!(joined.scopes.len(), 64);
    let stored = standing(&store, "alpha").await.words.scopes;
    assert!(stored.keys().eq(joined.scopes.keys()), "{:?}", stored.keys());
    assert_eq!(mongo.document("alpha").await.get_array("limits").unwrap().len(), 64);
}

/// The server logs and profiles every command.
#[tokio::test]
async fn s05_mongods_log_and_profile_hold_no_secret() {
    let server = own(Kind::ReplicaSet).await;
    let mongo = Mongo::at(&server.uri()).await;
    for id in ["alpha", "beta"] {
        let mut document = healthy(id);
        document.insert("apiKey", format!("sk-canary-{id}"));
        mongo.keys().insert_one(document).await.unwrap();
    }
    let mut spare = standby("gamma");
    spare.insert("apiKey", "sk-canary-gamma");
    mongo.standby().insert_one(spare).await.unwrap();
    mongo.database.run_command(doc! { "profile": 2, "slowms": -1 }).await.unwrap();
    let logged_before = server.output().lines().count();

    let store = mongo.builder().standby_collection("standby_keys").connect(&mongo.uri).await.unwrap();
    let pool = KeyPool::builder().open(store.clone()).await.unwrap();
    let recovery = RecoveryHandle::spawn_with(&pool, passes_by_hand());
    let one = Process { pool: pool.clone(), recovery };
    one.meets_quota("beta", "a", HOUR);
    pool.lease(&pinned("beta", "b")).unwrap().answered_with(Verdict::RateLimited { wait: Some(HOUR) });
    pool.lease(&Traits::new().key(key("beta"))).unwrap().answered_with(Verdict::RateLimited { wait: None });
    one.has_written().await;
    for operation in [Operation::Reset(None), Operation::Disable, Operation::Enable] {
        store.operate(key("beta"), operation).await.unwrap().unwrap();
    }
    pool.reload().await.unwrap();
    one.pool
        .lease(&Traits::new().key(key("alpha")))
        .unwrap()
        .answered_with(Verdict::Exhausted { wait: None });
    one.recovery.sweep_now().await.outcome.unwrap();
    sees("the standby key serves", || one.pool.stats().keys.iter().any(|known| known.id == key("gamma")))
        .await;
    store.add_usage(vec![Usage::new(key("beta"), 3, 5)]).await.unwrap();
    store.ensure_indexes().await.unwrap();
    pool.remove("beta").await.unwrap();
    one.recovery.shutdown().await.unwrap();

    let log: Vec<_> = server.output().lines().skip(logged_before).map(str::to_owned).collect();
    let of_keys = |line: &&String| line.contains(&format!("{}.keys", mongo.database.name()));
    assert!(log.iter().filter(of_keys).count() > 10, "the server logs commands");
    // The insertion of the standby key carries its secret; no other command carries any.
    let is_insertion = |line: &str| line.contains("\"upsert\":true") && line.contains("canary-gamma");
    for line in log.iter().filter(|line| line.contains("canary")) {
        assert!(
            is_insertion(line) && !line.contains("canary-alpha") && !line.contains("canary-beta"),
            "{line}"
        );
    }
    let profile = mongo.database.collection::<Document>("system.profile");
    let mut commands = profile.find(doc! {}).await.unwrap();
    let mut count = 0;
    while commands.advance().await.unwrap() {
        let command = format!("{:?}", commands.deserialize_current().unwrap());
        assert!(!command.contains("canary-alpha") && !command.contains("canary-beta"), "{command}");
        count += 1;
    }
    assert!(count > 20, "{count}");
}
