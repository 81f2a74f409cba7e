//! The state of a pool, for the recorder of the `metrics` crate.

use super::key_pool::KeyPool;

impl KeyPool {
    /// Records the pool's state with the recorder of the [`metrics`](https://docs.rs/metrics) crate: call it before the
    /// metrics are read. A [`RecoveryHandle`](crate::RecoveryHandle) does so after each pass, too. Takes a time that
    /// grows with the number of keys and of limits in use; requests don't notice.
    ///
    /// The recorder is that of the calling thread, or the global one; without one, nothing happens. Each metric has the
    /// label `pool`, [the pool's name](crate::KeyPoolBuilder::name); none has a label for each key. The label `scope` is empty for
    /// requests without a scope. It names the first 100 scopes, and all others together as `(others)`.
    ///
    /// | metric | type | what |
    /// |---|---|---|
    /// | `key_rotation_keys` | gauge | keys by `status`: `healthy`, `rate_limited`, `exhausted`, `revoked`, `suspected`, `disabled` |
    /// | `key_rotation_unreadable_keys` | gauge | what the store holds that can't be used as a key |
    /// | `key_rotation_marks_waiting` | gauge | marks that the store does not have yet |
    /// | `key_rotation_next_return_seconds` | gauge | time until a key can be picked: 0 where one can be now, infinite where none comes back by itself |
    /// | `key_rotation_picks_total` | counter | requests that were given a key |
    /// | `key_rotation_marks_total` | counter | responses that had a key rest, or rest longer, by `reason`: `rate_limited`, `exhausted`, `revoked` |
    /// | `key_rotation_refusals_total` | counter | refusals that do not say whether they are about the key, by what `became` of the key: `suspected`; `acquitted`, since another key refused the same request; `confirmed`, since another key served it; `recovered`, since a trial succeeded |
    /// | `key_rotation_limited_despite_pacing_total` | counter | limited responses in a pool that is paced or has quotas, by `scope`: those that pacing failed to avoid, and those by which it finds limits |
    /// | `key_rotation_no_key_total` | counter | attempts that found no key, those among them that waited for one afterwards |
    /// | `key_rotation_unkeyed_total` | counter | requests that were sent without a key: to a host that gets none, or without a host |
    /// | `key_rotation_failovers_total` | counter | further attempts |
    /// | `key_rotation_failover_budget_used_up_total` | counter | further attempts that the budget did not allow |
    /// | `key_rotation_waiting` | gauge | requests that wait for a key in the queue of their `scope` |
    /// | `key_rotation_left` | gauge | what the limits of a `scope` still allow together, by `unit`: `requests`, `tokens` |
    /// | `key_rotation_limits` | gauge | limits of a `scope`, by how they are known, `known_by`: `quota`, `headers`, `refusals`, `distrusted` |
    /// | `key_rotation_wait_seconds` | histogram | how long requests waited for a key |
    /// | `key_rotation_pass_seconds` | histogram | how long the recovery's passes took |
    /// | `key_rotation_pass_failures_total` | counter | passes that failed |
    /// | `key_rotation_recovered_total` | counter | keys that passes have reset |
    /// | `key_rotation_store_errors_total` | counter | what the store failed at, by `operation`: `load`, `write`, `recover`, `usage`, `operate`, `replace` |
    ///
    /// ```
    /// use tower_key_rotation::KeyPool;
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let pool = KeyPool::builder().name("openai").key("alpha", "sk-1").build()?;
    /// // a Prometheus exporter's handler:
    /// pool.record_metrics();
    /// # Ok(())
    /// # }
    /// ```
    pub fn record_metrics(&self) {
        let totals = self.engine().totals(self.unreadable());
        let keys = [
            ("healthy", totals.healthy),
            ("rate_limited", totals.rate_limited),
            ("exhausted", totals.exhausted),
            ("revoked", totals.revoked),
            ("suspected", totals.suspected),
            ("disabled", totals.disabled),
        ];
        let next = self.next_return().map_or(f64::INFINITY, |time| time.as_secs_f64());
        self.meter().record(
            self.engine().picks(),
            &keys,
            &[
                ("key_rotation_unreadable_keys", totals.unreadable as f64),
                ("key_rotation_marks_waiting", totals.marks_waiting as f64),
                ("key_rotation_next_return_seconds", next),
            ],
        );
        let scopes = self.scopes();
        self.meter().record_scopes(scopes.iter().map(|scope| (scope.scope.as_ref(), scope.now())));
    }
}
