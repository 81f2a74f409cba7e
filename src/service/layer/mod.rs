//! The middleware: a key for each request, a rest for a key that is limited.
//!
//! [`KeyRotationLayer`] wraps a client, which is any `tower::Service` over `http::Request` or, with the
//! feature `reqwest`, over `reqwest::Request`. For each request, [`KeyRotation`]
//!
//! 1. picks the next available key of its [`KeyPool`](crate::KeyPool), each in its turn,
//! 2. puts it where the pool's [`Inject`](crate::Inject) says, and calls the client,
//! 3. looks at the head of the response, and where it speaks against the key, rests the key.
//!
//! The response goes to the caller as it is. With no key available, the client is not called, and the error
//! is [`Error::NoKeyAvailable`](crate::Error::NoKeyAvailable). To have a limited request sent again with
//! another key, put a `FailoverLayer` around this one.
//!
//! ```
//! use http::{Request, Response};
//! use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
//! use tower_key_rotation::{KeyPool, KeyRotationLayer};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let pool = KeyPool::builder().key("alpha", "sk-1").build()?;
//!
//! let client = service_fn(async |request: Request<String>| {
//!     assert_eq!(request.headers()["authorization"], "Bearer sk-1");
//!     Ok::<_, std::io::Error>(Response::builder().status(429).body(String::new()).unwrap())
//! });
//! let mut client = ServiceBuilder::new()
//!     .layer(KeyRotationLayer::new(&pool))
//!     .service(client);
//!
//! let request = Request::post("https://api.example.com/v1").body(String::new())?;
//! let response = client.ready().await?.call(request).await?;
//! assert_eq!(response.status(), 429);
//! assert_eq!(pool.stats().rate_limited, 1);
//! # Ok(())
//! # }
//! ```

mod error_body;
mod future;
#[allow(clippy::module_inception)]
mod layer;
mod service;

pub use self::{
    error_body::{ReadErrorBody, ReadErrorBodyFuture},
    future::ResponseFuture,
    layer::{Bodies, ErrorBodies, HeadsOnly, KeyRotationLayer},
    service::KeyRotation,
};
