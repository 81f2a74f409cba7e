//! A client with keys in the state of an `axum` server, without boxing: the types can be named.

use std::error::Error;

use axum::{Router, extract::State, http::StatusCode, routing::get};
use clients::service;
use reqwest::{Method, Request, Url};
use tokio::net::TcpListener;
use tower::{Layer, ServiceExt};
use tower_key_rotation::{
    Failover, KeyPool, KeyRotation, KeyRotationLayer, classify::TooManyRequests, same_origin_redirects,
};

/// Each clone shares the keys, their turn and the connections.
#[derive(Clone)]
struct Upstream {
    client: KeyRotation<reqwest::Client, TooManyRequests, Failover>,
    url: Url,
}

async fn models(State(upstream): State<Upstream>) -> Result<String, (StatusCode, String)> {
    let request = Request::new(Method::GET, upstream.url);
    let failed = |error: &dyn Error| (StatusCode::BAD_GATEWAY, error.to_string());
    let response = upstream.client.oneshot(request).await.map_err(|error| failed(&error))?;
    response.text().await.map_err(|error| failed(&error))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let pool = KeyPool::builder().keys_from_env("KEYS").build()?;
    let http = same_origin_redirects(reqwest::Client::builder()).build()?;
    let client = KeyRotationLayer::new(&pool).failover(Failover::attempts(2)).layer(http);
    let upstream = Upstream { client, url: format!("{}/v1/models", service()).parse()? };
    let app = Router::new().route("/models", get(models)).with_state(upstream);

    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let models = format!("http://{}/models", listener.local_addr()?);
    let server = tokio::spawn(async { axum::serve(listener, app).await });
    println!("{}", reqwest::get(models).await?.text().await?);
    server.abort();
    Ok(())
}
