//! xAI.

use super::super::rules::{Means::*, Rule, Rules, When::*, service};

service! {
    /// A classifier for xAI.
    XAi, "xai.md"
}

pub(super) const RULES: &Rules = &[
    Rule {
        statuses: &[400, 401, 403],
        when: Begins(&["incorrect api key provided"]),
        means: Revoked,
        source: "https://docs.x.ai/docs/key-information/debugging",
    },
    Rule {
        statuses: &[403, 429],
        when: BeginsAndContains("your team ", &["used all available credits", "monthly spending limit"]),
        means: Exhausted,
        source: "https://github.com/continuedev/continue/issues/10373",
    },
    Rule {
        statuses: &[403, 429],
        when: Begins(&[
            "your newly created team doesn't have any credits",
            "your newly created teams doesn't have any credits",
            "you have run out of credits",
        ]),
        means: Exhausted,
        source: "https://github.com/continuedev/continue/issues/12670",
    },
    Rule {
        statuses: &[403],
        when: Begins(&["content violates usage guidelines"]),
        means: TheRequest,
        source: "https://docs.x.ai/docs/key-information/debugging",
    },
];
