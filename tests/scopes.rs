//! Rests of single scopes of a key: those that a pool knows from its store, and those that it tells the store.

mod support;

use std::{sync::Arc, time::Duration};

use support::{FaultyStore, MINUTE, Mode, SECOND, passes_by_hand};
use tower_key_rotation::{
    KeyId, KeyPool, KeyPoolBuilder, KeySpec, PassedOver, RecoveryHandle, Rest, Status, Traits,
    classify::Verdict,
    clock::ManualClock,
    store::{KeyRecord, KeyStore, Mark, MemoryStore, Operation, Resting, Scope, Until, Words},
};

fn scope(name: &str) -> Scope {
    Scope::new(name).unwrap()
}

/// A pool with the key alpha, over a store.
struct Fixture {
    clock: ManualClock,
    store: MemoryStore,
    pool: KeyPool,
}

impl Fixture {
    async fn new() -> Self {
        let clock = ManualClock::new();
        let store = MemoryStore::with_clock(Arc::new(clock.clone()));
        let pool = KeyPool::builder().key("alpha", "sk-1").clock(clock.clone());
        Self { clock, pool: pool.open(store.clone()).await.unwrap(), store }
    }

    async fn stored(&self) -> KeyRecord {
        self.store.load(None).await.unwrap().records.remove(0)
    }

    /// Another program marks a scope in the store.
    async fn mark(&self, name: &str, until: Until, reason: Rest) {
        let KeyRecord { spec, standing, .. } = self.stored().await;
        let scopes = [(scope(name), Resting { until, reason })].into();
        let words = Words { generation: standing.words.generation, scopes, ..Words::default() };
        self.store.merge(Mark::new(spec.id, standing.born, words)).await.unwrap().unwrap();
    }

    async fn limit(&self, name: &str, rest: Duration) {
        self.mark(name, Until::After(rest), Rest::RateLimited).await;
    }

    /// The scopes that rest in the pool, with what is left.
    fn shown(&self) -> Vec<(String, Status, Option<Duration>)> {
        let scopes = self.pool.stats().keys.remove(0).scopes;
        scopes.into_iter().map(|shown| (shown.scope.to_string(), shown.status, shown.time_left)).collect()
    }
}

fn limited(name: &str, left: Duration) -> (String, Status, Option<Duration>) {
    (name.to_owned(), Status::RateLimited, Some(left))
}

#[tokio::test]
async fn scope_rests_are_loaded_and_end_in_time() {
    let one = Fixture::new().await;
    one.limit("a", 2 * MINUTE).await;
    one.limit("b", MINUTE).await;
    one.pool.reload().await.unwrap();
    assert_eq!(one.shown(), [limited("a", 2 * MINUTE), limited("b", MINUTE)]);
    assert_eq!((one.pool.stats().healthy, one.pool.stats().marks_waiting), (1, 0), "the key itself serves");
    one.clock.advance(MINUTE);
    assert_eq!(one.shown(), [limited("a", MINUTE)]);
    one.clock.advance(MINUTE);
    assert_eq!(one.shown(), []);
}

#[tokio::test]
async fn f09_resets_end_all_scopes_or_one_alone() {
    let one = Fixture::new().await;
    for name in ["a", "b", "c"] {
        one.limit(name, MINUTE).await;
    }
    one.pool.reload().await.unwrap();
    one.pool.reset_scope("alpha", scope("a")).await.unwrap();
    assert_eq!(one.shown(), [limited("b", MINUTE), limited("c", MINUTE)]);
    one.pool.reset("alpha").await.unwrap();
    assert_eq!(one.shown(), []);
    assert!(one.stored().await.standing.words.scopes.is_empty());
}

#[tokio::test]
async fn f17_replacing_keys_inherit_no_scopes() {
    let one = Fixture::new().await;
    one.limit("a", MINUTE).await;
    one.pool.reload().await.unwrap();
    let spec = one.stored().await.spec;
    one.store.operate(spec.id.clone(), Operation::Remove).await.unwrap();
    one.store.operate(spec.id.clone(), Operation::Insert(spec)).await.unwrap();
    one.pool.reload().await.unwrap();
    assert_eq!(one.shown(), []);
}

#[tokio::test]
async fn scopes_resting_until_reset_have_no_time_left() {
    let one = Fixture::new().await;
    one.mark("a", Until::Reset, Rest::Revoked).await;
    one.pool.reload().await.unwrap();
    assert_eq!(one.shown(), [("a".to_owned(), Status::Revoked, None)]);
}

// ---- rests that responses name ----

/// Pools over one store, which write and load when a test asks for it.
struct Shared {
    clock: ManualClock,
    store: MemoryStore,
}

struct Process {
    pool: KeyPool,
    recovery: RecoveryHandle,
}

impl Shared {
    fn new() -> Self {
        let clock = ManualClock::new();
        Self { store: MemoryStore::with_clock(Arc::new(clock.clone())), clock }
    }

    fn builder(&self) -> KeyPoolBuilder {
        KeyPool::builder().keys([("alpha", "sk-1"), ("beta", "sk-2")]).clock(self.clock.clone())
    }

    async fn process(&self) -> Process {
        self.process_with(self.builder()).await
    }

    async fn process_with(&self, builder: KeyPoolBuilder) -> Process {
        let pool = builder.open(self.store.clone()).await.unwrap();
        Process { recovery: RecoveryHandle::spawn_with(&pool, passes_by_hand()), pool }
    }

    async fn words(&self, id: &str) -> Words {
        let id = KeyId::new(id).unwrap();
        self.store.load(Some(&[id])).await.unwrap().records.remove(0).standing.words
    }
}

impl Process {
    /// A request of that scope is answered so with that key.
    fn meets(&self, id: &str, traits: &Traits, verdict: Verdict) {
        let traits = traits.clone().key(KeyId::new(id).unwrap());
        self.pool.lease(&traits).unwrap().answered_with(verdict);
    }

    fn meets_quota(&self, id: &str, name: &str, left: Duration) {
        self.meets(id, &Traits::new().scope(name), Verdict::ScopeExhausted { wait: Some(left) });
    }

    async fn pass(&self) {
        self.recovery.sweep_now().await.outcome.unwrap();
    }

    /// Whether the key serves a request of that scope.
    fn serves(&self, id: &str, name: &str) -> bool {
        self.pool.lease(&Traits::new().scope(name).key(KeyId::new(id).unwrap())).is_ok()
    }

    fn resting(&self, id: &str) -> Vec<(String, Duration)> {
        let scopes = support::stats_of(&self.pool, id).scopes.into_iter();
        scopes.map(|shown| (shown.scope.to_string(), shown.time_left.unwrap())).collect()
    }
}

#[tokio::test]
async fn scope_rests_close_other_pools_over_the_store() {
    let shared = Shared::new();
    let (one, other) = (shared.process().await, shared.process().await);
    assert!(other.serves("alpha", "a"), "the scope is in use there");
    one.meets_quota("alpha", "a", 5 * MINUTE);
    one.meets_quota("alpha", "b", MINUTE);
    assert_eq!(one.pool.stats().marks_waiting, 1);
    one.pass().await;
    other.pass().await;
    assert_eq!(one.pool.stats().marks_waiting, 0);
    let both = [("a".to_owned(), 5 * MINUTE), ("b".to_owned(), MINUTE)];
    assert_eq!((one.resting("alpha"), other.resting("alpha")), (both.to_vec(), both.to_vec()));
    for pool in [&one, &other] {
        assert!(!pool.serves("alpha", "a") && !pool.serves("alpha", "b"), "b was not in use there");
        assert!(pool.serves("alpha", "c") && pool.serves("beta", "a"));
    }
    let explanation = other.pool.explain(&Traits::new().scope("a"));
    assert_eq!(explanation.keys[0].passed_over, Some(PassedOver::RestingInScope));
    shared.clock.advance(MINUTE);
    assert!(other.serves("alpha", "b") && !other.serves("alpha", "a"));
    shared.clock.advance(4 * MINUTE);
    assert!(other.serves("alpha", "a"));
    one.pass().await;
    assert_eq!(shared.words("alpha").await, Words::default(), "swept");
}

#[tokio::test]
async fn f42_the_next_process_finds_a_quota_used_up() {
    let shared = Shared::new();
    let one = shared.process().await;
    one.meets_quota("alpha", "gemini-pro", 600 * MINUTE);
    one.recovery.shutdown().await.unwrap();
    drop(one.pool);
    shared.clock.advance(100 * MINUTE);
    let next = shared.process().await;
    let traits = Traits::new().scope("gemini-pro");
    let explained = next.pool.explain(&traits).keys.remove(0);
    assert_eq!(
        (explained.passed_over, explained.opens_in),
        (Some(PassedOver::RestingInScope), Some(500 * MINUTE))
    );
    for _ in 0..4 {
        assert_eq!(next.pool.lease(&traits).unwrap().id().as_str(), "beta");
    }
    shared.clock.advance(500 * MINUTE);
    assert!(next.serves("alpha", "gemini-pro"));
}

#[tokio::test]
async fn guesses_and_short_waits_stay_in_the_process() {
    let shared = Shared::new();
    let one = shared.process_with(shared.builder().paced()).await;
    let limited = |wait| Verdict::RateLimited { wait };
    one.meets("alpha", &Traits::new().scope("a"), limited(Some(4 * SECOND)));
    one.meets("alpha", &Traits::new().scope("b"), limited(None));
    one.meets("beta", &Traits::new().scope("a"), limited(Some(30 * SECOND)));
    one.meets("beta", &Traits::new(), limited(Some(40 * SECOND)));
    one.pass().await;
    assert_eq!(shared.words("alpha").await, Words::default());
    let beta = shared.words("beta").await;
    assert_eq!(beta.key, None);
    let rests: Vec<_> = beta.scopes.iter().map(|(scope, resting)| (scope.as_str(), *resting)).collect();
    let rest = |left| Resting { until: Until::After(left), reason: Rest::RateLimited };
    assert_eq!(rests, [("(none)", rest(40 * SECOND)), ("a", rest(30 * SECOND))]);

    // Requests without a scope find that, too.
    let next = shared.process_with(shared.builder().paced()).await;
    let traits = Traits::new().key(KeyId::new("beta").unwrap());
    assert!(next.pool.lease(&traits).is_err());
    shared.clock.advance(40 * SECOND);
    assert!(next.pool.lease(&traits).is_ok());
}

#[tokio::test]
async fn f09_a_reset_ends_scope_rests_in_every_pool() {
    let shared = Shared::new();
    let (one, other) = (shared.process().await, shared.process().await);
    for name in ["a", "b"] {
        one.meets_quota("alpha", name, MINUTE);
    }
    one.pass().await;
    other.pass().await;
    // A mark that the store does not have yet is dropped with the reset.
    one.meets_quota("alpha", "c", MINUTE);
    other.pool.reset("alpha").await.unwrap();
    one.pool.reload().await.unwrap();
    one.pass().await;
    for pool in [&one, &other] {
        assert!(["a", "b", "c"].iter().all(|name| pool.serves("alpha", name)), "{:?}", pool.resting("alpha"));
    }
    let words = shared.words("alpha").await;
    assert_eq!((words.generation, words.scopes.len(), one.pool.stats().marks_waiting), (1, 0, 0));
    // One that is observed after the reset counts.
    one.meets_quota("alpha", "a", MINUTE);
    one.pass().await;
    other.pass().await;
    assert!(!other.serves("alpha", "a"));
}

#[tokio::test]
async fn f09_resetting_one_scope_leaves_the_others_closed() {
    let shared = Shared::new();
    let (one, other) = (shared.process().await, shared.process().await);
    for name in ["a", "b"] {
        one.meets_quota("alpha", name, MINUTE);
    }
    one.pass().await;
    other.pass().await;
    one.pool.reset_scope("alpha", scope("a")).await.unwrap();
    other.pass().await;
    for pool in [&one, &other] {
        assert!(pool.serves("alpha", "a") && !pool.serves("alpha", "b"));
    }
}

#[tokio::test]
async fn a_scope_rest_closes_the_whole_quota_group() {
    let shared = Shared::new();
    let group = |id: &str, secret: &str| {
        let mut spec = KeySpec::new(KeyId::new(id).unwrap(), secret);
        spec.group = Some("org".into());
        spec
    };
    let builder = || {
        let keys =
            [group("one", "sk-1"), group("two", "sk-2"), KeySpec::new(KeyId::new("three").unwrap(), "sk-3")];
        keys.into_iter()
            .fold(KeyPool::builder().clock(shared.clock.clone()), |builder, key| builder.key_spec(key))
    };
    let (one, other) = (shared.process_with(builder()).await, shared.process_with(builder()).await);
    one.meets_quota("one", "a", MINUTE);
    one.pass().await;
    other.pass().await;
    assert_eq!(shared.words("two").await, Words::default(), "one document tells of it");
    assert!(!other.serves("one", "a") && !other.serves("two", "a") && other.serves("three", "a"));
    // A reset of any member opens the limit that all share, for good.
    other.pool.reset("two").await.unwrap();
    let next = shared.process_with(builder()).await;
    one.pool.reload().await.unwrap();
    for pool in [&one, &other, &next] {
        assert!(pool.serves("one", "a") && pool.serves("two", "a"));
    }
}

#[tokio::test]
async fn scope_rests_without_a_store_end_by_resets_too() {
    let clock = ManualClock::new();
    let pool = support::pool(["alpha"], &clock);
    let traits = Traits::new().scope("a");
    pool.lease(&traits).unwrap().answered_with(Verdict::ScopeExhausted { wait: Some(MINUTE) });
    assert!(pool.lease(&traits).is_err());
    assert_eq!((pool.stats().keys[0].scopes.len(), pool.stats().marks_waiting), (1, 0));
    pool.reset("alpha").await.unwrap();
    assert!(pool.lease(&traits).is_ok() && pool.stats().keys[0].scopes.is_empty());
}

#[tokio::test]
async fn no_more_than_64_scopes_of_a_key_are_kept() {
    let shared = Shared::new();
    let one = shared.process().await;
    for number in 1..=70 {
        one.meets_quota("alpha", &format!("scope-{number:02}"), number * MINUTE);
    }
    one.pass().await;
    let words = shared.words("alpha").await;
    assert_eq!(words.scopes.len(), 64);
    assert_eq!(words.scopes.keys().next().unwrap().as_str(), "scope-07", "those that end first are dropped");
    assert!(!one.serves("alpha", "scope-01"), "the process that was told goes by it");
}

#[tokio::test]
async fn f02_scope_rests_wait_for_a_store_that_fails() {
    let shared = Shared::new();
    let store = FaultyStore::over(shared.store.clone(), &shared.clock);
    let pool = shared.builder().open(store.clone()).await.unwrap();
    let one = Process { recovery: RecoveryHandle::spawn_with(&pool, passes_by_hand()), pool };
    store.set(Mode::Fails);
    one.meets_quota("alpha", "a", 60 * MINUTE);
    one.meets("alpha", &Traits::new(), Verdict::RateLimited { wait: None });
    assert!(one.recovery.sweep_now().await.outcome.is_err());
    assert_eq!(one.pool.stats().marks_waiting, 1);
    store.set(Mode::Works);
    one.pass().await;
    let words = shared.words("alpha").await;
    assert!(words.key.is_some() && words.scopes.len() == 1, "{words:?}");
    assert_eq!(one.pool.stats().marks_waiting, 0);
}
