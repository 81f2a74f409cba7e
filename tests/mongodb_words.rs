//! The words of keys in MongoDB documents: how marks, resets and edits of other programs are joined. The tests use the
//! store itself, and write to its documents as other programs do.

mod support;

use std::{collections::BTreeMap, time::Duration};

use mongodb::bson::{Bson, DateTime, Document, doc};
use support::{mongo::*, *};
use tokio::{sync::mpsc, time::timeout};
use tower_key_rotation::{
    KeyId, KeySpec, Rest,
    store::{
        Born, Change, KeyRecord, KeyStore, Loaded, Mark, Operation, Recovered, Resting, Scope, Standing,
        Until, Usage, Words, mongodb::MongoStore,
    },
};

const HOUR: Duration = Duration::from_secs(3_600);

/// A database with the healthy key `alpha`, and a store over it.
struct Bench {
    mongo: Mongo,
    store: MongoStore,
}

impl Bench {
    async fn new() -> Self {
        let bench = Self::over(Mongo::standalone().await).await;
        bench.mongo.insert("alpha").await;
        bench
    }

    async fn over(mongo: Mongo) -> Self {
        let store = mongo.store().await;
        Self { mongo, store }
    }

    async fn load(&self) -> Loaded {
        self.store.load(None).await.unwrap()
    }

    async fn record(&self, id: &str) -> KeyRecord {
        let mut loaded = self.store.load(Some(&[key(id)])).await.unwrap();
        loaded.records.pop().unwrap_or_else(|| panic!("{id} is no key: {:?}", loaded.unreadable))
    }

    async fn standing(&self, id: &str) -> Standing {
        self.record(id).await.standing
    }

    async fn words(&self, id: &str) -> Words {
        self.standing(id).await.words
    }

    async fn merge(&self, id: &str, born: Born, words: Words) -> Option<Standing> {
        self.store.merge(Mark::new(key(id), born, words)).await.unwrap()
    }

    /// A mark in the generation that the document has.
    async fn mark(&self, id: &str, words: Words) -> Standing {
        let Standing { born, words: Words { generation, .. }, .. } = self.standing(id).await;
        self.merge(id, born, Words { generation, ..words }).await.unwrap()
    }

    async fn operate(&self, id: &str, operation: Operation) -> Option<Standing> {
        self.store.operate(key(id), operation).await.unwrap()
    }

    async fn insert(&self, id: &str, document: Document) {
        let mut key = healthy(id);
        key.extend(document);
        self.mongo.keys().insert_one(key).await.unwrap();
    }

    async fn unset(&self, id: &str, fields: &[&str]) {
        let unset: Document = fields.iter().map(|field| ((*field).to_owned(), Bson::from(""))).collect();
        self.mongo.keys().update_one(doc! { "_id": id }, doc! { "$unset": unset }).await.unwrap();
    }

    /// Lets all rests of a key end, as if time had passed.
    async fn let_time_pass(&self, id: &str) {
        let passed = |date: &str| doc! { "$subtract": [date, 400 * HOUR.as_millis() as i64] };
        let limits = doc! { "$map": { "input": { "$ifNull": ["$limits", []] }, "in": {
            "s": "$$this.s", "u": passed("$$this.u"), "r": "$$this.r",
        } } };
        let set = doc! {
            "rest": { "g": "$rest.g", "u": passed("$rest.u"), "r": "$rest.r" },
            "cooldownUntil": passed("$cooldownUntil"),
            "limits": limits,
        };
        self.mongo.keys().update_one(doc! { "_id": id }, vec![doc! { "$set": set }]).await.unwrap();
    }
}

fn key(id: &str) -> KeyId {
    KeyId::new(id).unwrap()
}

fn scope(name: &str) -> Scope {
    Scope::new(name).unwrap()
}

fn resting(reason: Rest, left: Duration) -> Resting {
    Resting { until: Until::After(left), reason }
}

fn limited(left: Duration) -> Words {
    Words { key: Some(resting(Rest::RateLimited, left)), ..Words::default() }
}

fn exhausted(left: Duration) -> Words {
    Words { key: Some(resting(Rest::Exhausted, left)), ..Words::default() }
}

fn revoked() -> Words {
    Words { key: Some(Resting { until: Until::Reset, reason: Rest::Revoked }), ..Words::default() }
}

fn scopes<const N: usize>(rests: [(&str, Duration); N]) -> Words {
    let rests = rests.map(|(name, left)| (scope(name), resting(Rest::RateLimited, left)));
    Words { scopes: rests.into(), ..Words::default() }
}

fn at(generation: u64, words: Words) -> Words {
    Words { generation, ..words }
}

/// The same words, if what is left of each rest differs by less than a minute.
#[track_caller]
fn assert_about(words: &Words, expected: &Words) {
    let rounded = |words: &Words| {
        let round = |resting: &Resting| match resting.until {
            Until::After(left) => (Some((left.as_secs() + 30) / 60), resting.reason),
            Until::Reset => (None, resting.reason),
        };
        let scopes: BTreeMap<_, _> =
            words.scopes.iter().map(|(name, resting)| (name.clone(), round(resting))).collect();
        (words.generation, words.key.as_ref().map(round), scopes)
    };
    assert_eq!(rounded(words), rounded(expected), "{words:?}");
}

fn date_in(seconds: i64) -> DateTime {
    DateTime::from_millis(DateTime::now().timestamp_millis() + seconds * 1_000)
}

fn text<'a>(document: &'a Document, field: &str) -> &'a str {
    document.get_str(field).unwrap_or_else(|error| panic!("{error}: {document}"))
}

// ---- marks and resets through the store ----

#[tokio::test]
async fn f10_a_shorter_mark_leaves_the_longer_one() {
    let bench = Bench::new().await;
    for (left, expected) in [(5, 5), (2, 5), (9, 9), (9, 9)] {
        let standing = bench.mark("alpha", limited(left * MINUTE)).await;
        assert_about(&standing.words, &limited(expected * MINUTE));
    }
    assert_about(&bench.words("alpha").await, &limited(9 * MINUTE));
    let document = bench.mongo.document("alpha").await;
    assert_eq!(text(&document, "status"), "rate_limited");
    assert_eq!(document.get_document("rest").unwrap().get("u"), document.get("cooldownUntil"));
}

#[tokio::test]
async fn a_mark_that_brings_nothing_new_writes_nothing() {
    let bench = Bench::new().await;
    bench.mark("alpha", Words { scopes: scopes([("a", HOUR)]).scopes, ..limited(HOUR) }).await;
    let before = bench.mongo.document("alpha").await;
    bench.mark("alpha", Words { scopes: scopes([("a", MINUTE)]).scopes, ..limited(MINUTE) }).await;
    assert_eq!(bench.mongo.document("alpha").await, before);
}

#[tokio::test]
async fn f09_a_mark_of_an_older_generation_is_dropped() {
    let bench = Bench::new().await;
    let born = bench.mark("alpha", limited(HOUR)).await.born;
    let reset = bench.operate("alpha", Operation::Reset(None)).await.unwrap();
    assert_eq!(reset, Standing::new(born, at(1, Words::default()), false));
    let late = Words { scopes: scopes([("a", HOUR)]).scopes, ..revoked() };
    assert_eq!(bench.merge("alpha", born, late).await.unwrap(), reset);
    let document = bench.mongo.document("alpha").await;
    assert_eq!((text(&document, "status"), document.get("cooldownUntil")), ("healthy", Some(&Bson::Null)));
    assert!(!document.contains_key("limits") && text(&document, "lastError").is_empty(), "{document}");
}

#[tokio::test]
async fn f09_eight_marking_and_resetting_processes_agree() {
    let bench = Bench::new().await;
    let born = bench.standing("alpha").await.born;
    let stores = futures_util::future::join_all((0..8).map(|_| bench.mongo.store())).await;
    let each = stores.iter().enumerate().map(|(number, store)| async move {
        let mut generation = 0;
        for round in 0..10 {
            if number == 0 && round % 3 == 0 {
                store.operate(key("alpha"), Operation::Reset(None)).await.unwrap();
            }
            let words = Words { generation, ..limited((number as u32 + 1) * HOUR) };
            let standing = store.merge(Mark::new(key("alpha"), born, words)).await.unwrap().unwrap();
            generation = standing.words.generation;
        }
    });
    futures_util::future::join_all(each).await;
    let words = bench.words("alpha").await;
    assert_eq!(words.generation, 4);
    for store in &stores {
        assert_about(&store.load(None).await.unwrap().records[0].standing.words, &words);
    }
    let longer = at(4, limited(9 * HOUR));
    assert_about(&bench.merge("alpha", born, longer.clone()).await.unwrap().words, &longer);
}

#[tokio::test]
async fn disabled_keys_keep_marks_until_enabled() {
    let bench = Bench::new().await;
    let born = bench.standing("alpha").await.born;
    assert!(bench.operate("alpha", Operation::Disable).await.unwrap().disabled);
    assert!(bench.merge("alpha", born, limited(HOUR)).await.unwrap().disabled);
    assert_eq!(bench.mongo.status("alpha").await, "disabled");
    let enabled = bench.operate("alpha", Operation::Enable).await.unwrap();
    assert_about(&enabled.words, &limited(HOUR));
    assert_eq!((enabled.born, enabled.disabled), (born, false));
    assert_eq!(bench.mongo.status("alpha").await, "rate_limited");

    bench.operate("alpha", Operation::Disable).await.unwrap();
    bench.let_time_pass("alpha").await;
    let enabled = bench.operate("alpha", Operation::Enable).await.unwrap();
    assert_eq!(enabled, Standing::new(born, Words::default(), false));
    let document = bench.mongo.document("alpha").await;
    assert_eq!((text(&document, "status"), document.get("cooldownUntil")), ("healthy", Some(&Bson::Null)));
}

#[tokio::test]
async fn operations_report_missing_and_existing_keys() {
    let bench = Bench::new().await;
    let insert = || Operation::Insert(KeySpec::new(key("beta"), "sk-beta"));
    let inserted = bench.operate("beta", insert()).await.unwrap();
    assert_eq!(
        bench.record("beta").await,
        KeyRecord::new(KeySpec::new(key("beta"), "sk-beta"), inserted.clone())
    );
    assert_eq!(bench.operate("beta", insert()).await, None);
    bench.mark("beta", limited(HOUR)).await;
    let removed = bench.operate("beta", Operation::Remove).await.unwrap();
    assert_eq!(removed.born, inserted.born);
    assert_about(&removed.words, &limited(HOUR));
    for operation in [Operation::Remove, Operation::Reset(None), Operation::Disable, Operation::Enable] {
        assert_eq!(bench.operate("beta", operation).await, None);
    }
    assert_eq!(bench.merge("beta", inserted.born, limited(HOUR)).await, None);
    assert_eq!(bench.mongo.find("beta").await, None);

    let again = bench.operate("beta", insert()).await.unwrap();
    assert_ne!(again.born, inserted.born);
    assert_eq!(bench.merge("beta", inserted.born, revoked()).await, None);
    assert_eq!(bench.standing("beta").await, again);
}

#[tokio::test]
async fn sweeps_reset_ended_rests_in_the_same_generation() {
    let bench = Bench::new().await;
    bench.insert("beta", doc! {}).await;
    for (id, words) in [("alpha", exhausted(HOUR)), ("beta", limited(HOUR))] {
        bench.mark(id, words).await;
    }
    assert_eq!(bench.store.sweep().await.unwrap(), Recovered::default());
    bench.let_time_pass("alpha").await;
    assert_eq!(bench.words("alpha").await, Words::default());
    assert_eq!(bench.store.sweep().await.unwrap(), Recovered::new(1, vec![key("alpha")]));
    assert_eq!(bench.store.sweep().await.unwrap(), Recovered::default());
    let document = bench.mongo.document("alpha").await;
    assert_eq!((text(&document, "status"), text(&document, "lastError")), ("healthy", ""));
    assert_eq!(document.get("cooldownUntil"), Some(&Bson::Null));
    assert!(!document.contains_key("failedAt"), "{document}");
    assert_eq!(bench.words("alpha").await, Words::default());
    assert_about(&bench.words("beta").await, &limited(HOUR));
}

// ---- scopes ----

#[tokio::test]
async fn scopes_rest_apart_while_others_see_healthy() {
    let bench = Bench::new().await;
    let hostile = "$apiKey.a{}\"";
    bench.mark("alpha", scopes([("gpt-4o", HOUR), (hostile, 2 * HOUR)])).await;
    let standing = bench.mark("alpha", scopes([("gpt-4o", 3 * HOUR), (hostile, HOUR), ("o3", HOUR)])).await;
    let expected = scopes([("gpt-4o", 3 * HOUR), (hostile, 2 * HOUR), ("o3", HOUR)]);
    assert_about(&standing.words, &expected);
    assert_about(&bench.words("alpha").await, &expected);
    let document = bench.mongo.document("alpha").await;
    assert_eq!(text(&document, "status"), "healthy");
    assert_eq!(document.get_array("limits").unwrap().len(), 3);

    let both = bench.mark("alpha", limited(4 * HOUR)).await;
    assert_about(&both.words, &Words { scopes: expected.scopes, ..limited(4 * HOUR) });
}

#[tokio::test]
async fn the_next_write_drops_ended_scope_rests() {
    let bench = Bench::new().await;
    bench.mark("alpha", scopes([("a", HOUR), ("b", HOUR)])).await;
    bench.let_time_pass("alpha").await;
    assert_eq!(bench.words("alpha").await, Words::default());
    bench.mark("alpha", scopes([("c", HOUR)])).await;
    assert_eq!(bench.mongo.document("alpha").await.get_array("limits").unwrap().len(), 1);
    bench.let_time_pass("alpha").await;
    bench.mark("alpha", limited(HOUR)).await;
    assert!(!bench.mongo.document("alpha").await.contains_key("limits"));
}

#[tokio::test]
async fn resetting_a_scope_leaves_the_other_rests() {
    let bench = Bench::new().await;
    let words = Words { scopes: scopes([("a", HOUR), ("b", HOUR)]).scopes, ..limited(HOUR) };
    let born = bench.mark("alpha", words.clone()).await.born;
    let reset = bench.operate("alpha", Operation::Reset(Some(scope("a")))).await.unwrap();
    let left = Words { scopes: scopes([("b", HOUR)]).scopes, ..limited(HOUR) };
    assert_about(&reset.words, &at(1, left.clone()));
    bench.merge("alpha", born, words).await.unwrap();
    assert_about(&bench.words("alpha").await, &at(1, left));
}

#[tokio::test]
async fn foreign_resets_end_scope_rests_too() {
    let bench = Bench::new().await;
    let words = Words { scopes: scopes([("a", HOUR)]).scopes, ..limited(HOUR) };
    let born = bench.mark("alpha", words.clone()).await.born;
    bench.mongo.set("alpha", doc! { "status": "healthy" }).await;
    // The late mark meets the reset before any load does.
    assert_eq!(bench.merge("alpha", born, words).await.unwrap().words, at(1, Words::default()));
    assert_eq!(bench.words("alpha").await, at(1, Words::default()));
}

#[tokio::test]
async fn unsetting_limits_and_born_ends_scope_rests() {
    let bench = Bench::new().await;
    let words = scopes([("a", HOUR)]);
    let born = bench.mark("alpha", words.clone()).await.born;
    bench.unset("alpha", &["limits", "born"]).await;
    assert_eq!(bench.merge("alpha", born, words).await, None);
    let standing = bench.standing("alpha").await;
    assert_eq!(standing.words, Words::default());
    assert_ne!(standing.born, born);
}

// ---- edits of other programs ----

#[tokio::test]
async fn f09_a_reset_by_status_alone_outlives_older_marks() {
    let bench = Bench::new().await;
    let born = bench.mark("alpha", limited(HOUR)).await.born;
    bench.mongo.set("alpha", doc! { "status": "healthy" }).await;
    let standing = bench.standing("alpha").await;
    assert_eq!(standing, Standing::new(born, at(1, Words::default()), false));
    bench.merge("alpha", born, limited(2 * HOUR)).await.unwrap();
    assert_eq!(bench.mongo.status("alpha").await, "healthy");
    bench.merge("alpha", born, at(1, limited(MINUTE))).await.unwrap();
    assert_about(&bench.words("alpha").await, &at(1, limited(MINUTE)));
}

#[tokio::test]
async fn ending_an_ended_rest_is_no_reset() {
    let bench = Bench::new().await;
    let born = bench.mark("alpha", limited(HOUR)).await.born;
    bench.let_time_pass("alpha").await;
    bench.mongo.set("alpha", doc! { "status": "healthy", "cooldownUntil": Bson::Null }).await;
    assert_eq!(bench.standing("alpha").await, Standing::new(born, Words::default(), false));
    bench.merge("alpha", born, limited(HOUR)).await.unwrap();
    assert_about(&bench.words("alpha").await, &limited(HOUR));
}

#[tokio::test]
async fn foreign_marks_are_joined_and_shorter_ones_reset() {
    let bench = Bench::new().await;
    let born = bench.mark("alpha", limited(HOUR)).await.born;
    let limited_for = |hours: i64| doc! { "status": "rate_limited", "cooldownUntil": date_in(hours * 3_600) };
    bench.mongo.set("alpha", limited_for(3)).await;
    assert_about(&bench.words("alpha").await, &limited(3 * HOUR));
    bench.mongo.set("alpha", limited_for(2)).await;
    assert_about(&bench.words("alpha").await, &at(1, limited(2 * HOUR)));
    bench.mongo.set("alpha", doc! { "status": "error" }).await;
    assert_about(&bench.words("alpha").await, &at(1, revoked()));
    let theirs = doc! { "status": "exhausted", "cooldownUntil": date_in(-60) };
    bench.mongo.set("alpha", theirs.clone()).await;
    let for_good =
        Words { key: Some(Resting { until: Until::Reset, reason: Rest::Exhausted }), ..Words::default() };
    assert_about(&bench.words("alpha").await, &at(2, for_good));
    let document = bench.mongo.document("alpha").await;
    assert_eq!(document.get("cooldownUntil"), theirs.get("cooldownUntil"));
    assert_eq!(bench.store.sweep().await.unwrap().count, 0);
    assert_eq!(bench.standing("alpha").await.born, born);
}

#[tokio::test]
async fn undated_limited_keys_rest_for_2_minutes() {
    let bench = Bench::new().await;
    bench.mongo.set("alpha", doc! { "status": "rate_limited", "cooldownUntil": Bson::Null }).await;
    assert_about(&bench.words("alpha").await, &limited(2 * MINUTE));
    assert!(bench.mongo.millis_left("alpha").await.unwrap() > 110_000);

    bench.operate("alpha", Operation::Reset(None)).await.unwrap();
    bench.mongo.set("alpha", doc! { "status": "rate_limited" }).await;
    assert_eq!(bench.store.sweep().await.unwrap(), Recovered::default());
    assert!(bench.mongo.millis_left("alpha").await.unwrap() > 110_000);

    bench.mongo.set("alpha", doc! { "cooldownUntil": [date_in(-60), date_in(60)] }).await;
    assert_about(&bench.words("alpha").await, &at(1, limited(2 * MINUTE)));
    assert!(bench.mongo.millis_left("alpha").await.unwrap() > 110_000);
}

#[tokio::test]
async fn f15_odd_date_types_stay_and_count_2_minutes() {
    let bench = Bench::new().await;
    for (number, odd) in
        [Bson::from("2031-01-01T00:00:00Z"), Bson::Int64(1_900_000_000_000)].into_iter().enumerate()
    {
        bench.mongo.set("alpha", doc! { "status": "rate_limited", "cooldownUntil": &odd }).await;
        for _ in 0..3 {
            assert_about(&bench.words("alpha").await, &limited(2 * MINUTE));
        }
        assert_eq!(bench.store.sweep().await.unwrap().count, 0);
        let past = vec![doc! { "$set": { "rest.u": { "$subtract": ["$rest.u", 130_000_i64] } } }];
        bench.mongo.keys().update_one(doc! { "_id": "alpha" }, past).await.unwrap();
        assert_eq!(bench.store.sweep().await.unwrap().count, 1, "{number}");
        let document = bench.mongo.document("alpha").await;
        assert_eq!((text(&document, "status"), document.get("cooldownUntil")), ("healthy", Some(&odd)));
    }
    bench.mark("alpha", limited(HOUR)).await;
    assert!(bench.mongo.document("alpha").await.get_datetime("cooldownUntil").is_ok());
}

#[tokio::test]
async fn unknown_statuses_disable_the_key_and_stay() {
    let bench = Bench::new().await;
    let born = bench.mark("alpha", limited(HOUR)).await.born;
    bench.mongo.set("alpha", doc! { "status": "using_failover", "cooldownUntil": date_in(-9) }).await;
    let standing = bench.standing("alpha").await;
    assert_about(&standing.words, &limited(HOUR));
    assert!(standing.disabled);
    bench.merge("alpha", born, limited(2 * HOUR)).await.unwrap();
    assert_eq!(bench.operate("alpha", Operation::Reset(None)).await.unwrap().words, at(1, Words::default()));
    assert_eq!(bench.mongo.status("alpha").await, "using_failover");
    bench.mongo.set("alpha", doc! { "status": "healthy" }).await;
    assert_eq!(bench.standing("alpha").await, Standing::new(born, at(1, Words::default()), false));
}

// ---- which key a document is ----

#[tokio::test]
async fn f17_another_secret_is_another_key_for_every_process() {
    let bench = Bench::new().await;
    let old = bench.standing("alpha").await;
    bench.mongo.set("alpha", doc! { "apiKey": "sk-new" }).await;
    assert_eq!(bench.merge("alpha", old.born, revoked()).await, None);
    assert_eq!(bench.mongo.status("alpha").await, "healthy");
    let new = bench.record("alpha").await;
    assert_eq!(new.spec.secret.expose(), "sk-new");
    assert_eq!(new.standing.words, Words::default());
    assert_ne!(new.standing.born, old.born);
    assert_eq!(bench.merge("alpha", old.born, revoked()).await, None);
    assert_eq!(bench.standing("alpha").await, new.standing);
}

#[tokio::test]
async fn f17_another_secret_rests_as_its_document_says() {
    let bench = Bench::new().await;
    let words = Words { scopes: scopes([("a", HOUR)]).scopes, ..exhausted(HOUR) };
    bench.mark("alpha", words).await;
    bench.operate("alpha", Operation::Reset(Some(scope("b")))).await.unwrap();
    bench.mongo.set("alpha", doc! { "apiKey": "sk-new" }).await;
    assert_about(&bench.words("alpha").await, &exhausted(HOUR));
    bench.mongo.set("alpha", doc! { "apiKey": "sk-newer", "status": "healthy" }).await;
    assert_eq!(bench.words("alpha").await, Words::default());
}

#[tokio::test]
async fn f17_a_secret_changed_back_unseen_is_the_same() {
    let bench = Bench::new().await;
    let before = bench.mark("alpha", limited(HOUR)).await;
    bench.mongo.set("alpha", doc! { "apiKey": "sk-new" }).await;
    bench.mongo.set("alpha", doc! { "apiKey": "sk-alpha" }).await;
    assert_eq!(bench.standing("alpha").await.born, before.born);
}

/// As other programs insert it, without an `_id` of their own.
#[tokio::test]
async fn a_document_with_an_object_id_is_a_key() {
    let bench = Bench::over(Mongo::replica_set().await).await;
    let mut changes = changes(&bench).await;
    let object_id = mongodb::bson::oid::ObjectId::new();
    let id = object_id.to_hex();
    let mut document = healthy("alpha");
    document.insert("_id", object_id);
    bench.mongo.keys().insert_one(document).await.unwrap();
    assert_eq!(next(&mut changes).await, Change::Keys(vec![key(&id)]));
    assert_eq!(bench.load().await.records[0].spec.id, key(&id));
    let document = async || bench.mongo.keys().find_one(doc! { "_id": object_id }).await.unwrap().unwrap();

    assert_about(&bench.mark(&id, limited(HOUR)).await.words, &limited(HOUR));
    assert_eq!(text(&document().await, "status"), "rate_limited");
    let insert = Operation::Insert(KeySpec::new(key(&id), "sk-other"));
    assert_eq!(bench.operate(&id, insert).await, None, "the id is taken");
    bench.operate(&id, Operation::Reset(None)).await.unwrap();
    bench.operate(&id, Operation::Disable).await.unwrap();
    bench.store.add_usage(vec![Usage::new(key(&id), 3, 5)]).await.unwrap();
    let after = document().await;
    assert_eq!((text(&after, "status"), after.get_i64("tokensUsed").unwrap()), ("disabled", 12));
    assert!(bench.operate(&id, Operation::Remove).await.is_some());
    assert_eq!(bench.load().await, Loaded::default());
}

#[tokio::test]
async fn replaced_documents_are_other_keys() {
    let bench = Bench::new().await;
    let born = bench.mark("alpha", revoked()).await.born;
    bench.mongo.keys().replace_one(doc! { "_id": "alpha" }, healthy("alpha")).await.unwrap();
    assert_eq!(bench.merge("alpha", born, revoked()).await, None);
    let standing = bench.standing("alpha").await;
    assert_eq!((standing.words, standing.born == born), (Words::default(), false));
}

#[tokio::test]
async fn f49_pools_trust_a_restored_backup_without_born() {
    let bench = Bench::new().await;
    let words = Words { scopes: scopes([("a", HOUR)]).scopes, ..exhausted(HOUR) };
    let before = bench.mark("alpha", words.clone()).await;
    let backup = bench.mongo.document("alpha").await;
    for _ in 0..3 {
        bench.operate("alpha", Operation::Reset(None)).await.unwrap();
    }
    bench.mongo.keys().replace_one(doc! { "_id": "alpha" }, backup).await.unwrap();
    bench.mongo.keys().update_many(doc! {}, doc! { "$unset": { "born": "" } }).await.unwrap();
    let restored = bench.standing("alpha").await;
    assert_ne!(restored.born, before.born);
    assert_about(&restored.words, &words);
}

// ---- documents of earlier versions ----

#[tokio::test]
async fn earlier_documents_migrate_to_equivalent_words() {
    let bench = Bench::new().await;
    let (past, later) = (date_in(-60), date_in(3_600));
    let no_words = Words::default();
    let for_good =
        Words { key: Some(Resting { until: Until::Reset, reason: Rest::Exhausted }), ..Words::default() };
    let cases = [
        (
            "healthy",
            doc! { "usageWriters": [{ "w": "x", "n": 1_i64, "at": past }], "resetAt": past },
            no_words.clone(),
        ),
        (
            "rate_limited",
            doc! { "cooldownUntil": later, "lastError": "rate limited (HTTP 429)" },
            limited(HOUR),
        ),
        (
            "exhausted",
            doc! { "cooldownUntil": later, "exhaustedUntil": later, "failedAt": past },
            exhausted(HOUR),
        ),
        ("exhausted", doc! { "cooldownUntil": later }, for_good.clone()),
        ("exhausted", doc! { "cooldownUntil": past, "exhaustedUntil": later }, for_good),
        ("error", doc! { "cooldownUntil": Bson::Null, "failedAt": past }, revoked()),
        ("disabled", doc! { "disabledFrom": "healthy" }, no_words.clone()),
        ("disabled", doc! { "disabledFrom": "rate_limited", "cooldownUntil": later }, limited(HOUR)),
        (
            "disabled",
            doc! { "disabledFrom": "exhausted", "cooldownUntil": later, "exhaustedUntil": later },
            exhausted(HOUR),
        ),
        ("disabled", doc! { "disabledFrom": "error" }, revoked()),
        ("disabled", doc! {}, no_words.clone()),
        ("using_failover", doc! { "cooldownUntil": later, "disabledFrom": "error" }, no_words.clone()),
        ("rate_limited", doc! { "cooldownUntil": past }, no_words.clone()),
        ("exhausted", doc! { "cooldownUntil": past, "exhaustedUntil": past, "failedAt": past }, no_words),
    ];
    for (number, (status, fields, _)) in cases.iter().enumerate() {
        let mut document = doc! { "status": *status };
        document.extend(fields.clone());
        bench.insert(&format!("{number:02}"), document).await;
    }
    let loaded = bench.load().await;
    assert_eq!((loaded.records.len(), loaded.unreadable), (cases.len() + 1, vec![]));
    assert_eq!(bench.store.sweep().await.unwrap().count, 2);
    for (number, (status, fields, words)) in cases.iter().enumerate() {
        let id = format!("{number:02}");
        let standing = bench.standing(&id).await;
        assert_about(&standing.words, words);
        let is_known = ["healthy", "rate_limited", "exhausted", "error"].contains(status);
        assert_eq!(standing.disabled, !is_known, "{id}");
        let document = bench.mongo.document(&id).await;
        for former in ["usageWriters", "resetAt", "exhaustedUntil", "disabledFrom"] {
            assert!(!document.contains_key(former), "{document}");
        }
        let has_ended = words.key.is_none() && is_known;
        assert_eq!(text(&document, "status"), if has_ended { "healthy" } else { *status }, "{id}");
        if !has_ended {
            let date = |document: &Document| document.get_datetime("cooldownUntil").ok().copied();
            assert_eq!(date(&document), date(fields), "{document}");
            assert_eq!(document.get("failedAt"), fields.get("failedAt"), "{document}");
            assert_eq!(document.get("lastError"), fields.get("lastError"), "{document}");
        }
        let theirs =
            |document: &Document| (document.get("note").cloned(), document.get("createdAt").cloned());
        assert_eq!(theirs(&document), theirs(&healthy(&id)));
    }
}

#[tokio::test]
async fn several_processes_migrate_many_documents_at_once() {
    let bench = Bench::over(Mongo::standalone().await).await;
    bench.mongo.keys().insert_many((0..1_300).map(|number| healthy(&format!("{number:04}")))).await.unwrap();
    let others = [bench.mongo.store().await, bench.mongo.store().await];
    let (first, second, third) =
        tokio::join!(bench.store.load(None), others[0].load(None), others[1].load(None));
    let mut first = first.unwrap().records;
    first.sort_by(|a, b| a.spec.id.cmp(&b.spec.id));
    assert_eq!(first.len(), 1_300);
    for mut other in [second.unwrap().records, third.unwrap().records] {
        other.sort_by(|a, b| a.spec.id.cmp(&b.spec.id));
        assert!(other == first);
    }
}

// ---- what cannot be a key ----

#[tokio::test]
async fn f15_documents_that_are_no_keys_stay_unchanged() {
    let bench = Bench::new().await;
    let odd = [
        doc! { "apiKey": 7 },
        doc! { "apiKey": ["sk"] },
        doc! { "status": ["rate_limited"], "cooldownUntil": date_in(-60) },
        doc! { "status": Bson::Null },
        doc! { "apiKey": "encrypted.v1.a.AAAA" },
        doc! { "spec": "pro" },
        doc! { "spec": { "tier": "first" } },
        doc! { "spec": { "tier": 300 } },
        doc! { "spec": { "weight": 0 } },
        doc! { "spec": { "colour": "red" } },
    ];
    for (number, fields) in odd.iter().enumerate() {
        bench.insert(&format!("odd-{number}"), fields.clone()).await;
    }
    let before = all_documents(&bench).await;
    let loaded = bench.load().await;
    assert_eq!((loaded.records.len(), loaded.unreadable.len()), (1, odd.len()));
    for unreadable in &loaded.unreadable {
        assert!(unreadable.id.starts_with("odd-") && !unreadable.reason.contains("sk"), "{unreadable:?}");
    }
    for number in 0..3 {
        let id = format!("odd-{number}");
        assert_eq!(bench.operate(&id, Operation::Reset(None)).await, None);
        assert_eq!(bench.merge(&id, Born(1), revoked()).await, None);
    }
    bench.store.sweep().await.unwrap();
    let after = all_documents(&bench).await;
    assert_eq!(after[1..], before[1..]);
}

async fn all_documents(bench: &Bench) -> Vec<Document> {
    let mut found = bench.mongo.keys().find(doc! {}).sort(doc! { "_id": 1 }).await.unwrap();
    let mut documents = Vec::new();
    while found.advance().await.unwrap() {
        documents.push(Document::try_from(found.current()).unwrap());
    }
    documents
}

#[tokio::test]
async fn f15_documents_behind_a_validator_stop_no_other() {
    let bench = Bench::new().await;
    for id in ["beta", "gamma"] {
        bench.mongo.insert(id).await;
    }
    let validator = doc! { "$or": [{ "_id": { "$ne": "beta" } }, { "born": { "$exists": false } }] };
    bench.mongo.database.run_command(doc! { "collMod": "keys", "validator": validator }).await.unwrap();
    let loaded = bench.load().await;
    let mut ids: Vec<_> = loaded.records.iter().map(|record| record.spec.id.as_str()).collect();
    ids.sort_unstable();
    assert_eq!(ids, ["alpha", "gamma"]);
    assert_eq!(loaded.unreadable.len(), 1);
    assert_eq!(loaded.unreadable[0].id, "beta");
    assert!(loaded.unreadable[0].reason.ends_with("with code 121"), "{:?}", loaded.unreadable);
}

#[tokio::test]
async fn whole_specs_are_kept_and_writable_by_others() {
    let bench = Bench::new().await;
    let number = |number| std::num::NonZeroU32::new(number).unwrap();
    let spec = |id: &str| {
        let mut spec = KeySpec::new(key(id), format!("sk-{id}"));
        spec.group = Some("$org".into());
        spec.tier = Some(2);
        spec.weight = Some(number(3));
        spec.max_in_flight = Some(number(4));
        spec.endpoint = Some("https://eu.example.com".into());
        spec
    };
    bench.operate("beta", Operation::Insert(spec("beta"))).await.unwrap();
    assert_eq!(bench.record("beta").await.spec, spec("beta"));
    let theirs = doc! {
        "group": "$org", "tier": 2.0, "weight": 3_i64, "maxInFlight": 4_i32, "endpoint": "https://eu.example.com",
    };
    bench.mongo.set("alpha", doc! { "spec": theirs }).await;
    assert_eq!(bench.record("alpha").await.spec, spec("alpha"));
}

// ---- time ----

#[tokio::test]
async fn f12_delayed_marks_get_no_later_date() {
    let server = own(Kind::ReplicaSet).await;
    let bench = Bench::over(Mongo::at(&server.uri()).await).await;
    bench.mongo.insert("alpha").await;
    let born = bench.standing("alpha").await.born;
    let held_up = doc! { "failCommands": ["findAndModify"], "blockConnection": true, "blockTimeMS": 2_000 };
    fail_command(&server, doc! { "times": 1 }, held_up).await;
    let called = DateTime::now().timestamp_millis();
    bench.merge("alpha", born, limited(MINUTE)).await.unwrap();
    assert!(DateTime::now().timestamp_millis() - called >= 2_000);
    let until = bench.mongo.document("alpha").await.get_datetime("cooldownUntil").unwrap().timestamp_millis();
    assert!((called + 60_000..called + 61_500).contains(&until), "{}", until - called);
}

// ---- secrets in statements ----

/// All that the server's profiler has kept of a database's commands.
async fn profile(mongo: &Mongo) -> Vec<Document> {
    let mut found = mongo.database.collection::<Document>("system.profile").find(doc! {}).await.unwrap();
    let mut commands = Vec::new();
    while found.advance().await.unwrap() {
        commands.push(Document::try_from(found.current()).unwrap());
    }
    commands
}

#[tokio::test]
async fn s05_no_command_but_an_insertion_carries_a_secret() {
    let mongo = Mongo::standalone().await;
    let store = mongo.builder().standby_collection("standby_keys").connect(&mongo.uri).await.unwrap();
    let bench = Bench { mongo, store };
    let secret = |text: &str| doc! { "apiKey": format!("sk-canary-{text}") };
    for id in ["alpha", "beta"] {
        bench.insert(id, secret(id)).await;
    }
    let mut standby = standby("gamma");
    standby.extend(secret("gamma"));
    bench.mongo.standby().insert_one(standby).await.unwrap();
    bench.mongo.database.run_command(doc! { "profile": 2 }).await.unwrap();

    let born = bench.standing("alpha").await.born;
    bench
        .merge("alpha", born, Words { scopes: scopes([("a", HOUR)]).scopes, ..limited(HOUR) })
        .await
        .unwrap();
    for operation in [Operation::Reset(None), Operation::Disable, Operation::Enable] {
        bench.operate("alpha", operation).await.unwrap();
    }
    let spec = KeySpec::new(key("delta"), "sk-canary-inserted");
    bench.operate("delta", Operation::Insert(spec)).await.unwrap();
    bench.operate("delta", Operation::Remove).await.unwrap();
    bench.mark("alpha", revoked()).await;
    assert_eq!(bench.store.replace_failed().await.unwrap().len(), 1);
    bench.store.sweep().await.unwrap();
    bench.store.add_usage(vec![Usage::new(key("beta"), 3, 5)]).await.unwrap();
    bench.load().await;

    let commands = profile(&bench.mongo).await;
    assert!(commands.len() > 15, "{}", commands.len());
    for command in commands {
        let is_insertion = command.to_string().contains("\"upsert\": true");
        assert!(is_insertion || !command.to_string().contains("sk-canary"), "{command}");
    }
}

// ---- changes ----

/// A receiver of changes that has heard that anything may have changed.
async fn changes(bench: &Bench) -> mpsc::Receiver<Change> {
    let mut changes = bench.store.changes().unwrap();
    assert_eq!(next(&mut changes).await, Change::Anything);
    changes
}

async fn next(changes: &mut mpsc::Receiver<Change>) -> Change {
    timeout(20 * SECOND, changes.recv()).await.expect("nothing was heard").unwrap()
}

async fn standing_heard(changes: &mut mpsc::Receiver<Change>) -> Standing {
    match next(changes).await {
        Change::Standing(id, standing) if id == key("alpha") => standing,
        other => panic!("{other:?}"),
    }
}

async fn watched() -> (Bench, mpsc::Receiver<Change>) {
    let bench = Bench::over(Mongo::replica_set().await).await;
    bench.mongo.insert("alpha").await;
    bench.load().await;
    let changes = changes(&bench).await;
    (bench, changes)
}

#[tokio::test]
async fn own_writes_are_heard_with_their_words() {
    let (bench, mut changes) = watched().await;
    let words = Words { scopes: scopes([("a", HOUR), ("b", 2 * HOUR)]).scopes, ..limited(HOUR) };
    let marked = bench.mark("alpha", words.clone()).await;
    let heard = standing_heard(&mut changes).await;
    assert_eq!((heard.born, heard.disabled), (marked.born, false));
    assert_about(&heard.words, &words);
    bench.operate("alpha", Operation::Reset(None)).await.unwrap();
    assert_eq!(standing_heard(&mut changes).await.words, at(1, Words::default()));
    bench.operate("alpha", Operation::Disable).await.unwrap();
    assert!(standing_heard(&mut changes).await.disabled);
    bench.operate("alpha", Operation::Enable).await.unwrap();
    assert!(!standing_heard(&mut changes).await.disabled);

    bench.mark("alpha", exhausted(HOUR)).await;
    assert_about(&standing_heard(&mut changes).await.words, &at(1, exhausted(HOUR)));
    bench.let_time_pass("alpha").await;
    assert_eq!(next(&mut changes).await, Change::Keys(vec![key("alpha")]));
    assert_eq!(bench.store.sweep().await.unwrap().count, 1);
    assert_eq!(standing_heard(&mut changes).await.words, at(1, Words::default()));
}

#[tokio::test]
async fn foreign_edits_are_heard_as_loads() {
    let (bench, mut changes) = watched().await;
    let keys = |ids: &[&str]| Change::Keys(ids.iter().map(|id| key(id)).collect());
    let past = date_in(-60);
    for edit in [
        doc! { "$set": { "status": "error" } },
        doc! { "$set": { "cooldownUntil": past } },
        doc! { "$set": { "apiKey": "sk-new" } },
        doc! { "$set": { "spec": { "tier": 1 } } },
        doc! { "$unset": { "born": "" } },
    ] {
        bench.mongo.keys().update_one(doc! { "_id": "alpha" }, edit.clone()).await.unwrap();
        assert_eq!(next(&mut changes).await, keys(&["alpha"]), "{edit}");
        bench.load().await;
        while let Ok(change) = timeout(SECOND / 2, changes.recv()).await {
            // The word as it was absorbed.
            assert!(matches!(change, Some(Change::Standing(..))), "{change:?}");
        }
    }
    bench.mongo.insert("beta").await;
    assert_eq!(next(&mut changes).await, keys(&["beta"]));
    bench.mongo.keys().delete_one(doc! { "_id": "beta" }).await.unwrap();
    assert_eq!(next(&mut changes).await, keys(&["beta"]));
}

#[tokio::test]
async fn usage_and_foreign_fields_cause_no_change() {
    let (bench, mut changes) = watched().await;
    bench.store.add_usage(vec![Usage::new(key("alpha"), 1, 1)]).await.unwrap();
    let others =
        doc! { "$inc": { "requestsCount": 1, "hits": 1 }, "$set": { "note": "x", "updatedAt": date_in(0) } };
    bench.mongo.keys().update_one(doc! { "_id": "alpha" }, others).await.unwrap();
    bench.mark("alpha", limited(HOUR)).await;
    assert_about(&standing_heard(&mut changes).await.words, &limited(HOUR));
}

// ---- usage ----

async fn counts(bench: &Bench, id: &str) -> (Option<Bson>, Option<Bson>) {
    let document = bench.mongo.document(id).await;
    (document.get("requestsCount").cloned(), document.get("tokensUsed").cloned())
}

#[tokio::test]
async fn usage_of_many_processes_grows_no_document() {
    let bench = Bench::new().await;
    bench
        .insert("beta", doc! { "requestsCount": 0_i64, "tokensUsed": 0_i64, "lastUsedAt": date_in(-9) })
        .await;
    bench.load().await;
    let size = async || {
        mongodb::bson::RawDocumentBuf::try_from(&bench.mongo.document("beta").await).unwrap().as_bytes().len()
    };
    let before = size().await;
    for _ in 0..20 {
        let store = bench.mongo.store().await;
        store.add_usage(vec![Usage::new(key("beta"), 3, 50), Usage::new(key("gone"), 1, 1)]).await.unwrap();
    }
    assert_eq!(counts(&bench, "beta").await, (Some(60_i64.into()), Some(1_000_i64.into())));
    assert_eq!(size().await, before);
    assert_eq!(bench.mongo.find("gone").await, None);
}

#[tokio::test]
async fn f15_numeric_counts_are_added_up_and_others_stay() {
    let bench = Bench::new().await;
    let cases = [
        (Bson::Int32(7), Bson::Int64(9)),
        (Bson::Int64(7), Bson::Int64(9)),
        (Bson::Double(7.0), Bson::Double(9.0)),
        (Bson::Null, Bson::Int64(2)),
        (Bson::from("many"), Bson::from("many")),
        (Bson::Int64(i64::MAX), Bson::Int64(i64::MAX)),
    ];
    let mut usage = Vec::new();
    for (number, (before, _)) in cases.iter().enumerate() {
        let id = format!("odd-{number}");
        bench.insert(&id, doc! { "requestsCount": before.clone(), "tokensUsed": 1 }).await;
        usage.push(Usage::new(key(&id), 2, 3));
    }
    bench.store.add_usage(usage).await.unwrap();
    for (number, (before, expected)) in cases.into_iter().enumerate() {
        let (requests, tokens) = counts(&bench, &format!("odd-{number}")).await;
        assert_eq!(requests, Some(expected), "{before}");
        assert_eq!(tokens.and_then(|tokens| tokens.as_i64()), Some(4), "{before}");
    }
}

#[tokio::test]
async fn unsent_usage_joins_the_next_batch_once() {
    let server = own(Kind::ReplicaSet).await;
    let bench = Bench::over(Mongo::at(&server.uri()).await).await;
    bench.mongo.insert("alpha").await;
    bench.load().await;
    let batch = |requests| vec![Usage::new(key("alpha"), requests, 0)];
    // Not authorised: refused before anything was done.
    fail_command(&server, doc! { "times": 1 }, doc! { "failCommands": ["update"], "errorCode": 13 }).await;
    bench.store.add_usage(batch(10)).await.unwrap_err();
    bench.store.add_usage(batch(1)).await.unwrap();
    assert_eq!(counts(&bench, "alpha").await.0, Some(Bson::Double(13.0)));
    // The answer is lost: nobody knows whether it was done.
    fail_command(&server, doc! { "times": 1 }, doc! { "failCommands": ["update"], "closeConnection": true })
        .await;
    bench.store.add_usage(batch(100)).await.unwrap_err();
    bench.store.add_usage(batch(1)).await.unwrap();
    assert_eq!(counts(&bench, "alpha").await.0, Some(Bson::Double(14.0)));
}

// ---- standby keys ----

#[tokio::test]
async fn failed_keys_stay_out_until_reset() {
    let mongo = Mongo::standalone().await;
    let store = mongo.builder().standby_collection("standby_keys").connect(&mongo.uri).await.unwrap();
    let bench = Bench { mongo, store };
    bench.mongo.insert("alpha").await;
    for id in ["spare", "other"] {
        bench.mongo.standby().insert_one(standby(id)).await.unwrap();
    }
    // Found exhausted by another program: not replaced.
    bench.insert("theirs", doc! { "status": "exhausted" }).await;
    bench.load().await;
    bench.mark("alpha", exhausted(HOUR)).await;
    let replaced = bench.store.replace_failed().await.unwrap();
    assert_eq!(replaced.len(), 1);
    assert_eq!((replaced[0].failed.as_str(), replaced[0].by.as_str()), ("alpha", "other"));
    assert_eq!(bench.store.replace_failed().await.unwrap(), []);
    let for_good =
        Words { key: Some(Resting { until: Until::Reset, reason: Rest::Exhausted }), ..Words::default() };
    assert_about(&bench.words("alpha").await, &for_good);
    assert_eq!(bench.words("other").await, Words::default());
    assert_eq!(text(&bench.mongo.document("other").await, "replacedKey"), "alpha");
    bench.let_time_pass("alpha").await;
    assert!(bench.mongo.document("alpha").await.get_datetime("retiredAt").is_ok());

    bench.operate("alpha", Operation::Reset(None)).await.unwrap();
    let document = bench.mongo.document("alpha").await;
    for field in ["failedAt", "replacedBy", "retiredAt"] {
        assert!(!document.contains_key(field), "{document}");
    }
    bench.mark("alpha", revoked()).await;
    assert_eq!(bench.store.replace_failed().await.unwrap()[0].by.as_str(), "spare");
}

#[cfg(feature = "encryption")]
mod encryption {
    use tower_key_rotation::store::mongodb::DataKeys;

    use super::*;

    #[tokio::test]
    async fn encrypting_in_place_changes_and_sends_no_secret() {
        let mongo = Mongo::standalone().await;
        let data_keys = DataKeys::parse(format!("a={}==", "A".repeat(86))).unwrap();
        let store = mongo.builder().encrypt_with(data_keys).connect(&mongo.uri).await.unwrap();
        let bench = Bench { mongo, store };
        for id in ["alpha", "beta", "gamma"] {
            bench.insert(id, doc! { "apiKey": format!("sk-canary-{id}") }).await;
        }
        bench.load().await;
        let before = bench.mark("alpha", limited(HOUR)).await;
        let gamma = bench.standing("gamma").await;
        // Changed by another program, and not absorbed yet.
        bench.mongo.set("gamma", doc! { "apiKey": "sk-canary-new" }).await;
        bench.insert("delta", doc! { "apiKey": "sk-canary-delta" }).await;
        bench.mongo.database.run_command(doc! { "profile": 2 }).await.unwrap();
        let encrypted = bench.store.encrypt_documents().await.unwrap();
        assert_eq!((encrypted.encrypted, encrypted.changed), (4, 0));
        for command in profile(&bench.mongo).await {
            assert!(!command.to_string().contains("sk-canary"), "{command}");
        }
        assert!(
            all_documents(&bench).await.iter().all(|key| text(key, "apiKey").starts_with("encrypted.v1.a."))
        );
        let alpha = bench.record("alpha").await;
        assert_eq!((alpha.standing.born, alpha.spec.secret.expose()), (before.born, "sk-canary-alpha"));
        assert_about(&alpha.standing.words, &limited(HOUR));
        assert!(bench.merge("alpha", before.born, limited(2 * HOUR)).await.is_some());
        let changed = bench.record("gamma").await;
        assert_eq!(changed.spec.secret.expose(), "sk-canary-new");
        assert_ne!(changed.standing.born, gamma.born);
    }
}
