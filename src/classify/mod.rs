//! Classifiers: they decide from a response whether its key rests.
//!
//! A [`ClassifyResponse`] turns a response into a [`Verdict`]. [`TooManyRequests`] is the default.
//! Each of the others knows the errors of one service, and [`LlmGateway`] those of all LLM services. [`Generic`] is for a
//! service that is not here. Or pass a function:
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

mod answer;
mod classifier;
mod decoded;
mod events;
mod formats;
mod grpc_status;
mod hint;
mod llm_gateway;
mod remaining;
mod rules;
mod services;
mod stream_event;
mod too_many_requests;

pub(crate) use self::{
    decoded::decoded,
    events::{Event, Events},
    grpc_status::{forbids_retry, is_error as is_grpc_error},
    stream_event::{Said, StreamError, may_be_error},
};

pub use self::{
    classifier::{ClassifyResponse, ResponseHead, Verdict},
    llm_gateway::LlmGateway,
    services::{
        Anthropic, AzureOpenAi, Cohere, DeepSeek, Discord, Gemini, Generic, GitHub, Groq, Grpc, HuggingFace,
        Mistral, Notion, OpenAi, OpenRouter, Shopify, Slack, Stripe, XAi,
    },
    too_many_requests::TooManyRequests,
};
