//! The oracle: it knows all limits and all tokens, and its requests take no time to arrive.

use crate::{
    arrivals::Job,
    service::{Limits, MODELS, Quota, ServiceKind},
};

/// Returns how long each request waits.
///
/// The requests of a model are served in order, each at the earliest time that any key allows. Of several keys that
/// allow it at once, the oracle takes the one whose limit is full first, so that no capacity is lost.
pub(crate) fn waits(kind: ServiceKind, jobs: &[Job]) -> Vec<f64> {
    let mut limits = Limits::new(kind);
    let mut last = [0.0; MODELS];
    let wait = |job: &Job| {
        let from = job.arrives.max(last[job.model]);
        let key = |quotas: &[Quota; MODELS]| {
            let at = quotas[job.model].earliest(job, from);
            (at, quotas[job.model].time_to_full(at))
        };
        let by_time = |a: &(f64, f64), b: &(f64, f64)| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1));
        let keys = limits.quotas.iter().map(key).enumerate();
        let (chosen, (at, _)) = keys.min_by(|(_, a), (_, b)| by_time(a, b)).expect("a key");
        let quota = &mut limits.quotas[chosen][job.model];
        quota.start(job, at);
        quota.end(job, at);
        last[job.model] = at;
        at - job.arrives
    };
    jobs.iter().map(wait).collect()
}
