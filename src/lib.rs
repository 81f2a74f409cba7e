//! Several API keys behind one HTTP client.
//!
//! Programs that call rate-limited services, LLM providers above all, hold several keys. This crate puts one
//! into each outgoing request, each in its turn; rests a key for 2 minutes after a 429, or for as long as
//! the service asks; sends the limited request again with another key, if you like; and takes the rested key
//! back by itself. It does so as a [tower](https://docs.rs/tower) layer around any client, `reqwest` among them.
//!
//! ```
//! use http::{Request, Response};
//! use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
//! use tower_key_rotation::{KeyPool, KeyRotationLayer};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let pool = KeyPool::builder()
//!     .key("alpha", "sk-1")
//!     .key("beta", "sk-2")
//!     .build()?;
//!
//! // the client: anything that takes an `http::Request`, or a `reqwest::Request`
//! let client = service_fn(async |request: Request<String>| {
//!     let status = if request.headers()["authorization"] == "Bearer sk-1" { 429 } else { 200 };
//!     Ok::<_, std::io::Error>(Response::builder().status(status).body(String::new()).unwrap())
//! });
//! let mut client = ServiceBuilder::new()
//!     .layer(KeyRotationLayer::new(&pool))
//!     .service(client);
//!
//! let request = || Request::post("https://api.example.com/v1").body(String::new());
//! assert_eq!(client.ready().await?.call(request()?).await?.status(), 429);
//! // alpha rests now, so everything goes to beta
//! assert_eq!(client.ready().await?.call(request()?).await?.status(), 200);
//! assert_eq!(client.ready().await?.call(request()?).await?.status(), 200);
//! # Ok(())
//! # }
//! ```
//!
//! # Where to look
//!
//! - [`KeyPool`]: the keys, where they come from, how long they rest; [`Inject`]: where they go in a request.
//! - [`source`]: keys that change while the program runs, in files or elsewhere, and secrets that expire.
//! - [`KeyRotationLayer`]: a key for each request; [`Failover`]: a refused request again with another key. The
//!   module [`service`] explains what happens to a limited request, whether a `POST` is ever sent twice, and the
//!   order of layers.
//! - [`classify`]: what a response says of its key.
//! - [`RecoveryHandle`] and [`store`]: state that outlives a process, and is shared by several, in MongoDB for
//!   one.
//! - `same_origin_redirects`: a `reqwest` client that takes no key to another host.
//!
//! # Features
//!
//! None is on by default. The [README](https://docs.rs/crate/tower-key-rotation/latest) lists them.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(clippy::expect_used, clippy::panic, clippy::unwrap_used))]
#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod classify;
pub mod clock;
mod key;
mod lending;
mod limit;
mod message;
mod meter;
mod pool;
mod replication;
mod select;
pub mod service;
pub mod source;
pub mod store;
mod sync;

#[cfg(feature = "reqwest")]
pub use self::service::redirects::same_origin_redirects;
pub use self::{
    key::{Credentials, Inject, InjectError, InvalidKeyId, KeyId, KeySpec, Rejected, Secret, UnusableSecret},
    limit::{BudgetStats, KnownBy, Quota, Rest, RestCause, Status, Traits, Unit},
    message::Replay,
    pool::{
        BuildError, ExplainedKey, Explanation, KeyPool, KeyPoolBuilder, KeyStats, NoKeyAvailable,
        OperateError, PassedOver, PoolStats, ScopeStats, ScopeTotals,
    },
    replication::{NotWritten, PassError, RecoveryConfig, RecoveryHandle, Report},
    service::{
        error::Error, failover::Failover, key_lease::KeyLease, key_leases::KeyLeases,
        key_rotation::KeyRotation, layer::KeyRotationLayer, reservation::Reservation, served_by::ServedBy,
    },
};

#[cfg(all(doctest, feature = "full"))]
#[doc = include_str!("../README.md")]
struct Readme;
