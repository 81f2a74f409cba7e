//! Azure OpenAI.

use std::time::Duration;

use super::super::{
    answer::Answer,
    rules::{Means::*, Reset, Rule, Rules, When::*, service},
};

service! {
    /// A classifier for Azure OpenAI, also behind Azure API Management.
    ///
    /// A 401 for a wrong key has the same words as one for a wrong endpoint.
    AzureOpenAi, "azure_openai.md"
}

pub(super) const RULES: &Rules = &[
    Rule {
        statuses: &[401, 403],
        when: Code(&["permissiondenied", "authorizationfailed"]),
        means: TheRequest,
        source: "https://learn.microsoft.com/azure/ai-foundry/openai/how-to/role-based-access-control",
    },
    Rule {
        statuses: &[403],
        when: Begins(&[
            "access denied due to virtual network/firewall rules",
            "public access is disabled. please configure private endpoint",
        ]),
        means: TheRequest,
        source: "https://learn.microsoft.com/azure/ai-services/cognitive-services-virtual-networks",
    },
    Rule {
        statuses: &[403],
        when: Begins(&["out of call volume quota"]),
        means: ExhaustedUntil(Reset { words: "the time that it names", wait: replenished }),
        source: "https://learn.microsoft.com/azure/api-management/quota-by-key-policy",
    },
    Rule {
        statuses: &[429],
        when: Begins(&["the system is currently experiencing high demand"]),
        means: TheService,
        source: "https://github.com/pollinations/pollinations/issues/6260",
    },
];

/// Reads `Quota will be replenished in 2.12:34:56`: days, if any, then hours, minutes and seconds.
fn replenished(answer: &Answer<'_>) -> Option<Duration> {
    let (_, time) = answer.message().split_once("replenished in ")?;
    let mut parts = time.trim_end_matches(['.', ' ']).split(':').rev();
    let mut next = || parts.next()?.parse::<u64>().ok();
    let (seconds, minutes) = (next()?, next()?);
    let hours = parts.next()?;
    let (days, hours) = hours.split_once('.').unwrap_or(("0", hours));
    let hours = days.parse::<u64>().ok()?.checked_mul(24)?.checked_add(hours.parse().ok()?)?;
    let minutes = hours.checked_mul(60)?.checked_add(minutes)?;
    Some(Duration::from_secs(minutes.checked_mul(60)?.checked_add(seconds)?))
}
