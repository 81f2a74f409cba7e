//! Several keys behind a `reqwest::Client`.
//!
//! ```text
//! KEYS=alpha=sk-1,beta=sk-2 cargo run --example reqwest --features failover,reqwest -- https://api.example.com/v1/models
//! ```
//!
//! Without arguments it talks to a service of its own, which limits one of two keys.

mod local;

use std::{env, error::Error, time::Duration};

use reqwest::{Method, Request, Url};
use tower::{Service, ServiceBuilder, ServiceExt};
use tower_key_rotation::{
    Failover, KeyPool, KeyRotationLayer, RecoveryHandle, ServedBy, same_origin_redirects,
};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let (keys, url) = match env::args().nth(1) {
        Some(url) => (KeyPool::builder().keys_from_env("KEYS"), url),
        None => (KeyPool::builder().key("alpha", "sk-1").key("beta", "sk-2"), local::serve().await?),
    };
    let url: Url = url.parse()?;
    let pool = keys.allowed_hosts(url.host_str()).build()?;
    let recovery = RecoveryHandle::spawn(&pool);

    // By itself, reqwest would take a key along to other hosts.
    let client = same_origin_redirects(reqwest::Client::builder()).build()?;
    let mut client = ServiceBuilder::new()
        .layer(
            KeyRotationLayer::new(&pool)
                .expose_key()
                .failover(Failover::attempts(3))
                .wait_up_to(Duration::from_secs(10)),
        )
        .service(client);

    for _ in 0..4 {
        let response = client.ready().await?.call(Request::new(Method::GET, url.clone())).await?;
        let key = response.extensions().get().map(|ServedBy(key)| key.clone());
        println!("{} with key {}", response.status(), key.map_or_else(String::new, |key| key.to_string()));
    }

    for key in pool.stats().keys {
        println!("{}: {:?}, {} requests, {} limited", key.id, key.status, key.requests, key.limited);
    }
    recovery.shutdown().await?;
    Ok(())
}
