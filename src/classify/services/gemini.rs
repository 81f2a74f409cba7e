//! Gemini.

use std::time::Duration;

use serde_json::Value;

use super::super::{
    answer::Answer,
    rules::{Means::*, Reset, Rule, Rules, When::*, service},
};
use crate::limit::Civil;

service! {
    /// A classifier for Gemini. Most of it is true of any service of Google.
    ///
    /// A quota per day is reset at midnight Pacific time. The `retryDelay` that comes with it, usually less than a
    /// minute, is wrong.
    Gemini, "gemini.md"
}

const REASONS: &str = "https://github.com/googleapis/googleapis/blob/master/google/api/error_reason.proto";
const LIMITS: &str = "https://ai.google.dev/gemini-api/docs/rate-limits";

const MIDNIGHT: Reset = Reset { words: "midnight Pacific time", wait: midnight };

pub(super) const RULES: &Rules = &[
    Rule {
        statuses: &[400, 401, 403],
        when: Code(&["api_key_invalid", "consumer_suspended"]),
        means: Revoked,
        source: REASONS,
    },
    Rule {
        statuses: &[403],
        when: Begins(&["your api key was reported as leaked"]),
        means: Revoked,
        source: "https://github.com/continuedev/continue/issues/11541",
    },
    Rule { statuses: &[403], when: Code(&["billing_disabled"]), means: Exhausted, source: REASONS },
    Rule {
        statuses: &[401, 403],
        when: Code(&[
            "iam_permission_denied",
            "access_token_scope_insufficient",
            "user_project_denied",
            "location_policy_violated",
            "location_org_policy_violated",
        ]),
        means: TheRequest,
        source: REASONS,
    },
    Rule {
        statuses: &[403],
        when: Begins(&["you do not have permission to access the ", "the caller does not have permission"]),
        means: TheRequest,
        source: "https://ai.google.dev/gemini-api/docs/troubleshooting",
    },
    Rule {
        statuses: &[429],
        when: Is("a `QuotaFailure` whose `quotaId` has `PerDay`, of one model", |answer| {
            per_day(answer).next().is_some() && per_day(answer).all(is_per_model)
        }),
        means: ScopeExhaustedUntil(MIDNIGHT),
        source: LIMITS,
    },
    Rule {
        statuses: &[429],
        when: Is("another `QuotaFailure` whose `quotaId` has `PerDay`", |answer| {
            per_day(answer).next().is_some()
        }),
        means: ExhaustedUntil(MIDNIGHT),
        source: LIMITS,
    },
];

/// The quotas per day that a request exceeded.
fn per_day<'a>(answer: &'a Answer<'_>) -> impl Iterator<Item = &'a Value> {
    let failures = answer.details("google.rpc.QuotaFailure");
    let quotas = failures.filter_map(|detail| detail.get("violations")?.as_array()).flatten();
    quotas.filter(|quota| has_in_id(quota, "PerDay"))
}

fn has_in_id(quota: &Value, words: &str) -> bool {
    quota.get("quotaId").and_then(Value::as_str).is_some_and(|id| id.contains(words))
}

fn is_per_model(quota: &Value) -> bool {
    let is_named = ["PerModel", "PerBaseModel"].iter().any(|words| has_in_id(quota, words));
    is_named || quota.pointer("/quotaDimensions/model").is_some()
}

fn midnight(answer: &Answer<'_>) -> Option<Duration> {
    let now = answer.time();
    let midnight = Civil::new("00:00", "America/Los_Angeles").ok()?.next_day(now.as_secs());
    Duration::from_secs(midnight).checked_sub(now)
}
