//! A `MongoStore` over a test's database, and calls that tests make often.

use std::time::Duration;

use tower_key_rotation::{
    KeyId, KeySpec, Rest,
    store::{
        KeyStore, Loaded, Mark, Operation, Resting, Standing, Until, Words,
        mongodb::{MongoStore, MongoStoreBuilder},
    },
};

use super::mongo::Mongo;

impl Mongo {
    /// The builder of a store over this database.
    pub fn builder(&self) -> MongoStoreBuilder {
        MongoStore::builder().database(self.database.name())
    }

    pub async fn store(&self) -> MongoStore {
        self.builder().connect(&self.uri).await.unwrap()
    }

    /// A store that reaches the same database by another URI.
    pub async fn store_through(&self, uri: &str) -> MongoStore {
        self.builder().connect(uri).await.unwrap()
    }
}

/// Calls of a store that tests make often.
pub trait Calls {
    async fn load_all(&self) -> Loaded;
    /// Whether the key was inserted.
    async fn insert(&self, id: &str, secret: &str) -> bool;
    /// Marks the key, as the store has it, as limited for that long.
    async fn limit(&self, id: &str, left: Duration) -> Option<Standing>;
}

impl Calls for MongoStore {
    async fn load_all(&self) -> Loaded {
        self.load(None).await.unwrap()
    }

    async fn insert(&self, id: &str, secret: &str) -> bool {
        let id = KeyId::new(id).unwrap();
        self.operate(id.clone(), Operation::Insert(KeySpec::new(id, secret))).await.unwrap().is_some()
    }

    async fn limit(&self, id: &str, left: Duration) -> Option<Standing> {
        let id = KeyId::new(id).unwrap();
        let loaded = self.load(Some(std::slice::from_ref(&id))).await.unwrap();
        let standing = loaded.records.into_iter().next()?.standing;
        let key = Some(Resting { until: Until::After(left), reason: Rest::RateLimited });
        let words = Words { generation: standing.words.generation, key, ..Words::default() };
        self.merge(Mark::new(id, standing.born, words)).await.unwrap()
    }
}
