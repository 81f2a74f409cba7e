//! GitHub.

use super::super::rules::{Means::*, Rule, Rules, When::*, service};

service! {
    /// A classifier for GitHub's REST and GraphQL APIs.
    ///
    /// GitHub counts its resources apart: core, search, GraphQL and others. Name them as the request's
    /// [scope](crate::Traits::scope), and a limit of one rests the key for that one.
    GitHub, "github.md"
}

const LIMITS: &str = "https://docs.github.com/en/rest/using-the-rest-api/rate-limits-for-the-rest-api";
const GRAPHQL: &str =
    "https://docs.github.com/en/graphql/overview/rate-limits-and-query-limits-for-the-graphql-api";
const TROUBLE: &str = "https://docs.github.com/en/rest/using-the-rest-api/troubleshooting-the-rest-api";

pub(super) const RULES: &Rules = &[
    Rule {
        statuses: &[200],
        when: Is("`x-ratelimit-resource: graphql` and `x-ratelimit-remaining: 0`", |answer| {
            answer.header("x-ratelimit-resource") == Some("graphql")
                && answer.header("x-ratelimit-remaining") == Some("0")
        }),
        means: Limited,
        source: GRAPHQL,
    },
    Rule {
        statuses: &[403, 429],
        when: Begins(&[
            "api rate limit exceeded",
            "api rate limit already exceeded",
            "you have exceeded a secondary rate limit",
            "you have triggered an abuse detection mechanism",
        ]),
        means: Limited,
        source: LIMITS,
    },
    Rule {
        statuses: &[403],
        when: Begins(&["maximum number of login attempts exceeded"]),
        means: Limited,
        source: "https://docs.github.com/en/rest/authentication/authenticating-to-the-rest-api",
    },
    Rule { statuses: &[401], when: Begins(&["bad credentials"]), means: Revoked, source: TROUBLE },
    Rule {
        statuses: &[403],
        when: Begins(&["sorry. your account was suspended"]),
        means: Revoked,
        source: "https://github.com/sourcegraph/sourcegraph-public-snapshot/issues/16638",
    },
    Rule {
        statuses: &[403],
        when: Begins(&[
            "resource not accessible by ",
            "must have admin rights to repository",
            "resource protected by organization saml enforcement",
            "although you appear to have the correct authorization credentials",
            "request forbidden by administrative rules",
            "repository access blocked",
            "repository was archived so is read-only",
        ]),
        means: TheRequest,
        source: TROUBLE,
    },
];
