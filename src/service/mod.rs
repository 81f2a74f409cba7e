//! The layer: a key for each request, and what happens when a key is limited.
//!
//! [`KeyRotationLayer`](crate::KeyRotationLayer) wraps a client: any `tower::Service` over `http::Request` or, with the
//! feature `reqwest`, over `reqwest::Request`. For each request, [`KeyRotation`](crate::KeyRotation)
//!
//! 1. picks the next available key of its [`KeyPool`](crate::KeyPool), in strict turn,
//! 2. puts it where the pool's [`Inject`](crate::Inject) says, and calls the client,
//! 3. has a [classifier](crate::classify) judge the response's head, and rests the key if the response speaks
//!    against it.
//!
//! # What happens to a limited request
//!
//! By default the caller gets the 429 as it is, and the key rests. With
//! [`failover`](crate::KeyRotationLayer::failover), the request is sent again at once with another key.
//!
//! A refusal that may be about the request, such as most 403s, is sent to a second key at most:
//! see [`Verdict::Refused`](crate::classify::Verdict::Refused).
//!
//! With no key available, nothing is sent and the error is
//! [`Error::NoKeyAvailable`](crate::Error::NoKeyAvailable). With
//! [`wait_up_to`](crate::KeyRotationLayer::wait_up_to), the request waits for a key.
//!
//! # Is a `POST` ever sent twice?
//!
//! Only with failover, and only after the service refused it: the classifier judged a response with a status from 400
//! on to speak against the key. Two errors come with a 200, and count as such a status: the error of a gRPC call that has
//! no message and, with [`stream_head`](crate::KeyRotationLayer::stream_head), an error before the first content of a
//! stream. A request is never sent again after an error of the connection, after any other response below 400, or once a
//! response has begun to reach the caller. It is sent again only with the same body:
//!
//! - An `http::Request` is sent again if its body is `Clone`, knew its exact length before the first attempt, and the
//!   clone still has that length. A body whose clones share one stream is therefore never sent half or empty.
//! - A `reqwest::Request` is sent again unless its body streams.
//! - [`Failover::clone_with`](crate::Failover::clone_with) decides otherwise.
//!
//! In all other cases the caller gets the refused response.
//!
//! # One explanation per request
//!
//! A [`tracing`](https://docs.rs/tracing) span explains each request that wants a key. It has the target
//! `tower_key_rotation::request` and the level `TRACE`; while no subscriber enables it, a request pays for one load. The
//! client is called inside the span. [`KeyPool::explain`](crate::KeyPool::explain) answers the same beforehand.
//!
//! | where | field | what |
//! |---|---|---|
//! | span `request` | `scope` | the scope of its [`Traits`](crate::Traits) |
//! | | `waited_ms`, `attempts`, `key` | at the end: how long it waited, how often it was sent, and the last key |
//! | event of each attempt | `key`, `status` | the key that went out, and the status of the response; none after an error |
//! | | `passed_over` | the keys before it in turn that got no request, and why |
//! | | `preferred` | the first choice of the request's session, if it has one |
//! | | `probe` | the key should have no room; the request finds out whether that is so |
//! | | `learned` | what is known of the key after the answer: its rest, what is left of its budgets |
//! | event `not sent` | `passed_over`, `error` | why no key had room |
//! | event `dropped without an answer` | `key` | the caller gave up |
//!
//! Leases have the same span, from [`KeyPool::lease`](crate::KeyPool::lease) to their answer.
//!
//! # The order of layers
//!
//! Layers for a whole request go outside: above `KeyRotationLayer` in a `ServiceBuilder`. They see one request without a
//! key and one response. Layers for each attempt go inside: they see every attempt, with its key.
//!
//! ```
//! use std::time::Duration;
//! use bytes::Bytes;
//! use http::{Request, Response};
//! use http_body_util::Full;
//! use tower::{ServiceBuilder, ServiceExt, service_fn, timeout::TimeoutLayer};
//! use tower_key_rotation::{Error, Failover, KeyPool, KeyRotationLayer};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
//! let pool = KeyPool::builder().key("alpha", "sk-1").key("beta", "sk-2").build()?;
//!
//! // a service that limits one of the two keys
//! let client = service_fn(async |request: Request<Full<Bytes>>| {
//!     let limited = request.headers()["authorization"] == "Bearer sk-1";
//!     let status = if limited { 429 } else { 200 };
//!     Ok::<_, std::io::Error>(Response::builder().status(status).body(Full::<Bytes>::default()).unwrap())
//! });
//! let client = ServiceBuilder::new()
//!     // the whole request, with all attempts and waits
//!     .layer(TimeoutLayer::new(Duration::from_secs(60)))
//!     .map_err(Error::into_inner)
//!     .layer(
//!         KeyRotationLayer::new(&pool)
//!             .failover(Failover::attempts(3))
//!             .wait_up_to(Duration::from_secs(30)),
//!     )
//!     // each attempt
//!     .layer(TimeoutLayer::new(Duration::from_secs(10)))
//!     .service(client);
//!
//! let request = Request::post("https://api.example.com/v1").body(Full::default())?;
//! assert_eq!(client.oneshot(request).await?.status(), 200);
//! assert_eq!(pool.stats().rate_limited, 1);
//! # Ok(())
//! # }
//! ```
//!
//! A layer that completes URIs, such as a base URI or an origin, goes outside as well: a request whose URI names no host
//! gets no key.
//!
//! Two pools may stand in one stack, or behind one another. Each acts on refusals of its own keys only.
//!
//! # Types
//!
//! The type of a layer says how it sends requests. [`Once`] and [`Waiting`] leave the response type as the client's;
//! [`Failover`](crate::Failover) makes an `http::Response<B>` an `http::Response<Replay<B>>`, see
//! [`Replay`](crate::Replay), because it reads the bodies of refused responses, within limits, to keep the connection.
//!
//! | | [`Once`] | [`Waiting`] | [`Failover`](crate::Failover) |
//! |---|---|---|---|
//! | request: `http::Request<B>` or `reqwest::Request` | any `B` | `Send` | `B` is `Clone` and a `Body`, or see [`clone_with`](crate::Failover::clone_with) |
//! | response: `http::Response<B>` or `reqwest::Response` | any `B` | `Send` | `B` is a `Body` |
//! | client | any | `Clone`, `Send` | `Clone`, `Send` |

mod attempts;
mod budget;
mod clone;
mod describe;
pub(crate) mod error;
mod experiment;
pub(crate) mod failover;
mod future;
mod gate;
mod judge;
pub(crate) mod key_lease;
pub(crate) mod key_leases;
pub(crate) mod key_rotation;
pub(crate) mod layer;
mod mode;
mod redact;
#[cfg(feature = "reqwest")]
pub(crate) mod redirects;
#[cfg(feature = "reqwest-middleware")]
mod reqwest_middleware;
pub(crate) mod reservation;
mod rotation;
mod send;
pub(crate) mod served_by;
mod stream_head;
mod stream_watch;
mod trace;

pub use self::{
    clone::TryClone,
    describe::{Describe, FromExtensions},
    mode::{Once, Waiting},
};
