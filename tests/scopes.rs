//! Rests of single scopes of a key, which a pool knows from its store.

use std::{sync::Arc, time::Duration};

use tower_key_rotation::{
    KeyPool, Rest, Status,
    clock::ManualClock,
    store::{KeyRecord, KeyStore, Mark, MemoryStore, Operation, Resting, Scope, Until, Words},
};

const MINUTE: Duration = Duration::from_secs(60);

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
