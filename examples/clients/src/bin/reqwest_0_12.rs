//! `reqwest` 0.12, as a service of `http::Request`.

use std::error::Error;

use clients::service;
use http::{Request, Response};
use reqwest_0_12::{Body, Client};
use tower::{ServiceBuilder, ServiceExt, service_fn};
use tower_key_rotation::{Failover, KeyPool, KeyRotationLayer};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let pool = KeyPool::builder().keys_from_env("KEYS").build()?;
    let http = Client::new();
    let client = ServiceBuilder::new()
        .layer(KeyRotationLayer::new(&pool).failover(Failover::attempts(2)))
        .service(service_fn(move |request: Request<String>| {
            let http = http.clone();
            async move {
                let response = http.execute(request.try_into()?).await?;
                Ok::<Response<Body>, reqwest_0_12::Error>(response.into())
            }
        }));

    let request = Request::post(format!("{}/v1/chat/completions", service()))
        .header("content-type", "application/json")
        .body(r#"{"model":"gpt-5-mini"}"#.to_owned())?;
    let response = client.oneshot(request).await?;
    // Back to a response of reqwest, with its methods.
    let response = reqwest_0_12::Response::from(response.map(Body::wrap));
    println!("{}", response.json::<serde_json::Value>().await?["choices"][0]["message"]["content"]);
    Ok(())
}
