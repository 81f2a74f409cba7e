//! LiteLLM, a gateway to LLM services.

use super::super::rules::{Means::*, Rule, Rules, When::*};

const ERRORS: &str = "https://docs.litellm.ai/docs/proxy/users";
const TYPES: &str = "https://github.com/BerriAI/litellm/blob/main/litellm/proxy/_types.py";

pub(super) const RULES: &Rules = &[
    Rule {
        statuses: &[400, 401, 403],
        when: Code(&[
            "key_model_access_denied",
            "user_model_access_denied",
            "team_model_access_denied",
            "project_model_access_denied",
            "org_model_access_denied",
        ]),
        means: TheRequest,
        source: TYPES,
    },
    Rule {
        statuses: &[401],
        when: Code(&["token_not_found_in_db", "expired_key"]),
        means: Revoked,
        source: TYPES,
    },
    Rule {
        statuses: &[401],
        when: Begins(&[
            "invalid proxy server token passed",
            "authentication error, invalid proxy server token passed",
        ]),
        means: Revoked,
        source: "https://docs.litellm.ai/docs/proxy/virtual_keys",
    },
    Rule {
        statuses: &[400, 401, 429],
        when: Is("`budget_exceeded`, for one model", |answer| {
            answer.has_code_of(&["budget_exceeded"])
                && answer.message().starts_with("litellm ")
                && answer.message().contains("exceeded budget for model=")
        }),
        means: ScopeExhausted,
        source: ERRORS,
    },
    Rule { statuses: &[400, 401, 429], when: Code(&["budget_exceeded"]), means: Exhausted, source: ERRORS },
    Rule {
        statuses: &[400, 401, 429],
        when: Begins(&["budget has been exceeded"]),
        means: Exhausted,
        source: "https://github.com/BerriAI/litellm/issues/22726",
    },
];
