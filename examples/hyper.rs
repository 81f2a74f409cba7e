//! Several keys behind `hyper-util`'s client: `http` requests, without `reqwest`.
//!
//! ```text
//! KEYS=alpha=sk-1,beta=sk-2 cargo run --example hyper --features failover -- http://127.0.0.1:8000/v1/models
//! ```
//!
//! Without arguments it talks to a service of its own, which limits one of two keys.

mod local;

use std::{env, error::Error};

use bytes::Bytes;
use http::{Request, Uri};
use http_body_util::{BodyExt, Empty};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tower::{Service, ServiceBuilder, ServiceExt};
use tower_key_rotation::{Failover, Inject, KeyPool, KeyRotationLayer, RecoveryHandle};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let (keys, url) = match env::args().nth(1) {
        Some(url) => (KeyPool::builder().keys_from_env("KEYS"), url),
        None => (KeyPool::builder().key("alpha", "sk-1").key("beta", "sk-2"), local::serve().await?),
    };
    let url: Uri = url.parse()?;
    let pool = keys.inject(Inject::bearer().and(Inject::header("x-api-key"))).build()?;
    let recovery = RecoveryHandle::spawn(&pool);

    let mut client = ServiceBuilder::new()
        .layer(KeyRotationLayer::new(&pool).failover(Failover::attempts(3)))
        .service(Client::builder(TokioExecutor::new()).build_http::<Empty<Bytes>>());

    for _ in 0..4 {
        let request = Request::get(url.clone()).body(Empty::new())?;
        let response = client.ready().await?.call(request).await?;
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        println!("{status}: {}", String::from_utf8_lossy(&body));
    }

    for key in pool.stats().keys {
        println!("{}: {:?}, {} requests, {} limited", key.id, key.status, key.requests, key.limited);
    }
    recovery.shutdown().await?;
    Ok(())
}
