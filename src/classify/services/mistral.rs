//! Mistral.

use super::super::rules::{Means::*, Rule, Rules, When::*, service};

service! {
    /// A classifier for Mistral.
    ///
    /// A 401 for a quota that is used up has the same words as one for an invalid key.
    Mistral, "mistral.md"
}

pub(super) const RULES: &Rules = &[Rule {
    statuses: &[429],
    when: Begins(&["service tier capacity exceeded for this model"]),
    means: Limited,
    source: "https://github.com/continuedev/continue/issues/6185",
}];
