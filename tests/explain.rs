//! What an operator is told of picks and limits.

mod support;

use std::{
    collections::BTreeMap,
    time::{Duration, UNIX_EPOCH},
};

use http::{HeaderMap, StatusCode};
use support::{
    MINUTE, SECOND,
    leased::{ask, keys, left, scope},
};
use tokio::time::sleep;
use tower_key_rotation::{
    ExplainedKey, Explanation, KeyId, KeyPool, KeyPoolBuilder, KeySpec, KnownBy, PassedOver, Quota,
    RestCause, Status, Traits, Unit, classify::ResponseHead, clock::ManualClock,
};

const HOUR: Duration = Duration::from_secs(60 * 60);

fn id(name: &str) -> KeyId {
    KeyId::new(name).unwrap()
}

fn spec(number: usize, tier: u8, group: Option<&str>) -> KeySpec {
    let mut spec = KeySpec::new(id(&format!("k{number}")), format!("sk-{number}"));
    spec.tier = Some(tier);
    spec.group = group.map(str::to_owned);
    spec
}

fn of<'a>(explanation: &'a Explanation, name: &str) -> &'a ExplainedKey {
    explanation.keys.iter().find(|key| key.id.as_str() == name).unwrap()
}

fn why(pool: &KeyPool, traits: &Traits, name: &str) -> Option<PassedOver> {
    of(&pool.explain(traits), name).passed_over.clone()
}

// ---- explanations ----

#[tokio::test]
async fn each_reason_is_given_with_its_time() {
    let clock = ManualClock::new();
    let builder = (0..3).map(|number| spec(number, 0, None)).chain([spec(3, 1, None)]);
    let builder = builder.fold(KeyPool::builder().clock(clock.clone()), KeyPoolBuilder::key_spec);
    let pool =
        builder.quota(Quota::per_minute(60)).quota(Quota::per_minute(60).burst(10).tokens()).build().unwrap();
    let model = scope("model").tokens(5);

    // k0 rests in the scope, k1 has taken its second's request, k2 is out.
    ask(&pool, &model, 429, &HeaderMap::new());
    let lease = pool.lease(&model).unwrap();
    pool.disable("k2").await.unwrap();
    let explanation = pool.explain(&model);
    assert_eq!(of(&explanation, "k0").passed_over, Some(PassedOver::RestingInScope));
    assert_eq!(of(&explanation, "k0").opens_in, Some(2 * MINUTE));
    let Some(PassedOver::Budget(budget)) = of(&explanation, "k1").passed_over.clone() else {
        panic!("{explanation}")
    };
    assert_eq!((budget.unit, budget.known_by, budget.limit), (Unit::Requests, KnownBy::Quota, 1.0));
    assert_eq!(of(&explanation, "k1").opens_in, Some(SECOND));
    assert_eq!(of(&explanation, "k1").in_flight, 1);
    assert_eq!(of(&explanation, "k2").passed_over, Some(PassedOver::Disabled));
    assert_eq!(of(&explanation, "k2").opens_in, None);
    assert_eq!((&explanation.next, explanation.opens_in), (&Some(id("k3")), Some(Duration::ZERO)));

    // Of two budgets, the one that takes longer.
    let Some(PassedOver::Budget(budget)) = why(&pool, &scope("model").tokens(15), "k1") else { panic!() };
    assert_eq!(budget.unit, Unit::Tokens);

    // After its second, k1 has room, and tier 1 is no longer needed.
    drop(lease);
    clock.advance(SECOND);
    assert_eq!(why(&pool, &model, "k1"), None);
    assert_eq!(why(&pool, &model, "k3"), Some(PassedOver::LowerTier));
    assert_eq!(why(&pool, &model.clone().avoid(id("k1")), "k1"), Some(PassedOver::Avoided));
    assert_eq!(why(&pool, &model.clone().avoid(id("k1")), "k3"), None);
    let pinned = pool.explain(&model.clone().key(id("k3")));
    assert_eq!((&pinned.next, &pinned.keys[0].id), (&Some(id("k3")), &id("k3")));
    assert_eq!(of(&pinned, "k1").passed_over, Some(PassedOver::AnotherIsPinned));

    // Other scopes know nothing of it.
    let other = pool.explain(&scope("other"));
    assert_eq!(other.keys.iter().filter(|key| key.passed_over.is_none()).count(), 2, "{other}");
}

#[tokio::test]
async fn rests_of_whole_keys_are_given_with_their_time() {
    let pool = keys(2).clock(ManualClock::new()).build().unwrap();
    ask(&pool, &Traits::new(), 429, &HeaderMap::new());
    let explanation = pool.explain(&Traits::new());
    let rests = PassedOver::Resting { status: Status::RateLimited, cause: RestCause::Guessed };
    assert_eq!((&of(&explanation, "k0").passed_over, &explanation.next), (&Some(rests), &Some(id("k1"))));
    assert_eq!(of(&explanation, "k0").opens_in, Some(2 * MINUTE));
}

#[tokio::test]
async fn full_in_flight_caps_are_given_as_reason() {
    let pool = keys(1).paced().clock(ManualClock::new()).build().unwrap();
    let leases: Vec<_> = (0..4).map(|_| pool.lease(&scope("model")).unwrap()).collect();
    let explanation = pool.explain(&scope("model"));
    assert_eq!(explanation.keys[0].passed_over, Some(PassedOver::InFlight { in_flight: 4, most: 4 }));
    assert_eq!((explanation.next, explanation.opens_in), (None, None));
    drop(leases);
    assert_eq!(why(&pool, &scope("model"), "k0"), None);
}

#[tokio::test]
async fn full_keys_are_given_as_reason_in_every_scope() {
    let mut capped = spec(0, 0, None);
    capped.max_in_flight = std::num::NonZeroU32::new(1);
    let pool = KeyPool::builder().key_spec(capped).key_spec(spec(1, 0, None)).build().unwrap();
    let lease = pool.lease(&scope("model").key(id("k0"))).unwrap();
    let full = PassedOver::InFlight { in_flight: 1, most: 1 };
    assert_eq!(why(&pool, &scope("other"), "k0"), Some(full));
    assert_eq!(pool.explain(&scope("other")).next, Some(id("k1")));
    drop(lease);
    assert_eq!(why(&pool, &scope("other"), "k0"), None);
}

#[tokio::test]
async fn used_up_days_are_given_with_their_reset() {
    let clock = ManualClock::new();
    clock.set_wall(UNIX_EPOCH + 22 * HOUR);
    let quota = Quota::per_day(1).resets_at("00:00", "UTC");
    let pool = keys(1).quota(quota).clock(clock).build().unwrap();
    ask(&pool, &scope("model"), 200, &HeaderMap::new());
    let key = &pool.explain(&scope("model")).keys[0];
    let Some(PassedOver::Budget(budget)) = &key.passed_over else { panic!("{key}") };
    assert_eq!((budget.known_by, budget.left, budget.limit), (KnownBy::Quota, 0.0, 1.0));
    assert!(budget.is_window);
    // Days are kept in ticks of 17 ms, or longer.
    for time in [key.opens_in.unwrap(), budget.resets_in] {
        assert!((2 * HOUR..2 * HOUR + SECOND).contains(&time), "{time:?}");
    }
}

#[tokio::test]
async fn budgets_say_what_they_are_known_by() {
    let clock = ManualClock::new();
    let pool = keys(1).paced().clock(clock.clone()).build().unwrap();
    let budgets = |traits: &Traits| pool.explain(traits).keys[0].budgets.clone();

    ask(&pool, &scope("headers"), 200, &left("7", "3s"));
    let budget = budgets(&scope("headers"))[0];
    assert_eq!((budget.known_by, budget.unit, budget.limit), (KnownBy::Headers, Unit::Requests, 10.0));
    assert!((6.5..8.1).contains(&budget.left), "{budget}");
    assert!((2 * SECOND..4 * SECOND).contains(&budget.resets_in), "{budget:?}");

    assert_eq!(budgets(&scope("silent")), []);
    ask(&pool, &scope("silent"), 200, &HeaderMap::new());
    clock.advance(SECOND);
    ask(&pool, &scope("silent"), 429, &HeaderMap::new());
    assert_eq!(budgets(&scope("silent"))[0].known_by, KnownBy::Refusals);

    // Refused, though all is left, again and again.
    for _ in 0..5 {
        ask(&pool, &scope("lies"), 429, &left("10", "0s"));
        clock.advance(10 * MINUTE);
    }
    let totals: BTreeMap<_, _> = pool
        .scopes()
        .into_iter()
        .map(|totals| {
            let known =
                [totals.known_by_headers, totals.known_by_refusals, totals.distrusted, totals.unknown];
            (totals.scope.unwrap().to_string(), (known, totals.limited_despite_pacing))
        })
        .collect();
    assert_eq!(totals["headers"], ([1, 0, 0, 0], 0));
    assert_eq!(totals["silent"], ([0, 1, 0, 0], 1));
    assert_eq!(totals["lies"], ([0, 0, 1, 0], 5));
    assert_eq!(pool.stats().limited_despite_pacing, 6);
}

#[tokio::test]
async fn explaining_takes_and_makes_nothing() {
    let pools = [(); 2].map(|()| {
        let builder = (0..6).map(|number| spec(number, 0, Some(["a", "b"][number % 2])));
        let builder = builder.fold(KeyPool::builder().clock(ManualClock::new()), KeyPoolBuilder::key_spec);
        builder.quota(Quota::per_minute(60).burst(8)).build().unwrap()
    });
    let mut picked = [const { Vec::new() }; 2];
    for _ in 0..20 {
        for (pool, picked) in pools.iter().zip(&mut picked) {
            picked.push(pool.lease(&scope("model")).ok().map(|lease| lease.id().clone()));
        }
        for traits in [scope("model"), scope("model").session(1), scope("new"), Traits::new()] {
            assert_eq!(pools[0].explain(&traits), pools[0].explain(&traits));
        }
    }
    assert_eq!(picked[0], picked[1]);
    assert_eq!(pools[0].scopes().len(), 1);
}

/// Explains, and then picks, many times at random: the pick is the one that was explained.
#[test]
fn the_next_key_is_the_one_that_is_explained() {
    for seed in 0..300 {
        let mut random = fastrand::Rng::with_seed(seed);
        let clock = ManualClock::new();
        let count = random.usize(1..9);
        let group = |random: &mut fastrand::Rng| [None, None, Some("a"), Some("b")][random.usize(0..4)];
        let specs: Vec<_> =
            (0..count).map(|number| spec(number, random.u8(0..3), group(&mut random))).collect();
        let mut builder = specs.into_iter().fold(KeyPool::builder(), KeyPoolBuilder::key_spec);
        if random.bool() {
            builder = builder.quota(Quota::per_minute(random.u32(1..40)).burst(random.u32(1..5)));
        }
        let has_tokens = random.bool();
        if has_tokens {
            builder = builder.quota(Quota::per_minute(300).burst(random.u32(10..60)).tokens());
        }
        let pool = builder.clock(clock.clone()).build().unwrap();
        let mut leases = Vec::new();
        for step in 0..60 {
            let mut traits = scope(["a", "b"][random.usize(0..2)]);
            if random.u8(0..3) == 0 {
                traits = traits.session(random.u8(0..4));
            }
            if random.bool() {
                traits = traits.tokens(random.u64(1..30));
            }
            match random.u8(0..12) {
                0 => traits = traits.key(id(&format!("k{}", random.usize(0..10)))),
                1 => traits = traits.avoid(id(&format!("k{}", random.usize(0..count)))),
                _ => {}
            }
            let explanation = pool.explain(&traits);
            let told = format!("seed {seed}, step {step}, {traits:?}: {explanation}");
            match pool.lease(&traits) {
                Ok(lease) => {
                    assert_eq!(explanation.next.as_ref(), Some(lease.id()), "{told}");
                    leases.push(lease);
                }
                Err(error) => {
                    assert_eq!(explanation.next, None, "{told}");
                    // The error knows when the pick looks again: not by this request's tokens, but by a usual one's.
                    let (opens_in, retry_in) = (explanation.opens_in, error.retry_in());
                    assert!(opens_in == retry_in || has_tokens && opens_in.is_some(), "{error}: {told}");
                }
            }
            if random.u8(0..4) == 0 && !leases.is_empty() {
                let lease = leases.swap_remove(random.usize(0..leases.len()));
                let status = StatusCode::from_u16([200, 429][random.usize(0..2)]).unwrap();
                lease.answered(&ResponseHead::new(status, &HeaderMap::new()));
            }
            if random.u8(0..3) == 0 {
                clock.advance(Duration::from_millis(random.u64(1..40_000)));
            }
        }
    }
}

#[tokio::test]
async fn a_session_is_told_its_preferred_key() {
    let pool = keys(5).quota(Quota::per_minute(1)).clock(ManualClock::new()).build().unwrap();
    let traits = scope("model").session("user-7");
    let before = pool.explain(&traits);
    assert!(before.preferred.is_some() && before.preferred == before.next, "{before}");
    ask(&pool, &traits, 200, &HeaderMap::new());
    let after = pool.explain(&traits);
    assert_eq!(after.preferred, before.preferred);
    assert_ne!(after.next, before.next);
}

#[tokio::test]
async fn the_text_is_a_table_of_bounded_length() {
    let pool = keys(3).quota(Quota::per_minute(60).burst(10)).clock(ManualClock::new()).build().unwrap();
    ask(&pool, &scope("model"), 429, &HeaderMap::new());
    ask(&pool, &scope("model"), 200, &HeaderMap::new());
    pool.disable("k2").await.unwrap();
    let text = pool.explain(&scope("model")).to_string();
    let expected = "\
scope model: the next request gets k1; 0 wait
  k2  disabled
  k0  rests in this scope, 120.0 s; 10.0 of 10 requests left (by quota)
  k1  open; 9.0 of 10 requests left (by quota)";
    assert_eq!(text, expected);

    let many = keys(1_000).build().unwrap().explain(&Traits::new()).to_string();
    assert!(many.ends_with("\n  and 950 more: 950 open") && many.lines().count() == 52, "{many}");
    let none = KeyPool::builder().build().unwrap().explain(&scope("model")).to_string();
    assert_eq!(none, "scope model: no key has room, and none has by itself; 0 wait");
}

#[tokio::test(start_paused = true)]
async fn waits_are_counted_with_their_time() {
    let pool = keys(1).quota(Quota::per_minute(60)).build().unwrap();
    let traits = scope("model");
    for _ in 0..2 {
        drop(pool.lease_within(&traits, MINUTE).await.unwrap());
    }
    let waiting = tokio::spawn({
        let (pool, traits) = (pool.clone(), traits.clone());
        async move { pool.lease_within(&traits, MINUTE).await.map(drop) }
    });
    sleep(SECOND / 10).await;
    assert_eq!((pool.explain(&traits).waiting, pool.scopes()[0].waiting), (1, 1));
    waiting.await.unwrap().unwrap();
    let stats = pool.stats();
    assert_eq!(stats.waited, 2);
    assert!((1_990..2_020).contains(&stats.waited_for.as_millis()), "{:?}", stats.waited_for);
    assert_eq!((pool.explain(&traits).waiting, stats.limited_despite_pacing), (0, 0));
}
