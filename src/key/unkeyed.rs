//! Requests that are sent without a key: counted, and logged once for each host.

use std::{
    array,
    hash::{DefaultHasher, Hash, Hasher},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use super::hosts::NoKeyBecause;

/// How many hosts are logged; further ones are only counted.
const LOGGED_AT_MOST: usize = 64;

#[derive(Debug)]
pub(crate) struct Unkeyed {
    sent: AtomicU64,
    /// Hashes of the hosts that have been logged; 0 for none. Without a lock: a proxy may send most requests so.
    logged: [AtomicU64; LOGGED_AT_MOST],
}

impl Default for Unkeyed {
    fn default() -> Self {
        Self { sent: AtomicU64::new(0), logged: array::from_fn(|_| AtomicU64::new(0)) }
    }
}

impl Unkeyed {
    #[cold]
    pub(crate) fn sent(&self, host: Option<&str>, because: NoKeyBecause) {
        self.sent.fetch_add(1, Relaxed);
        if !self.is_first(host.unwrap_or_default()) {
            return;
        }
        match because {
            NoKeyBecause::NoHost => tracing::warn!(
                "a request was sent without a key: its URI names no host. Put `KeyRotationLayer` inside the layer \
                 that completes URIs, or complete the URI before"
            ),
            NoKeyBecause::HostNotAllowed => {
                tracing::warn!(host, "a request was sent without a key: its host is not in `allowed_hosts`");
            }
            NoKeyBecause::NoScheme => tracing::warn!(
                host,
                "a request was sent without a key: its URI has no scheme, so it may travel in cleartext. Name the \
                 host in `allowed_hosts`, or complete the URI before"
            ),
        }
    }

    pub(crate) fn count(&self) -> u64 {
        self.sent.load(Relaxed)
    }

    /// Whether that host is to be logged now.
    fn is_first(&self, host: &str) -> bool {
        let mut hasher = DefaultHasher::new();
        host.to_ascii_lowercase().hash(&mut hasher);
        let hash = hasher.finish().max(1);
        let free_or_known = |logged: &AtomicU64| {
            let known = logged.compare_exchange(0, hash, Relaxed, Relaxed);
            known.map_or_else(|known| (known == hash).then_some(false), |_| Some(true))
        };
        self.logged.iter().find_map(free_or_known).unwrap_or(false)
    }
}
