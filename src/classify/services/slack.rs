//! Slack.

use super::super::rules::{Means::*, Rule, Rules, When::*, service};

service! {
    /// A classifier for Slack.
    ///
    /// Slack reports most errors in the body of a 200. Layers read no such body, so those rows count only for a
    /// [`KeyLease`](crate::KeyLease) that is told the body.
    Slack, "slack.md"
}

const ERRORS: &str = "https://docs.slack.dev/reference/methods/auth.test";

pub(super) const RULES: &Rules = &[
    Rule {
        statuses: &[200],
        when: Code(&["ratelimited"]),
        means: Limited,
        source: "https://docs.slack.dev/apis/web-api/rate-limits",
    },
    Rule {
        statuses: &[200, 401, 403],
        when: Code(&["token_revoked", "account_inactive", "invalid_auth"]),
        means: Revoked,
        source: ERRORS,
    },
    Rule { statuses: &[200], when: Code(&["token_expired"]), means: Refused, source: ERRORS },
];
