//! Cohere.

use super::super::rules::{Means::*, Rule, Rules, When::*, service};

service! {
    /// A classifier for Cohere.
    Cohere, "cohere.md"
}

const ERRORS: &str = "https://docs.cohere.com/reference/errors";

pub(super) const RULES: &Rules = &[
    Rule { statuses: &[401], when: Begins(&["invalid api token"]), means: Revoked, source: ERRORS },
    Rule {
        statuses: &[402],
        when: Begins(&["please add or update your payment method"]),
        means: Exhausted,
        source: ERRORS,
    },
    Rule {
        statuses: &[429],
        when: BeginsAndContains("you are using a trial key, which is limited to", &["calls / month"]),
        means: Exhausted,
        source: "https://docs.cohere.com/docs/rate-limits",
    },
];
