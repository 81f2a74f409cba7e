//! The pool and its store: passes every 30 seconds, marks that are written, and stores that misbehave.

mod support;

use std::{
    collections::HashSet,
    sync::{Arc, mpsc},
    time::Duration,
};

use futures_util::FutureExt;
use support::{
    model::{Answer, Caller, FINE, LIMITED},
    *,
};
use tokio::task::JoinHandle;
use tower::Layer;
use tower_key_rotation::{
    KeyId, KeyPool, KeyRotationLayer, KeySpec, NotWritten, OperateError, RecoveryConfig, RecoveryHandle,
    Rest, Status,
    clock::ManualClock,
    store::{
        Change, KeyStore, Mark, MemoryStore, Operation, Resting, Scope, StoreError, Until, Usage, Words,
    },
};

const INTERVAL: Duration = Duration::from_secs(30);

fn id(name: &str) -> KeyId {
    KeyId::new(name).unwrap()
}

fn limited(left: Duration) -> Option<Resting> {
    Some(Resting { until: Until::After(left), reason: Rest::RateLimited })
}

fn at_once() -> RecoveryConfig {
    RecoveryConfig::new().start_jitter(Duration::ZERO)
}

/// A handle that has made its first pass.
async fn recovery(pool: &KeyPool) -> RecoveryHandle {
    let recovery = RecoveryHandle::spawn_with(pool, at_once());
    passed(&recovery, 1).await;
    recovery
}

fn passes(recovery: &RecoveryHandle) -> u64 {
    recovery.last_report().map_or(0, |report| report.pass)
}

async fn passed(recovery: &RecoveryHandle, pass: u64) {
    eventually("a pass", || passes(recovery) >= pass).await;
    settle().await;
    assert_eq!(passes(recovery), pass);
}

/// A pool over a store with faults, and a server that limits `alpha`.
struct Bench {
    clock: ManualClock,
    store: FaultyStore,
    pool: KeyPool,
    server: Server,
}

impl Bench {
    async fn new<const N: usize>(keys: [&str; N]) -> Self {
        let clock = ManualClock::new();
        let store = FaultyStore::new(&clock);
        let pool = builder(keys, &clock).open(store.clone()).await.unwrap();
        Self { clock, store, pool, server: Server::limiting(["alpha"]).await }
    }

    fn ids(&self) -> Vec<String> {
        self.pool.stats().keys.into_iter().map(|key| key.id.to_string()).collect()
    }

    async fn get(&self) -> u16 {
        status(&rotating(&self.pool), &self.server.url()).await
    }

    async fn mark_is_written(&self) {
        eventually("the mark is written", || self.pool.stats().marks_waiting == 0).await;
    }

    /// As if another process had seen `alpha` limited for so long, and had written that.
    async fn limited_elsewhere(&self, left: Duration) {
        let standing = self.store.record("alpha").await.standing;
        let words = Words { key: limited(left), generation: standing.words.generation, ..Words::default() };
        let mark = Mark::new(id("alpha"), standing.born, words);
        self.store.tested.merge(mark).await.unwrap().unwrap();
    }

    /// Another pool over what is in the store, as another process has it.
    async fn another(&self) -> KeyPool {
        KeyPool::builder().clock(self.clock.clone()).open(self.store.tested.clone()).await.unwrap()
    }
}

#[tokio::test]
async fn passes_run_every_30_seconds_and_are_counted() {
    let bench = Bench::new(["alpha"]).await;
    let recovery = recovery(&bench.pool).await;
    for pass in 2..=4 {
        bench.clock.advance(INTERVAL - INSTANT);
        settle().await;
        assert_eq!(passes(&recovery), pass - 1);
        bench.clock.advance(INSTANT);
        passed(&recovery, pass).await;
    }
    let report = recovery.last_report().unwrap();
    assert_eq!((report.failures, report.outcome.unwrap().count), (0, 0));
    assert_eq!((bench.store.recovers.begun(), bench.store.loads.begun()), (4, 6));
}

#[tokio::test]
async fn the_interval_can_be_set() {
    let bench = Bench::new(["alpha"]).await;
    let recovery = RecoveryHandle::spawn_with(&bench.pool, at_once().interval(5 * SECOND));
    passed(&recovery, 1).await;
    bench.clock.advance(5 * SECOND);
    passed(&recovery, 2).await;
}

#[tokio::test]
async fn sweeps_recover_keys_of_pools_without_a_store() {
    let clock = ManualClock::new();
    let pool = pool(["alpha", "beta"], &clock);
    let server = Server::limiting(["alpha", "beta"]).await;
    let client = rotating(&pool);
    let recovery = RecoveryHandle::spawn_with(&pool, passes_by_hand());
    for _ in 0..2 {
        assert_eq!(status(&client, &server.url()).await, 429);
    }
    assert_eq!((pool.stats().rate_limited, pool.stats().marks_waiting), (2, 0));
    assert_eq!(recovery.sweep_now().await.outcome.unwrap().count, 0);

    clock.advance(MINUTE * 2 + SECOND);
    let recovered = recovery.sweep_now().await.outcome.unwrap();
    assert_eq!((recovered.count, recovered.ids), (2, vec![id("alpha"), id("beta")]));
    assert_eq!(recovery.sweep_now().await.outcome.unwrap().count, 0);
    assert_eq!(stats_of(&pool, "alpha").recovered, 1);

    // And one that a request has taken back is no longer there to be returned.
    assert_eq!(status(&client, &server.url()).await, 429);
    clock.advance(MINUTE * 2);
    for _ in 0..2 {
        assert_eq!(status(&client, &server.url()).await, 429);
    }
    assert_eq!(recovery.sweep_now().await.outcome.unwrap().count, 0);
    assert_eq!(recovery.last_report().unwrap().recovered, 2);
    recovery.shutdown().await.unwrap();
}

#[tokio::test]
async fn sweep_now_leaves_the_pass_interval_unchanged() {
    let bench = Bench::new(["alpha"]).await;
    let recovery = recovery(&bench.pool).await;
    bench.clock.advance(INTERVAL / 2);
    let report = in_time(recovery.sweep_now()).await;
    assert_eq!((report.pass, passes(&recovery)), (2, 2));
    bench.clock.advance(INTERVAL / 2);
    passed(&recovery, 3).await;
}

#[tokio::test]
async fn before_the_first_pass_there_is_no_report() {
    let bench = Bench::new(["alpha"]).await;
    bench.store.recovers.set(Mode::Hangs);
    let recovery = RecoveryHandle::spawn_with(&bench.pool, at_once());
    eventually("the first pass has begun", || bench.store.recovers.begun() == 1).await;
    assert!(recovery.last_report().is_none());
}

#[tokio::test]
async fn f06_the_first_pass_starts_with_random_jitter() {
    for (jitter, config) in [(30, RecoveryConfig::new()), (5, RecoveryConfig::new().start_jitter(5 * SECOND))]
    {
        let clock = ManualClock::new();
        let pools: Vec<_> = (0..50).map(|_| pool(["alpha"], &clock)).collect();
        let handles: Vec<_> =
            pools.iter().map(|pool| RecoveryHandle::spawn_with(pool, config.clone())).collect();
        settle().await;
        let begun = || handles.iter().filter(|handle| passes(handle) > 0).count();
        let mut steps = HashSet::new();
        for _ in 0..jitter * 10 {
            clock.advance(SECOND / 10);
            tokio::time::sleep(Duration::from_millis(1)).await;
            steps.insert(begun());
        }
        eventually("every first pass has been made", || begun() == 50).await;
        assert!(steps.len() > 10, "they began together: {steps:?}");
    }
}

#[tokio::test]
async fn a_sweep_resets_a_stored_mark_once_expired() {
    let bench = Bench::new(["alpha", "beta"]).await;
    let recovery = recovery(&bench.pool).await;
    assert_eq!(bench.get().await, 429);
    bench.mark_is_written().await;
    assert_eq!(bench.store.rest("alpha").await, limited(2 * MINUTE));
    let mark = bench.store.marks().remove(0);
    assert_eq!((mark.id.as_str(), mark.http_status), ("alpha", Some(429)));

    bench.clock.advance(2 * MINUTE - INSTANT);
    assert_eq!(recovery.sweep_now().await.outcome.unwrap().count, 0);
    bench.clock.advance(INSTANT);
    let recovered = recovery.sweep_now().await.outcome.unwrap();
    assert_eq!((recovered.count, recovered.ids[0].as_str()), (1, "alpha"));
    assert_eq!(bench.store.rest("alpha").await, None);
    assert_eq!(recovery.sweep_now().await.outcome.unwrap().count, 0);
}

#[tokio::test]
async fn another_pool_honours_a_mark_after_its_pass() {
    let bench = Bench::new(["alpha", "beta"]).await;
    let other = bench.another().await;
    let _ours = recovery(&bench.pool).await;
    let theirs = recovery(&other).await;
    assert_eq!(bench.get().await, 429);
    bench.mark_is_written().await;
    assert_eq!(stats_of(&other, "alpha").status, Status::Healthy);

    bench.clock.advance(INTERVAL);
    passed(&theirs, 2).await;
    assert_eq!(time_left(&other, "alpha"), Some(2 * MINUTE - INTERVAL));
    let client = rotating(&other);
    for _ in 0..3 {
        assert_eq!(status(&client, &bench.server.url()).await, 200);
    }
    assert_eq!(bench.server.keys()[1..], ["beta", "beta", "beta"]);

    bench.server.lift("alpha");
    bench.clock.advance(2 * MINUTE - INTERVAL);
    assert_eq!(status(&client, &bench.server.url()).await, 200);
    assert_eq!(bench.server.keys()[4], "alpha");
}

#[tokio::test]
async fn operator_changes_reach_other_pools_after_a_pass() {
    let bench = Bench::new(["alpha"]).await;
    let other = bench.another().await;
    let ours = recovery(&bench.pool).await;
    assert_eq!(bench.get().await, 429);
    ours.sweep_now().await.outcome.unwrap();
    other.reload().await.unwrap();
    assert_eq!(stats_of(&other, "alpha").status, Status::RateLimited);

    bench.clock.advance(SECOND);
    other.reset("alpha").await.unwrap();
    assert_eq!(stats_of(&bench.pool, "alpha").status, Status::RateLimited);
    ours.sweep_now().await.outcome.unwrap();
    assert_eq!(stats_of(&bench.pool, "alpha").status, Status::Healthy);

    other.disable("alpha").await.unwrap();
    other.insert("beta", "sk-beta").await.unwrap();
    ours.sweep_now().await.outcome.unwrap();
    assert_eq!(stats_of(&bench.pool, "alpha").status, Status::Disabled);
    assert_eq!(stats_of(&bench.pool, "beta").status, Status::Healthy);
    other.remove("beta").await.unwrap();
    other.enable("alpha").await.unwrap();
    ours.sweep_now().await.outcome.unwrap();
    assert_eq!((bench.pool.stats().keys.len(), bench.pool.stats().healthy), (1, 1));
}

#[tokio::test]
async fn f02_requests_ignore_store_failures_and_marks_follow_later() {
    let (logs, _guard) = Logs::capture();
    let bench = Bench::new(["alpha", "beta"]).await;
    let recovery = recovery(&bench.pool).await;
    bench.store.set(Mode::Fails);

    assert_eq!(bench.get().await, 429);
    for _ in 0..3 {
        assert_eq!(bench.get().await, 200);
    }
    bench.clock.advance(INTERVAL);
    passed(&recovery, 2).await;
    let report = recovery.last_report().unwrap();
    assert_eq!(report.failures, 1);
    let error = report.outcome.unwrap_err();
    assert!(all_that_it_says(&error).contains("connection reset by mongod"));
    assert!(logs.count("recovery pass failed") == 1 && logs.text().contains("connection reset by mongod"));
    assert_eq!(bench.pool.stats().marks_waiting, 1);
    bench.clock.advance(INTERVAL);
    passed(&recovery, 3).await;
    assert_eq!(recovery.last_report().unwrap().failures, 2);

    bench.store.set(Mode::Works);
    bench.clock.advance(INTERVAL);
    passed(&recovery, 4).await;
    assert!(recovery.last_report().unwrap().outcome.is_ok());
    assert_eq!(bench.pool.stats().marks_waiting, 0);
    assert_eq!(bench.store.rest("alpha").await, limited(2 * MINUTE - 3 * INTERVAL));
}

#[tokio::test]
async fn f02_failed_marks_are_retried_before_the_next_pass() {
    let bench = Bench::new(["alpha"]).await;
    let recovery = recovery(&bench.pool).await;
    bench.store.writes.set(Mode::Fails);
    assert_eq!(bench.get().await, 429);
    eventually("a write was tried", || bench.store.writes.begun() == 1).await;
    bench.store.writes.set(Mode::Works);
    settle().await;
    bench.clock.advance(SECOND);
    bench.mark_is_written().await;
    assert_eq!(passes(&recovery), 1);
    assert_eq!(bench.store.rest("alpha").await, limited(2 * MINUTE - SECOND));
}

#[tokio::test]
async fn f02_cooldowns_expire_locally_while_the_store_is_down() {
    let bench = Bench::new(["alpha"]).await;
    let recovery = recovery(&bench.pool).await;
    assert_eq!(bench.get().await, 429);
    recovery.sweep_now().await.outcome.unwrap();
    bench.store.set(Mode::Fails);
    bench.server.lift("alpha");
    bench.clock.advance(2 * MINUTE);
    assert_eq!(bench.get().await, 200);
    bench.store.set(Mode::Works);
    assert_eq!(recovery.sweep_now().await.outcome.unwrap().count, 1);
    assert_eq!(bench.get().await, 200);
}

#[tokio::test]
async fn f05_a_failed_reload_leaves_the_keys_unchanged() {
    let bench = Bench::new(["alpha", "beta"]).await;
    bench.another().await.remove("alpha").await.unwrap();
    bench.store.loads.set(Mode::Fails);
    let error = bench.pool.reload().await.unwrap_err();
    assert!(all_that_it_says(&error).contains("connection reset by mongod"));
    assert_eq!(bench.pool.stats().keys.len(), 2);
    bench.store.loads.set(Mode::Works);
    bench.pool.reload().await.unwrap();
    assert_eq!(bench.pool.stats().keys.len(), 1);
}

#[tokio::test]
async fn f01_seed_keys_are_stored_once_the_store_recovers() {
    let clock = ManualClock::new();
    let store = FaultyStore::new(&clock);
    store.insert("beta", "sk-theirs").await;
    store.insert("gamma", "sk-gamma").await;
    store.set(Mode::Fails);
    let pool = builder(["alpha", "beta"], &clock).open_when_ready(store.clone()).unwrap();
    let recovery = RecoveryHandle::spawn(&pool);
    let server = Server::limiting(["alpha"]).await;
    let client = rotating(&pool);
    assert_eq!(status(&client, &server.url()).await, 429);
    assert_eq!(status(&client, &server.url()).await, 200);
    passed(&recovery, 1).await;
    assert!(recovery.last_report().unwrap().outcome.is_err());

    store.set(Mode::Works);
    // Sooner than after the usual 30 seconds.
    clock.advance(3 * SECOND);
    eventually("the keys of the store are here", || pool.stats().keys.len() == 3).await;
    assert_eq!(store.rest("alpha").await, limited(2 * MINUTE - 3 * SECOND));
    assert_eq!(store.record("beta").await.spec.secret.expose(), "sk-theirs");
    for _ in 0..2 {
        assert_eq!(status(&client, &server.url()).await, 200);
    }
    let mut keys = server.keys().split_off(2);
    keys.sort();
    assert_eq!(keys, ["gamma", "theirs"]);
    recovery.shutdown().await.unwrap();
}

#[tokio::test]
async fn f01_a_seeds_state_moves_to_its_stored_id() {
    let clock = ManualClock::new();
    let store = FaultyStore::new(&clock);
    for (name, secret) in [("theirs", "sk-alpha"), ("others", "sk-others")] {
        store.insert(name, secret).await;
    }
    store.set(Mode::Fails);
    let pool = builder(["alpha"], &clock).open_when_ready(store.clone()).unwrap();
    let server = Server::limiting(["alpha"]).await;
    let client = rotating(&pool);
    assert_eq!(status(&client, &server.url()).await, 429);

    store.set(Mode::Works);
    let recovery = recovery(&pool).await;
    eventually("the mark is written", || pool.stats().marks_waiting == 0).await;
    assert_eq!(store.rest("theirs").await, limited(2 * MINUTE));
    for _ in 0..3 {
        assert_eq!(status(&client, &server.url()).await, 200);
    }
    assert_eq!(server.keys(), ["alpha", "others", "others", "others"]);
    let ids: Vec<_> = pool.stats().keys.into_iter().map(|key| key.id.to_string()).collect();
    assert_eq!(ids, ["theirs", "others"]);
    recovery.shutdown().await.unwrap();
    let used = store.used().into_iter().flatten().map(|used| (used.id, used.requests));
    assert_eq!(used.collect::<Vec<_>>(), [(id("theirs"), 1), (id("others"), 3)]);
}

#[tokio::test]
async fn f01_an_absent_store_is_retried_with_jittered_backoff() {
    let clock = ManualClock::new();
    let store = FaultyStore::new(&clock);
    store.set(Mode::Fails);
    let pool = builder(["alpha"], &clock).open_when_ready(store.clone()).unwrap();
    let recovery = RecoveryHandle::spawn(&pool);
    let mut at = Vec::new();
    for second in 0..120 {
        settle().await;
        if passes(&recovery) as usize > at.len() {
            at.push(second);
        }
        clock.advance(SECOND);
    }
    let gaps: Vec<_> = at.windows(2).map(|pass| pass[1] - pass[0]).collect();
    assert!(at[0] == 0 && gaps[0] <= 4 && gaps.len() >= 5, "{at:?}");
    // At most one and a half times 1, 2, 4 and 8 seconds, in whole ones as the test sees them.
    assert!(gaps.iter().zip([2, 3, 6, 12]).all(|(gap, most)| *gap <= most), "{at:?}");
    assert!(gaps.iter().all(|gap| *gap <= 31) && *gaps.last().unwrap() >= 15, "{at:?}");
}

#[tokio::test]
async fn usage_with_unknown_outcome_is_added_once() {
    let bench = Bench::new(["alpha", "beta"]).await;
    let recovery = recovery(&bench.pool).await;
    assert!(bench.store.used().is_empty());
    bench.get().await;
    bench.pool.record_usage(&id("beta"), 7);
    bench.store.usage.set(Mode::Fails);
    let report = recovery.sweep_now().await;
    assert_eq!(report.outcome.unwrap_err().to_string(), "the pass failed");
    bench.store.usage.set(Mode::Works);
    bench.get().await;
    bench.pool.record_usage(&id("beta"), 1);
    recovery.sweep_now().await.outcome.unwrap();
    bench.get().await;
    in_time(recovery.shutdown()).await.unwrap();

    let used = bench.store.used().into_iter().map(|usage| {
        let used = usage.into_iter().map(|used| (used.id.to_string(), used.requests, used.tokens));
        used.collect::<Vec<_>>()
    });
    let beta = |requests, tokens| ("beta".to_owned(), requests, tokens);
    let expected = [vec![("alpha".to_owned(), 1, 0), beta(0, 7)], vec![beta(1, 1)], vec![beta(1, 0)]];
    assert_eq!(used.collect::<Vec<_>>(), expected);
}

#[tokio::test]
async fn usage_waits_while_the_store_is_gone() {
    let bench = Bench::new(["beta"]).await;
    let recovery = recovery(&bench.pool).await;
    bench.get().await;
    bench.store.set(Mode::Fails);
    recovery.sweep_now().await.outcome.unwrap_err();
    assert!(bench.store.used().is_empty());
    bench.store.set(Mode::Works);
    recovery.sweep_now().await.outcome.unwrap();
    assert_eq!(bench.store.used()[0][0].requests, 1);
}

#[tokio::test]
async fn usage_of_replaced_keys_counts_for_their_id() {
    let bench = Bench::new(["beta"]).await;
    let recovery = recovery(&bench.pool).await;
    bench.get().await;
    bench.store.operate_elsewhere("beta", Operation::Remove).await;
    bench.store.insert("beta", "sk-beta2").await;
    bench.pool.reload().await.unwrap();
    bench.get().await;
    recovery.sweep_now().await.outcome.unwrap();
    assert_eq!(bench.store.used().concat(), [Usage::new(id("beta"), 2, 0)]);
}

#[tokio::test]
async fn changed_keys_load_without_waiting_for_a_pass() {
    let bench = Bench::new(["alpha", "beta"]).await;
    let other = bench.another().await;
    let recovery = recovery(&bench.pool).await;
    other.disable("alpha").await.unwrap();
    other.remove("beta").await.unwrap();
    other.insert("gamma", "sk-gamma").await.unwrap();
    bench.store.tell(Change::Keys(vec![id("alpha"), id("gamma")])).await;
    eventually("the new key is here", || bench.pool.stats().keys.len() == 3).await;
    assert_eq!(stats_of(&bench.pool, "alpha").status, Status::Disabled);
    assert_eq!(stats_of(&bench.pool, "beta").status, Status::Healthy);
    bench.store.tell(Change::Keys(vec![id("beta")])).await;
    eventually("the old one is gone", || bench.pool.stats().keys.len() == 2).await;
    other.enable("alpha").await.unwrap();
    bench.store.tell(Change::Anything).await;
    eventually("all was loaded", || bench.pool.stats().healthy == 2).await;
    assert_eq!(passes(&recovery), 1);
}

#[tokio::test]
async fn a_failed_load_of_a_change_is_retried() {
    let bench = Bench::new(["alpha"]).await;
    let other = bench.another().await;
    let recovery = recovery(&bench.pool).await;
    other.disable("alpha").await.unwrap();
    bench.store.loads.set(Mode::Fails);
    let loads = bench.store.loads.begun();
    bench.store.tell(Change::Keys(vec![id("alpha")])).await;
    eventually("it was tried", || bench.store.loads.begun() > loads).await;
    bench.store.loads.set(Mode::Works);
    settle().await;
    bench.clock.advance(SECOND);
    eventually("it was loaded", || bench.pool.stats().disabled == 1).await;
    assert_eq!(passes(&recovery), 1);
}

#[tokio::test]
async fn changes_with_words_are_joined_without_loading() {
    let bench = Bench::new(["alpha"]).await;
    let _recovery = recovery(&bench.pool).await;
    let loads = bench.store.loads.begun();
    bench.limited_elsewhere(2 * MINUTE).await;
    let marked = bench.store.record("alpha").await.standing;
    bench.store.tell(Change::Standing(id("alpha"), marked.clone())).await;
    eventually("the mark is here", || time_left(&bench.pool, "alpha") == Some(2 * MINUTE)).await;
    let reset = bench.store.operate_elsewhere("alpha", Operation::Reset(None)).await;
    // In any order, and more than once.
    for standing in [reset, marked.clone(), marked] {
        bench.store.tell(Change::Standing(id("alpha"), standing)).await;
    }
    eventually("the reset is here", || bench.pool.stats().healthy == 1).await;
    settle().await;
    assert_eq!((bench.pool.stats().healthy, bench.store.loads.begun()), (1, loads));
}

#[tokio::test]
async fn changes_of_unknown_keys_are_loaded() {
    let bench = Bench::new(["alpha"]).await;
    let _recovery = recovery(&bench.pool).await;
    bench.store.operate_elsewhere("alpha", Operation::Remove).await;
    for (name, secret) in [("alpha", "sk-other"), ("beta", "sk-beta")] {
        bench.store.insert(name, secret).await;
        let standing = bench.store.record(name).await.standing;
        bench.store.tell(Change::Standing(id(name), standing)).await;
    }
    eventually("both are here", || bench.pool.stats().keys.len() == 2).await;
    let server = Server::limiting(["other"]).await;
    eventually("the new secret is here", || {
        bench.pool.masked_secret("alpha").is_some_and(|secret| secret.ends_with("er"))
    })
    .await;
    drop(server);

    let disabled = bench.store.operate_elsewhere("beta", Operation::Disable).await;
    bench.store.tell(Change::Standing(id("beta"), disabled)).await;
    eventually("that it is disabled is here", || bench.pool.stats().disabled == 1).await;
}

#[tokio::test]
async fn words_are_joined_during_a_load_that_hangs() {
    let bench = Bench::new(["alpha"]).await;
    let _recovery = recovery(&bench.pool).await;
    bench.store.loads.set(Mode::Hangs);
    let loads = bench.store.loads.begun();
    bench.store.tell(Change::Anything).await;
    eventually("the load hangs", || bench.store.loads.begun() > loads).await;
    bench.limited_elsewhere(2 * MINUTE).await;
    let standing = bench.store.record("alpha").await.standing;
    bench.store.tell(Change::Standing(id("alpha"), standing)).await;
    eventually("the mark is here", || time_left(&bench.pool, "alpha") == Some(2 * MINUTE)).await;
    bench.store.loads.set(Mode::Works);
}

#[tokio::test]
async fn mark_writes_stop_early_when_the_store_fails() {
    let clock = ManualClock::new();
    let store = FaultyStore::new(&clock);
    let pool = builder(0..50, &clock).open(store.clone()).await.unwrap();
    let server = Server::answering(|| answer(429, "")).await;
    let client = rotating(&pool);
    for _ in 0..50 {
        assert_eq!(status(&client, &server.url()).await, 429);
    }
    store.set(Mode::Fails);
    let recovery = RecoveryHandle::spawn_with(&pool, RecoveryConfig::new());
    eventually("writes were tried", || store.writes.begun() > 0).await;
    settle().await;
    assert!((8..=16).contains(&store.writes.begun()), "{}", store.writes.begun());
    assert_eq!(pool.stats().marks_waiting, 50);
    store.set(Mode::Works);
    clock.advance(SECOND);
    eventually("all are written", || pool.stats().marks_waiting == 0).await;
    drop(recovery);
}

#[tokio::test]
async fn a_failed_key_without_replacement_triggers_no_load() {
    let bench = Bench::new(["alpha"]).await;
    let recovery = RecoveryHandle::spawn_with(&bench.pool, passes_by_hand());
    let loads = bench.store.loads.begun();
    let refusing = Server::answering(|| answer(401, "")).await;
    let client = KeyRotationLayer::new(&bench.pool).classify(support::ByStatus).layer(http());
    assert_eq!(status(&client, &refusing.url()).await, 401);
    bench.mark_is_written().await;
    settle().await;
    assert_eq!((bench.store.marks().len(), bench.store.loads.begun()), (1, loads));
    drop(recovery);
}

#[tokio::test]
async fn marks_are_written_eight_at_a_time() {
    let clock = ManualClock::new();
    let store = FaultyStore::new(&clock);
    let pool = builder(0..20, &clock).open(store.clone()).await.unwrap();
    let server = Server::answering(|| answer(429, "")).await;
    let client = rotating(&pool);
    for _ in 0..20 {
        assert_eq!(status(&client, &server.url()).await, 429);
    }
    store.writes.set(Mode::Hangs);
    let recovery = RecoveryHandle::spawn_with(&pool, passes_by_hand());
    eventually("eight are under way", || store.writes.begun() == 8).await;
    settle().await;
    assert_eq!(store.writes.begun(), 8);
    store.writes.set(Mode::Works);
    eventually("all are written", || pool.stats().marks_waiting == 0).await;
    assert_eq!((store.writes.begun(), store.writes.most_at_once()), (20, 8));
    drop(recovery);
}

fn spec((id, secret): (String, String)) -> KeySpec {
    KeySpec::new(KeyId::new(id).unwrap(), secret)
}

#[tokio::test]
async fn insert_all_runs_eight_inserts_and_reports_each() {
    let bench = Bench::new(["alpha"]).await;
    bench.store.insert("theirs", "sk-theirs").await;
    let pool = bench.pool.clone();
    bench.store.operators.set(Mode::Hangs);
    let inserting = tokio::spawn(async move {
        let many = (0..20).map(|place| (format!("key-{place:02}"), format!("sk-{place}")));
        let others = [("alpha", "sk-9"), ("key-03", "sk-30"), ("beta", "sk-alpha"), ("theirs", "sk-31")];
        let others = others.map(|(id, secret)| (id.to_owned(), secret.to_owned()));
        pool.insert_all(many.chain(others).map(spec)).await
    });
    // One was asked for already, as the pool was opened.
    eventually("the store is asked", || bench.store.operators.begun() == 1 + 8).await;
    settle().await;
    assert_eq!((bench.store.operators.begun(), bench.ids().len()), (1 + 8, 1));
    bench.store.operators.set(Mode::Works);
    let outcomes = in_time(inserting).await.unwrap();
    let said = |place: usize| outcomes[place].as_ref().unwrap_err().to_string();
    assert!(outcomes[..20].iter().all(Result::is_ok), "{outcomes:?}");
    assert_eq!(said(20), "there is a key alpha already");
    assert_eq!(said(21), "there is a key key-03 already");
    assert_eq!(said(22), "key alpha has the same secret");
    assert_eq!(said(23), "there is a key theirs already");
    assert_eq!(bench.store.operators.most_at_once(), 8);
    assert_eq!(bench.ids().len(), 21);
    assert!(bench.ids()[1..].is_sorted());
}

#[tokio::test]
async fn f02_bulk_inserts_stop_early_when_the_store_fails() {
    for mode in [Mode::Fails, Mode::Panics] {
        let bench = Bench::new(["alpha"]).await;
        bench.store.operators.set(mode);
        let begun_before = bench.store.operators.begun();
        let many = (0..1_000).map(|place| (format!("key-{place}"), format!("sk-{place}")));
        let outcomes = bench.pool.insert_all(many.map(spec)).await;
        let errors: Vec<_> = outcomes.into_iter().map(Result::unwrap_err).collect();
        assert!(errors.iter().all(OperateError::is_store_failure));
        // The others were not tried.
        let was_tried = |error: &&OperateError| error.to_string() == "the store did not confirm the change";
        let tried = bench.store.operators.begun() - begun_before;
        assert_eq!(errors.iter().filter(was_tried).count(), tried);
        assert!((8..20).contains(&tried), "{tried}");
        assert_eq!(bench.ids(), ["alpha"]);
    }
}

#[tokio::test]
async fn f01_operator_changes_to_seeds_survive_the_first_load() {
    let clock = ManualClock::new();
    let store = FaultyStore::new(&clock);
    let pool = builder(["alpha", "beta"], &clock).open_when_ready(store.clone()).unwrap();
    pool.remove("alpha").await.unwrap();
    pool.disable("beta").await.unwrap();
    pool.reload().await.unwrap();
    assert_eq!((pool.stats().keys.len(), pool.stats().disabled), (1, 1));
    assert!(store.record("beta").await.standing.disabled);
}

#[tokio::test]
async fn a_secret_stored_under_another_id_appears_once() {
    let clock = ManualClock::new();
    let store = FaultyStore::new(&clock);
    let (logs, _guard) = Logs::capture();
    store.insert("theirs", "sk-alpha").await;
    store.insert("beta", "sk-beta").await;
    let pool = builder(["alpha", "beta"], &clock).open(store).await.unwrap();
    // That it has one under the same id is nothing to be told.
    assert_eq!((logs.count("under its own id"), logs.count("key=theirs given_as=alpha")), (1, 1));
    let ids: Vec<_> = pool.stats().keys.iter().map(|key| key.id.to_string()).collect();
    assert_eq!(ids, ["beta", "theirs"]);
}

#[tokio::test]
async fn a_failed_sweep_still_reloads() {
    let bench = Bench::new(["alpha"]).await;
    let recovery = recovery(&bench.pool).await;
    bench.another().await.disable("alpha").await.unwrap();
    bench.store.recovers.set(Mode::Fails);
    assert!(recovery.sweep_now().await.outcome.is_err());
    assert_eq!(bench.pool.stats().disabled, 1);
}

#[tokio::test]
async fn a_failed_reload_still_counts_recovered_keys() {
    let (logs, _guard) = Logs::capture();
    let bench = Bench::new(["alpha"]).await;
    let recovery = recovery(&bench.pool).await;
    assert_eq!(bench.get().await, 429);
    recovery.sweep_now().await.outcome.unwrap();
    bench.clock.advance(2 * MINUTE);
    bench.store.loads.set(Mode::Fails);
    assert!(recovery.sweep_now().await.outcome.is_err());
    assert_eq!(bench.store.rest("alpha").await, None);
    assert_eq!(recovery.last_report().unwrap().recovered, 1);
    assert_eq!(logs.count("keys recovered"), 1);
}

#[tokio::test]
async fn slow_full_loads_delay_only_full_loads() {
    let bench = Bench::new(["alpha", "beta"]).await;
    let _recovery = recovery(&bench.pool).await;
    let loads = || bench.store.loads.begun();
    let before = loads();
    bench.store.loads.set(Mode::Hangs);
    bench.store.tell(Change::Anything).await;
    eventually("all keys are being loaded", || loads() > before).await;
    bench.clock.advance(2 * SECOND);
    bench.store.loads.set(Mode::Works);
    settle().await;

    let other = bench.another().await;
    other.disable("alpha").await.unwrap();
    bench.store.tell(Change::Keys(vec![id("alpha")])).await;
    eventually("it is seen", || stats_of(&bench.pool, "alpha").status == Status::Disabled).await;
    other.disable("beta").await.unwrap();
    bench.store.tell(Change::Anything).await;
    settle().await;
    assert_eq!(stats_of(&bench.pool, "beta").status, Status::Healthy);
    bench.clock.advance(20 * SECOND);
    eventually("it is seen", || stats_of(&bench.pool, "beta").status == Status::Disabled).await;
}

type Done<E> = JoinHandle<Result<(), E>>;

/// What an operator asks for waits for its turn, behind a reload that hangs.
async fn behind_a_reload<C>(
    bench: &Bench,
    change: impl FnOnce(KeyPool) -> C,
) -> (Done<StoreError>, Done<OperateError>)
where
    C: Future<Output = Result<(), OperateError>> + Send + 'static,
{
    bench.store.loads.set(Mode::Hangs);
    let loads = bench.store.loads.begun();
    let reload = tokio::spawn({
        let pool = bench.pool.clone();
        async move { pool.reload().await }
    });
    eventually("the reload has its turn", || bench.store.loads.begun() > loads).await;
    let change = tokio::spawn(change(bench.pool.clone()));
    settle().await;
    (reload, change)
}

#[tokio::test]
async fn older_reloads_never_bring_back_removed_keys() {
    let bench = Bench::new(["alpha", "beta"]).await;
    let (reload, removal) = behind_a_reload(&bench, |pool| async move { pool.remove("alpha").await }).await;
    bench.store.loads.set(Mode::Works);
    in_time(reload).await.unwrap().unwrap();
    in_time(removal).await.unwrap().unwrap();
    assert_eq!(bench.ids(), ["beta"]);
    bench.pool.reload().await.unwrap();
    assert_eq!(bench.ids(), ["beta"]);
}

#[tokio::test]
async fn removals_take_out_the_ids_current_key() {
    let bench = Bench::new(["alpha"]).await;
    bench.store.operate_elsewhere("alpha", Operation::Remove).await;
    let (reload, insert) =
        behind_a_reload(&bench, |pool| async move { pool.insert("alpha", "sk-another").await }).await;
    let removal = tokio::spawn({
        let pool = bench.pool.clone();
        async move { pool.remove("alpha").await }
    });
    settle().await;
    bench.store.loads.set(Mode::Works);
    in_time(reload).await.unwrap().unwrap();
    in_time(insert).await.unwrap().unwrap();
    in_time(removal).await.unwrap().unwrap();
    assert_eq!(bench.ids(), [""; 0]);
    bench.pool.reload().await.unwrap();
    assert_eq!(bench.ids(), [""; 0]);
}

#[tokio::test]
async fn older_reloads_never_enable_a_disabled_key() {
    let bench = Bench::new(["alpha", "beta"]).await;
    let (reload, disable) = behind_a_reload(&bench, |pool| async move { pool.disable("alpha").await }).await;
    bench.store.loads.set(Mode::Works);
    in_time(reload).await.unwrap().unwrap();
    in_time(disable).await.unwrap().unwrap();
    assert_eq!(stats_of(&bench.pool, "alpha").status, Status::Disabled);
    assert!(bench.store.record("alpha").await.standing.disabled);
}

#[tokio::test]
async fn late_mark_answers_never_enable_a_disabled_key() {
    let bench = Bench::new(["alpha"]).await;
    let _recovery = recovery(&bench.pool).await;
    bench.store.replies.set(Mode::Hangs);
    assert_eq!(bench.get().await, 429);
    eventually("the answer is late", || bench.store.replies.begun() == 1).await;
    bench.pool.disable("alpha").await.unwrap();
    bench.store.replies.set(Mode::Works);
    bench.mark_is_written().await;
    assert_eq!(stats_of(&bench.pool, "alpha").status, Status::Disabled);
}

#[tokio::test]
async fn changes_that_the_store_fails_change_nothing() {
    let bench = Bench::new(["alpha"]).await;
    let recovery = recovery(&bench.pool).await;
    let mut caller = Caller::new(&bench.pool);
    let (first, second) = (caller.send().unwrap(), caller.send().unwrap());
    first.answer(LIMITED);
    bench.store.operators.set(Mode::Fails);
    for failed in [
        bench.pool.remove("alpha").await,
        bench.pool.reset("alpha").await,
        bench.pool.disable("alpha").await,
        bench.pool.insert("beta", "sk-beta").await,
    ] {
        assert!(failed.as_ref().is_err_and(OperateError::is_store_failure), "{failed:?}");
    }
    assert_eq!((bench.ids(), time_left(&bench.pool, "alpha")), (vec!["alpha".to_owned()], Some(2 * MINUTE)));
    second.answer(Answer { status: 429, retry_after: Some(600) });
    recovery.sweep_now().await.outcome.unwrap();
    assert_eq!(bench.store.rest("alpha").await, limited(10 * MINUTE));
}

#[tokio::test]
async fn unconfirmed_changes_arrive_with_the_next_load() {
    let bench = Bench::new(["alpha"]).await;
    bench.store.confirmations.set(Mode::Fails);
    bench.pool.disable("alpha").await.unwrap_err();
    assert_eq!(stats_of(&bench.pool, "alpha").status, Status::Healthy);
    bench.pool.reload().await.unwrap();
    assert_eq!(stats_of(&bench.pool, "alpha").status, Status::Disabled);
}

#[tokio::test]
async fn abandoned_removals_leave_the_key() {
    let bench = Bench::new(["alpha"]).await;
    bench.store.operators.set(Mode::Hangs);
    assert!(bench.pool.remove("alpha").now_or_never().is_none());
    assert_eq!(bench.ids(), ["alpha"]);
    bench.store.operators.set(Mode::Works);
    bench.pool.remove("alpha").await.unwrap();
    assert_eq!(bench.ids(), [""; 0]);
}

#[tokio::test]
async fn f09_resets_end_all_earlier_marks() {
    let bench = Bench::new(["alpha"]).await;
    let mut caller = Caller::new(&bench.pool);
    let [first, second, third] = std::array::from_fn(|_| caller.send().unwrap());
    let recovery = recovery(&bench.pool).await;
    first.answer(Answer { status: 401, retry_after: None });
    bench.mark_is_written().await;
    let reset = |pool: KeyPool| async move { pool.reset("alpha").await };
    let (reload, reset) = behind_a_reload(&bench, reset).await;
    second.answer(LIMITED);
    bench.store.loads.set(Mode::Works);
    in_time(reload).await.unwrap().unwrap();
    in_time(reset).await.unwrap().unwrap();
    assert_eq!(stats_of(&bench.pool, "alpha").status, Status::Healthy);

    third.answer(LIMITED);
    recovery.sweep_now().await.outcome.unwrap();
    assert_eq!(time_left(&bench.pool, "alpha"), Some(2 * MINUTE));
    assert_eq!(bench.store.rest("alpha").await, limited(2 * MINUTE));
}

#[tokio::test]
async fn f09_resets_during_an_outage_fail_and_change_nothing() {
    let bench = Bench::new(["alpha"]).await;
    assert_eq!(bench.get().await, 429);
    bench.store.operators.set(Mode::Fails);
    bench.pool.reset("alpha").await.unwrap_err();
    assert_eq!(time_left(&bench.pool, "alpha"), Some(2 * MINUTE));
    assert_eq!(bench.pool.stats().marks_waiting, 1);
}

#[tokio::test]
async fn operations_report_unknown_and_existing_key_ids() {
    let bench = Bench::new(["alpha"]).await;
    let error = bench.pool.reset("nobody").await.unwrap_err();
    assert!(error.is_unknown_key());
    assert_eq!(error.to_string(), "there is no key \"nobody\"");
    let error = bench.pool.insert("alpha", "sk-other").await.unwrap_err();
    assert!(error.is_taken());
    assert_eq!(error.to_string(), "there is a key alpha already");

    let alone = pool(["alpha"], &bench.clock);
    let error = alone.insert("alpha", "sk-other").await.unwrap_err();
    assert!(error.is_taken());
    assert_eq!(error.to_string(), "there is a key alpha already");
    assert_eq!(alone.stats().keys.len(), 1);
    let error = alone.insert("", "sk-other").await.unwrap_err();
    assert_eq!(error.to_string(), KeyId::new("").unwrap_err().to_string());
}

#[tokio::test]
async fn insert_refuses_a_duplicate_secret() {
    let bench = Bench::new(["alpha"]).await;
    for pool in [&bench.pool, &pool(["alpha"], &bench.clock)] {
        let error = pool.insert("beta", "sk-alpha").await.unwrap_err();
        assert!(error.is_taken());
        assert_eq!(error.to_string(), "key alpha has the same secret");
        assert_eq!(pool.stats().keys.len(), 1);

        pool.remove("alpha").await.unwrap();
        pool.insert("beta", "sk-alpha").await.unwrap();
    }
}

/// What would break a log's lines, colour them, or fill a disk.
const HOSTILE: &str = "\n INFO tower_key_rotation: all is well\r\u{1b}[2J\u{9b}31m\u{7}\0";

#[tokio::test]
async fn s04_errors_quote_ids_on_one_bounded_line() {
    let bench = Bench::new(["alpha"]).await;
    for id in [HOSTILE.to_owned(), "long ".repeat(100_000)] {
        let (pool, id) = (&bench.pool, id.as_str());
        let told = [
            pool.reset(id).await,
            pool.disable(id).await,
            pool.enable(id).await,
            pool.remove(id).await,
            pool.insert(id, "sk-new").await,
        ];
        for error in told {
            let error = error.unwrap_err();
            for said in [error.to_string(), format!("{error:?}")] {
                assert!(said.len() < 2_000 && !said.chars().any(char::is_control), "{said:?}");
            }
        }
    }
}

#[tokio::test]
async fn s04_store_errors_are_logged_on_one_bounded_line() {
    let (logs, _guard) = Logs::capture();
    let bench = Bench::new(["alpha"]).await;
    let recovery = recovery(&bench.pool).await;
    for text in [HOSTILE, "long ".repeat(100_000).leak()] {
        bench.store.set(Mode::FailsSaying(text));
        bench.clock.advance(2 * MINUTE);
        assert_eq!(bench.get().await, 429);
        assert!(recovery.sweep_now().await.outcome.is_err());
    }
    assert_eq!(marks_lost(in_time(recovery.shutdown()).await), 1);
    bench.store.set(Mode::Works);
    bench.store.usage.set(Mode::FailsSaying(HOSTILE));
    bench.clock.advance(2 * MINUTE);
    assert_eq!(bench.get().await, 429);
    let recovery = RecoveryHandle::spawn_with(&bench.pool, passes_by_hand());
    assert_eq!(marks_lost(in_time(recovery.shutdown()).await), 0);
    let texts = [
        "recovery pass failed",
        "marks could not be written and",
        "marks could not be written error",
        "usage",
    ];
    for text in texts {
        assert!(logs.count(text) > 0, "not logged, so not tested: {text}: {:?}", logs.ours());
    }
    for line in logs.text().lines() {
        assert!(line.len() < 600 && !line.chars().any(char::is_control), "{line:?}");
        assert!(!line.trim_start().starts_with("INFO tower_key_rotation: all is well"), "{line:?}");
    }
}

#[tokio::test]
async fn f32_a_panicking_pass_is_reported_and_passes_continue() {
    let (logs, _guard) = Logs::capture();
    let bench = Bench::new(["alpha", "beta"]).await;
    let recovery = recovery(&bench.pool).await;
    for (pass, operation) in [(2, &bench.store.recovers), (3, &bench.store.loads)] {
        operation.set(Mode::Panics);
        bench.clock.advance(INTERVAL);
        passed(&recovery, pass).await;
        let error = recovery.last_report().unwrap().outcome.unwrap_err();
        assert_eq!(error.to_string(), "the pass panicked");
        operation.set(Mode::Works);
    }
    assert_eq!(recovery.last_report().unwrap().failures, 2);
    assert_eq!(logs.count("recovery pass failed"), 2);
    bench.clock.advance(INTERVAL);
    passed(&recovery, 4).await;
    assert!(recovery.last_report().unwrap().outcome.is_ok());
    assert_eq!(bench.get().await, 429);
}

#[tokio::test]
async fn f32_a_write_that_panics_loses_no_mark() {
    let bench = Bench::new(["alpha"]).await;
    let recovery = recovery(&bench.pool).await;
    bench.store.writes.set(Mode::Panics);
    assert_eq!(bench.get().await, 429);
    eventually("a write was tried", || bench.store.writes.begun() == 1).await;
    settle().await;
    assert_eq!(bench.pool.stats().marks_waiting, 1);
    bench.store.writes.set(Mode::Works);
    bench.clock.advance(SECOND);
    bench.mark_is_written().await;
    assert!(bench.store.rest("alpha").await.is_some());
    recovery.shutdown().await.unwrap();
}

#[tokio::test]
async fn f03_a_hanging_pass_times_out_and_never_overlaps() {
    let bench = Bench::new(["alpha", "beta"]).await;
    let recovery = recovery(&bench.pool).await;
    bench.store.recovers.set(Mode::Hangs);
    bench.clock.advance(INTERVAL);
    eventually("the pass hangs", || bench.store.recovers.begun() == 2).await;
    bench.clock.advance(10 * SECOND - INSTANT);
    settle().await;
    assert_eq!(passes(&recovery), 1);
    bench.clock.advance(INSTANT);
    passed(&recovery, 2).await;
    let report = recovery.last_report().unwrap();
    assert_eq!(report.duration, 10 * SECOND);
    assert_eq!(report.outcome.unwrap_err().to_string(), "the pass took longer than 10s");

    // Requests go on meanwhile, and keys rest and come back.
    assert_eq!(in_time(bench.get()).await, 429);
    assert_eq!(in_time(bench.get()).await, 200);

    // The next pass waits for the one that hangs.
    bench.clock.advance(20 * SECOND);
    settle().await;
    bench.clock.advance(10 * SECOND);
    passed(&recovery, 3).await;
    assert_eq!((recovery.last_report().unwrap().failures, bench.store.recovers.begun()), (2, 2));

    bench.store.recovers.set(Mode::Works);
    bench.clock.advance(20 * SECOND);
    passed(&recovery, 4).await;
    assert!(recovery.last_report().unwrap().outcome.is_ok());
    bench.clock.advance(INTERVAL);
    passed(&recovery, 5).await;
    // The one that hung, and those of the first, fourth and fifth pass: who waited for it made one of its own.
    assert_eq!((bench.store.recovers.begun(), bench.store.recovers.most_at_once()), (4, 1));
}

#[tokio::test]
async fn f03_a_hanging_write_blocks_only_its_keys_writes() {
    let bench = Bench::new(["alpha", "beta"]).await;
    let recovery = recovery(&bench.pool).await;
    bench.store.writes.set(Mode::Hangs);
    assert_eq!(bench.get().await, 429);
    eventually("the write hangs", || bench.store.writes.begun() == 1).await;
    bench.clock.advance(2 * MINUTE);
    settle().await;
    bench.clock.advance(10 * SECOND);
    for expected in [200, 429, 200] {
        assert_eq!(in_time(bench.get()).await, expected);
    }
    settle().await;
    assert_eq!((bench.store.writes.begun(), bench.pool.stats().marks_waiting), (1, 1));

    // The first write, which is let go now, was of the first mark: the second still waits.
    bench.store.writes.set(Mode::Works);
    settle().await;
    bench.clock.advance(SECOND);
    eventually("both are written", || bench.pool.stats().marks_waiting == 0).await;
    assert_eq!(bench.store.rest("alpha").await, limited(time_left(&bench.pool, "alpha").unwrap()));
    assert_eq!(bench.store.writes.most_at_once(), 1);
    recovery.shutdown().await.unwrap();
}

#[tokio::test]
async fn f02_refused_marks_block_no_other_marks() {
    let keys: [_; 40] = std::array::from_fn(|place| if place < 38 { "refused" } else { "taken" });
    let clock = ManualClock::new();
    let store = FaultyStore::new(&clock);
    store.refuse_marks_of("refused");
    let named =
        keys.iter().enumerate().map(|(place, name)| (format!("{name}-{place:02}"), format!("sk-{place}")));
    let pool = KeyPool::builder().keys(named).clock(clock.clone()).open(store.clone()).await.unwrap();
    let server = Server::answering(|| answer(429, "too many requests")).await;
    for _ in keys {
        assert_eq!(status(&rotating(&pool), &server.url()).await, 429);
    }
    let recovery = recovery(&pool).await;
    for _ in 0..10 {
        settle().await;
        clock.advance(SECOND);
    }
    let written: Vec<_> = store.marks().iter().map(|mark| mark.id.to_string()).collect();
    assert_eq!(written, ["taken-38", "taken-39"]);
    assert_eq!(marks_lost(in_time(recovery.shutdown()).await), 38);
}

#[tokio::test]
async fn f13_a_paused_clock_causes_one_pass_not_twenty() {
    let bench = Bench::new(["alpha"]).await;
    let recovery = recovery(&bench.pool).await;
    bench.clock.advance(10 * MINUTE);
    passed(&recovery, 2).await;
    assert_eq!(bench.store.recovers.begun(), 2);
    bench.clock.advance(INTERVAL - INSTANT);
    settle().await;
    assert_eq!(passes(&recovery), 2);
    bench.clock.advance(INSTANT);
    passed(&recovery, 3).await;
}

#[tokio::test]
async fn f31_a_shutdown_writes_the_marks_that_wait() {
    let bench = Bench::new(["alpha", "beta"]).await;
    bench.server.limit("beta");
    let recovery = recovery(&bench.pool).await;
    assert_eq!(bench.get().await, 429);
    eventually("the first mark is written", || bench.pool.stats().marks_waiting == 0).await;
    // The second comes while the store is left alone for a quarter of a second.
    assert_eq!(bench.get().await, 429);
    settle().await;
    assert_eq!((bench.pool.stats().marks_waiting, bench.store.writes.begun()), (1, 1));
    in_time(recovery.shutdown()).await.unwrap();
    assert_eq!(bench.store.rest("beta").await, limited(2 * MINUTE));
}

#[tokio::test]
async fn f31_a_shutdown_counts_the_unwritten_marks() {
    let bench = Bench::new(["alpha", "beta"]).await;
    bench.server.limit("beta");
    let failing = recovery(&bench.pool).await;
    bench.store.set(Mode::Fails);
    assert_eq!((bench.get().await, bench.get().await), (429, 429));
    let lost = in_time(failing.shutdown()).await.unwrap_err();
    assert_eq!((lost.marks, lost.usage), (2, 2), "each key has served a request");

    // They are not lost as long as the process lives.
    bench.store.set(Mode::Works);
    let working = recovery(&bench.pool).await;
    assert_eq!(in_time(working.shutdown()).await, Ok(()));
    assert_eq!(bench.store.rest("beta").await, limited(2 * MINUTE));
}

fn marks_lost(outcome: Result<(), NotWritten>) -> usize {
    outcome.expect_err("something is lost").marks
}

#[tokio::test]
async fn f31_a_shutdown_counts_unwritten_usage() {
    let bench = Bench::new(["alpha", "beta"]).await;
    let failing = recovery(&bench.pool).await;
    bench.store.usage.set(Mode::Fails);
    bench.pool.record_usage(&KeyId::new("alpha").unwrap(), 10);
    let lost = in_time(failing.shutdown()).await.unwrap_err();
    assert_eq!((lost.marks, lost.usage), (0, 1));

    bench.store.usage.set(Mode::Works);
    bench.pool.record_usage(&KeyId::new("alpha").unwrap(), 10);
    let working = recovery(&bench.pool).await;
    assert_eq!(in_time(working.shutdown()).await, Ok(()));
}

/// A pass hangs, and then the last writes do.
#[tokio::test]
async fn f31_passes_and_writes_share_a_shutdowns_8_seconds() {
    let bench = Bench::new(["alpha"]).await;
    bench.store.set(Mode::Hangs);
    let recovery = RecoveryHandle::spawn_with(&bench.pool, at_once());
    eventually("the pass hangs", || bench.store.recovers.begun() == 1).await;
    bench.pool.record_usage(&KeyId::new("alpha").unwrap(), 10);
    let shutdown = tokio::spawn(recovery.shutdown());
    settle().await;
    bench.clock.advance(4 * SECOND);
    settle().await;
    bench.clock.advance(4 * SECOND - INSTANT);
    settle().await;
    assert!(!shutdown.is_finished());
    bench.clock.advance(INSTANT);
    assert_eq!(marks_lost(in_time(shutdown).await.unwrap()), 0);
}

#[tokio::test]
async fn f31_a_shutdown_over_a_hanging_store_times_out() {
    let bench = Bench::new(["alpha"]).await;
    let recovery = recovery(&bench.pool).await;
    bench.store.set(Mode::Hangs);
    assert_eq!(bench.get().await, 429);
    eventually("the write hangs", || bench.store.writes.begun() == 1).await;
    let shutdown = tokio::spawn(recovery.shutdown());
    settle().await;
    bench.clock.advance(8 * SECOND - INSTANT);
    settle().await;
    assert!(!shutdown.is_finished());
    bench.clock.advance(INSTANT);
    assert_eq!(marks_lost(in_time(shutdown).await.unwrap()), 1);
}

#[tokio::test]
async fn f31_a_shutdown_finishes_the_running_pass() {
    let bench = Bench::new(["alpha"]).await;
    bench.store.loads.set(Mode::Hangs);
    let recovery = RecoveryHandle::spawn_with(&bench.pool, at_once());
    eventually("the pass reads the store", || bench.store.loads.begun() == 3).await;
    let shutdown = tokio::spawn(recovery.shutdown());
    settle().await;
    assert!(!shutdown.is_finished());
    bench.another().await.insert("beta", "sk-beta").await.unwrap();
    bench.store.loads.set(Mode::Works);
    in_time(shutdown).await.unwrap().unwrap();
    let begun = bench.store.recovers.begun();
    bench.clock.advance(10 * INTERVAL);
    settle().await;
    assert_eq!(bench.store.recovers.begun(), begun);
}

#[tokio::test]
async fn f31_dropping_the_handle_stops_passes_and_writes() {
    let bench = Bench::new(["alpha", "beta"]).await;
    drop(recovery(&bench.pool).await);
    settle().await;
    let begun = (bench.store.recovers.begun(), bench.store.loads.begun());
    bench.clock.advance(10 * INTERVAL);
    assert_eq!(bench.get().await, 429);
    settle().await;
    assert_eq!((bench.store.recovers.begun(), bench.store.loads.begun()), begun);
    assert_eq!(bench.store.writes.begun(), 0);
    assert_eq!(bench.get().await, 200);
}

/// What is left of a recovery when its runtime has shut down, with one mark that waits unless the store works.
fn after_its_runtime(mode: Mode) -> RecoveryHandle {
    let (done, ended) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let recovery = runtime.block_on(async {
            let bench = Bench::new(["alpha"]).await;
            let recovery = recovery(&bench.pool).await;
            bench.store.set(mode);
            assert_eq!(bench.get().await, 429);
            bench.clock.advance(INTERVAL);
            settle().await;
            assert_eq!(bench.pool.stats().marks_waiting, usize::from(mode != Mode::Works));
            recovery
        });
        drop(runtime);
        let _ = done.send(());
        recovery
    });
    let ended = ended.recv_timeout(30 * SECOND);
    assert!(ended != Err(mpsc::RecvTimeoutError::Timeout), "{mode:?}: it hangs");
    thread.join().unwrap()
}

#[tokio::test]
async fn f31_a_stopped_runtime_causes_no_hang_or_panic() {
    for mode in [Mode::Works, Mode::Hangs, Mode::Fails] {
        let recovery = after_its_runtime(mode);
        let report = in_time(recovery.sweep_now()).await;
        assert_eq!(report.outcome.unwrap_err().to_string(), "the recovery has stopped");
    }
    assert_eq!(in_time(after_its_runtime(Mode::Works).shutdown()).await, Ok(()));
}

#[tokio::test]
async fn f31_shutdown_without_a_runtime_reports_unwritten_marks() {
    for mode in [Mode::Hangs, Mode::Fails] {
        let recovery = after_its_runtime(mode);
        assert_eq!(marks_lost(in_time(recovery.shutdown()).await), 1, "{mode:?}");
    }
}

#[tokio::test]
async fn recovery_logs_only_starts_marks_recoveries_and_stops() {
    let (logs, _guard) = Logs::capture();
    let bench = Bench::new(["alpha", "beta"]).await;
    let recovery = recovery(&bench.pool).await;
    let started = logs.ours();
    assert_eq!(started.len(), 1, "{started:?}");
    assert!(
        started[0].contains("INFO") && started[0].contains("recovery started interval_ms=30000"),
        "{started:?}"
    );

    // Nothing to recover: nothing is said.
    for pass in 2..=4 {
        bench.clock.advance(INTERVAL);
        passed(&recovery, pass).await;
    }
    assert_eq!(logs.ours().len(), 1, "{:?}", logs.ours());

    assert_eq!(bench.get().await, 429);
    let marked = logs.ours().pop().unwrap();
    assert!(marked.contains("INFO") && marked.contains("key=alpha"), "{marked}");
    assert!(marked.contains("cooldown_ms=120000") && marked.contains("http_status=429"), "{marked}");
    assert_eq!(bench.get().await, 200);
    bench.clock.advance(2 * MINUTE);
    passed(&recovery, 5).await;
    let recovered = logs.ours().into_iter().find(|line| line.contains("keys recovered")).unwrap();
    assert!(recovered.contains("INFO") && recovered.contains("count=1"), "{recovered}");
    assert!(recovered.contains(r#"ids=["alpha"]"#) && recovered.contains("duration_ms=0"), "{recovered}");

    bench.store.set(Mode::Fails);
    bench.clock.advance(INTERVAL);
    passed(&recovery, 6).await;
    let failed = logs.ours().pop().unwrap();
    assert!(failed.contains("WARN") && failed.contains("connection reset by mongod"), "{failed}");
    let before = logs.ours().len();
    recovery.shutdown().await.unwrap();
    assert!(
        logs.ours()[before..].iter().any(|line| line.contains("INFO") && line.contains("recovery stopped"))
    );
    assert!(!logs.text().contains("sk-"), "{}", logs.text());
}

#[tokio::test]
async fn dropping_the_handle_logs_recovery_stopped() {
    let (logs, _guard) = Logs::capture();
    let bench = Bench::new(["alpha"]).await;
    drop(recovery(&bench.pool).await);
    eventually("it is logged", || logs.count("recovery stopped") == 1).await;
}

#[tokio::test]
async fn the_recovery_log_omits_more_than_five_ids() {
    for keys in [5, 6] {
        let (logs, _guard) = Logs::capture();
        let clock = ManualClock::new();
        let pool = builder(0..keys, &clock).build().unwrap();
        let recovery = recovery(&pool).await;
        let server = Server::answering(|| answer(429, "")).await;
        let client = rotating(&pool);
        for _ in 0..keys {
            assert_eq!(status(&client, &server.url()).await, 429);
        }
        recovery.sweep_now().await.outcome.unwrap();
        clock.advance(2 * MINUTE);
        passed(&recovery, 3).await;
        let line = logs.ours().into_iter().find(|line| line.contains("keys recovered")).unwrap();
        assert!(line.contains(&format!("count={keys}")), "{line}");
        let named = (0..keys).filter(|key| line.contains(&format!("\"{key}\""))).count();
        assert_eq!(named, if keys == 5 { 5 } else { 0 }, "{line}");
    }
}

#[tokio::test]
async fn f08_a_reload_started_earlier_keeps_a_later_mark() {
    for written_meanwhile in [false, true] {
        let bench = Bench::new(["alpha", "beta"]).await;
        bench.store.loads.set(Mode::Hangs);
        let reload = tokio::spawn({
            let pool = bench.pool.clone();
            async move { pool.reload().await }
        });
        eventually("the reload has read", || bench.store.loads.begun() == 3).await;
        assert_eq!(bench.get().await, 429);
        let recovery = written_meanwhile.then(|| RecoveryHandle::spawn(&bench.pool));
        if written_meanwhile {
            bench.mark_is_written().await;
        }
        bench.store.loads.set(Mode::Works);
        in_time(reload).await.unwrap().unwrap();
        assert_eq!(time_left(&bench.pool, "alpha"), Some(2 * MINUTE));
        for _ in 0..3 {
            assert_eq!(bench.get().await, 200);
        }
        drop(recovery);
    }
}

#[tokio::test]
async fn f08_a_reload_keeps_a_mark_whose_write_hangs() {
    let bench = Bench::new(["alpha"]).await;
    let recovery = recovery(&bench.pool).await;
    bench.store.writes.set(Mode::Hangs);
    assert_eq!(bench.get().await, 429);
    eventually("the write hangs", || bench.store.writes.begun() == 1).await;
    bench.pool.reload().await.unwrap();
    assert_eq!(time_left(&bench.pool, "alpha"), Some(2 * MINUTE));
    bench.store.writes.set(Mode::Works);
    bench.mark_is_written().await;
    bench.pool.reload().await.unwrap();
    assert_eq!(time_left(&bench.pool, "alpha"), Some(2 * MINUTE));
    drop(recovery);
}

#[tokio::test]
async fn f09_a_remote_reset_wins_over_older_pending_marks() {
    let bench = Bench::new(["alpha"]).await;
    let other = bench.another().await;
    let recovery = recovery(&bench.pool).await;
    bench.store.writes.set(Mode::Fails);
    assert_eq!(bench.get().await, 429);
    bench.clock.advance(SECOND);
    other.reset("alpha").await.unwrap();
    bench.clock.advance(SECOND);
    bench.store.writes.set(Mode::Works);
    recovery.sweep_now().await.outcome.unwrap();
    assert_eq!(bench.store.rest("alpha").await, None);
    recovery.sweep_now().await.outcome.unwrap();
    assert_eq!(stats_of(&bench.pool, "alpha").status, Status::Healthy);

    // A mark from after the reset counts.
    assert_eq!(bench.get().await, 429);
    recovery.sweep_now().await.outcome.unwrap();
    assert!(bench.store.rest("alpha").await.is_some());
}

#[tokio::test]
async fn f09_marks_bring_back_no_rest_that_was_reset() {
    let bench = Bench::new(["alpha"]).await;
    let mut caller = Caller::new(&bench.pool);
    let in_flight = caller.send().unwrap();
    let recovery = recovery(&bench.pool).await;
    let other = bench.another().await;
    bench.limited_elsewhere(10 * MINUTE).await;
    let (reload, reset) = behind_a_reload(&bench, |_| async move { other.reset("alpha").await }).await;
    in_time(reset).await.unwrap().unwrap();
    in_flight.answer(LIMITED);
    bench.store.loads.set(Mode::Works);
    in_time(reload).await.unwrap().unwrap();
    bench.mark_is_written().await;
    assert_eq!(bench.store.rest("alpha").await, None);
    recovery.sweep_now().await.outcome.unwrap();
    assert_eq!(stats_of(&bench.pool, "alpha").status, Status::Healthy);
}

/// The price of an exact reset: one more 429 for each pool that has not heard of it.
#[tokio::test]
async fn f09_a_429_counts_after_a_known_remote_reset() {
    let bench = Bench::new(["alpha"]).await;
    let mut caller = Caller::new(&bench.pool);
    let [first, second, third] = std::array::from_fn(|_| caller.send().unwrap());
    let recovery = recovery(&bench.pool).await;
    first.answer(LIMITED);
    bench.mark_is_written().await;
    bench.another().await.reset("alpha").await.unwrap();
    second.answer(Answer { status: 429, retry_after: Some(600) });
    recovery.sweep_now().await.outcome.unwrap();
    assert_eq!(stats_of(&bench.pool, "alpha").status, Status::Healthy);
    third.answer(LIMITED);
    recovery.sweep_now().await.outcome.unwrap();
    assert_eq!(time_left(&bench.pool, "alpha"), Some(2 * MINUTE));
    assert_eq!(bench.store.rest("alpha").await, limited(2 * MINUTE));
}

#[tokio::test]
async fn an_expired_pending_mark_recovers_only_once() {
    let bench = Bench::new(["alpha"]).await;
    let recovery = recovery(&bench.pool).await;
    let other = bench.another().await;
    let mut caller = Caller::new(&bench.pool);
    bench.store.writes.set(Mode::Hangs);
    caller.send().unwrap().answer(LIMITED);
    bench.clock.advance(2 * MINUTE);
    caller.send().unwrap().answer(FINE);
    other.disable("alpha").await.unwrap();
    bench.pool.reload().await.unwrap();
    other.enable("alpha").await.unwrap();
    bench.pool.reload().await.unwrap();
    caller.send().unwrap().answer(FINE);
    assert_eq!(stats_of(&bench.pool, "alpha").recovered, 1);
    drop(recovery);
}

#[tokio::test]
async fn f09_a_reset_here_forgets_a_mark_that_waits() {
    let bench = Bench::new(["alpha"]).await;
    let recovery = recovery(&bench.pool).await;
    bench.store.writes.set(Mode::Fails);
    assert_eq!(bench.get().await, 429);
    bench.clock.advance(SECOND);
    bench.pool.reset("alpha").await.unwrap();
    bench.store.writes.set(Mode::Works);
    recovery.sweep_now().await.outcome.unwrap();
    assert_eq!(bench.store.rest("alpha").await, None);
    assert_eq!((bench.pool.stats().healthy, bench.pool.stats().marks_waiting), (1, 0));
}

#[tokio::test]
async fn the_first_reload_honours_a_remote_reset() {
    let bench = Bench::new(["alpha"]).await;
    let other = bench.another().await;
    let recovery = RecoveryHandle::spawn_with(&bench.pool, passes_by_hand());
    assert_eq!(bench.get().await, 429);
    bench.mark_is_written().await;
    other.reset("alpha").await.unwrap();
    bench.pool.reload().await.unwrap();
    assert_eq!(stats_of(&bench.pool, "alpha").status, Status::Healthy);
    drop(recovery);
}

#[tokio::test]
async fn only_newer_generations_shorten_a_rest() {
    let bench = Bench::new(["alpha"]).await;
    let recovery = recovery(&bench.pool).await;
    assert_eq!(bench.get().await, 429);
    bench.mark_is_written().await;
    bench.limited_elsewhere(MINUTE).await;
    bench.pool.reload().await.unwrap();
    assert_eq!(time_left(&bench.pool, "alpha"), Some(2 * MINUTE));
    bench.store.operate_elsewhere("alpha", Operation::Reset(None)).await;
    bench.limited_elsewhere(MINUTE).await;
    bench.pool.reload().await.unwrap();
    assert_eq!(time_left(&bench.pool, "alpha"), Some(MINUTE));
    drop(recovery);
}

#[tokio::test]
async fn f17_a_key_deleted_and_added_again_is_another() {
    for secret in ["sk-alpha", "sk-another"] {
        let bench = Bench::new(["alpha"]).await;
        let mut caller = Caller::new(&bench.pool);
        let (early, late) = (caller.send().unwrap(), caller.send().unwrap());
        let recovery = recovery(&bench.pool).await;
        bench.store.writes.set(Mode::Fails);
        early.answer(LIMITED);
        bench.store.operate_elsewhere("alpha", Operation::Remove).await;
        bench.store.insert("alpha", secret).await;
        bench.store.writes.set(Mode::Works);
        // The store refuses the mark, and the pool loads the key that the store has now.
        recovery.sweep_now().await.outcome.unwrap();
        assert_eq!((bench.pool.stats().healthy, bench.pool.stats().marks_waiting), (1, 0));
        late.answer(LIMITED);
        recovery.sweep_now().await.outcome.unwrap();
        assert_eq!(bench.pool.stats().healthy, 1);
        assert_eq!(bench.store.rest("alpha").await, None);
    }
}

#[tokio::test]
async fn f16_the_mark_of_a_deleted_key_inserts_nothing() {
    let bench = Bench::new(["alpha", "beta"]).await;
    let recovery = RecoveryHandle::spawn_with(&bench.pool, passes_by_hand());
    bench.store.operate_elsewhere("alpha", Operation::Remove).await;
    assert_eq!(bench.get().await, 429);
    // The refusal alone tells the pool that the key is gone.
    eventually("the key is gone", || bench.ids() == ["beta"]).await;
    assert_eq!(bench.pool.stats().marks_waiting, 0);
    assert_eq!(bench.store.tested.load(None).await.unwrap().records.len(), 1);
    drop(recovery);
}

#[tokio::test]
async fn loading_an_expired_cooldown_counts_no_recovery() {
    let bench = Bench::new(["alpha"]).await;
    let recovery = RecoveryHandle::spawn_with(&bench.pool, passes_by_hand());
    assert_eq!(bench.get().await, 429);
    bench.mark_is_written().await;
    bench.clock.advance(2 * MINUTE);
    let other = bench.another().await;
    let alpha = stats_of(&other, "alpha");
    assert_eq!((alpha.status, alpha.recovered), (Status::Healthy, 0));
    drop(recovery);
}

#[tokio::test]
async fn f10_the_store_keeps_the_later_of_two_deadlines() {
    let bench = Bench::new(["alpha"]).await;
    let other = bench.another().await;
    let server = Server::answering(|| answer_with(429, [("retry-after", "600")], "")).await;
    assert_eq!(status(&rotating(&other), &server.url()).await, 429);
    assert_eq!(bench.get().await, 429);
    drop(recovery(&other).await);
    let ours = recovery(&bench.pool).await;
    assert_eq!(bench.store.rest("alpha").await, limited(10 * MINUTE));
    ours.sweep_now().await.outcome.unwrap();
    assert_eq!(time_left(&bench.pool, "alpha"), Some(10 * MINUTE));
}

#[tokio::test]
async fn f14_a_restart_honours_the_remaining_cooldown() {
    let bench = Bench::new(["alpha"]).await;
    let recovery = recovery(&bench.pool).await;
    assert_eq!(bench.get().await, 429);
    in_time(recovery.shutdown()).await.unwrap();
    bench.clock.advance(30 * SECOND);

    // The new process gives its keys again, as programs do when they start.
    let restarted = builder(["alpha", "beta"], &bench.clock).open(bench.store.tested.clone()).await.unwrap();
    assert_eq!(time_left(&restarted, "alpha"), Some(90 * SECOND));
    let client = rotating(&restarted);
    bench.server.lift("alpha");
    bench.clock.advance(90 * SECOND - INSTANT);
    for _ in 0..2 {
        assert_eq!(status(&client, &bench.server.url()).await, 200);
    }
    bench.clock.advance(INSTANT);
    for _ in 0..2 {
        assert_eq!(status(&client, &bench.server.url()).await, 200);
    }
    let mut keys = bench.server.keys();
    keys[3..].sort();
    assert_eq!(keys, ["alpha", "beta", "beta", "alpha", "beta"]);
}

#[tokio::test]
async fn f06_two_concurrent_sweeps_reset_each_key_once() {
    let clock = ManualClock::new();
    let store = MemoryStore::with_clock(Arc::new(clock.clone()));
    let pools = [
        builder(0..20, &clock).open(store.clone()).await.unwrap(),
        KeyPool::builder().clock(clock.clone()).open(store.clone()).await.unwrap(),
    ];
    let server = Server::answering(|| answer(429, "")).await;
    let client = rotating(&pools[0]);
    for _ in 0..20 {
        assert_eq!(status(&client, &server.url()).await, 429);
    }
    let handles = [recovery(&pools[0]).await, recovery(&pools[1]).await];
    let loaded = store.load(None).await.unwrap();
    assert!(loaded.records.iter().all(|record| record.standing.words.key.is_some()));
    clock.advance(2 * MINUTE);
    for handle in &handles {
        passed(handle, 2).await;
    }
    let counts = handles.map(|handle| handle.last_report().unwrap().outcome.unwrap().count);
    assert_eq!(counts.iter().sum::<u64>(), 20);
}

#[tokio::test(start_paused = true)]
async fn no_interval_is_too_long_or_too_short() {
    for time in [Duration::ZERO, Duration::MAX] {
        let pool = KeyPool::builder().key("alpha", "sk-1").build().unwrap();
        let config = RecoveryConfig::new().interval(Duration::MAX).limit(Duration::MAX).start_jitter(time);
        let recovery = RecoveryHandle::spawn_with(&pool, config);
        assert!(recovery.sweep_now().await.outcome.is_ok());
        assert_eq!(recovery.shutdown().await, Ok(()));
    }
}

#[tokio::test]
async fn resetting_a_scope_leaves_the_other_rests() {
    let bench = Bench::new(["alpha", "beta"]).await;
    let (store, resting) = (&bench.store.tested, limited(MINUTE).unwrap());
    let scopes = ["a", "b"].map(|name| (Scope::new(name).unwrap(), resting)).into();
    let words = Words { key: Some(resting), scopes, ..Words::default() };
    let born = bench.store.record("alpha").await.standing.born;
    store.merge(Mark::new(id("alpha"), born, words)).await.unwrap().unwrap();

    let reset = Operation::Reset(Some(Scope::new("a").unwrap()));
    let words = store.operate(id("alpha"), reset).await.unwrap().unwrap().words;
    let scopes = [(Scope::new("b").unwrap(), resting)].into();
    assert_eq!(words, Words { generation: 1, key: Some(resting), scopes });
    let loaded = store.load(Some(&[id("alpha")])).await.unwrap().records;
    assert_eq!(loaded.len(), 1);
    assert_eq!(loaded[0].standing.words, words);
}
