//! Secrets that are encrypted in MongoDB: what a stolen dump holds, what can't be decrypted, and documents that are
//! encrypted in place.

mod support;

use std::collections::HashMap;

use base64::{Engine, prelude::BASE64_STANDARD};
use mongodb::{
    Client,
    bson::{Bson, Document, doc},
};
use support::{mongo::*, *};
use tower::Layer;
use tower_key_rotation::{
    KeyPool, KeyRotationLayer, RecoveryHandle, Secret, Status,
    store::mongodb::{DataKeys, MongoStore, MongoStoreBuilder},
};

const STANDBY: &str = "standby_keys";

/// A data key of that name, and the same bytes whenever it is asked for.
fn data_key(name: &str) -> String {
    let bytes: Vec<u8> = (0..64).map(|byte| byte ^ name.bytes().fold(0, u8::wrapping_add)).collect();
    format!("{name}={}", BASE64_STANDARD.encode(bytes))
}

/// Data keys of these names, of which the first is the current one.
fn data_keys<const N: usize>(names: [&str; N]) -> DataKeys {
    DataKeys::parse(names.map(data_key).join(",")).unwrap()
}

fn encrypting<const N: usize>(mongo: &Mongo, names: [&str; N]) -> MongoStoreBuilder {
    mongo.builder().standby_collection(STANDBY).encrypt_with(data_keys(names))
}

async fn store<const N: usize>(mongo: &Mongo, names: [&str; N]) -> MongoStore {
    encrypting(mongo, names).connect(&mongo.uri).await.unwrap()
}

async fn stored(mongo: &Mongo, id: &str) -> String {
    mongo.document(id).await.get_str("apiKey").unwrap().to_owned()
}

fn ids(pool: &KeyPool) -> Vec<String> {
    let mut ids: Vec<_> = pool.stats().keys.into_iter().map(|key| key.id.to_string()).collect();
    ids.sort();
    ids
}

/// Every document of every database, and what the server wrote into its log.
async fn dump(server: &Mongod) -> String {
    let client = Client::with_uri_str(server.uri()).await.unwrap();
    let mut dump = server.output();
    for database in client.list_database_names().await.unwrap() {
        let database = client.database(&database);
        for name in database.list_collection_names().await.unwrap() {
            let mut documents = database.collection::<Document>(&name).find(doc! {}).await.unwrap();
            while documents.advance().await.unwrap() {
                dump += &format!("{}.{name}: {:?}\n", database.name(), documents.current());
            }
        }
    }
    dump
}

/// The server has change streams, and so keeps every write in its oplog; and it is told to keep every command in
/// its profile and log.
#[tokio::test]
async fn s05_a_dump_of_the_server_holds_no_secret() {
    const SECRETS: [(&str, &str); 4] = [
        ("alpha", "sk-canary-alpha-7A9F"),
        ("beta", "sk-canary-beta-7A9F"),
        ("gamma", "sk-canary-gamma-7A9F"),
        ("delta", "sk-canary-delta-7A9F"),
    ];
    let server = own(Kind::ReplicaSet).await;
    let mongo = Mongo::at(&server.uri()).await;
    mongo.database.run_command(doc! { "profile": 2, "slowms": 0 }).await.unwrap();
    let answers =
        HashMap::from([("canary-beta-7A9F", 429), ("canary-gamma-7A9F", 402), ("canary-delta-7A9F", 401)]);
    let upstream = Server::start(move |request| {
        let status = key_of(&request).and_then(|key| answers.get(key).copied()).unwrap_or(200);
        std::future::ready(answer(status, ""))
    });
    let upstream = upstream.await;

    let pool = KeyPool::builder().keys(SECRETS).open(store(&mongo, ["a"]).await).await.unwrap();
    let recovery = RecoveryHandle::spawn_with(&pool, passes_by_hand());
    let client = KeyRotationLayer::new(&pool).classify(ByStatus).layer(http());
    for _ in SECRETS {
        get(&client, &upstream.url()).await.unwrap();
    }
    eventually("marks are written", || pool.stats().marks_waiting == 0).await;
    for (id, status) in [("beta", "rate_limited"), ("gamma", "exhausted"), ("delta", "error")] {
        assert_eq!(mongo.status(id).await, status);
    }
    pool.insert("epsilon", "sk-canary-epsilon-7A9F").await.unwrap();
    assert!(pool.insert("epsilon", "sk-canary-other-7A9F").await.is_err());
    pool.reset("beta").await.unwrap();
    pool.disable("alpha").await.unwrap();
    pool.enable("alpha").await.unwrap();
    recovery.sweep_now().await.outcome.unwrap();
    pool.remove("gamma").await.unwrap();
    recovery.shutdown().await.unwrap();
    let again = KeyPool::builder().open(store(&mongo, ["a"]).await).await.unwrap();
    assert_eq!(ids(&again), ["alpha", "beta", "delta", "epsilon"]);
    assert_eq!(stats_of(&again, "delta").status, Status::Revoked);
    assert_eq!(again.stats().keys.iter().map(|key| key.requests).sum::<u64>(), 0);

    let dump = dump(&server).await;
    // Otherwise it shows nothing.
    for part in ["local.oplog.rs: ", ".system.profile: ", "encrypted.v1.a.", "Slow query"] {
        assert!(dump.contains(part), "the dump has no {part:?}");
    }
    for secret in ["canary", &BASE64_STANDARD.encode("sk-canary-alpha-7A9F")[..20]] {
        let found = dump.lines().find(|line| line.contains(secret));
        assert!(found.is_none(), "{secret} in {found:?}");
    }
}

#[tokio::test]
async fn s05_an_undecryptable_key_is_skipped_and_others_serve() {
    let (logs, _guard) = Logs::capture();
    let mongo = Mongo::standalone().await;
    let opened = store(&mongo, ["a"]).await;
    for id in ["fine", "copied", "changed"] {
        opened.insert(id, &format!("sk-{id}")).await;
    }
    let fine = stored(&mongo, "fine").await;
    mongo.set("copied", doc! { "apiKey": &fine }).await;
    let changed = stored(&mongo, "changed").await;
    mongo.set("changed", doc! { "apiKey": changed.replace(".a.", ".a.AAAA") }).await;
    store(&mongo, ["b"]).await.insert("unknown", "sk-unknown").await;
    mongo.insert_all(["later", "plain"]).await;
    mongo.set("later", doc! { "apiKey": "encrypted.v7.whatever" }).await;

    let pool = KeyPool::builder().open(opened).await.unwrap();
    assert_eq!(ids(&pool), ["fine", "plain"]);
    assert_eq!(pool.stats().unreadable, 4);
    let because = "apiKey can't be decrypted with the data key a";
    for (id, reason) in [
        ("copied", because),
        ("changed", because),
        ("unknown", "apiKey is encrypted with the data key b, which is not given here"),
        ("later", "apiKey is encrypted in a form that this version does not know"),
    ] {
        assert!(logs.ours().iter().any(|line| line.contains(id) && line.contains(reason)), "{id}: {reason}");
    }
    let upstream = Server::answering(|| answer(200, "")).await;
    let client = rotating(&pool);
    for _ in 0..4 {
        assert_eq!(status(&client, &upstream.url()).await, 200);
    }
    assert_eq!(upstream.keys(), ["fine", "plain", "fine", "plain"]);
}

#[tokio::test]
async fn s05_without_data_keys_no_encrypted_key_is_used() {
    let (logs, _guard) = Logs::capture();
    let mongo = Mongo::standalone().await;
    store(&mongo, ["a"]).await.insert("alpha", "sk-alpha").await;
    mongo.insert("plain").await;
    let pool = KeyPool::builder().open(mongo.store().await).await.unwrap();
    assert_eq!(ids(&pool), ["plain"]);
    assert_eq!(logs.count("apiKey is encrypted, and this program was given no data keys"), 1);
    let error = mongo.store().await.encrypt_documents().await.unwrap_err();
    assert!(all_that_it_says(&error).contains("there are no data keys"), "{error:?}");
}

#[tokio::test]
async fn a_newly_decryptable_key_serves_after_reload() {
    let mongo = Mongo::standalone().await;
    let opened = store(&mongo, ["a"]).await;
    opened.insert("alpha", "sk-alpha").await;
    let alpha = stored(&mongo, "alpha").await;
    mongo.set("alpha", doc! { "apiKey": alpha.replace("v1", "v9") }).await;
    let pool = KeyPool::builder().open(opened).await.unwrap();
    let recovery = RecoveryHandle::spawn_with(&pool, passes_by_hand());
    assert!(ids(&pool).is_empty());
    mongo.set("alpha", doc! { "apiKey": alpha }).await;
    recovery.sweep_now().await.outcome.unwrap();
    assert_eq!(ids(&pool), ["alpha"]);
}

#[tokio::test]
async fn marks_find_documents_whatever_the_stored_form() {
    let mongo = Mongo::standalone().await;
    store(&mongo, ["old"]).await.insert("old", "sk-old").await;
    mongo.insert("plain").await;
    let store = store(&mongo, ["new", "old"]).await;
    store.insert("new", "sk-new").await;
    let loaded = store.load_all().await;
    assert_eq!(loaded.records.len(), 3);
    for record in loaded.records {
        let id = record.spec.id.as_str();
        assert_eq!(record.spec.secret, Secret::new(format!("sk-{id}")));
        assert_eq!(store.limit(id, MINUTE).await.unwrap().born, record.standing.born);
        assert_eq!(mongo.status(id).await, "rate_limited");
    }
}

/// Keys and standby keys as other programs wrote them.
async fn filled(mongo: &Mongo, keys: usize) {
    let healthy = (0..keys).map(|number| healthy(&format!("key-{number}")));
    mongo.keys().insert_many(healthy).await.unwrap();
    mongo.standby().insert_many((0..3).map(|number| standby(&format!("standby-{number}")))).await.unwrap();
}

async fn count_plain(mongo: &Mongo) -> u64 {
    let plain = doc! { "apiKey": { "$regex": "^sk-" } };
    let standby = mongo.standby().count_documents(plain.clone()).await.unwrap();
    mongo.count(plain).await + standby
}

#[tokio::test]
async fn encrypting_documents_changes_only_the_secret_field() {
    let mongo = Mongo::standalone().await;
    filled(&mongo, 3).await;
    mongo.set("key-1", doc! { "status": "exhausted", "lastError": "quota" }).await;
    let mut before = mongo.document("key-1").await;
    let store = store(&mongo, ["a"]).await;
    let done = store.encrypt_documents().await.unwrap();
    assert_eq!((done.encrypted, done.already, done.changed, done.left.len()), (6, 0, 0, 0));
    assert_eq!(count_plain(&mongo).await, 0);
    let mut after = mongo.document("key-1").await;
    assert!(after.remove("apiKey").unwrap().as_str().unwrap().starts_with("encrypted.v1.a."));
    before.remove("apiKey");
    assert_eq!(after, before);

    let again = store.encrypt_documents().await.unwrap();
    assert_eq!((again.encrypted, again.already), (0, 6));
    let pool = KeyPool::builder().open(store).await.unwrap();
    assert_eq!(ids(&pool), ["key-0", "key-1", "key-2"]);
}

#[tokio::test]
async fn the_next_run_finishes_a_failed_encryption() {
    const KEYS: usize = 1_200;
    let server = own(Kind::Standalone).await;
    let mongo = Mongo::at(&server.uri()).await;
    filled(&mongo, KEYS).await;
    let store = store(&mongo, ["a"]).await;
    let second_batch = doc! { "skip": 1 };
    let fails = doc! { "failCommands": ["update"], "errorCode": 11_601 };
    fail_command(&server, second_batch, fails).await;
    let error = store.encrypt_documents().await.unwrap_err();
    assert!(all_that_it_says(&error).contains("11601"), "{error:?}");
    stop_failing(&server).await;
    assert_eq!(count_plain(&mongo).await, 700 + 3);
    let done = store.encrypt_documents().await.unwrap();
    assert_eq!((done.encrypted, done.already), (703, 500));
    assert_eq!(store.load_all().await.records.len(), KEYS);
}

#[tokio::test]
async fn encrypting_documents_keeps_a_concurrently_changed_secret() {
    let server = own(Kind::Standalone).await;
    let mongo = Mongo::at(&server.uri()).await;
    mongo.insert_all(["alpha", "beta"]).await;
    let store = store(&mongo, ["a"]).await;
    let mut waits = doc! { "failCommands": ["update"], "appName": "tower-key-rotation" };
    waits.extend(doc! { "blockConnection": true, "blockTimeMS": 1_000 });
    fail_command(&server, "alwaysOn", waits).await;
    let encrypting = tokio::spawn(async move { store.encrypt_documents().await });
    let admin = server.admin().await.unwrap();
    let is_writing = doc! { "currentOp": 1, "appName": "tower-key-rotation", "command.update": "keys" };
    eventually_within(5 * SECOND, "it has read and is about to write", || async {
        let operations = admin.run_command(is_writing.clone()).await.unwrap();
        !operations.get_array("inprog").unwrap().is_empty()
    })
    .await;
    mongo.set("beta", doc! { "apiKey": "sk-new" }).await;
    let done = encrypting.await.unwrap().unwrap();
    assert_eq!((done.encrypted, done.changed), (1, 1));
    assert_eq!(stored(&mongo, "beta").await, "sk-new");
}

#[tokio::test]
async fn concurrent_processes_encrypt_each_document_once() {
    let mongo = Mongo::standalone().await;
    filled(&mongo, 600).await;
    let (one, other) = (store(&mongo, ["a"]).await, store(&mongo, ["a"]).await);
    let (one, other) = tokio::join!(one.encrypt_documents(), other.encrypt_documents());
    assert_eq!(one.unwrap().encrypted + other.unwrap().encrypted, 603);
    assert_eq!(count_plain(&mongo).await, 0);
}

#[tokio::test]
async fn a_new_data_key_replaces_the_old_one() {
    let mongo = Mongo::standalone().await;
    filled(&mongo, 3).await;
    store(&mongo, ["old"]).await.encrypt_documents().await.unwrap();
    let done = store(&mongo, ["new", "old"]).await.encrypt_documents().await.unwrap();
    assert_eq!((done.encrypted, done.already), (6, 0));
    let only_new = store(&mongo, ["new"]).await.load_all().await;
    assert_eq!((only_new.records.len(), only_new.unreadable.len()), (3, 0));
}

/// By `cryptography` 48 for Python: `AESSIV(bytes(range(64))).encrypt(b"sk-1", [b"apiKey", b"alpha"])`.
#[tokio::test]
async fn stored_values_match_another_aes_siv_implementation() {
    let mongo = Mongo::standalone().await;
    let bytes: Vec<u8> = (0..64).collect();
    let data_keys = DataKeys::parse(format!("a={}", BASE64_STANDARD.encode(bytes))).unwrap();
    let store = mongo.builder().encrypt_with(data_keys).connect(&mongo.uri).await.unwrap();
    store.insert("alpha", "sk-1").await;
    assert_eq!(stored(&mongo, "alpha").await, "encrypted.v1.a.eLH6eRw6wIzwAOCDf3w0DQ55l0Q");
}

#[test]
fn data_key_errors_locate_but_never_quote_entries() {
    let (a, b) = (data_key("a"), data_key("b"));
    let twice = format!("{a}\n{a}");
    let wrapped = format!("{}\n{}", &a[..40], &a[40..]);
    let third = format!("# ours\n{a},{b}\n = canary");
    for (text, error) in [
        ("", "there is no data key"),
        ("# nothing\n , \n", "there is no data key"),
        ("canary", "data key 1: not `name=base64` on one line"),
        (&third, "data key 3: not `name=base64` on one line"),
        ("a=canary!", "data key a: what stands behind its name is not base64 on one line"),
        ("a=Y2FuYXJ5", "data key a: it has 6 bytes in base64, not 64"),
        (&wrapped, "data key a: "),
        (&twice, "there are two data keys of the name a"),
    ] {
        let refused = DataKeys::parse(text).unwrap_err();
        assert!(refused.to_string().starts_with(error), "{refused}");
        assert!(!all_that_it_says(&refused).contains("canary"), "{refused}");
    }
}

#[test]
fn data_key_files_load_and_errors_name_them() {
    let path = std::env::temp_dir().join(format!("data-keys-{}", std::process::id()));
    std::fs::write(&path, format!("# the keys of 2026\n{}\n{}\n", data_key("a"), data_key("b"))).unwrap();
    assert_eq!(format!("{:?}", DataKeys::from_file(&path).unwrap()), r#"DataKeys(["a", "b"])"#);
    std::fs::remove_file(&path).unwrap();
    let error = DataKeys::from_file(&path).unwrap_err().to_string();
    assert!(error.contains("data-keys-") && error.ends_with("entity not found"), "{error}");
}

#[tokio::test]
async fn documents_without_usable_secret_are_left_and_reported() {
    let mongo = Mongo::standalone().await;
    mongo.insert_all(["number", "missing", "foreign", "fine"]).await;
    mongo.set("number", doc! { "apiKey": 7 }).await;
    mongo.set("foreign", doc! { "apiKey": "encrypted.v1.lost.AAAA" }).await;
    let unset = doc! { "$unset": { "apiKey": "" } };
    mongo.keys().update_one(doc! { "_id": "missing" }, unset).await.unwrap();
    mongo.keys().insert_one(doc! { "_id": 5, "apiKey": "sk-five" }).await.unwrap();
    store(&mongo, ["a"]).await.insert("wrong", "sk-wrong").await;
    let other_key_of_that_name = data_key("b").replace("b=", "a=");
    let other = mongo.builder().encrypt_with(DataKeys::parse(other_key_of_that_name).unwrap());
    let left = other.connect(&mongo.uri).await.unwrap().encrypt_documents().await.unwrap().left;
    assert!(left.iter().any(|left| left.id == "wrong" && left.reason.contains("can't be decrypted")));
    mongo.keys().delete_one(doc! { "_id": "wrong" }).await.unwrap();
    mongo.set("fine", doc! { "apiKey": "sk-fine" }).await;
    let before = mongo.document("foreign").await;

    let mut done = store(&mongo, ["a"]).await.encrypt_documents().await.unwrap();
    assert_eq!(done.encrypted, 1);
    done.left.sort_by(|one, other| one.id.cmp(&other.id));
    let left: Vec<_> = done.left.iter().map(|left| (&*left.id, &*left.reason)).collect();
    assert_eq!(
        left,
        [
            ("5", "its _id can't be a key's"),
            ("foreign", "apiKey is encrypted with the data key lost, which is not given here"),
            ("missing", "apiKey is missing"),
            ("number", "apiKey is of the type Int32, not a string"),
        ]
    );
    assert_eq!(mongo.document("foreign").await, before);
}

#[tokio::test]
async fn an_encrypted_standby_key_replaces_a_failed_one() {
    let mongo = Mongo::standalone().await;
    mongo.insert("alpha").await;
    // The first has a secret that is in use, which only shows when it is decrypted.
    for (id, created, secret) in [("same", 0, "sk-alpha"), ("beta", 1, "sk-beta")] {
        let mut key = standby(id);
        key.insert("apiKey", secret);
        key.insert("createdAt", Bson::DateTime(mongodb::bson::DateTime::from_millis(created)));
        mongo.standby().insert_one(key).await.unwrap();
    }
    let opened = store(&mongo, ["a"]).await;
    opened.encrypt_documents().await.unwrap();
    let pool = KeyPool::builder().open(opened).await.unwrap();
    let recovery = RecoveryHandle::spawn_with(&pool, passes_by_hand());
    let upstream = Server::start(|request| {
        std::future::ready(answer(if key_of(&request) == Some("alpha") { 401 } else { 200 }, ""))
    });
    let upstream = upstream.await;
    let client = KeyRotationLayer::new(&pool).classify(ByStatus).layer(http());
    assert_eq!(status(&client, &upstream.url()).await, 401);
    eventually("the mark is written", || pool.stats().marks_waiting == 0).await;
    recovery.sweep_now().await.outcome.unwrap();
    assert_eq!(ids(&pool), ["alpha", "beta"]);
    assert_eq!(status(&client, &upstream.url()).await, 200);
    assert_eq!(upstream.keys(), ["alpha", "beta"]);
    assert!(stored(&mongo, "beta").await.starts_with("encrypted.v1.a."));
}
