//! The layer: a key for each request, and what comes of it.

pub(crate) mod error;
#[cfg(feature = "failover")]
pub mod failover;
pub mod layer;
mod redact;
#[cfg(feature = "reqwest")]
mod redirects;
#[cfg(feature = "reqwest-middleware")]
mod reqwest_middleware;
mod rotation;
#[cfg(feature = "failover")]
mod tried;

#[cfg(feature = "reqwest")]
pub use self::redirects::same_origin_redirects;
#[cfg(feature = "reqwest-middleware")]
pub use self::reqwest_middleware::KeyRotationMiddleware;
pub use self::{error::Error, rotation::ServedBy};
