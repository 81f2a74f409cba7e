//! The time of a pick in a pool with limits, beside one of a pool without limits in which one key rests.

use std::time::Duration;

use http::{HeaderMap, HeaderValue, header::RETRY_AFTER};
use tower_key_rotation::{KeyPool, Quota, Traits, classify::ResponseHead, classify::Verdict};

use crate::{
    pools::{self, VirtualClock, ends, lease, picks},
    support::compare::{Bar, Comparison},
};

pub(crate) fn number_of(keys: usize) -> String {
    match keys {
        1 => "1 key".into(),
        1_000.. => format!("{},000 keys", keys / 1_000),
        _ => format!("{keys} keys"),
    }
}

/// One budget for each key, learned from headers.
pub(crate) fn paced() {
    const SIZES: [usize; 4] = [1, 100, 10_000, 100_000];
    let today = |keys| format!("no limits, one key rests, {}", number_of(keys));
    let pick = |keys| format!("paced, {}", number_of(keys));
    let end = |keys| format!("the end of a paced pick, {}", number_of(keys));
    let mut comparison = Comparison::new("a pick of a paced pool, one budget");
    for keys in SIZES {
        comparison = comparison
            .timed(today(keys), move || {
                let (pool, traits) = (pools::one_rests(keys), Traits::new());
                picks(move || lease(&pool, &traits))
            })
            .timed(pick(keys), move || {
                let (pool, traits) = (pools::paced(keys, &[Traits::new()]), Traits::new());
                picks(move || lease(&pool, &traits))
            })
            .timed(end(keys), move || {
                let (pool, traits) = (pools::paced(keys, &[Traits::new()]), Traits::new());
                ends(move || lease(&pool, &traits), drop)
            });
    }
    let Some(outcome) = comparison.run() else { return };
    outcome.print(&today(100));
    for keys in SIZES {
        let beyond = outcome.beyond(&pick(keys), &today(keys));
        let what = format!("a paced pick beyond one without limits, {}", number_of(keys));
        Bar::AtMost(60.0).print(&what, beyond, " ns");
    }
}

/// The requests of 100 scopes, each with a budget at each of 10,000 keys.
pub(crate) fn in_scopes() {
    const KEYS: usize = 10_000;
    const TODAY: &str = "no limits, one key rests";
    const PACED: &str = "paced, a scope at random";
    let scopes =
        || -> Vec<_> { (0..100).map(|scope| Traits::new().scope(format!("model-{scope}"))).collect() };
    let comparison = Comparison::new("a pick of a paced pool, 10,000 keys in 100 scopes")
        .batches_of(Duration::from_micros(500))
        .timed(TODAY, || {
            let (pool, traits) = (pools::one_rests(KEYS), Traits::new());
            picks(move || lease(&pool, &traits))
        })
        .timed(PACED, move || {
            let scopes = scopes();
            let pool = pools::paced(KEYS, &scopes);
            let mut random = fastrand::Rng::with_seed(7);
            picks(move || lease(&pool, &scopes[random.usize(..scopes.len())]))
        });
    let Some(outcome) = comparison.run() else { return };
    outcome.print(TODAY);
    let beyond = outcome.beyond(PACED, TODAY);
    Bar::AtMost(200.0).print(
        "a paced pick beyond one without limits, 10,000 keys in 100 scopes",
        beyond,
        " ns",
    );
}

/// All keys but one are closed: each pick takes the key that has just got room. And: half of the keys rest, and all others
/// but one are limited in the scope.
pub(crate) fn saturated() {
    const TODAY: &str = "no limits, one key rests, 100 keys";
    const ADVERSARY: &str = "every second key rests, the others are limited in the scope, 100,000 keys";
    let name = |keys| format!("saturated, {}", number_of(keys));
    let end = |keys| format!("the end of a saturated pick, {}", number_of(keys));
    let comparison = Comparison::new("a pick of a saturated pool").timed(TODAY, || {
        let (pool, traits) = (pools::one_rests(100), Traits::new());
        picks(move || lease(&pool, &traits))
    });
    let comparison = [100, 100_000].into_iter().fold(comparison, |comparison, keys| {
        comparison
            .timed(name(keys), move || picks(saturated_pick(keys)))
            .timed(end(keys), move || ends(saturated_pick(keys), drop))
    });
    let comparison = comparison.timed(ADVERSARY, || {
        let (pool, traits) = (adversary(100_000), Traits::new().scope("model"));
        picks(move || lease(&pool, &traits))
    });
    let Some(outcome) = comparison.run() else { return };
    outcome.print(TODAY);
    for (keys, bar) in [(100, 120.0), (100_000, 350.0)] {
        Bar::AtMost(bar).print(&format!("a pick, {}", name(keys)), outcome.time(&name(keys)), " ns");
        let beyond = outcome.beyond(&name(keys), TODAY);
        Bar::AtMost(bar).print(&format!("the same beyond one without limits, {}", name(keys)), beyond, " ns");
    }
    Bar::AtMost(500.0).print(&format!("a pick, {ADVERSARY}"), outcome.time(ADVERSARY), " ns");
}

fn saturated_pick(keys: usize) -> impl FnMut() -> tower_key_rotation::KeyLease {
    let clock = VirtualClock::new();
    let pool = pools::builder(keys).paced().quota(Quota::per_second(1)).clock(clock.clone()).build().unwrap();
    let traits = Traits::new();
    // From the second round on, one key gets room with each step.
    let step = 1_000_000_000_u64.div_ceil(keys as u64);
    for _ in 0..keys {
        clock.advance(step);
        drop(lease(&pool, &traits));
    }
    move || {
        clock.advance(step);
        lease(&pool, &traits)
    }
}

fn adversary(keys: usize) -> KeyPool {
    let pool = pools::builder(keys)
        .paced()
        .hint_limits(Duration::ZERO, Duration::from_secs(86_400))
        .build()
        .unwrap();
    let traits = Traits::new().scope("model");
    pools::learn(&pool, keys, &traits, &pools::of_requests());
    let wait: HeaderMap = [(RETRY_AFTER, HeaderValue::from_static("80000"))].into_iter().collect();
    for number in 1..keys {
        if number % 2 == 0 {
            let exhausted = |_: &ResponseHead<'_>| Verdict::Exhausted { wait: None };
            let head = ResponseHead::new(http::StatusCode::PAYMENT_REQUIRED, &wait);
            let _ = lease(&pool, &traits).answered_by(&exhausted, &head);
        } else {
            let _ = pools::limit(&pool, &traits, &wait);
        }
    }
    pool
}
