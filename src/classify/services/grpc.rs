//! gRPC.

use super::super::{
    answer::Answer,
    rules::{Means::*, Rule, Rules, When::*, service},
};

service! {
    /// A classifier for gRPC services.
    ///
    /// It reads the `grpc-status` of a response's head, which is where a service puts it if it sends no message, and of
    /// its trailers. The wait comes from `grpc-retry-pushback-ms`, or from a `google.rpc.RetryInfo` in
    /// `grpc-status-details-bin`.
    ///
    /// A layer sees trailers with [`failover`](crate::KeyRotationLayer::failover),
    /// [`read_error_bodies`](crate::KeyRotationLayer::read_error_bodies) or
    /// [`stream_head`](crate::KeyRotationLayer::stream_head). Failover sends a call again if its status is in the head, or
    /// in trailers that are there at once, without a message; and not if `grpc-retry-pushback-ms` is below zero. The
    /// request's body has to be one that can be cloned: see [`Failover::clone_with`](crate::Failover::clone_with).
    Grpc, "grpc.md", trailers: true
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
