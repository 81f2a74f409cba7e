//! Documents as other programs write them: what this crate makes of them, and what it leaves of them.

mod support;

use std::{collections::BTreeSet, time::Duration};

use mongodb::{
    Collection,
    bson::{
        Binary, Bson, DateTime, Decimal128, Document, JavaScriptCodeWithScope, RawArrayBuf, RawDocumentBuf,
        Regex, Timestamp, cstr, doc, oid::ObjectId, rawdoc, spec::BinarySubtype,
    },
};
use proptest::{
    prelude::*,
    test_runner::{TestCaseResult, TestRunner},
};
use support::{mongo::*, *};
use tower_key_rotation::{
    Error, KeyId, KeyPool, KeyRotation, RecoveryHandle, Status,
    store::{KeyStore, mongodb::MongoStore},
};

const HOUR: Duration = Duration::from_secs(60 * 60);

/// A pool over a store of its own. Nothing happens by itself but that marks are written.
struct Process {
    pool: KeyPool,
    client: KeyRotation<reqwest::Client>,
    recovery: RecoveryHandle,
}

impl Process {
    async fn start(mongo: &Mongo) -> Self {
        let pool = KeyPool::builder().open(quiet_store(mongo).await).await.unwrap();
        let recovery = RecoveryHandle::spawn_with(&pool, passes_by_hand());
        Self { client: rotating(&pool), recovery, pool }
    }

    async fn get(&self, server: &Server) -> u16 {
        status(&self.client, &server.url()).await
    }

    /// Writes marks and usage, sweeps and reloads.
    async fn pass(&self) -> u64 {
        let recovered = self.recovery.sweep_now().await.outcome.unwrap();
        assert_eq!(self.pool.stats().marks_waiting, 0);
        recovered.count
    }

    fn status(&self, id: &str) -> Status {
        stats_of(&self.pool, id).status
    }

    fn ids(&self) -> BTreeSet<String> {
        self.pool.stats().keys.iter().map(|key| key.id.to_string()).collect()
    }
}

async fn quiet_store(mongo: &Mongo) -> MongoStore {
    mongo.builder().poll_interval(HOUR).connect(&mongo.uri).await.unwrap()
}

fn raw(mongo: &Mongo) -> Collection<RawDocumentBuf> {
    mongo.keys().clone_with_type()
}

/// Every document, byte by byte, in the order of the ids.
async fn all_documents(mongo: &Mongo) -> Vec<RawDocumentBuf> {
    let mut found = raw(mongo).find(doc! {}).sort(doc! { "_id": 1 }).await.unwrap();
    let mut documents = Vec::new();
    while found.advance().await.unwrap() {
        documents.push(found.current().to_owned());
    }
    documents
}

/// The same without the fields that only this crate reads.
async fn documents_of_others(mongo: &Mongo) -> Vec<RawDocumentBuf> {
    let documents = all_documents(mongo).await;
    documents.iter().map(of_others).collect()
}

fn of_others(document: &RawDocumentBuf) -> RawDocumentBuf {
    let mut others = RawDocumentBuf::new();
    for (name, value) in document.iter().map(Result::unwrap) {
        if !FIELDS[KNOWN_TO_OTHERS..].contains(&name.as_str()) {
            others.append(name, value);
        }
    }
    others
}

/// A number of any type but decimal.
fn number(value: Option<&Bson>) -> Option<f64> {
    match value? {
        Bson::Int32(number) => Some((*number).into()),
        Bson::Int64(number) => Some(*number as f64),
        Bson::Double(number) => Some(*number),
        _ => None,
    }
}

fn text<'a>(document: &'a Document, field: &str) -> &'a str {
    document.get_str(field).unwrap()
}

fn a_date() -> DateTime {
    DateTime::from_millis(1_700_000_000_000)
}

fn is_recent(document: &Document, field: &str) -> bool {
    let date = document.get_datetime(field).unwrap();
    (date.timestamp_millis() - DateTime::now().timestamp_millis()).unsigned_abs() < 60_000
}

// ---- round trips ----

/// As a Go service's driver writes a key.
fn of_a_go_service() -> Document {
    doc! {
        "_id": "go",
        "apiKey": "sk-go",
        "status": "healthy",
        "tokensUsed": 1_200_i64,
        "requestsCount": 5_i64,
        "lastError": "",
        "cooldownUntil": null,
        "lastUsedAt": a_date(),
        "createdAt": a_date(),
        "updatedAt": a_date(),
        "weight": "1.50".parse::<Decimal128>().unwrap(),
        "routes": [ObjectId::from_bytes([7; 12]), "eu"],
        "enableFailover": true,
    }
}

/// As a Node admin page's driver writes a key.
fn of_an_admin_page() -> Document {
    doc! {
        "_id": "node",
        "apiKey": "sk-node",
        "status": "healthy",
        "tokensUsed": 1_200.0,
        "requestsCount": 5_i32,
        "createdAt": a_date(),
        "__v": 0_i32,
        "meta": { "owner": null, "tags": [], "since": a_date() },
        "failoverTo": null,
    }
}

/// Whether programs that know nothing of this crate can read it, as their types have it.
fn assert_readable(document: &Document) {
    let is_text = |field: &str| matches!(document.get(field), Some(Bson::String(_)));
    let is_date = |field: &str| matches!(document.get(field), Some(Bson::DateTime(_)));
    let is_nothing = |field: &str| matches!(document.get(field), None | Some(Bson::Null));
    let is_number =
        |field: &str| matches!(document.get(field), Some(Bson::Int32(_) | Bson::Int64(_) | Bson::Double(_)));
    assert!(is_text("_id") && is_text("apiKey") && is_text("status") && is_date("createdAt"), "{document}");
    assert!(is_text("lastError") || is_nothing("lastError"), "{document}");
    assert!(is_date("cooldownUntil") || is_nothing("cooldownUntil"), "{document}");
    assert!(is_number("tokensUsed") && is_number("requestsCount"), "{document}");
    for field in ["lastUsedAt", "updatedAt"] {
        assert!(is_date(field) || document.get(field).is_none(), "{field}: {document}");
    }
}

/// What this crate has a say in.
const KNOWN: [&str; 8] = [
    "status",
    "cooldownUntil",
    "lastError",
    "tokensUsed",
    "requestsCount",
    "lastUsedAt",
    "updatedAt",
    "exhaustedUntil",
];

/// A key of another program, followed through all that can happen to it.
struct RoundTrip {
    mongo: Mongo,
    process: Process,
    original: Document,
    id: String,
}

impl RoundTrip {
    async fn of(original: Document) -> Self {
        let mongo = Mongo::standalone().await;
        mongo.keys().insert_one(&original).await.unwrap();
        let process = Process::start(&mongo).await;
        let id = text(&original, "_id").to_owned();
        Self { mongo, process, original, id }
    }

    /// The document, of which the others' fields are as they were.
    async fn look(&self, word: &str, status: Status) -> Document {
        let document = self.mongo.document(&self.id).await;
        assert_readable(&document);
        assert_eq!(text(&document, "status"), word);
        assert_eq!(self.process.status(&self.id), status);
        for (field, value) in self.original.iter().filter(|(field, _)| !KNOWN.contains(&field.as_str())) {
            assert_eq!(document.get(field), Some(value), "{field}");
        }
        let order: Vec<_> = document.keys().filter(|field| self.original.contains_key(field)).collect();
        assert_eq!(order, self.original.keys().collect::<Vec<_>>());
        document
    }

    async fn limit(&self, server: &Server) {
        assert_eq!(self.process.get(server).await, 429);
        self.process.pass().await;
        let limited = self.look("rate_limited", Status::RateLimited).await;
        assert!(limited.get_datetime("cooldownUntil").is_ok());
    }

    async fn play(&self) {
        self.process.pass().await;
        assert_eq!(theirs(self.look("healthy", Status::Healthy).await), self.original);

        let server = Server::limiting([self.id.as_str()]).await;
        self.process.pool.record_usage(&KeyId::new(&self.id).unwrap(), 300);
        self.limit(&server).await;
        self.mongo.end_cooldown(&self.id).await;
        assert_eq!(self.process.pass().await, 1);
        // The process goes by its own clock.
        let swept = self.look("healthy", Status::RateLimited).await;
        assert_eq!((swept.get("cooldownUntil"), text(&swept, "lastError")), (Some(&Bson::Null), ""));
        assert_eq!(
            ["tokensUsed", "requestsCount"].map(|field| number(swept.get(field))),
            [Some(1_500.0), Some(6.0)]
        );
        assert!(is_recent(&swept, "lastUsedAt") && is_recent(&swept, "updatedAt"));

        for _ in 0..2 {
            self.process.pool.reset(&self.id).await.unwrap();
            self.look("healthy", Status::Healthy).await;
            self.limit(&server).await;
        }
        self.process.pool.reset(&self.id).await.unwrap();
        self.process.pool.disable(&self.id).await.unwrap();
        self.look("disabled", Status::Disabled).await;
        self.process.pool.enable(&self.id).await.unwrap();
        let last = self.look("healthy", Status::Healthy).await;
        assert_eq!(number(last.get("requestsCount")), Some(8.0));
    }
}

#[tokio::test]
async fn documents_stay_readable_for_a_go_service() {
    RoundTrip::of(of_a_go_service()).await.play().await;
}

#[tokio::test]
async fn documents_stay_readable_for_a_node_admin_page() {
    RoundTrip::of(of_an_admin_page()).await.play().await;
}

// ---- f15: every field, every type ----

fn date_in(minutes: i64) -> DateTime {
    DateTime::from_millis(DateTime::now().timestamp_millis() + minutes * 60_000)
}

/// A value of every type that BSON has, `None` for none.
fn every_type() -> Vec<(&'static str, Option<Bson>)> {
    let decimal = |text: &str| text.parse::<Decimal128>().unwrap().into();
    let scope = JavaScriptCodeWithScope { code: "now".into(), scope: doc! { "now": 1 } };
    let regex = Regex { pattern: cstr!("^healthy").into(), options: cstr!("i").into() };
    let values: Vec<(_, Bson)> = vec![
        ("null", Bson::Null),
        ("word", "healthily".into()),
        ("empty", "".into()),
        ("long-text", "x".repeat(20_000).into()),
        ("control", "two\nlines\u{0}".into()),
        ("int32", 5_i32.into()),
        ("int64", 5_i64.into()),
        ("greatest-int64", i64::MAX.into()),
        ("least-int64", i64::MIN.into()),
        ("double", 2.5.into()),
        ("huge-double", 1e300.into()),
        ("nan", f64::NAN.into()),
        ("infinity", f64::NEG_INFINITY.into()),
        ("true", true.into()),
        ("past-date", date_in(-60).into()),
        ("future-date", date_in(60).into()),
        ("first-date", DateTime::MIN.into()),
        ("last-date", DateTime::MAX.into()),
        ("timestamp", Timestamp { time: u32::MAX, increment: 1 }.into()),
        ("object-id", ObjectId::from_bytes([9; 12]).into()),
        ("binary", Binary { subtype: BinarySubtype::Generic, bytes: vec![0, 255] }.into()),
        ("decimal", decimal("7.5")),
        ("decimal-nan", decimal("NaN")),
        ("huge-decimal", decimal("9E6000")),
        ("regex", regex.into()),
        ("code", Bson::JavaScriptCode("healthy".into())),
        ("code-with-scope", scope.into()),
        ("symbol", Bson::Symbol("healthy".into())),
        ("undefined", Bson::Undefined),
        ("least-key", Bson::MinKey),
        ("greatest-key", Bson::MaxKey),
        ("document", doc! { "$set": { "status": [1, { "a.b": null }] } }.into()),
        ("array", vec!["healthy", "rate_limited"].into()),
        ("array-of-dates", vec![date_in(-60), date_in(60)].into()),
        ("array-of-documents", vec![doc! { "w": 1, "n": "x", "at": null }, doc! {}].into()),
        ("no-elements", Bson::Array(Vec::new())),
    ];
    let values = values.into_iter().map(|(name, value)| (name, Some(value)));
    values.chain([("missing", None)]).collect()
}

/// A key whose state depends on that field.
fn where_it_matters(id: &str, field: &str) -> Document {
    let mut document = healthy(id);
    let (status, until) = match field {
        "cooldownUntil" => ("rate_limited", Bson::Null),
        "exhaustedUntil" => ("exhausted", date_in(60).into()),
        "disabledFrom" => ("disabled", Bson::Null),
        "failedAt" | "replacedBy" | "retiredAt" => ("error", Bson::Null),
        _ => return document,
    };
    document.extend(doc! { "status": status, "cooldownUntil": until });
    document
}

fn with(mut document: Document, field: &str, value: Option<Bson>) -> Document {
    document.remove(field);
    document.extend(value.map(|value| (field.to_owned(), value)));
    document
}

/// A document that has one odd field.
struct Odd {
    id: String,
    field: &'static str,
    kind: &'static str,
    document: Document,
}

impl Odd {
    /// Every field with every type, in a healthy key and in one whose state depends on that field.
    fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for field in FIELDS {
            for (kind, value) in every_type() {
                let id = format!("{field}-{kind}");
                let special = where_it_matters(&format!("{id}-special"), field);
                if text(&special, "status") != "healthy" {
                    let document = with(special, field, value.clone());
                    all.push(Self { id: format!("{id}-special"), field, kind, document });
                }
                all.push(Self { document: with(healthy(&id), field, value), id, field, kind });
            }
        }
        all
    }

    /// Whether it can be used as a key at all.
    fn is_readable(&self) -> bool {
        match self.field {
            "apiKey" => ["word", "long-text"].contains(&self.kind),
            "status" => self.document.get_str("status").is_ok(),
            "spec" => ["null", "missing", "undefined"].contains(&self.kind),
            _ => true,
        }
    }

    fn status(&self) -> Option<&str> {
        self.document.get_str("status").ok().filter(|_| self.is_readable())
    }

    fn expected(&self) -> Option<Status> {
        Some(match (self.status()?, self.kind) {
            ("healthy", _) => Status::Healthy,
            ("rate_limited", "past-date" | "first-date") => Status::Healthy,
            ("rate_limited", _) => Status::RateLimited,
            ("exhausted", _) => Status::Exhausted,
            ("error", _) => Status::Revoked,
            _ => Status::Disabled,
        })
    }

    /// The sweep resets a cooldown that has ended. A limited key without a date gets one. A date of another type stays.
    fn may_change(&self) -> bool {
        let none =
            ["null", "missing", "undefined", "array", "array-of-dates", "array-of-documents", "no-elements"];
        let is_changed = none.contains(&self.kind) || ["past-date", "first-date"].contains(&self.kind);
        self.status() == Some("rate_limited") && is_changed
    }
}

/// All the odd documents in one collection, with ten good keys among them.
struct Zoo {
    mongo: Mongo,
    odd: Vec<Odd>,
}

const GOOD: usize = 10;

impl Zoo {
    async fn open() -> Self {
        let mongo = Mongo::standalone().await;
        let odd = Odd::all();
        let good = (0..GOOD).map(|number| healthy(&format!("good-{number}")));
        mongo.keys().insert_many(odd.iter().map(|odd| odd.document.clone()).chain(good)).await.unwrap();
        Self { mongo, odd }
    }

    fn unreadable(&self) -> impl Iterator<Item = &Odd> {
        self.odd.iter().filter(|odd| !odd.is_readable())
    }

    fn readable(&self) -> impl Iterator<Item = &Odd> {
        self.odd.iter().filter(|odd| odd.is_readable())
    }
}

#[tokio::test]
async fn f15_wrong_field_types_never_block_other_keys() {
    let (logs, _guard) = Logs::capture();
    let zoo = Zoo::open().await;
    assert!(zoo.odd.len() > 500);
    let process = Process::start(&zoo.mongo).await;
    let stats = process.pool.stats();
    assert_eq!(stats.unreadable, zoo.unreadable().count());
    assert_eq!(stats.keys.len(), zoo.readable().count() + GOOD);
    for odd in zoo.readable() {
        assert_eq!(Some(process.status(&odd.id)), odd.expected(), "{}", odd.id);
    }

    let server = Server::limiting([]).await;
    for _ in 0..stats.healthy {
        assert_eq!(process.get(&server).await, 200);
    }
    let served: BTreeSet<_> = server.keys().into_iter().collect();
    assert!((0..GOOD).all(|number| served.contains(&format!("good-{number}"))));

    for _ in 0..3 {
        process.pool.reload().await.unwrap();
    }
    assert_eq!(process.pool.stats().unreadable, zoo.unreadable().count());
    // So many are told together, once.
    let told: Vec<_> = logs.ours().into_iter().filter(|line| line.contains("not used as")).collect();
    let count = format!("count={} ", zoo.unreadable().count());
    assert!(told.len() == 1 && told[0].contains(&count) && told[0].len() < 1_000, "{told:?}");
    assert!(!logs.text().contains("sk-") && !logs.text().contains("xxxxx"));
}

#[tokio::test]
async fn f15_loads_and_sweeps_never_overwrite_unreadable_documents() {
    let zoo = Zoo::open().await;
    let (before, others_before) = (all_documents(&zoo.mongo).await, documents_of_others(&zoo.mongo).await);
    let process = Process::start(&zoo.mongo).await;
    let may_change: BTreeSet<_> =
        zoo.odd.iter().filter(|odd| odd.may_change()).map(|odd| odd.id.as_str()).collect();
    let ended = ["cooldownUntil-past-date-special", "cooldownUntil-first-date-special"];
    assert_eq!(process.pass().await, ended.len() as u64);
    assert_eq!(process.pass().await, 0);

    let after = all_documents(&zoo.mongo).await;
    assert_eq!(before.len(), after.len());
    // The store reads these secrets. The pool refuses to send them.
    let is_text = |odd: &Odd| odd.field == "apiKey" && odd.document.get_str("apiKey").is_ok();
    let unreadable: BTreeSet<_> =
        zoo.unreadable().filter(|odd| !is_text(odd)).map(|odd| odd.id.as_str()).collect();
    let mut changed = BTreeSet::new();
    for ((before, others_before), after) in before.iter().zip(&others_before).zip(&after) {
        let id = before.get_str("_id").unwrap();
        assert!(!unreadable.contains(id) || before == after, "{id}");
        if of_others(after) != *others_before {
            changed.insert(id);
        }
    }
    let (too_many, too_few) = (&changed - &may_change, &may_change - &changed);
    assert!(too_many.is_empty() && too_few.is_empty(), "{too_many:?} {too_few:?}");
    for id in &may_change {
        let document = zoo.mongo.document(id).await;
        let expected = if ended.contains(id) { "healthy" } else { "rate_limited" };
        assert_eq!(text(&document, "status"), expected, "{id}");
        assert_eq!(document.get_datetime("cooldownUntil").is_ok(), expected == "rate_limited", "{id}");
    }
}

/// Whether it is the sum: what is no number, or can't be counted further, stays.
fn is_sum(before: Option<&Bson>, more: i64, after: Option<&Bson>) -> bool {
    match before {
        None | Some(Bson::Null) => after == Some(&Bson::Int64(more)),
        Some(Bson::Decimal128(_)) => matches!(after, Some(Bson::Decimal128(_))),
        Some(Bson::Int64(i64::MAX)) => before == after,
        Some(Bson::Int32(_) | Bson::Int64(_) | Bson::Double(_)) => {
            let sum = number(before).unwrap() + more as f64;
            number(after).is_some_and(|after| after == sum || after.is_nan() && sum.is_nan())
        }
        Some(_) => same(before, after),
    }
}

/// Also where the value is not equal to itself.
fn same(one: Option<&Bson>, other: Option<&Bson>) -> bool {
    let bytes = |value: Option<&Bson>| {
        let document: Document = value.map(|value| ("value".to_owned(), value.clone())).into_iter().collect();
        RawDocumentBuf::try_from(&document).unwrap()
    };
    bytes(one) == bytes(other)
}

#[tokio::test]
async fn f15_marks_and_usage_overwrite_fields_of_any_type() {
    let (logs, _guard) = Logs::capture();
    let zoo = Zoo::open().await;
    let process = Process::start(&zoo.mongo).await;
    let server = Server::answering(|| answer(429, "")).await;
    for _ in 0..process.pool.stats().healthy {
        assert_eq!(process.get(&server).await, 429);
    }
    for id in process.ids() {
        process.pool.record_usage(&KeyId::new(&id).unwrap(), 3);
    }
    process.pass().await;
    assert_eq!(logs.count("refused to add usage"), 0);

    for odd in zoo.readable() {
        let document = zoo.mongo.document(&odd.id).await;
        let requests = i64::from(odd.expected() == Some(Status::Healthy));
        let before = &odd.document;
        for (field, more) in [("requestsCount", requests), ("tokensUsed", 3)] {
            assert!(is_sum(before.get(field), more, document.get(field)), "{}: {document}", odd.id);
        }
        assert!(document.get_datetime("lastUsedAt").is_ok(), "{}", odd.id);
        if requests == 1 {
            assert_eq!(text(&document, "status"), "rate_limited", "{}", odd.id);
            assert!(*document.get_datetime("cooldownUntil").unwrap() > date_in(1), "{}", odd.id);
            assert_eq!(text(&document, "lastError"), "rate limited (HTTP 429)", "{}", odd.id);
            assert_eq!(process.status(&odd.id), Status::RateLimited, "{}", odd.id);
        }
    }
}

#[tokio::test]
async fn f15_a_reset_works_whatever_type_it_finds() {
    let zoo = Zoo::open().await;
    let process = Process::start(&zoo.mongo).await;
    for odd in zoo.readable() {
        process.pool.reset(&odd.id).await.unwrap();
    }
    process.pass().await;
    for odd in zoo.readable() {
        let document = zoo.mongo.document(&odd.id).await;
        let known = ["healthy", "rate_limited", "exhausted", "error"];
        let status = odd.status().map(|status| if known.contains(&status) { "healthy" } else { status });
        assert_eq!(document.get_str("status").ok(), status, "{}", odd.id);
        assert_eq!(document.get("cooldownUntil"), Some(&Bson::Null), "{}", odd.id);
        assert_eq!(text(&document, "lastError"), "", "{}", odd.id);
        assert!(is_recent(&document, "updatedAt"), "{}", odd.id);
        let expected = if status == Some("healthy") { Status::Healthy } else { Status::Disabled };
        assert_eq!(process.status(&odd.id), expected, "{}", odd.id);
    }
    assert_eq!(process.pool.stats().unreadable, zoo.unreadable().count());
}

#[tokio::test]
async fn f15_enable_works_despite_an_invalid_disabled_from() {
    let zoo = Zoo::open().await;
    let process = Process::start(&zoo.mongo).await;
    let disabled = || zoo.readable().filter(|odd| odd.status() == Some("disabled"));
    for odd in disabled() {
        process.pool.enable(&odd.id).await.unwrap();
    }
    process.pool.reload().await.unwrap();
    for odd in disabled() {
        let document = zoo.mongo.document(&odd.id).await;
        assert!(document.get_str("status").is_ok(), "{document}");
        assert!(!document.contains_key("disabledFrom"), "{document}");
        if odd.document.get_str("disabledFrom").is_err() {
            assert_eq!(process.status(&odd.id), Status::Healthy, "{document}");
        }
    }
    assert_eq!(process.pool.stats().unreadable, zoo.unreadable().count());
}

#[tokio::test]
async fn f15_an_array_status_is_unreadable_and_stays_untouched() {
    let mongo = Mongo::standalone().await;
    for (number, until) in [Bson::Null, date_in(-60).into(), date_in(60).into()].into_iter().enumerate() {
        for status in ["rate_limited", "exhausted"] {
            let odd =
                doc! { "status": [status], "cooldownUntil": until.clone(), "exhaustedUntil": until.clone() };
            let document = merged(healthy(&format!("{status}-{number}")), odd);
            mongo.keys().insert_one(document).await.unwrap();
        }
    }
    mongo.insert("good").await;
    let before = all_documents(&mongo).await;
    let process = Process::start(&mongo).await;
    assert_eq!(process.pass().await, 0);
    assert_eq!(process.ids(), BTreeSet::from(["good".to_owned()]));
    assert_eq!(process.pool.stats().unreadable, 6);
    let odd = |documents: Vec<RawDocumentBuf>| -> Vec<_> {
        documents
            .into_iter()
            .filter(|document| document.get_str("_id").is_ok_and(|id| id != "good"))
            .collect()
    };
    assert_eq!(odd(all_documents(&mongo).await), odd(before));
}

fn merged(mut document: Document, fields: Document) -> Document {
    document.extend(fields);
    document
}

// ---- ids ----

/// Every type that the server takes as an `_id`, and texts that can't be a key's id.
fn odd_ids() -> Vec<Bson> {
    let arrays = ["array", "array-of-dates", "array-of-documents", "no-elements"];
    let refused = ["regex", "undefined", "document"];
    // To the server these are the same as others in the list.
    let twice = ["int32", "decimal-nan"];
    // The id of a key.
    let good = ["object-id"];
    let left_out = [&arrays[..], &refused, &twice, &good].concat();
    let types = every_type().into_iter().filter(|(kind, _)| !left_out.contains(kind));
    let others = types.filter_map(|(_, value)| value.filter(|value| !matches!(value, Bson::String(_))));
    let long = |end: char| Bson::String("i".repeat(10_000) + &end.to_string());
    let texts = ["", "two\nlines", "two\rlines", "\u{1b}[31mred", "a\tb", "nul\u{0}"].map(Bson::from);
    others.chain(texts).chain([long('a'), long('b'), doc! { "a": 1 }.into(), doc! {}.into()]).collect()
}

#[tokio::test]
async fn f15_invalid_ids_count_as_unreadable() {
    let mongo = Mongo::standalone().await;
    let ids = odd_ids();
    for id in &ids {
        let document = with(healthy("odd"), "_id", Some(id.clone()));
        mongo.keys().insert_one(document).await.unwrap_or_else(|error| panic!("{id:?}: {error}"));
    }
    mongo.insert_all(["good", "also good"]).await;
    let before = documents_of_others(&mongo).await;
    let process = Process::start(&mongo).await;
    assert_eq!(process.ids(), ["also good", "good"].map(str::to_owned).into());
    process.pass().await;
    assert!(documents_of_others(&mongo).await == before);
    assert_eq!(process.pool.stats().unreadable, ids.len());
}

#[tokio::test]
async fn s04_hostile_ids_are_logged_on_one_bounded_line() {
    let (logs, _guard) = Logs::capture();
    let mongo = Mongo::standalone().await;
    let ids = [
        "\n INFO tower_key_rotation: all is well",
        "\u{1b}[2J\u{7}\u{9b}31m",
        &"long ".repeat(2_000),
        "",
        "\u{85}next\u{0}line\r\n",
    ];
    for id in ids {
        mongo.insert(id).await;
    }
    mongo.insert("good").await;
    let process = Process::start(&mongo).await;
    process.pass().await;
    assert_eq!((process.ids().len(), process.pool.stats().unreadable), (1, ids.len()));
    assert_eq!(logs.count("not used as a key"), ids.len());
    let ours = logs.ours();
    assert!(!ours.iter().any(|line| line.trim_start().starts_with("INFO tower_key_rotation: all is well")));
    for line in ours.iter().filter(|line| line.contains("not used as a key")) {
        assert!(line.len() < 600, "{line}");
        assert!(!line.chars().any(char::is_control), "{line:?}");
    }
}

#[tokio::test]
async fn reload_adds_repaired_keys_and_logs_broken_ones() {
    let (logs, _guard) = Logs::capture();
    let mongo = Mongo::standalone().await;
    mongo.insert_all(["alpha", "beta"]).await;
    mongo.set("alpha", doc! { "apiKey": 5 }).await;
    let process = Process::start(&mongo).await;
    assert_eq!((process.pool.stats().healthy, process.pool.stats().unreadable), (1, 1));
    assert_eq!((logs.count("not used as a key"), logs.count("key=alpha")), (1, 1));

    mongo.set("alpha", doc! { "apiKey": "sk-alpha" }).await;
    process.pool.reload().await.unwrap();
    assert_eq!((process.pool.stats().healthy, process.pool.stats().unreadable), (2, 0));

    mongo.set("alpha", doc! { "apiKey": "sk-a\nb" }).await;
    process.pool.reload().await.unwrap();
    process.pool.reload().await.unwrap();
    assert_eq!(process.ids(), BTreeSet::from(["beta".to_owned()]));
    assert_eq!(process.pool.stats().unreadable, 1);
    assert_eq!(logs.count("not used as a key"), 2);
    assert!(!logs.text().contains("sk-a"));
}

/// Replaces a text in a document by bytes that are none.
fn broken(document: RawDocumentBuf, text: &str) -> RawDocumentBuf {
    let mut bytes = document.into_bytes();
    let at = bytes.windows(text.len()).position(|window| window == text.as_bytes()).unwrap();
    bytes[at..at + text.len()].fill(0xff);
    RawDocumentBuf::from_bytes(bytes).unwrap()
}

/// Past the driver, which looks at ids.
async fn insert_unchecked(mongo: &Mongo, documents: Vec<RawDocumentBuf>) {
    let count = documents.len() as i32;
    let documents: RawArrayBuf = documents.into_iter().collect();
    let insert = rawdoc! { "insert": "keys", "documents": documents };
    let answer = mongo.database.run_raw_command(insert).await.unwrap();
    assert_eq!(answer.get("n"), Some(&Bson::Int32(count)), "{answer}");
}

#[tokio::test]
async fn f15_invalid_utf8_affects_only_its_own_document() {
    let mongo = Mongo::standalone().await;
    let key =
        || rawdoc! { "_id": "broken-id", "apiKey": "sk-broken", "status": "healthy", "note": "something" };
    let mut documents: Vec<_> = ["broken-id", "sk-broken"].map(|text| broken(key(), text)).into();
    let status = rawdoc! { "_id": "status", "apiKey": "sk-status", "status": "broken!" };
    let note = rawdoc! { "_id": "note", "apiKey": "sk-note", "status": "healthy", "note": "something" };
    documents.extend([broken(status, "broken!"), broken(note, "something")]);
    insert_unchecked(&mongo, documents).await;
    mongo.insert("good").await;

    let process = Process::start(&mongo).await;
    assert_eq!(process.ids(), ["good", "note"].map(str::to_owned).into());
    assert_eq!(process.pool.stats().unreadable, 3);
    let server = Server::limiting(["note"]).await;
    let answers = [process.get(&server).await, process.get(&server).await];
    assert_eq!(answers.iter().sum::<u16>(), 429 + 200);
    process.pass().await;
    process.pool.reset("note").await.unwrap();
    process.pass().await;
    assert_eq!((process.status("note"), process.pool.stats().unreadable), (Status::Healthy, 3));
}

// ---- words of other programs ----

#[tokio::test]
async fn f15_an_unknown_status_counts_as_disabled_and_stays() {
    let mongo = Mongo::standalone().await;
    mongo.insert_all(["alpha", "beta"]).await;
    let late = Process::start(&mongo).await;
    let word = doc! { "status": "using_failover", "cooldownUntil": date_in(-60), "lastError": "theirs" };
    mongo.set("alpha", word).await;
    let before = theirs(mongo.document("alpha").await);
    let process = Process::start(&mongo).await;
    assert_eq!(process.status("alpha"), Status::Disabled);

    let server = Server::limiting(["alpha"]).await;
    for _ in 0..4 {
        assert_eq!(process.get(&server).await, 200);
    }
    let answers = [late.get(&server).await, late.get(&server).await];
    assert!(answers.contains(&429));
    eventually("the mark is written", || late.pool.stats().marks_waiting == 0).await;
    assert_eq!(process.recovery.sweep_now().await.outcome.unwrap().count, 0);
    let after = theirs(mongo.document("alpha").await);
    let counted = ["updatedAt", "requestsCount", "lastUsedAt"];
    let [before, after] = [before, after].map(|mut document| {
        counted.iter().for_each(|field| _ = document.remove(*field));
        document
    });
    assert_eq!(after, before);

    late.pool.reload().await.unwrap();
    assert_eq!(late.status("alpha"), Status::Disabled);
    process.pool.reset("alpha").await.unwrap();
    process.pass().await;
    assert_eq!(mongo.status("alpha").await, "using_failover");
    assert_eq!(process.status("alpha"), Status::Disabled);

    mongo.set("alpha", doc! { "status": "healthy" }).await;
    process.pool.reload().await.unwrap();
    assert_eq!(process.status("alpha"), Status::Healthy);
}

// ---- random documents ----

fn word() -> impl Strategy<Value = String> {
    let known = &["healthy", "rate_limited", "exhausted", "error", "disabled", "using_failover", "sk-1", ""];
    prop_oneof![3 => prop::sample::select(&known[..]).prop_map(str::to_owned), 1 => any::<String>()]
}

fn date() -> impl Strategy<Value = DateTime> {
    prop_oneof![any::<i64>().prop_map(DateTime::from_millis), (-120..120_i64).prop_map(date_in),]
}

fn bson() -> impl Strategy<Value = Bson> {
    let simple = every_type().into_iter().filter_map(|(_, value)| value).collect::<Vec<_>>();
    let leaf = prop_oneof![
        3 => word().prop_map(Bson::from),
        2 => date().prop_map(Bson::from),
        1 => any::<i64>().prop_map(Bson::from),
        1 => any::<f64>().prop_map(Bson::from),
        1 => any::<[u8; 16]>().prop_map(|bytes| Bson::Decimal128(Decimal128::from_bytes(bytes))),
        4 => prop::sample::select(simple),
    ];
    leaf.prop_recursive(2, 12, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Bson::Array),
            prop::collection::vec((field(), inner), 0..4)
                .prop_map(|fields| Bson::Document(fields.into_iter().collect())),
        ]
    })
}

fn field() -> impl Strategy<Value = String> {
    prop_oneof![
        8 => prop::sample::select(&FIELDS[..]).prop_map(str::to_owned),
        1 => "[a-z.]{1,6}",
        1 => prop::sample::select(&["serverTime", "isSettled", "__proto__", "g", "u", "r", "s", "w", "n", "at"][..]).prop_map(str::to_owned),
    ]
}

fn id() -> impl Strategy<Value = Option<Bson>> {
    prop_oneof![
        4 => any::<u32>().prop_map(|number| Some(Bson::String(format!("key-{number}")))),
        2 => any::<String>().prop_map(|text| Some(text.into())),
        1 => Just(None),
        3 => bson().prop_map(Some),
    ]
}

/// A random document, or a good one with a few random fields.
fn document() -> impl Strategy<Value = Document> {
    let fields = prop::collection::vec((field(), bson()), 0..8);
    (id(), any::<bool>(), fields).prop_map(|(id, is_good, fields)| {
        let mut document = if is_good { healthy("good") } else { Document::new() };
        document.extend(fields);
        with(document, "_id", id)
    })
}

struct Fuzz {
    mongo: Mongo,
    store: MongoStore,
}

impl Fuzz {
    async fn check(&self, documents: &[Document]) -> TestCaseResult {
        self.mongo.keys().delete_many(doc! {}).await.unwrap();
        // What the server itself refuses is no document: an array can't be an id, and each is there once.
        let _ = self.mongo.keys().insert_many(documents).ordered(false).await;
        let count = self.mongo.count(doc! {}).await as usize;
        let before = documents_of_others(&self.mongo).await;

        let loaded = self.store.load_all().await;
        prop_assert_eq!(loaded.records.len() + loaded.unreadable.len(), count);
        let pool = KeyPool::builder().open(self.store.clone()).await.unwrap();
        let stats = pool.stats();
        prop_assert_eq!(stats.keys.len() + stats.unreadable, count);

        self.store.sweep().await.unwrap();
        for (before, after) in before.iter().zip(documents_of_others(&self.mongo).await) {
            let may_change = matches!(before.get_str("status"), Ok("rate_limited" | "exhausted"));
            prop_assert!(may_change || *before == after, "{:?}", before);
        }
        pool.reload().await.unwrap();
        let stats = pool.stats();
        prop_assert_eq!(stats.keys.len() + stats.unreadable, count);
        Ok(())
    }
}

#[test]
fn f15_random_documents_load_or_count_as_unreadable() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let fuzz = runtime.block_on(async {
        let mongo = Mongo::standalone().await;
        Fuzz { store: quiet_store(&mongo).await, mongo }
    });
    let config = ProptestConfig {
        cases: 100,
        failure_persistence: None,
        max_shrink_iters: 200,
        ..ProptestConfig::default()
    };
    let documents = prop::collection::vec(document(), 1..40);
    let result =
        TestRunner::new(config).run(&documents, |documents| runtime.block_on(fuzz.check(&documents)));
    result.unwrap_or_else(|failure| panic!("{failure}"));
}

// ---- many, and none ----

#[tokio::test]
async fn loads_and_reloads_handle_2500_keys() {
    const KEYS: usize = 2_500;
    let mongo = Mongo::standalone().await;
    mongo.keys().insert_many((0..KEYS).map(|number| healthy(&format!("key-{number}")))).await.unwrap();
    let process = Process::start(&mongo).await;
    assert_eq!(process.pool.stats().healthy, KEYS);
    let server = Server::limiting([]).await;
    for _ in 0..3 {
        assert_eq!(process.get(&server).await, 200);
    }

    mongo.keys().delete_many(doc! { "_id": { "$regex": "^key-1" } }).await.unwrap();
    mongo.insert_all(["new-1", "new-2"]).await;
    process.pool.reload().await.unwrap();
    let left = mongo.count(doc! {}).await as usize;
    assert!(left < KEYS && process.pool.stats().keys.len() == left);
    let ids = process.ids();
    assert!(ids.contains("new-1") && ids.contains("key-2") && !ids.contains("key-1"));
    assert!(!ids.iter().any(|id| id.starts_with("key-1")));
}

#[tokio::test]
async fn f21_an_empty_collection_errors_until_reload_finds_keys() {
    let mongo = Mongo::standalone().await;
    let process = Process::start(&mongo).await;
    let server = Server::limiting([]).await;
    assert_empty(&process, &server).await;

    mongo.insert_all(["alpha", "beta"]).await;
    process.pool.reload().await.unwrap();
    assert_eq!(process.get(&server).await, 200);

    mongo.keys().delete_many(doc! {}).await.unwrap();
    process.pass().await;
    assert_empty(&process, &server).await;
    mongo.insert("gamma").await;
    process.pass().await;
    assert_eq!(process.get(&server).await, 200);
    mongo.keys().drop().await.unwrap();
    process.pass().await;
    assert_empty(&process, &server).await;
    assert_eq!(server.keys(), ["alpha", "gamma"]);
}

async fn assert_empty(process: &Process, server: &Server) {
    assert!(process.pool.stats().keys.is_empty());
    let refused = get(&process.client, &server.url()).await.unwrap_err();
    let Error::NoKeyAvailable(refused) = refused else { panic!("{refused:?}") };
    assert!(refused.is_empty_pool() && refused.retry_in().is_none());
    assert_eq!(refused.to_string(), "no key available: the pool is empty");
}
