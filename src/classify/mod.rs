//! Classifiers: they decide from a response whether its key rests.
//!
//! A [`ClassifyResponse`] turns a response into a [`Verdict`]. [`TooManyRequests`] is the default.
//! [`LlmGateway`] knows the errors of LLM services and LLM gateways. For any other service, pass a function:
//!
//! ```
//! use http::StatusCode;
//! use tower_key_rotation::{KeyPool, KeyRotationLayer, classify::{ResponseHead, Verdict}};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let pool = KeyPool::builder().key("alpha", "sk-1").build()?;
//! let layer = KeyRotationLayer::new(&pool).classify(|response: &ResponseHead<'_>| {
//!     match response.status() {
//!         StatusCode::TOO_MANY_REQUESTS => Verdict::RateLimited { wait: response.wait() },
//!         StatusCode::PAYMENT_REQUIRED => Verdict::Exhausted { wait: None },
//!         _ => Verdict::Nothing,
//!     }
//! });
//! # let _ = layer;
//! # Ok(())
//! # }
//! ```

mod classifier;
mod formats;
mod hint;
mod llm_gateway;
// Nothing reads the budgets yet.
mod remaining;
mod too_many_requests;

pub use self::{
    classifier::{ClassifyResponse, ResponseHead, Verdict},
    llm_gateway::LlmGateway,
    too_many_requests::TooManyRequests,
};
