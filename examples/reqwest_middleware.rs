//! Several keys behind `reqwest-middleware`, whose requests are built as usual.
//!
//! ```text
//! KEYS=alpha=sk-1,beta=sk-2 cargo run --example reqwest_middleware --features reqwest-middleware -- https://api.example.com/v1/models
//! ```
//!
//! Without arguments it talks to a service of its own, which limits one of two keys.

mod local;

use std::{env, error::Error};

use reqwest_middleware::ClientBuilder;
use tower_key_rotation::{
    Failover, KeyPool, KeyRotationLayer, RecoveryHandle, classify::LlmGateway, same_origin_redirects,
};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let (pool, url) = match env::args().nth(1) {
        Some(url) => (KeyPool::builder().keys_from_env("KEYS").build()?, url),
        None => (KeyPool::builder().key("alpha", "sk-1").key("beta", "sk-2").build()?, local::serve().await?),
    };
    let recovery = RecoveryHandle::spawn(&pool);

    let rotation = KeyRotationLayer::new(&pool)
        .classify(LlmGateway::new())
        .read_error_bodies(16 * 1024)
        .failover(Failover::attempts(3));
    let client = same_origin_redirects(reqwest::Client::builder()).build()?;
    let client = ClientBuilder::new(client).with(rotation).build();

    for _ in 0..4 {
        let response = client.get(&url).header("accept", "application/json").send().await?;
        println!("{}: {}", response.status(), response.text().await?);
    }

    for key in pool.stats().keys {
        println!("{}: {:?}, {} requests, {} limited", key.id, key.status, key.requests, key.limited);
    }
    recovery.shutdown().await?;
    Ok(())
}
