//! Notion.

use super::super::rules::{Means::*, Rule, Rules, When::*, service};

service! {
    /// A classifier for Notion.
    Notion, "notion.md"
}

const CODES: &str = "https://developers.notion.com/reference/status-codes";

pub(super) const RULES: &Rules = &[
    Rule {
        statuses: &[401],
        when: CodeAndBegins("unauthorized", &["api token is invalid", "the bearer token is not valid"]),
        means: Revoked,
        source: CODES,
    },
    Rule { statuses: &[403], when: Code(&["restricted_resource"]), means: TheRequest, source: CODES },
];
