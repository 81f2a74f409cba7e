//! The library's classifiers, by the names that the configuration has for them.

use std::{fmt, str::FromStr, sync::Arc};

use tower_key_rotation::classify::{
    Anthropic, AzureOpenAi, ClassifyResponse, Cohere, DeepSeek, Discord, Gemini, Generic, GitHub, Groq, Grpc,
    HuggingFace, LlmGateway, Mistral, Notion, OpenAi, OpenRouter, ResponseHead, Shopify, Slack, Stripe,
    TooManyRequests, Verdict, XAi,
};

/// What decides from a response whether its key can go on.
#[derive(Clone)]
pub(crate) struct Classifier {
    name: &'static str,
    by: Arc<dyn ClassifyResponse + Send + Sync>,
}

impl Classifier {
    fn of<C: ClassifyResponse + Default + Send + Sync + 'static>(name: &'static str) -> Self {
        Self { name, by: Arc::new(C::default()) }
    }

    fn all() -> [Self; 21] {
        [
            Self::default(),
            Self::of::<TooManyRequests>("429"),
            Self::of::<Anthropic>("anthropic"),
            Self::of::<AzureOpenAi>("azure-openai"),
            Self::of::<Cohere>("cohere"),
            Self::of::<DeepSeek>("deepseek"),
            Self::of::<Discord>("discord"),
            Self::of::<Gemini>("gemini"),
            Self::of::<Generic>("generic"),
            Self::of::<GitHub>("github"),
            Self::of::<Groq>("groq"),
            Self::of::<Grpc>("grpc"),
            Self::of::<HuggingFace>("hugging-face"),
            Self::of::<Mistral>("mistral"),
            Self::of::<Notion>("notion"),
            Self::of::<OpenAi>("openai"),
            Self::of::<OpenRouter>("openrouter"),
            Self::of::<Shopify>("shopify"),
            Self::of::<Slack>("slack"),
            Self::of::<Stripe>("stripe"),
            Self::of::<XAi>("xai"),
        ]
    }
}

impl Default for Classifier {
    fn default() -> Self {
        Self::of::<LlmGateway>("llm")
    }
}

impl FromStr for Classifier {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = Self::all();
        let names = || all.iter().map(|classifier| classifier.name).collect::<Vec<_>>().join(", ");
        all.iter()
            .find(|classifier| classifier.name == text)
            .cloned()
            .ok_or_else(|| format!("it is one of {}", names()))
    }
}

impl PartialEq for Classifier {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for Classifier {}

impl fmt::Debug for Classifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl ClassifyResponse for Classifier {
    fn classify(&self, response: &ResponseHead<'_>) -> Verdict {
        self.by.classify(response)
    }

    fn wants_body(&self, response: &ResponseHead<'_>) -> bool {
        self.by.wants_body(response)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use http::{HeaderMap, StatusCode};

    use super::*;

    #[test]
    fn each_name_stands_for_another_classifier() {
        let all = Classifier::all();
        assert_eq!(all.iter().map(|classifier| classifier.name).collect::<HashSet<_>>().len(), all.len());
        for classifier in &all {
            assert_eq!(classifier.name.parse::<Classifier>().as_ref(), Ok(classifier));
        }
        let headers = HeaderMap::new();
        let body = br#"{"error":{"code":"invalid_api_key"}}"#;
        let response = ResponseHead::new(StatusCode::UNAUTHORIZED, &headers).with_body(body);
        let verdict = |name: &str| name.parse::<Classifier>().unwrap().classify(&response);
        assert_eq!((verdict("groq"), verdict("429")), (Verdict::Revoked, Verdict::Nothing));
    }
}
