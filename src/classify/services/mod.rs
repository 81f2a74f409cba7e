//! The classifiers of single services, one file each.

mod anthropic;
mod azure_openai;
mod cohere;
mod deepseek;
mod discord;
mod gemini;
mod generic;
mod github;
mod groq;
mod grpc;
mod hugging_face;
mod litellm;
mod mistral;
mod notion;
mod openai;
mod openrouter;
#[cfg(test)]
mod pages;
mod shopify;
mod slack;
mod stripe;
mod xai;

pub use self::{
    anthropic::Anthropic, azure_openai::AzureOpenAi, cohere::Cohere, deepseek::DeepSeek, discord::Discord,
    gemini::Gemini, generic::Generic, github::GitHub, groq::Groq, grpc::Grpc, hugging_face::HuggingFace,
    mistral::Mistral, notion::Notion, openai::OpenAi, openrouter::OpenRouter, shopify::Shopify, slack::Slack,
    stripe::Stripe, xai::XAi,
};
use super::rules::Rules;

/// The rules of the LLM services, and of LiteLLM, a gateway before them. No rule of one contradicts another's.
pub(super) const OF_LLMS: [&Rules; 12] = [
    litellm::RULES,
    openai::RULES,
    azure_openai::RULES,
    anthropic::RULES,
    gemini::RULES,
    mistral::RULES,
    groq::RULES,
    openrouter::RULES,
    xai::RULES,
    deepseek::RULES,
    cohere::RULES,
    hugging_face::RULES,
];
