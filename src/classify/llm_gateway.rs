//! A classifier for LLM services and LLM gateways.

use super::{rules::by_rules, services::OF_LLMS};

/// A classifier for LLM services and LLM gateways: the union of [`OpenAi`](super::OpenAi),
/// [`AzureOpenAi`](super::AzureOpenAi), [`Anthropic`](super::Anthropic), [`Gemini`](super::Gemini),
/// [`Mistral`](super::Mistral), [`Groq`](super::Groq), [`OpenRouter`](super::OpenRouter), [`XAi`](super::XAi),
/// [`DeepSeek`](super::DeepSeek), [`Cohere`](super::Cohere) and [`HuggingFace`](super::HuggingFace), and of the table
/// below, which is LiteLLM's.
///
/// Turn on [`KeyRotationLayer::read_error_bodies`](crate::KeyRotationLayer::read_error_bodies). Without it, this
/// classifier decides from status and headers alone: it takes each 401, 402 and 403 for
/// [`Refused`](super::Verdict::Refused), each 429 for a rate limit, and ignores every other status.
///
/// Only unmistakable words revoke or exhaust a key. For all other refusals, the answer to another key shows whether the
/// service refuses the request or the key.
///
/// ```
/// use tower_key_rotation::{KeyPool, KeyRotationLayer, classify::LlmGateway};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let pool = KeyPool::builder().key("alpha", "sk-1").build()?;
/// let layer = KeyRotationLayer::new(&pool)
///     .classify(LlmGateway::new())
///     .read_error_bodies(16 * 1024);
/// # let _ = layer;
/// # Ok(())
/// # }
/// ```
///
#[doc = include_str!("services/litellm.md")]
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct LlmGateway;

impl LlmGateway {
    /// Creates the classifier.
    #[must_use]
    pub fn new() -> Self {
        Self
    }
}

by_rules!(LlmGateway, OF_LLMS);
