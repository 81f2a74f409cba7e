//! The keys of a pool in MongoDB: marks, sweeps, reloads and what operators do, on documents of other programs.

mod support;

use mongodb::bson::doc;
use support::{mongo::*, *};
use tower_key_rotation::{KeyPool, RecoveryConfig, RecoveryHandle, Status};

#[tokio::test]
async fn a_mark_is_written_swept_and_reloaded() {
    let mongo = Mongo::standalone().await;
    mongo.insert_all(["alpha", "beta"]).await;
    let pool = KeyPool::builder().open(mongo.store().await).await.unwrap();
    let recovery = RecoveryHandle::spawn_with(&pool, RecoveryConfig::new().start_jitter(60 * SECOND));
    let server = Server::limiting(["alpha"]).await;
    assert_eq!(status(&rotating(&pool), &server.url()).await, 429);
    eventually("the mark is written", || pool.stats().marks_waiting == 0).await;
    println!("{:?}", mongo.document("alpha").await);
    assert_eq!(mongo.status("alpha").await, "rate_limited");
    mongo.end_cooldown("alpha").await;
    println!("{:?}", recovery.sweep_now().await);
    println!("{:?}", mongo.document("alpha").await);
    assert_eq!(stats_of(&pool, "alpha").status, Status::Healthy);
    recovery.shutdown().await.unwrap();
    println!("{:?}", mongo.document("beta").await);
    println!("{:?}", mongo.document("alpha").await);
    let _ = doc! {};
}
