//! Shopify.

use super::super::rules::{Means::*, Rule, Rules, When::*, service};

service! {
    /// A classifier for Shopify's REST and GraphQL APIs.
    ///
    /// GraphQL reports a limit in the body of a 200. Layers read no such body, so that row counts only for a
    /// [`KeyLease`](crate::KeyLease) that is told the body.
    Shopify, "shopify.md"
}

const STATUSES: &str = "https://shopify.dev/docs/api/admin-rest#status_and_error_codes";

pub(super) const RULES: &Rules = &[
    Rule {
        statuses: &[200],
        when: Code(&["throttled"]),
        means: Limited,
        source: "https://shopify.dev/docs/api/usage/limits",
    },
    Rule {
        statuses: &[401],
        when: Begins(&["[api] invalid api key or access token"]),
        means: Revoked,
        source: STATUSES,
    },
    Rule {
        statuses: &[402],
        when: Begins(&["this shop's plan does not have access to this feature"]),
        means: TheRequest,
        source: STATUSES,
    },
    Rule {
        statuses: &[403],
        when: Begins(&["[api] this action requires merchant approval for "]),
        means: TheRequest,
        source: "https://pastebin.com/fUdeqNgG",
    },
];
