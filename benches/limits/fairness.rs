//! How evenly keys are picked over a long run, with scopes, rests and budgets in between.

use std::time::Duration;

use http::{HeaderMap, HeaderValue, StatusCode, header::RETRY_AFTER};
use tower_key_rotation::{Quota, Traits, classify::ResponseHead, classify::Verdict};

use crate::{
    pools::{self, VirtualClock, lease},
    support::compare::{Bar, is_benchmark},
};

const KEYS: usize = 100;

pub(crate) fn run() {
    let picks = if is_benchmark() { 4_000_000 } else { 20_000 };
    let clock = VirtualClock::fast();
    let pool = pools::builder(KEYS).paced().quota(Quota::per_second(10)).clock(clock.clone());
    let pool = pool.exhausted_for(Duration::from_secs(7)).build().unwrap();
    let scopes = [Traits::new().scope("one"), Traits::new().scope("two")];
    let wait: HeaderMap = [(RETRY_AFTER, HeaderValue::from_static("3"))].into_iter().collect();
    let exhausted = |_: &ResponseHead<'_>| Verdict::Exhausted { wait: None };
    let mut random = fastrand::Rng::with_seed(7);
    let mut counts = [0_u64; KEYS];
    // The keys rest in turn, or chance would decide who rests more often.
    let (mut next_limited, mut next_exhausted) = (0, 0);
    for pick in 0..picks {
        // Half of what the budgets of both scopes allow.
        clock.advance(1_000_000);
        let lease = lease(&pool, &scopes[random.usize(..2)]);
        let key: usize = lease.id().as_str()["key-".len()..].parse().unwrap();
        counts[key] += 1;
        if pick / 50 > next_limited && key == next_limited % KEYS {
            next_limited += 1;
            let _ = lease.answered(&ResponseHead::new(StatusCode::TOO_MANY_REQUESTS, &wait));
        } else if pick / 500 > next_exhausted && key == next_exhausted % KEYS {
            next_exhausted += 1;
            let head = ResponseHead::new(StatusCode::PAYMENT_REQUIRED, &wait);
            let _ = lease.answered_by(&exhausted, &head);
        } else {
            let _ = lease.answered(&ResponseHead::new(StatusCode::OK, &HeaderMap::new()));
        }
    }
    let (least, most) = (counts.iter().min().unwrap(), counts.iter().max().unwrap());
    println!("\n{next_limited} rests of limits, {next_exhausted} of keys in {picks} picks");
    let ratio = *most as f64 / *least as f64;
    Bar::AtMost(1.01).print("picks of the most picked key / of the least picked, two scopes", ratio, "");
}
