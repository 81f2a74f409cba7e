//! The words that stores and pools exchange, and their join.

use std::time::Duration;

use proptest::prelude::*;
use tower_key_rotation::{
    Rest,
    store::{InvalidScope, Resting, Scope, Until, Words},
};

fn resting() -> impl Strategy<Value = Resting> {
    let until = prop_oneof![
        (0_u64..50).prop_map(|seconds| Until::After(Duration::from_secs(seconds))),
        Just(Until::Reset)
    ];
    let reason = prop_oneof![Just(Rest::RateLimited), Just(Rest::Exhausted), Just(Rest::Revoked)];
    (until, reason).prop_map(|(until, reason)| Resting { until, reason })
}

fn words() -> impl Strategy<Value = Words> {
    let scope = "[ab]".prop_map(|name| Scope::new(name).unwrap());
    let scopes = prop::collection::btree_map(scope, resting(), 0..3);
    (0_u64..3, prop::option::of(resting()), scopes).prop_map(|(generation, key, scopes)| Words {
        generation,
        key,
        scopes,
    })
}

fn joined(one: &Words, other: &Words) -> Words {
    let mut joined = one.clone();
    joined.join(other);
    joined
}

proptest! {
    #[test]
    fn joins_are_commutative_idempotent_and_associative(a in words(), b in words(), c in words()) {
        prop_assert_eq!(joined(&a, &a), a.clone());
        prop_assert_eq!(joined(&a, &b), joined(&b, &a));
        prop_assert_eq!(joined(&joined(&a, &b), &c), joined(&a, &joined(&b, &c)));
        prop_assert_eq!(joined(&joined(&a, &b), &b), joined(&a, &b));
    }

    #[test]
    fn f10_within_a_generation_no_rest_gets_shorter(a in words(), b in words()) {
        let both = joined(&a, &b);
        for view in [&a, &b].into_iter().filter(|view| view.generation == both.generation) {
            prop_assert!(both.key >= view.key);
            prop_assert!(view.scopes.iter().all(|(scope, resting)| both.scopes[scope] >= *resting));
        }
    }

    #[test]
    fn joins_ignore_the_origin_of_times(a in words(), b in words(), by in 0_u64..60) {
        let by = Duration::from_secs(by);
        let moved = joined(&a.clone().later(by), &b.clone().later(by));
        prop_assert_eq!(moved.clone(), joined(&a, &b).later(by));
        prop_assert_eq!(moved.after(by), joined(&a, &b).after(Duration::ZERO));
    }
}

#[test]
fn f09_a_reset_outlives_marks_of_the_generation_before() {
    let marked =
        Words { key: Some(Resting { until: Until::Reset, reason: Rest::Revoked }), ..Words::default() };
    let reset = Words { generation: 1, ..Words::default() };
    assert_eq!(joined(&reset, &marked), reset);
    assert_eq!(joined(&marked, &reset), reset);
}

#[test]
fn scope_names_that_break_log_lines_are_refused() {
    for name in ["", "a\nb", &"x".repeat(129)] {
        assert_eq!(Scope::new(name), Err(InvalidScope), "{name:?}");
    }
    assert_eq!(Scope::new("gpt-4o").unwrap().to_string(), "gpt-4o");
}
