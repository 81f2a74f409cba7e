//! What the end-to-end tests share: a server that remembers what it was sent, clients, logs, and a store
//! with faults.

#![allow(dead_code, unreachable_pub)] // Each test file is a crate of its own and uses a part of this.

pub mod canary;
mod files;
pub mod gateway;
mod logs;
pub mod model;
pub mod mongo;
#[path = "../../examples/local/mongod.rs"]
mod mongod;
mod program;
mod proxy;
pub mod python;
mod server;
mod store;

use std::{future::Future, time::Duration};

use reqwest::{Method, Request};
use tokio::time::{sleep, timeout};
use tower::{Layer, Service, ServiceExt};
use tower_key_rotation::{
    FailoverLayer, KeyPool, KeyPoolBuilder, KeyRotation, KeyRotationLayer, KeyStats, RecoveryConfig,
    clock::ManualClock,
};

#[allow(unused_imports)]
pub(crate) use self::store::operators_of;
#[allow(unused_imports)] // For the same reason.
pub use self::{
    files::{TestFile, file, keys_file},
    logs::Logs,
    program::example,
    proxy::{Fault, Proxy},
    server::{Answer, Server, answer, answer_with, key_of, stream},
    store::{FaultyStore, Mode},
};

pub const SECOND: Duration = Duration::from_secs(1);
pub const MINUTE: Duration = Duration::from_secs(60);
pub const INSTANT: Duration = Duration::from_nanos(1);

/// Keys of these names, each with the secret that [`key_of`] finds the name in again.
pub fn builder<I>(ids: I, clock: &ManualClock) -> KeyPoolBuilder
where
    I: IntoIterator,
    I::Item: ToString,
{
    let keys = ids.into_iter().map(|id| (id.to_string(), format!("sk-{}", id.to_string())));
    KeyPool::builder().keys(keys).clock(clock.clone())
}

pub fn pool<const N: usize>(ids: [&str; N], clock: &ManualClock) -> KeyPool {
    builder(ids, clock).build().unwrap()
}

/// A recovery that makes no pass but those that a test asks for.
pub fn passes_by_hand() -> RecoveryConfig {
    RecoveryConfig::new().start_jitter(Duration::MAX).interval(Duration::MAX)
}

/// A client that no proxy of the environment comes between.
pub fn http() -> reqwest::Client {
    reqwest::Client::builder().no_proxy().build().unwrap()
}

pub fn rotating(pool: &KeyPool) -> KeyRotation<reqwest::Client> {
    KeyRotationLayer::new(pool).layer(http())
}

/// The whole stack, as a program would put it together.
pub fn failing_over(
    pool: &KeyPool,
    failover: FailoverLayer,
) -> impl Service<Request, Response = reqwest::Response, Error = ClientError, Future: Send> + Clone + Send + 'static
{
    failover.layer(rotating(pool))
}

pub type ClientError = tower_key_rotation::Error<reqwest::Error>;

pub fn get_request(url: &str) -> Request {
    Request::new(Method::GET, url.parse().unwrap())
}

pub async fn send<S: Service<Request> + Clone>(
    client: &S,
    request: Request,
) -> Result<S::Response, S::Error> {
    client.clone().oneshot(request).await
}

pub async fn get<S: Service<Request> + Clone>(client: &S, url: &str) -> Result<S::Response, S::Error> {
    send(client, get_request(url)).await
}

/// The status of a GET that has to be answered.
pub async fn status<S>(client: &S, url: &str) -> u16
where
    S: Service<Request, Response = reqwest::Response> + Clone,
    S::Error: std::fmt::Debug,
{
    get(client, url).await.unwrap().status().as_u16()
}

pub fn stats_of(pool: &KeyPool, id: &str) -> KeyStats {
    pool.stats().keys.into_iter().find(|key| key.id.as_str() == id).unwrap()
}

pub fn time_left(pool: &KeyPool, id: &str) -> Option<Duration> {
    stats_of(pool, id).time_left
}

/// Waits, for real time but not for long, until something holds that a task in the background brings about.
pub async fn eventually(what: &str, holds: impl Fn() -> bool) {
    for _ in 0..5_000 {
        if holds() {
            return;
        }
        sleep(Duration::from_millis(1)).await;
    }
    panic!("this did not come about: {what}");
}

/// Gives everything in the background the time to do what it should not do.
pub async fn settle() {
    for _ in 0..20 {
        sleep(Duration::from_millis(1)).await;
    }
}

/// Fails where a test would otherwise hang.
pub async fn in_time<F: Future>(what: F) -> F::Output {
    timeout(10 * SECOND, what).await.expect("it hangs")
}

/// What an error says of itself and its sources, by `Display` and by `Debug`.
pub fn all_that_it_says(error: &(dyn std::error::Error + 'static)) -> String {
    let sources = std::iter::successors(Some(error), |error| error.source());
    sources.map(|error| format!("{error} / {error:?}\n")).collect()
}
