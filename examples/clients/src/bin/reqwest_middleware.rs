//! Cache, retry and tracing around the key rotation, in the right order: what is added first is outside.

use std::error::Error;

use clients::service;
use http_cache_reqwest::{Cache, CacheMode, HttpCache, HttpCacheOptions, MokaManager};
use reqwest_middleware::ClientBuilder;
use reqwest_retry::{
    RetryTransientMiddleware, Retryable, RetryableStrategy, default_on_request_failure,
    policies::ExponentialBackoff,
};
use reqwest_tracing::TracingMiddleware;
use tower_key_rotation::{Failover, KeyPool, KeyRotationLayer, same_origin_redirects};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let pool = KeyPool::builder().keys_from_env("KEYS").build()?;
    let cache = HttpCache {
        mode: CacheMode::Default,
        manager: MokaManager::default(),
        options: HttpCacheOptions::default(),
    };
    let backoff = ExponentialBackoff::builder().build_with_max_retries(2);
    let client = ClientBuilder::new(same_origin_redirects(reqwest::Client::builder()).build()?)
        .with(Cache(cache)) // an answer that is kept needs no key
        .with(RetryTransientMiddleware::new_with_policy_and_strategy(backoff, NotLimits)) // 500, connections
        .with(KeyRotationLayer::new(&pool).failover(Failover::attempts(2))) // 429, with another key at once
        .with(TracingMiddleware::default()) // a span for each attempt
        .build();

    for _ in 0..2 {
        let response = client.get(format!("{}/v1/models", service())).send().await?;
        println!("{}", response.text().await?);
    }
    Ok(())
}

/// Retries what is transient, but no 429: the keys have been tried then.
struct NotLimits;

impl RetryableStrategy for NotLimits {
    fn handle(&self, result: &Result<reqwest::Response, reqwest_middleware::Error>) -> Option<Retryable> {
        match result {
            Ok(response) if response.status().is_server_error() => Some(Retryable::Transient),
            Ok(_) => None,
            Err(error) => default_on_request_failure(error),
        }
    }
}
