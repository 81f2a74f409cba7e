//! The oracle: a client that knows all limits and all tokens, and whose requests arrive at once.

use crate::{
    arrivals::Job,
    service::{Limits, MODELS, Quota, ServiceKind},
};

/// The results of the oracle.
pub(crate) struct Oracle {
    /// How long each served request waits, in seconds.
    pub(crate) waits: Vec<f64>,
    /// The share of the requests that the limits do not allow within the client's patience.
    pub(crate) failed: f64,
}

/// Serves the requests of each model in order, each at the earliest time that any key allows, and drops those that would
/// wait longer than `patience`.
///
/// If several keys allow a request at the same time, the oracle takes the key whose limit is full first. Capacity is lost
/// only while a limit is full, so this loses the least.
pub(crate) fn serve(kind: ServiceKind, jobs: &[Job], patience: f64) -> Oracle {
    let mut limits = Limits::new(kind);
    let mut last = [0.0; MODELS];
    let serve = |job: &Job| {
        let from = job.arrives.max(last[job.model]);
        let key = |quotas: &[Quota; MODELS]| {
            let at = quotas[job.model].earliest(job, from);
            (at, quotas[job.model].time_to_full(at))
        };
        let by_time = |a: &(f64, f64), b: &(f64, f64)| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1));
        let keys = limits.quotas.iter().map(key).enumerate();
        let (chosen, (at, _)) = keys.min_by(|(_, a), (_, b)| by_time(a, b)).expect("a key");
        if at - job.arrives > patience {
            return None;
        }
        let quota = &mut limits.quotas[chosen][job.model];
        quota.start(job, at);
        quota.end(job, at);
        last[job.model] = at;
        Some(at - job.arrives)
    };
    let waits: Vec<_> = jobs.iter().filter_map(serve).collect();
    let failed = 1.0 - waits.len() as f64 / jobs.len() as f64;
    Oracle { waits, failed }
}
