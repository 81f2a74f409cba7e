//! Stripe.

use super::super::rules::{Means::*, Rule, Rules, When::*, service};

service! {
    /// A classifier for Stripe.
    Stripe, "stripe.md"
}

const CODES: &str = "https://docs.stripe.com/error-codes";
const ERRORS: &str = "https://docs.stripe.com/api/errors";

pub(super) const RULES: &Rules = &[
    Rule {
        statuses: &[402],
        when: Code(&["card_error", "invalid_request_error", "idempotency_error"]),
        means: TheRequest,
        source: ERRORS,
    },
    Rule {
        statuses: &[401],
        when: Code(&["api_key_expired", "platform_api_key_expired"]),
        means: Revoked,
        source: CODES,
    },
    Rule {
        statuses: &[401],
        when: Begins(&["invalid api key provided", "expired api key provided"]),
        means: Revoked,
        source: "https://github.com/expo/stripe-expo/issues/25",
    },
    Rule {
        statuses: &[401, 403],
        when: Code(&["account_invalid", "secret_key_required", "testmode_charges_only"]),
        means: TheRequest,
        source: CODES,
    },
    Rule { statuses: &[403], when: Begins(&["the provided key "]), means: TheRequest, source: ERRORS },
    Rule {
        statuses: &[429],
        when: Code(&["lock_timeout"]),
        means: TheRequest,
        source: "https://docs.stripe.com/rate-limits",
    },
];
