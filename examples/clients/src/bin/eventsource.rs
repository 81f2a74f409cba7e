//! `eventsource-client` takes a transport: a service with the key rotation is one.

use std::{error::Error, pin::pin};

use bytes::Bytes;
use clients::service;
use eventsource_client::{Client as _, ClientBuilder, SSE};
use futures_util::{StreamExt, TryStreamExt};
use http_body_util::{BodyExt, Full};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use launchdarkly_sdk_transport::{HttpTransport, Request, ResponseFuture, TransportError};
use sync_wrapper::SyncFuture;
use tower::{Layer, ServiceExt};
use tower_key_rotation::{Failover, KeyPool, KeyRotation, KeyRotationLayer, classify::TooManyRequests};

#[derive(Clone)]
struct Transport(KeyRotation<Client<HttpConnector, Full<Bytes>>, TooManyRequests, Failover>);

impl HttpTransport for Transport {
    fn request(&self, request: Request<Option<Bytes>>) -> ResponseFuture {
        let sent = self.0.clone().oneshot(request.map(|body| Full::new(body.unwrap_or_default())));
        Box::pin(SyncFuture::new(async move {
            let response = sent.await.map_err(TransportError::new)?;
            Ok(response.map(|body| Box::pin(body.into_data_stream().map_err(TransportError::new)) as _))
        }))
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let pool = KeyPool::builder().keys_from_env("KEYS").build()?;
    let http = Client::builder(TokioExecutor::new()).build_http();
    let transport = Transport(KeyRotationLayer::new(&pool).failover(Failover::attempts(2)).layer(http));

    let client = ClientBuilder::for_url(&format!("{}/events", service()))?.build_with_transport(transport);
    let mut events = pin!(client.stream());
    while let Some(event) = events.next().await {
        if let SSE::Event(event) = event? {
            println!("{}", event.data);
            break;
        }
    }
    Ok(())
}
