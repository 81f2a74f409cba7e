//! DeepSeek.

use super::super::rules::{Means::*, Rule, Rules, When::*, service};

service! {
    /// A classifier for DeepSeek.
    DeepSeek, "deepseek.md"
}

const ERRORS: &str = "https://api-docs.deepseek.com/quick_start/error_codes";

pub(super) const RULES: &Rules = &[
    Rule { statuses: &[400, 402], when: Begins(&["insufficient balance"]), means: Exhausted, source: ERRORS },
    Rule {
        statuses: &[401],
        when: BeginsAndContains("authentication fails, your api key:", &["is invalid"]),
        means: Revoked,
        source: ERRORS,
    },
];
