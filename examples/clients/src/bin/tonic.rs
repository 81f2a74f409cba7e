//! `tonic`: a key in each call's metadata.

use std::error::Error;

use clients::service;
use tonic::{Code, transport::Endpoint};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tower::ServiceBuilder;
use tower_key_rotation::{Inject, KeyPool, KeyRotationLayer, classify::Grpc};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let pool = KeyPool::builder().keys_from_env("KEYS").inject(Inject::header("x-api-key")).build()?;
    let channel = Endpoint::new(service())?.connect_lazy();
    let channel = ServiceBuilder::new().layer(KeyRotationLayer::new(&pool).classify(Grpc)).service(channel);
    // Without an origin, requests name no host, and get no key.
    let mut client = HealthClient::with_origin(channel, service().try_into()?);

    // tonic's bodies are streams, which the layer can't send again. So the caller makes a limited call again.
    let mut reply = client.check(HealthCheckRequest::default()).await;
    if reply.as_ref().is_err_and(|status| status.code() == Code::ResourceExhausted) {
        reply = client.check(HealthCheckRequest::default()).await;
    }
    println!("{}", reply?.into_inner().status().as_str_name());
    Ok(())
}
