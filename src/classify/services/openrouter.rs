//! OpenRouter.

use serde_json::Value;

use super::super::rules::{Means::*, Reset, Rule, Rules, When::*, service};

service! {
    /// A classifier for OpenRouter.
    ///
    /// A 402 for a request that costs more than is left says nothing of the next one.
    OpenRouter, "openrouter.md"
}

const ERRORS: &str = "https://openrouter.ai/docs/api-reference/errors";
const LIMITS: &str = "https://openrouter.ai/docs/api-reference/limits";

pub(super) const RULES: &Rules = &[
    Rule {
        statuses: &[403],
        when: Is("`metadata` has `flagged_input`: the moderation's", |answer| {
            answer.member("/metadata/flagged_input").is_some()
        }),
        means: TheRequest,
        source: ERRORS,
    },
    Rule {
        statuses: &[402],
        when: Begins(&["insufficient credits", "your account or api key has insufficient credits"]),
        means: Exhausted,
        source: ERRORS,
    },
    Rule {
        statuses: &[402, 403],
        when: Begins(&["key limit exceeded"]),
        means: Exhausted,
        source: "https://github.com/RooCodeInc/Roo-Code/issues/515",
    },
    Rule {
        statuses: &[429],
        when: Begins(&["rate limit exceeded: free-models-per-day"]),
        means: ScopeExhaustedUntil(Reset {
            words: "the time that its metadata names",
            wait: |answer| answer.wait(),
        }),
        source: LIMITS,
    },
    Rule {
        statuses: &[429],
        when: Is("`metadata` has `provider_name`: that provider's limit, for all of OpenRouter", |answer| {
            answer.member("/metadata/provider_name").is_some_and(Value::is_string)
                && answer.message().starts_with("provider returned error")
        }),
        means: TheService,
        source: ERRORS,
    },
];
