//! Time of a request while two threads pick concurrently.
//!
//! ```text
//! cargo bench --all-features --bench contention
//! ```

mod support;

use std::{
    fmt::Debug,
    sync::{Arc, Barrier, Mutex},
    thread,
    time::{Duration, Instant},
};

use http::{Request, StatusCode};
use support::{
    GivesBack, Turns,
    compare::{Bar, Comparison},
    peers::{self, InTurn},
    rotation,
};
use tower::Service;

const THREADS: usize = 2;
const KEYS: usize = 1_000;

const SAME_HEADER: &str = "`SetRequestHeader`, one header value for both threads";
const LAYER: &str = "`KeyRotationLayer`";
const MUTEX: &str = "by hand: `Mutex`, first key";
const RW_LOCK: &str = "by hand: `RwLock`, in turn";

/// State of one thread, aligned so that no two threads share a cache line.
#[repr(align(128))]
struct Apart<S>(S, Turns);

/// Sends the given number of requests in each thread, all threads at once, and returns the total time.
fn together<S>(clients: Vec<S>) -> impl FnMut(u64) -> Duration
where
    S: Service<Request<StatusCode>, Error: Debug> + Send,
{
    let mut clients: Vec<_> = clients.into_iter().map(|client| Apart(client, Turns::new())).collect();
    move |times| {
        let begin = Barrier::new(clients.len());
        let send = |Apart(client, turns): &mut Apart<S>| {
            begin.wait();
            let started = Instant::now();
            (0..times).for_each(|_| turns.take(client, StatusCode::OK));
            (started, Instant::now())
        };
        thread::scope(|scope| {
            let threads: Vec<_> = clients.iter_mut().map(|own| scope.spawn(|| send(own))).collect();
            let times: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
            let first_start = times.iter().map(|(started, _)| *started).min();
            let last_end = times.iter().map(|(_, ended)| *ended).max();
            last_end.unwrap() - first_start.unwrap()
        })
    }
}

fn for_each_thread<S>(client: impl Fn() -> S) -> Vec<S> {
    (0..THREADS).map(|_| client()).collect()
}

fn main() {
    let by_hand = || peers::keys(KEYS, |_| false);
    let comparison = Comparison::new(format!("two concurrent threads, {KEYS} healthy keys"))
        // Long enough to make the time to wake the threads negligible.
        .batches_of(Duration::from_millis(3))
        .timed(SAME_HEADER, || {
            let header = support::authorization();
            together(for_each_thread(|| peers::set_this_header(GivesBack, header.clone())))
        })
        .timed(LAYER, || {
            let client = rotation(GivesBack, KEYS, |_| false);
            together(for_each_thread(|| client.clone()))
        })
        .timed(MUTEX, move || {
            let keys = Arc::new(Mutex::new(by_hand()));
            together(for_each_thread(|| peers::by_hand(GivesBack, keys.clone())))
        })
        .timed(RW_LOCK, move || {
            let keys = Arc::new(InTurn::new(by_hand()));
            together(for_each_thread(|| peers::by_hand(GivesBack, keys.clone())))
        });
    let Some(outcome) = comparison.run() else { return };
    outcome.print(LAYER);
    for (name, by_hand) in [(MUTEX, "`Mutex`"), (RW_LOCK, "`RwLock`")] {
        println!("picks per second, the layer / {by_hand}: {:.2}", outcome.ratio(name, LAYER));
    }
    outcome.bar(MUTEX, LAYER, Bar::AtLeast(2.0));
}
