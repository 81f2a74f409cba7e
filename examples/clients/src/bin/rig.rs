//! `rig` takes a client of `reqwest-middleware`, and the layer is a middleware.

use std::error::Error;

use clients::service;
use reqwest_middleware::ClientBuilder;
use rig_core::{completion::CompletionRequest, providers::openai::OpenAIConfig};
use rig_reqwest::ReqwestMiddlewareClient;
use tower_key_rotation::{Failover, KeyPool, KeyRotationLayer, same_origin_redirects};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let pool = KeyPool::builder().keys_from_env("KEYS").build()?;
    let http = same_origin_redirects(reqwest::Client::builder()).build()?;
    let http =
        ClientBuilder::new(http).with(KeyRotationLayer::new(&pool).failover(Failover::attempts(2))).build();
    let openai = OpenAIConfig::new("in each request").with_base_url(format!("{}/v1", service()));
    let model = openai.connect(ReqwestMiddlewareClient::from(http)).chat("gpt-5-mini");

    println!("{}", model.call(CompletionRequest::new("Hello")).await?.text());
    Ok(())
}
