//! The audit log: changes by admins and by files, and failed sign-ins. Its lines have a target of their own, so that a
//! filter such as `warn,audit=info` keeps them, and a log collector finds them.

/// The target of audit lines.
pub(crate) const AUDIT: &str = "audit";
