//! A limited request is sent again, with another key.
//!
//! [`FailoverLayer`] stands around a [`KeyRotationLayer`](crate::KeyRotationLayer) over the same pool. Where
//! a response speaks against its key, and another key is available, the request is sent again at once with
//! that. The decision is made on the head: a response that has begun to stream to the caller is never sent
//! for again.
//!
//! - At most 3 attempts are made for a request, and over all requests no more than a
//!   [budget](FailoverLayer::budget) allows, so that an account-wide limit does not become a walk through all
//!   keys.
//! - None is made with a key that the request was limited on. Which those are is known to a rotation that is called
//!   while the failover calls it: a layer in between that calls later, as a buffer does, may have one tried twice where
//!   its cooldown was a second or less.
//! - Where no other key is available, the caller gets the limited response itself.
//! - A request that can't be cloned, because its body streams, is sent once.
//! - The body of a limited response is read, within limits, before the next attempt, so that an HTTP/1.1
//!   connection is kept.
//! - With [`wait_up_to`](FailoverLayer::wait_up_to), a request for which there is no key waits for one.
//!
//! ```
//! use std::time::Duration;
//! use http::{Request, Response};
//! use http_body_util::Full;
//! use bytes::Bytes;
//! use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
//! use tower_key_rotation::{FailoverLayer, KeyPool, KeyRotationLayer};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let pool = KeyPool::builder().key("alpha", "sk-1").key("beta", "sk-2").build()?;
//!
//! // a service that limits one of the two keys
//! let client = service_fn(async |request: Request<Full<Bytes>>| {
//!     let limited = request.headers()["authorization"] == "Bearer sk-1";
//!     let status = if limited { 429 } else { 200 };
//!     Ok::<_, std::io::Error>(Response::builder().status(status).body(Full::<Bytes>::default()).unwrap())
//! });
//! let mut client = ServiceBuilder::new()
//!     .layer(FailoverLayer::new(&pool).wait_up_to(Duration::from_secs(5)))
//!     .layer(KeyRotationLayer::new(&pool))
//!     .service(client);
//!
//! let request = Request::post("https://api.example.com/v1").body(Full::default())?;
//! assert_eq!(client.ready().await?.call(request).await?.status(), 200);
//! assert_eq!(pool.stats().rate_limited, 1);
//! # Ok(())
//! # }
//! ```

mod attempts;
mod budget;
mod clone;
mod gate;
mod layer;
mod policy;
mod service;

#[cfg(feature = "reqwest-middleware")]
pub(crate) use self::{
    attempts::{SendOnce, Sending, send_with_failover},
    policy::FailoverPolicy,
};
pub use self::{
    clone::{CloneRequest, TryClone},
    layer::FailoverLayer,
    service::{Failover, FailoverFuture},
};
