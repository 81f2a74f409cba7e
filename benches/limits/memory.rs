//! The memory of a limit.

use tower_key_rotation::{KeyPool, Quota, Traits};

use crate::{
    pools::{self, lease},
    support::compare::{Bar, is_benchmark},
};

pub(crate) fn run() {
    let keys = if is_benchmark() { 10_000 } else { 100 };
    let headers = pools::of_requests();
    let learned = bytes(keys, pools::builder(keys).paced().build().unwrap(), |pool, traits| {
        pools::learn(pool, keys, traits, &headers);
    });
    let quota = Quota::per_minute(60).burst(10);
    let configured = bytes(keys, pools::builder(keys).quota(quota).build().unwrap(), |pool, traits| {
        (0..keys).for_each(|_| drop(lease(pool, traits)));
    });
    println!();
    Bar::AtMost(192.0).print("memory of a limit with one budget, learned", learned.limit, " B");
    Bar::AtMost(192.0).print("memory of a limit with one budget, configured", configured.limit, " B");
    println!("for each key of a scope, beside its limit: {} B", learned.scope);
}

struct Bytes {
    limit: f64,
    scope: f64,
}

fn bytes(keys: usize, pool: KeyPool, use_each_key: impl Fn(&KeyPool, &Traits)) -> Bytes {
    let traits = Traits::new().scope("model");
    let of_scope = allocation_counter::measure(|| drop(lease(&pool, &traits)));
    let of_limits = allocation_counter::measure(|| use_each_key(&pool, &traits));
    // In whole bytes: the first key's limit was made together with its scope, and may learn only now.
    let each = |bytes: i64, number: usize| (bytes as f64 / number as f64).round();
    Bytes { limit: each(of_limits.bytes_current, keys - 1), scope: each(of_scope.bytes_current, keys) }
}
