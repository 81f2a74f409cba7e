//! Discord.

use super::super::rules::{Means::*, Rule, Rules, When::*, service};

service! {
    /// A classifier for Discord.
    Discord, "discord.md"
}

const CODES: &str = "https://discord.com/developers/docs/topics/opcodes-and-status-codes";

pub(super) const RULES: &Rules = &[
    Rule { statuses: &[401, 403], when: Code(&["50014"]), means: Revoked, source: CODES },
    Rule {
        statuses: &[403],
        // Access, permissions, and what is true of a guild, a channel or a user.
        when: Code(&[
            "20001", "20002", "20009", "20012", "20018", "30001", "40007", "50001", "50003", "50007",
            "50009", "50013", "50020", "50021", "50024", "50068", "50083", "50095", "60003", "160002",
            "200000", "200001",
        ]),
        means: TheRequest,
        source: CODES,
    },
];
