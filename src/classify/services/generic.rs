//! Any service.

use super::super::rules::{Rules, service};

service! {
    /// A classifier for any service: it knows no words, so it decides by the status and by the wait.
    Generic, "generic.md"
}

pub(super) const RULES: &Rules = &[];
