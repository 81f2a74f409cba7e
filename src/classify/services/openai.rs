//! OpenAI.

use super::super::rules::{Means::*, Rule, Rules, When::*, service};

service! {
    /// A classifier for OpenAI.
    OpenAi, "openai.md"
}

const ERRORS: &str = "https://developers.openai.com/docs/guides/error-codes";

pub(super) const RULES: &Rules = &[
    Rule {
        statuses: &[401, 403],
        when: Code(&[
            "model_not_found",
            "mismatched_organization",
            "invalid_organization",
            "mismatched_project",
            "missing_scope",
            "ip_not_authorized",
            "unsupported_country_region_territory",
        ]),
        means: TheRequest,
        source: ERRORS,
    },
    Rule {
        statuses: &[401, 403],
        when: Begins(&[
            "you have insufficient permissions for this operation",
            "you are not allowed to sample from this model",
        ]),
        means: TheRequest,
        source: "https://github.com/microsoft/PowerToys/issues/32989",
    },
    Rule {
        statuses: &[401],
        when: Code(&["invalid_api_key", "account_deactivated"]),
        means: Revoked,
        source: "https://github.com/ChatGPTNextWeb/NextChat/issues/4175",
    },
    Rule {
        statuses: &[401],
        when: Begins(&[
            "incorrect api key provided",
            "this key is associated with a deactivated account",
            "the openai account associated with this api key has been deactivated",
            "your openai account has been deactivated",
        ]),
        means: Revoked,
        source: ERRORS,
    },
    Rule {
        statuses: &[403, 429],
        when: Code(&["access_terminated"]),
        means: Revoked,
        source: "https://github.com/ChatGPTNextWeb/NextChat/issues/1719",
    },
    Rule {
        statuses: &[400, 402, 403, 429],
        when: Code(&[
            "insufficient_quota",
            "credit_balance_exhausted",
            "billing_hard_limit_reached",
            "billing_not_active",
        ]),
        means: Exhausted,
        source: ERRORS,
    },
    Rule {
        statuses: &[429],
        when: Begins(&["request too large for "]),
        means: TheRequest,
        source: "https://github.com/Aider-AI/aider/issues/1880",
    },
];
