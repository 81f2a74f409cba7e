//! A process over MongoDB: a pool, and a client that sends requests to a service.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use tower::Layer;
use tower_key_rotation::{
    KeyPool, KeyRotation, KeyRotationLayer, RecoveryHandle, Status, store::mongodb::MongoStore,
};

use super::{ByStatus, Server, http, passes_by_hand, status};

/// A process that makes a pass only when asked, and a service whose answers the test sets.
pub struct Process {
    pub pool: KeyPool,
    pub recovery: RecoveryHandle,
    pub client: KeyRotation<reqwest::Client, ByStatus>,
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
            client: KeyRotationLayer::new(&pool).classify(ByStatus).layer(http()),
            server,
            answers,
            pool,
        }
    }

    /// Sets the service's answer to the secret `sk-{secret}`, and sends requests until one is answered so.
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
