//! What a request pays for the layer, beside what it would pay for something else.
//!
//! ```text
//! cargo bench --bench layer
//! ```

mod support;

use std::sync::{Arc, Mutex, RwLock};

use support::{
    Answers,
    compare::{Bar, Comparison},
    peers::{self, Client},
    request, rotation, send,
};

const NOTHING: &str = "no middleware";
const SET_HEADER: &str = "`SetRequestHeader`";
const LAYER: &str = "`KeyRotationLayer`";

/// As many keys as a program that holds several might have.
const KEYS: usize = 10;

fn sends(client: impl Client<&'static str>) -> impl FnMut() {
    let mut client = client;
    move || send(&mut client, request())
}

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let _timers = runtime.enter();
    let by_hand = || peers::keys(KEYS, |_| false);

    let comparison = Comparison::new("a request with three headers and a body")
        .case(NOTHING, || sends(Answers))
        .case(LAYER, || sends_keyed(KEYS))
        .case(format!("{LAYER}, 10,000 keys"), || sends_keyed(10_000))
        .case(SET_HEADER, || sends(peers::set_header(Answers)))
        .case("`AddAuthorization`", || sends(peers::add_authorization(Answers)))
        .case("`SetRequestHeader` and tower's `RateLimit`", || sends(peers::rate_limit(Answers)))
        .case("`SetRequestHeader` and `governor`", || sends(peers::governor_direct(Answers)))
        .case("`governor` for each key", || sends(peers::governor_keyed(Answers, KEYS)))
        .case("by hand: `Mutex`, first key", move || {
            sends(peers::mutex(Answers, Arc::new(Mutex::new(by_hand()))))
        })
        .case("by hand: `RwLock`, in turn", move || {
            sends(peers::rw_lock(Answers, Arc::new(RwLock::new(by_hand()))))
        })
        .case("by hand: tokio's `Mutex`, first key", move || {
            sends(peers::tokio_mutex(Answers, Arc::new(tokio::sync::Mutex::new(by_hand()))))
        });
    if let Some(outcome) = comparison.run() {
        outcome.print(LAYER);
        outcome.bar(LAYER, SET_HEADER, Bar::AtMost(1.25));
    }
}

fn sends_keyed(keys: usize) -> impl FnMut() {
    let mut client = rotation(Answers, keys, |_| false);
    move || send(&mut client, request())
}
