//! MongoDB for the tests: a database of its own for each, and documents as other programs write them.

use std::{
    collections::HashMap,
    env,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};

use mongodb::{
    Client, Collection, Database,
    bson::{Bson, DateTime, Document, doc},
};
use tokio::sync::OnceCell;
use tower::Layer;
use tower_key_rotation::{
    KeyPool, KeyRotation, KeyRotationLayer, RecoveryHandle, Status,
    classify::LlmGateway,
    store::mongodb::{MongoStore, MongoStoreBuilder},
};

pub use super::mongod::{Kind, Mongod};
use super::{Server, http, passes_by_hand, status};

static STANDALONE: OnceCell<Mongod> = OnceCell::const_new();
static REPLICA_SET: OnceCell<Mongod> = OnceCell::const_new();
static DATABASES: AtomicU32 = AtomicU32::new(0);

/// A server that the test does nothing bad to: one that is shared by all tests, or the one of `MONGODB_URI` if it
/// is of that kind.
pub async fn shared_uri(kind: Kind) -> String {
    if let Ok(uri) = env::var("MONGODB_URI")
        && kind_of(&uri).await == kind
    {
        return uri;
    }
    let server = match kind {
        Kind::Standalone => &STANDALONE,
        Kind::ReplicaSet => &REPLICA_SET,
    };
    server.get_or_init(|| own(kind)).await.uri()
}

async fn kind_of(uri: &str) -> Kind {
    let admin = Client::with_uri_str(uri).await.unwrap().database("admin");
    let hello = admin.run_command(doc! { "hello": 1 }).await;
    let hello = hello.unwrap_or_else(|error| panic!("the MongoDB of MONGODB_URI does not answer: {error}"));
    if hello.contains_key("setName") { Kind::ReplicaSet } else { Kind::Standalone }
}

/// A server of the test's own, to be ill-treated.
pub async fn own(kind: Kind) -> Mongod {
    Mongod::start(kind).await.unwrap_or_else(|error| panic!("{error}"))
}

/// A database of the test's own. It is there for other programs' documents: nothing here uses the crate's types
/// but to open a store.
#[derive(Clone, Debug)]
pub struct Mongo {
    pub uri: String,
    pub database: Database,
}

impl Mongo {
    pub async fn standalone() -> Self {
        Self::at(&shared_uri(Kind::Standalone).await).await
    }

    pub async fn replica_set() -> Self {
        Self::at(&shared_uri(Kind::ReplicaSet).await).await
    }

    pub async fn at(uri: &str) -> Self {
        let client = Client::with_uri_str(uri).await.unwrap();
        let name = format!("test_{}_{}", std::process::id(), DATABASES.fetch_add(1, Relaxed));
        let database = client.database(&name);
        database.drop().await.unwrap();
        Self { uri: uri.to_owned(), database }
    }

    pub fn keys(&self) -> Collection<Document> {
        self.database.collection("ohmygpt_keys")
    }

    pub fn standby(&self) -> Collection<Document> {
        self.database.collection("ohmygpt_backup_keys")
    }

    /// A store over this database, to be connected.
    pub fn builder(&self) -> MongoStoreBuilder {
        MongoStore::builder().database(self.database.name())
    }

    pub async fn store(&self) -> MongoStore {
        self.builder().connect(&self.uri).await.unwrap()
    }

    /// A store that goes by another way to the same database.
    pub async fn store_through(&self, uri: &str) -> MongoStore {
        self.builder().connect(uri).await.unwrap()
    }

    /// A healthy key as a Go service or a Node page writes it.
    pub async fn insert(&self, id: &str) {
        self.keys().insert_one(healthy(id)).await.unwrap();
    }

    pub async fn insert_all<const N: usize>(&self, ids: [&str; N]) {
        for id in ids {
            self.insert(id).await;
        }
    }

    pub async fn document(&self, id: &str) -> Document {
        self.find(id).await.unwrap_or_else(|| panic!("there is no key {id}"))
    }

    pub async fn find(&self, id: &str) -> Option<Document> {
        self.keys().find_one(doc! { "_id": id }).await.unwrap()
    }

    pub async fn status(&self, id: &str) -> String {
        self.document(id).await.get_str("status").unwrap().to_owned()
    }

    /// Sets fields of a key, as somebody else would.
    pub async fn set(&self, id: &str, fields: Document) {
        let updated = self.keys().update_one(doc! { "_id": id }, doc! { "$set": fields }).await.unwrap();
        assert_eq!(updated.matched_count, 1, "{id}");
    }

    /// Lets a cooldown end now, so that no test has to wait for it.
    pub async fn end_cooldown(&self, id: &str) {
        let past = vec![doc! { "$set": { "cooldownUntil": { "$subtract": ["$$NOW", 1_000] } } }];
        self.keys().update_one(doc! { "_id": id }, past).await.unwrap();
    }

    /// By the server's clock, what is left of a key's cooldown in milliseconds.
    pub async fn millis_left(&self, id: &str) -> Option<i64> {
        let left = doc! { "left": { "$subtract": ["$cooldownUntil", "$$NOW"] } };
        let pipeline = [doc! { "$match": { "_id": id } }, doc! { "$project": left }];
        let mut found = self.keys().aggregate(pipeline).await.unwrap();
        assert!(found.advance().await.unwrap());
        match Bson::try_from(found.current().get("left").unwrap()?).unwrap() {
            Bson::Int64(left) => Some(left),
            _ => None,
        }
    }

    /// How many keys have these fields.
    pub async fn count(&self, filter: Document) -> u64 {
        self.keys().count_documents(filter).await.unwrap()
    }
}

/// The fields of a key besides its `_id`: those that other programs know, and those that are the crate's own.
pub const FIELDS: [&str; 16] = [
    "apiKey",
    "status",
    "cooldownUntil",
    "lastError",
    "tokensUsed",
    "requestsCount",
    "createdAt",
    "lastUsedAt",
    "updatedAt",
    "resetAt",
    "exhaustedUntil",
    "disabledFrom",
    "usageWriters",
    "failedAt",
    "replacedBy",
    "retiredAt",
];
pub const KNOWN_TO_OTHERS: usize = 10;

/// A healthy key, with a field of somebody else's, and numbers of the types that other drivers write.
pub fn healthy(id: &str) -> Document {
    doc! {
        "_id": id,
        "apiKey": format!("sk-{id}"),
        "status": "healthy",
        "tokensUsed": 7_i32,
        "requestsCount": 2.0,
        "createdAt": DateTime::from_millis(1_700_000_000_000),
        "enableFailover": true,
        "note": { "owner": "billing", "tags": ["a", "b"] },
    }
}

/// A standby key as the admin page writes it.
pub fn standby(id: &str) -> Document {
    doc! {
        "_id": id,
        "apiKey": format!("sk-{id}"),
        "isUsed": false,
        "activated": false,
        "createdAt": DateTime::from_millis(1_700_000_000_000),
    }
}

/// Has the server make commands fail, or wait, as its test commands can.
pub async fn fail_command(server: &Mongod, mode: impl Into<Bson>, data: Document) {
    let command = doc! { "configureFailPoint": "failCommand", "mode": mode.into(), "data": data };
    server.admin().await.unwrap().run_command(command).await.unwrap();
}

pub async fn stop_failing(server: &Mongod) {
    let command = doc! { "configureFailPoint": "failCommand", "mode": "off" };
    server.admin().await.unwrap().run_command(command).await.unwrap();
}

/// Waits, for real time, until the database says so.
pub async fn eventually_within<F, T>(limit: Duration, what: &str, mut holds: F)
where
    F: FnMut() -> T,
    T: Future<Output = bool>,
{
    let deadline = tokio::time::Instant::now() + limit;
    while !holds().await {
        assert!(tokio::time::Instant::now() < deadline, "this did not come about in {limit:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A process that makes no pass but those that it is asked for, and a service that answers as it is told.
pub struct Process {
    pub pool: KeyPool,
    pub recovery: RecoveryHandle,
    pub client: KeyRotation<reqwest::Client, LlmGateway>,
    pub server: Server,
    pub answers: Arc<Mutex<HashMap<String, u16>>>,
}

impl Process {
    pub async fn over(store: MongoStore) -> Self {
        let pool = KeyPool::builder().open(store).await.unwrap();
        let answers: Arc<Mutex<HashMap<String, u16>>> = Arc::default();
        let server = Server::by_key(&answers).await;
        Self {
            recovery: RecoveryHandle::spawn_with(&pool, passes_by_hand()),
            client: KeyRotationLayer::new(&pool).classify(LlmGateway::new()).layer(http()),
            server,
            answers,
            pool,
        }
    }

    /// The service answers that to requests with this secret, after `sk-`, and one is sent.
    pub async fn sees(&self, secret: &str, answer: u16) {
        self.answers.lock().unwrap().insert(secret.into(), answer);
        for _ in 0..10 {
            if status(&self.client, &self.server.url()).await == answer {
                return;
            }
        }
        panic!("no request went out with {secret}");
    }

    pub async fn pass(&self) {
        self.recovery.sweep_now().await.outcome.unwrap();
    }

    pub fn status(&self, key: &str) -> Option<Status> {
        self.pool.stats().keys.into_iter().find(|stats| stats.id.as_str() == key).map(|stats| stats.status)
    }
}
