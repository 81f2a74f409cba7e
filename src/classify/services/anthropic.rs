//! Anthropic.

use std::time::Duration;

use jiff::{civil::DateTime, tz::Offset};

use super::super::{
    answer::Answer,
    rules::{Means::*, Reset, Rule, Rules, When::*, service},
};

service! {
    /// A classifier for Anthropic.
    Anthropic, "anthropic.md"
}

const ERRORS: &str = "https://docs.claude.com/en/api/errors";
const SPEND_LIMITS: &str =
    "https://learn.microsoft.com/microsoft-cloud/dev/dev-proxy/concepts/anthropic-529-overloaded-error";

pub(super) const RULES: &Rules = &[
    Rule {
        statuses: &[401],
        when: CodeAndBegins("authentication_error", &["invalid x-api-key"]),
        means: Revoked,
        source: "https://github.com/eyaltoledano/claude-task-master/issues/222",
    },
    Rule {
        statuses: &[401, 403],
        when: Begins(&["oauth token has been revoked"]),
        means: Revoked,
        source: "https://github.com/anthropics/claude-code/issues/9635",
    },
    Rule {
        statuses: &[400, 401, 403],
        when: Begins(&["this organization has been disabled"]),
        means: Revoked,
        source: "https://github.com/anthropics/claude-code/issues/19028",
    },
    Rule { statuses: &[402], when: Code(&["billing_error"]), means: Exhausted, source: ERRORS },
    Rule {
        statuses: &[400, 402, 403],
        when: Begins(&["your credit balance is too low"]),
        means: Exhausted,
        source: "https://github.com/anthropics/claude-quickstarts/issues/229",
    },
    Rule {
        statuses: &[400, 403, 429],
        when: Begins(&[
            "you have reached your specified api usage limits",
            "you have reached your specified workspace api usage limits",
        ]),
        means: ExhaustedUntil(Reset { words: "the date that it names", wait: regain_access }),
        source: "https://github.com/anthropics/claude-code/issues/2127",
    },
    Rule {
        statuses: &[429],
        when: Code(&["enforced_spend_limit_reached"]),
        means: Exhausted,
        source: SPEND_LIMITS,
    },
    Rule {
        statuses: &[429],
        when: Begins(&["extra usage is required for long context requests"]),
        means: TheRequest,
        source: "https://github.com/anthropics/claude-code/issues/29584",
    },
    Rule {
        statuses: &[401, 403],
        when: Begins(&["oauth "]),
        means: Refused,
        source: "https://github.com/anthropics/claude-code/issues/4293",
    },
    Rule { statuses: &[401, 403], when: Code(&["permission_error"]), means: TheRequest, source: ERRORS },
    Rule {
        statuses: &[403],
        when: CodeAndBegins("forbidden", &["request not allowed"]),
        means: TheRequest,
        source: "https://github.com/enricoros/big-AGI/issues/176",
    },
    Rule { statuses: &[429, 503, 529], when: Code(&["overloaded_error"]), means: TheService, source: ERRORS },
];

/// Reads `You will regain access on 2025-07-01 at 00:00 UTC.`
fn regain_access(answer: &Answer<'_>) -> Option<Duration> {
    let (_, time) = answer.message().split_once("regain access on ")?;
    let (time, _) = time.split_once(" utc")?;
    let time = Offset::UTC.to_timestamp(DateTime::strptime("%Y-%m-%d at %H:%M", time).ok()?).ok()?;
    Duration::try_from(time.as_duration()).ok()?.checked_sub(answer.time())
}
