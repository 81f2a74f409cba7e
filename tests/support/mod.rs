//! Code that the integration tests share: servers, clients, logs, stores with faults.
//!
//! The modules that do not use the library (`canary`, `files`, `logs`, `mongo`, `proxy`, `requests`, `server`, `time`)
//! are shared with the tests of the other packages in this workspace, which include them by their paths.

#![allow(dead_code, unreachable_pub, unused_imports)] // Each test is a crate of its own and uses a part of this.

pub mod canary;
mod files;
pub mod leased;
pub mod limited;
mod logs;
pub mod model;
pub mod mongo;
#[cfg(feature = "mongodb")]
pub mod mongo_store;
#[path = "../../examples/local/mongod.rs"]
mod mongod;
#[cfg(all(feature = "mongodb", feature = "reqwest"))]
mod process;
mod program;
mod proxy;
mod requests;
mod server;
mod store;
mod time;

use std::time::Duration;

use tower::{Layer, Service};
use tower_key_rotation::{
    Failover, KeyPool, KeyPoolBuilder, KeyRotation, KeyRotationLayer, KeyStats, RecoveryConfig,
    classify::{ClassifyResponse, ResponseHead, TooManyRequests, Verdict},
    clock::ManualClock,
};

#[cfg(feature = "mongodb")]
pub use self::mongo_store::Calls;
#[cfg(all(feature = "mongodb", feature = "reqwest"))]
pub use self::process::Process;
#[allow(unused_imports)] // Each test file uses a part of these, too.
pub use self::{
    files::{TestFile, file, keys_file},
    logs::{Logs, listen_to_everything},
    program::example,
    proxy::{Fault, Proxy},
    requests::{get, get_request, http, send, status},
    server::{Answer, Server, answer, answer_with, key_of, stream},
    store::{FaultyStore, Mode},
    time::{INSTANT, MINUTE, SECOND, eventually, in_time, settle},
};

/// A pool's builder with keys of these ids. [`key_of`] finds the id of a key in its secret.
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

/// A recovery that makes a pass only when a test asks for one.
pub fn passes_by_hand() -> RecoveryConfig {
    RecoveryConfig::new().start_jitter(Duration::MAX).interval(Duration::MAX)
}

#[cfg(feature = "reqwest")]
pub fn rotating(pool: &KeyPool) -> KeyRotation<reqwest::Client> {
    KeyRotationLayer::new(pool).layer(http())
}

/// Judges by the status alone, so that a test can have a key revoked or exhausted by it.
#[derive(Clone, Copy, Debug)]
pub struct ByStatus;

impl ClassifyResponse for ByStatus {
    fn classify(&self, response: &ResponseHead<'_>) -> Verdict {
        match response.status().as_u16() {
            401 | 403 => Verdict::Revoked,
            402 => Verdict::Exhausted { wait: None },
            429 => Verdict::RateLimited { wait: response.wait() },
            _ => Verdict::Nothing,
        }
    }
}

pub type FailoverLayer = KeyRotationLayer<TooManyRequests, Failover>;

/// The layer with the default failover.
pub fn failover(pool: &KeyPool) -> FailoverLayer {
    KeyRotationLayer::new(pool).failover(Failover::attempts(3))
}

#[cfg(feature = "reqwest")]
pub fn failing_over(
    layer: FailoverLayer,
) -> impl Service<reqwest::Request, Response = reqwest::Response, Error = ClientError, Future: Send>
+ Clone
+ Send
+ 'static {
    layer.layer(http())
}

#[cfg(feature = "reqwest")]
pub type ClientError = tower_key_rotation::Error<reqwest::Error>;

pub fn stats_of(pool: &KeyPool, id: &str) -> KeyStats {
    pool.stats().keys.into_iter().find(|key| key.id.as_str() == id).unwrap()
}

pub fn time_left(pool: &KeyPool, id: &str) -> Option<Duration> {
    stats_of(pool, id).time_left
}

/// The text of an error and its sources, by `Display` and by `Debug`.
pub fn all_that_it_says(error: &(dyn std::error::Error + 'static)) -> String {
    let sources = std::iter::successors(Some(error), |error| error.source());
    sources.map(|error| format!("{error} / {error:?}\n")).collect()
}
