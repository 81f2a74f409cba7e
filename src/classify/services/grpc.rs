//! gRPC.

use super::super::{
    answer::Answer,
    rules::{Means::*, Rule, Rules, When::*, service},
};

service! {
    /// A classifier for gRPC services.
    ///
    /// It reads the `grpc-status` of a response's head, which is where a service puts it if it sends no message. A
    /// `grpc-status` in trailers comes after the response was judged, so it has no effect. The wait comes from
    /// `grpc-retry-pushback-ms`, or from a `google.rpc.RetryInfo` in `grpc-status-details-bin`.
    ///
    /// Such a response has the status 200, so failover does not send its request again: the key rests, and the caller
    /// gets the response.
    Grpc, "grpc.md"
}

const CODES: &str = "https://grpc.github.io/grpc/core/md_doc_statuscodes.html";
const REASONS: &str = "https://github.com/googleapis/googleapis/blob/master/google/api/error_reason.proto";

pub(super) const RULES: &Rules = &[
    Rule {
        statuses: &[200],
        when: Is("`grpc-status` is 8, `RESOURCE_EXHAUSTED`", |answer| is(answer, 8)),
        means: Limited,
        source: CODES,
    },
    Rule {
        statuses: &[200],
        when: Code(&["api_key_invalid", "consumer_suspended"]),
        means: Revoked,
        source: REASONS,
    },
    Rule {
        statuses: &[200],
        when: Is("`grpc-status` is 16, `UNAUTHENTICATED`", |answer| is(answer, 16)),
        means: Refused,
        source: CODES,
    },
];

fn is(answer: &Answer<'_>, code: u32) -> bool {
    answer.grpc().is_some_and(|grpc| grpc.code == code)
}
