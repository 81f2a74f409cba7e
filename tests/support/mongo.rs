//! MongoDB for the tests: a database for each test, and documents as other programs write them.

use std::{
    env,
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    time::Duration,
};

use mongodb::{
    Client, Collection, Database,
    bson::{Bson, DateTime, Document, doc},
};
use tokio::sync::OnceCell;

pub use super::mongod::{Kind, Mongod, ReplicaSet};

static STANDALONE: OnceCell<Mongod> = OnceCell::const_new();
static REPLICA_SET: OnceCell<Mongod> = OnceCell::const_new();
static DATABASES: AtomicU32 = AtomicU32::new(0);

/// A server that tests share and must not harm: the one of `MONGODB_URI` if that is of the given kind.
pub async fn shared_uri(kind: Kind) -> String {
    if let Ok(uri) = env::var("MONGODB_URI")
        && kind_of(&uri).await == kind
    {
        return uri;
    }
    let server = match kind {
        Kind::Standalone => &STANDALONE,
        Kind::ReplicaSet | Kind::Member => &REPLICA_SET,
    };
    server.get_or_init(|| own(kind)).await.uri()
}

async fn kind_of(uri: &str) -> Kind {
    let admin = Client::with_uri_str(uri).await.unwrap().database("admin");
    let hello = admin.run_command(doc! { "hello": 1 }).await;
    let hello = hello.unwrap_or_else(|error| panic!("the MongoDB of MONGODB_URI does not answer: {error}"));
    if hello.contains_key("setName") { Kind::ReplicaSet } else { Kind::Standalone }
}

/// A server for one test, which may harm it.
pub async fn own(kind: Kind) -> Mongod {
    Mongod::start(kind).await.unwrap_or_else(|error| panic!("{error}"))
}

/// A database for one test. It writes documents as other programs do, without the library.
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
        self.database.collection("keys")
    }

    pub fn standby(&self) -> Collection<Document> {
        self.database.collection("standby_keys")
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

    /// Sets fields of a key as another program would.
    pub async fn set(&self, id: &str, fields: Document) {
        let updated = self.keys().update_one(doc! { "_id": id }, doc! { "$set": fields }).await.unwrap();
        assert_eq!(updated.matched_count, 1, "{id}");
    }

    /// Ends a cooldown now, so that no test has to wait for it.
    pub async fn end_cooldown(&self, id: &str) {
        let past = doc! { "$subtract": ["$$NOW", 1_000] };
        let rest = doc! { "$mergeObjects": ["$rest", { "u": &past }] };
        let has_word = doc! { "$eq": [{ "$type": "$rest" }, "object"] };
        let set = doc! { "cooldownUntil": past, "rest": { "$cond": [has_word, rest, "$$REMOVE"] } };
        self.keys().update_one(doc! { "_id": id }, vec![doc! { "$set": set }]).await.unwrap();
    }

    /// The rest of a key's cooldown in milliseconds, by the server's clock.
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

    /// The number of keys that match.
    pub async fn count(&self, filter: Document) -> u64 {
        self.keys().count_documents(filter).await.unwrap()
    }
}

/// The fields of a key besides its `_id`: first those that other programs know, then the library's own, of this version
/// and of earlier ones.
pub const FIELDS: [&str; 22] = [
    "apiKey",
    "status",
    "cooldownUntil",
    "lastError",
    "tokensUsed",
    "requestsCount",
    "createdAt",
    "lastUsedAt",
    "updatedAt",
    "rest",
    "born",
    "limits",
    "secretHash",
    "words",
    "spec",
    "failedAt",
    "replacedBy",
    "retiredAt",
    "exhaustedUntil",
    "disabledFrom",
    "usageWriters",
    "resetAt",
];
pub const KNOWN_TO_OTHERS: usize = 9;

/// A document without the fields that only this crate reads.
pub fn theirs(mut document: Document) -> Document {
    for field in &FIELDS[KNOWN_TO_OTHERS..] {
        document.remove(*field);
    }
    document
}

/// A healthy key with fields of other programs, and with numbers of the types that other drivers write.
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

/// Makes the server fail or delay commands, by its fail points.
pub async fn fail_command(server: &Mongod, mode: impl Into<Bson>, data: Document) {
    let command = doc! { "configureFailPoint": "failCommand", "mode": mode.into(), "data": data };
    server.admin().await.unwrap().run_command(command).await.unwrap();
}

pub async fn stop_failing(server: &Mongod) {
    let command = doc! { "configureFailPoint": "failCommand", "mode": "off" };
    server.admin().await.unwrap().run_command(command).await.unwrap();
}

/// Polls in real time until the condition holds.
pub async fn eventually_within<F, T>(limit: Duration, what: &str, mut holds: F)
where
    F: FnMut() -> T,
    T: Future<Output = bool>,
{
    let deadline = tokio::time::Instant::now() + limit;
    while !holds().await {
        assert!(tokio::time::Instant::now() < deadline, "this did not happen within {limit:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
