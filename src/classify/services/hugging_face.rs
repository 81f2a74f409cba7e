//! Hugging Face.

use super::super::rules::{Means::*, Rule, Rules, When::*, service};

service! {
    /// A classifier for Hugging Face: its hub and its inference providers.
    ///
    /// A 401 about credentials has come for valid tokens, too, so it revokes none.
    HuggingFace, "hugging_face.md"
}

const HUB: &str =
    "https://github.com/huggingface/huggingface_hub/blob/main/src/huggingface_hub/utils/_http.py";

pub(super) const RULES: &Rules = &[
    Rule {
        statuses: &[401, 403],
        when: Header(
            "x-error-code",
            &["RepoNotFound", "GatedRepo", "RevisionNotFound", "EntryNotFound", "DisabledRepo"],
        ),
        means: TheRequest,
        source: HUB,
    },
    Rule {
        statuses: &[403],
        when: Begins(&["this authentication method does not have sufficient permissions"]),
        means: TheRequest,
        source: "https://github.com/huggingface/agents-course/issues/558",
    },
    Rule {
        statuses: &[402],
        when: Begins(&["you have exceeded your monthly included credits"]),
        means: Exhausted,
        source: "https://github.com/huggingface/agents-course/issues/386",
    },
];
