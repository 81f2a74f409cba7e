//! Sessions: the time that affinity adds to a pick, and how often a session finds its key.

use std::{collections::HashMap, time::Duration};

use tower_key_rotation::{Quota, Traits};

use crate::{
    pick::number_of,
    pools::{self, VirtualClock, lease, picks},
    support::compare::{Bar, Comparison, is_benchmark},
};

pub(crate) fn run() {
    time();
    hits();
}

fn time() {
    const SIZES: [usize; 3] = [10, 10_000, 100_000];
    let (without, with) =
        (|keys| format!("no session, {}", number_of(keys)), |keys| format!("a session, {}", number_of(keys)));
    let start = |keys: usize, traits: &'static (dyn Fn(usize) -> Traits + Sync)| {
        move || {
            let pool = pools::paced(keys, &[Traits::new()]);
            let sessions: Vec<_> = (0..100).map(traits).collect();
            let mut random = fastrand::Rng::with_seed(7);
            picks(move || lease(&pool, &sessions[random.usize(..sessions.len())]))
        }
    };
    // Long enough that the keys of all sessions are in the processor's caches.
    let comparison = Comparison::new("a pick for a session").batches_of(Duration::from_micros(500));
    let comparison = SIZES.into_iter().fold(comparison, |comparison, keys| {
        comparison
            // With as many objects of traits.
            .timed(without(keys), start(keys, &|_| Traits::new().tokens(0)))
            .timed(with(keys), start(keys, &|number| Traits::new().session(number)))
    });
    let Some(outcome) = comparison.run() else { return };
    outcome.print(&without(SIZES[0]));
    for keys in [10, 10_000] {
        let beyond = outcome.beyond(&with(keys), &without(keys));
        Bar::AtMost(20.0).print(&format!("affinity beyond a pick, {}", number_of(keys)), beyond, " ns");
    }
}

/// In virtual time: requests of random sessions at random times. A hit goes to the key of the session's request before.
fn hits() {
    const KEYS: usize = 20;
    const SESSIONS: usize = 10_000;
    let requests = if is_benchmark() { 200_000 } else { 2_000 };
    println!("\n| load | hits | most loaded key / mean |\n|---|---|---|");
    let mut bars = Vec::new();
    for (load, bar) in [(0.5, 0.99), (0.8, 0.97), (0.95, 0.9)] {
        let clock = VirtualClock::fast();
        let quota = Quota::per_minute(60).burst(10);
        let pool = pools::builder(KEYS).quota(quota).clock(clock.clone()).build().unwrap();
        let mut random = fastrand::Rng::with_seed(7);
        let sessions: Vec<_> = (0..SESSIONS).map(|session| Traits::new().session(session)).collect();
        let mut keys = HashMap::new();
        let (mut hits, mut again) = (0, 0);
        let mut counts: HashMap<_, u32> = HashMap::new();
        for _ in 0..requests {
            // Each key serves one request a second.
            let pause = -random.f64().max(1e-12).ln() / (load * KEYS as f64);
            clock.advance((pause * 1e9) as u64);
            let session = random.usize(..SESSIONS);
            let Ok(lease) = pool.lease(&sessions[session]) else { continue };
            *counts.entry(lease.id().clone()).or_default() += 1;
            if let Some(before) = keys.insert(session, lease.id().clone()) {
                again += 1;
                hits += u32::from(before == *lease.id());
            }
        }
        let hits = f64::from(hits) / f64::from(again);
        let mean = counts.values().sum::<u32>() as f64 / KEYS as f64;
        let most = f64::from(*counts.values().max().unwrap()) / mean;
        println!("| {load} | {:.1} % | {most:.2} |", 100.0 * hits);
        bars.push((load, hits, bar, most));
    }
    println!();
    for (load, hits, bar, most) in bars {
        Bar::AtLeast(100.0 * bar).print(
            &format!("sessions that find their key at load {load}"),
            100.0 * hits,
            " %",
        );
        Bar::AtMost(1.25).print(&format!("load of the most loaded key / mean at load {load}"), most, "");
    }
}
