//! Groq.

use super::super::rules::{Means::*, Rule, Rules, When::*, service};

service! {
    /// A classifier for Groq.
    Groq, "groq.md"
}

const ERRORS: &str = "https://console.groq.com/docs/errors";
const PERMISSIONS: &str = "https://console.groq.com/docs/model-permissions";

pub(super) const RULES: &Rules = &[
    Rule { statuses: &[401], when: Code(&["invalid_api_key"]), means: Revoked, source: ERRORS },
    Rule {
        statuses: &[400, 403],
        when: Code(&["organization_restricted"]),
        means: Revoked,
        source: "https://github.com/crewAIInc/crewAI/issues/783",
    },
    Rule {
        statuses: &[400, 403],
        when: Code(&["blocked_api_access"]),
        means: Exhausted,
        source: "https://console.groq.com/docs/spend-limits",
    },
    Rule {
        statuses: &[403],
        when: Code(&["model_permission_blocked_org", "model_permission_blocked_project"]),
        means: TheRequest,
        source: PERMISSIONS,
    },
    Rule {
        statuses: &[429],
        when: Begins(&["request too large for "]),
        means: TheRequest,
        source: "https://github.com/elizaOS/eliza/issues/4040",
    },
    Rule { statuses: &[498], when: Code(&["capacity_exceeded"]), means: TheService, source: ERRORS },
];
