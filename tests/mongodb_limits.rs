//! Processes that share the limits of their keys through MongoDB. Each pool stands for a process.

mod support;

use std::net::{SocketAddr, ToSocketAddrs};

use futures_util::future::join_all;
use mongodb::bson::{Binary, doc, spec::BinarySubtype};
use support::{
    limited::{Limited, LimitedClient, offer, post},
    mongo::*,
    *,
};
use tower_key_rotation::{
    KeyPool, RecoveryHandle,
    store::{KeyStore, mongodb::MongoStore},
};

struct Process {
    recovery: RecoveryHandle,
    client: LimitedClient,
}

impl Process {
    async fn over(store: MongoStore, service: &Limited, keys: usize) -> Self {
        let keys = (0..keys).map(|key| (format!("k{key}"), format!("sk-{key}")));
        let pool = KeyPool::builder().keys(keys).paced().open(store).await.unwrap();
        Self {
            client: service.client(&pool, MINUTE),
            recovery: RecoveryHandle::spawn_with(&pool, passes_by_hand()),
        }
    }
}

async fn processes(mongo: &Mongo, service: &Limited, keys: usize) -> Vec<Process> {
    let mut processes = Vec::new();
    for _ in 0..3 {
        processes.push(Process::over(mongo.store().await, service, keys).await);
    }
    processes
}

async fn offer_each(processes: &[Process], per_second: f64, seconds: f64) -> usize {
    let offers = processes.iter().map(|process| offer(&process.client, per_second, seconds, post));
    join_all(offers).await.into_iter().sum()
}

fn address_of(mongo: &Mongo) -> SocketAddr {
    let uri = mongo.uri.trim_start_matches("mongodb://");
    uri.split(['/', '?']).next().unwrap().to_socket_addrs().unwrap().next().unwrap()
}

async fn count_messages(mongo: &Mongo) -> u64 {
    mongo
        .database
        .collection::<mongodb::bson::Document>("keys_processes")
        .count_documents(doc! {})
        .await
        .unwrap()
}

#[tokio::test]
async fn many_keys_are_shared_with_few_refusals() {
    let (mongo, service) = (Mongo::standalone().await, Limited::new(0.25, 2.0));
    let processes = processes(&mongo, &service, 20).await;
    assert_eq!(offer_each(&processes, 1.4, 8.0).await, 0);
    service.count_from_now();
    assert_eq!(offer_each(&processes, 1.4, 12.0).await, 0);
    // Without messages, it is more than 20.
    assert!(service.refused_per_100() <= 10.0, "{}", service.refused_per_100());
    assert_eq!(count_messages(&mongo).await, 3);
}

#[tokio::test]
async fn a_single_limit_serves_all_processes() {
    let (mongo, service) = (Mongo::standalone().await, Limited::new(6.0, 6.0));
    let processes = processes(&mongo, &service, 1).await;
    assert_eq!(offer_each(&processes, 1.8, 8.0).await, 0);
    assert!(service.refused_per_100() <= 15.0, "{}", service.refused_per_100());
    for process in processes {
        process.recovery.shutdown().await.unwrap();
    }
}

#[tokio::test]
async fn an_outage_of_mongodb_fails_no_request() {
    let (mongo, service) = (Mongo::standalone().await, Limited::new(6.0, 6.0));
    let address = address_of(&mongo);
    let proxy = Proxy::to(address).await;
    let mut processes = Vec::new();
    for _ in 0..2 {
        let store = mongo.builder().operation_limit(SECOND).connect(proxy.uri()).await.unwrap();
        processes.push(Process::over(store, &service, 1).await);
    }
    assert_eq!(offer_each(&processes, 2.0, 4.0).await, 0);
    proxy.set(Fault::Cut);
    assert_eq!(offer_each(&processes, 2.0, 8.0).await, 0);
    proxy.set(Fault::None);
    assert_eq!(offer_each(&processes, 2.0, 4.0).await, 0);
}

#[tokio::test]
async fn messages_are_replaced_and_those_of_ended_processes_deleted() {
    let mongo = Mongo::standalone().await;
    let store = mongo.store().await;
    let messages = mongo.database.collection("keys_processes");
    let bytes = Binary { subtype: BinarySubtype::Generic, bytes: vec![1] };
    messages.insert_one(doc! { "_id": 7_i64, "body": bytes }).await.unwrap();
    let two_minutes_ago = vec![doc! { "$set": { "at": { "$subtract": ["$$NOW", 120_000] } } }];
    messages.update_one(doc! { "_id": 7_i64 }, two_minutes_ago).await.unwrap();
    messages.insert_one(doc! { "_id": "not a message", "at": "not a date" }).await.unwrap();

    store.publish(u64::MAX, vec![1]).await.unwrap();
    store.publish(u64::MAX, vec![1, 2, 3]).await.unwrap();
    let heard = store.messages().await.unwrap().unwrap();
    let heard: Vec<_> = heard.into_iter().map(|heard| (heard.process, heard.body, heard.age)).collect();
    assert!(
        matches!(&heard[..], [(u64::MAX, body, age)] if *body == [1, 2, 3] && *age < MINUTE),
        "{heard:?}"
    );
    assert_eq!(count_messages(&mongo).await, 2);
}

#[tokio::test]
async fn the_collection_of_messages_has_a_name_of_its_own() {
    let mongo = Mongo::standalone().await;
    let store = mongo.builder().processes_collection("sharing").connect(&mongo.uri).await.unwrap();
    store.publish(1, vec![1]).await.unwrap();
    let names = mongo.database.list_collection_names().await.unwrap();
    assert_eq!(names, ["sharing"]);
    for name in ["keys", "", "a$b"] {
        let refused = mongo.builder().processes_collection(name).connect(&mongo.uri).await;
        assert!(refused.is_err(), "{name:?}");
    }
}
