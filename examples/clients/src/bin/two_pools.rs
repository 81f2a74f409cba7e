//! Two services with keys of their own, behind one client: each pool names its hosts.

use std::error::Error;

use clients::service;
use reqwest::{Method, Request, Url};
use tower::{ServiceBuilder, ServiceExt};
use tower_key_rotation::{Failover, Inject, KeyPool, KeyRotationLayer, same_origin_redirects};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let first: Url = service().parse()?;
    // The same service by another name, to run without a second one.
    let mut second = first.clone();
    second.set_host(Some("localhost"))?;

    let by_bearer = KeyPool::builder().keys_from_env("KEYS").allowed_hosts(first.host_str()).build()?;
    let by_header = KeyPool::builder()
        .keys_from_env("KEYS")
        .inject(Inject::header("x-api-key"))
        .allowed_hosts(second.host_str())
        .build()?;
    let client = ServiceBuilder::new()
        .layer(KeyRotationLayer::new(&by_bearer).failover(Failover::attempts(2)))
        .layer(KeyRotationLayer::new(&by_header).failover(Failover::attempts(2)))
        .service(same_origin_redirects(reqwest::Client::builder()).build()?);

    for service in [first, second] {
        let request = Request::new(Method::GET, service.join("v1/models")?);
        println!("{}", client.clone().oneshot(request).await?.text().await?);
    }
    Ok(())
}
