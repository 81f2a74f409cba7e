//! Somebody who adds and removes keys all the time: through a pool, and directly in the collection.

use std::{
    collections::{BTreeSet, HashSet, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use mongodb::bson::doc;
use tokio::time::sleep;
use tower_key_rotation::{KeyId, KeyPool};

use crate::{
    figures::Figures,
    ledger::{Books, SOMEBODY_ELSE},
    service::Service,
    support::mongo::{Mongo, healthy},
};

/// What was sent with a removed key has been answered long before that.
const REMEMBERED_FOR: Duration = Duration::from_secs(30);

pub(crate) struct Operator {
    pub(crate) mongo: Mongo,
    pub(crate) pools: [KeyPool; 2],
    pub(crate) keys: Keys,
    pub(crate) books: Arc<Books>,
    pub(crate) figures: Arc<Figures>,
}

/// The keys that there are, the oldest first, and those that there no longer are.
pub(crate) struct Keys {
    service: Arc<Service>,
    given: usize,
    living: VecDeque<KeyId>,
    gone: Vec<(KeyId, Instant)>,
}

impl Keys {
    pub(crate) fn of(service: &Arc<Service>) -> Self {
        Self { service: service.clone(), given: 0, living: VecDeque::new(), gone: Vec::new() }
    }

    /// A key that the service knows, and the store not yet.
    pub(crate) fn give(&mut self) -> KeyId {
        let id = KeyId::new(format!("key-{}", self.given)).unwrap();
        self.service.open_account(self.given, &id);
        self.living.push_back(id.clone());
        self.given += 1;
        id
    }

    fn living(&self) -> BTreeSet<String> {
        self.living.iter().map(KeyId::to_string).collect()
    }
}

impl Operator {
    /// Goes on until then, and says which keys there are.
    pub(crate) async fn operate(mut self, pause: Duration, until: Instant) -> BTreeSet<String> {
        for turn in 0.. {
            sleep(pause).await;
            if Instant::now() > until {
                break;
            }
            // One pool, the collection, the other pool, the collection.
            let through = [Some(0), None, Some(1), None][turn % 4];
            self.remove(through).await;
            self.add(through).await;
            self.forget_the_gone();
        }
        self.keys.living()
    }

    /// Where a pool can't do it, or it isn't known whether it could, it is done in the collection.
    async fn add(&mut self, through: Option<usize>) {
        let id = self.keys.give();
        if let Some(pool) = through
            && self.pools[pool].insert(&id, format!("sk-{id}")).await.is_ok()
        {
            return self.figures.count("keys added through a pool", 1);
        }
        let mut document = healthy(id.as_str());
        document.remove("_id");
        let insert = doc! { "$setOnInsert": document };
        self.mongo.keys().update_one(doc! { "_id": id.as_str() }, insert).upsert(true).await.unwrap();
        self.figures.count("keys added in the collection", 1);
    }

    async fn remove(&mut self, through: Option<usize>) {
        let id = self.keys.living.pop_front().unwrap();
        self.keys.gone.push((id.clone(), Instant::now()));
        if let Some(pool) = through
            && self.pools[pool].remove(&id).await.is_ok()
        {
            self.books.removed(&id, pool);
            return self.figures.count("keys removed through a pool", 1);
        }
        self.mongo.keys().delete_one(doc! { "_id": id.as_str() }).await.unwrap();
        self.books.removed(&id, SOMEBODY_ELSE);
        self.figures.count("keys removed in the collection", 1);
    }

    fn forget_the_gone(&mut self) {
        let stats = self.pools.iter().map(KeyPool::stats);
        let known: HashSet<_> = stats.flat_map(|stats| stats.keys).map(|key| key.id).collect();
        self.keys.gone.retain(|(id, since)| {
            let is_needed = since.elapsed() < REMEMBERED_FOR || known.contains(id);
            if !is_needed {
                self.keys.service.close_account(id);
                self.books.forget(id);
            }
            is_needed
        });
    }
}
