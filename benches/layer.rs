//! Cost of the layer per request, compared with alternatives.
//!
//! ```text
//! cargo bench --all-features --bench layer
//! ```

mod support;

use std::{
    fmt::Debug,
    sync::{Arc, Mutex},
};

use http::Request;
use support::{
    Answers, Text,
    compare::{Bar, Comparison},
    peers::{self, InTurn},
    request, rotation, send,
};
use tower::Service;

const NOTHING: &str = "no middleware";
const SET_HEADER: &str = "`SetRequestHeader`";
const LAYER: &str = "`KeyRotationLayer`";
const HEALTHY: &str = "`KeyRotationLayer`, 100 keys";
const HALF_RESTING: &str = "`KeyRotationLayer`, 100 keys of which 50 rest";

/// A typical number of keys.
const KEYS: usize = 10;

fn sends(mut client: impl Service<Request<Text>, Error: Debug>) -> impl FnMut() {
    move || send(&mut client, request())
}

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let _timers = runtime.enter();
    let by_hand = || peers::keys(KEYS, |_| false);

    let comparison = Comparison::new("a request with three headers and a body")
        .case(NOTHING, || sends(Answers))
        .case(LAYER, || sends(rotation(Answers, KEYS, |_| false)))
        .case(format!("{LAYER}, 10,000 keys"), || sends(rotation(Answers, 10_000, |_| false)))
        .case(HEALTHY, || sends(rotation(Answers, 100, |_| false)))
        .case(HALF_RESTING, || sends(rotation(Answers, 100, |number| number % 2 == 0)))
        .case(SET_HEADER, || sends(peers::set_header(Answers)))
        .case("`AddAuthorization`", || sends(peers::add_authorization(Answers)))
        .case("`SetRequestHeader` and tower's `RateLimit`", || sends(peers::rate_limit(Answers)))
        .case("`SetRequestHeader` and `governor`", || sends(peers::governor_direct(Answers)))
        .case("`governor` for each key", || sends(peers::governor_keyed(Answers, KEYS)))
        .case("by hand: `Mutex`, first key", move || {
            sends(peers::by_hand(Answers, Arc::new(Mutex::new(by_hand()))))
        })
        .case("by hand: `RwLock`, in turn", move || {
            sends(peers::by_hand(Answers, Arc::new(InTurn::new(by_hand()))))
        })
        .case("by hand: tokio's `Mutex`, first key", move || {
            sends(peers::by_hand(Answers, Arc::new(tokio::sync::Mutex::new(by_hand()))))
        });
    if let Some(outcome) = comparison.run() {
        outcome.print(LAYER);
        outcome.bar(LAYER, SET_HEADER, Bar::AtMost(1.25));
        outcome.bar(HALF_RESTING, HEALTHY, Bar::AtMost(1.3));
    }
}
