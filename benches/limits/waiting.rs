//! Requests that wait in the queue of a scope: memory, time, order and punctuality.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, Wake, Waker},
    time::{Duration, Instant},
};

use tower_key_rotation::{KeyLease, NoKeyAvailable, Quota, Traits};

use crate::{
    pools,
    support::compare::{Bar, is_benchmark},
};

const HOUR: Duration = Duration::from_secs(3_600);

type Waiting<'a> = Pin<Box<dyn Future<Output = Result<KeyLease, NoKeyAvailable>> + 'a>>;

pub(crate) fn run() {
    in_virtual_time();
    in_real_time();
}

/// Woken requests, in order.
#[derive(Default)]
struct Woken(Mutex<VecDeque<usize>>);

struct WakeOne(usize, Arc<Woken>);

impl Wake for WakeOne {
    fn wake(self: Arc<Self>) {
        self.1.0.lock().unwrap().push_back(self.0);
    }
}

/// All wait for one key, which has room every millisecond. Figures are the best of several rounds.
fn in_virtual_time() {
    let (waiters, rounds) = if is_benchmark() { (10_000, 7) } else { (100, 1) };
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    // Polls of ten thousand requests in one task would use up its budget.
    let round = || runtime().unwrap().block_on(tokio::task::unconstrained(Round::run(waiters)));
    let rounds: Vec<_> = (0..rounds).map(|_| round()).collect();
    let least = |figure: fn(&Round) -> f64| rounds.iter().map(figure).fold(f64::INFINITY, f64::min);
    println!();
    let (future, queue) = (least(|round| round.future), least(|round| round.queue));
    println!("a waiting request: {future:.0} B of its future, {queue:.0} B of the queue");
    Bar::AtMost(200.0).print("memory of a waiting request", future + queue, " B");
    Bar::AtMost(3.0).print("time to enqueue a request", least(|round| round.enqueue), " µs");
    Bar::AtMost(3.0).print("time to release a request", least(|round| round.release), " µs");
    println!("met: {waiters} requests went in order, exactly on time in virtual time");
}

struct Round {
    /// In bytes.
    future: f64,
    queue: f64,
    /// In µs.
    enqueue: f64,
    release: f64,
}

impl Round {
    async fn run(waiters: usize) -> Self {
        let quota = Quota::per_second(1_000).burst(1);
        let pool = pools::builder(1).quota(quota).build().unwrap();
        let traits = Traits::new().scope("model");
        drop(pools::lease(&pool, &traits));
        let woken = Arc::new(Woken::default());
        let wakers: Vec<_> =
            (0..waiters).map(|number| Waker::from(Arc::new(WakeOne(number, woken.clone())))).collect();
        let size = size_of_val(&pool.lease_within(&traits, HOUR));
        let mut waiting: Vec<Option<Waiting<'_>>> =
            (0..waiters).map(|_| Some(Box::pin(pool.lease_within(&traits, HOUR)) as Waiting<'_>)).collect();

        let mut enqueue = Duration::ZERO;
        let allocated = allocation_counter::measure(|| {
            let started = Instant::now();
            for (waiting, waker) in waiting.iter_mut().zip(&wakers) {
                let waiting = waiting.as_mut().unwrap().as_mut();
                assert!(waiting.poll(&mut Context::from_waker(waker)).is_pending());
            }
            enqueue = started.elapsed();
        });

        let mut released = Vec::with_capacity(waiters);
        let started = Instant::now();
        for _ in 0..waiters {
            tokio::time::advance(Duration::from_millis(1)).await;
            let before = released.len();
            loop {
                let Some(number) = woken.0.lock().unwrap().pop_front() else { break };
                let Some(future) = &mut waiting[number] else { continue };
                if let Poll::Ready(lease) = future.as_mut().poll(&mut Context::from_waker(&wakers[number])) {
                    waiting[number] = None;
                    released.push((number, lease.unwrap()));
                }
            }
            assert_eq!(released.len(), before + 1, "one request each millisecond");
        }
        let release = started.elapsed();
        assert!(released.iter().map(|(number, _)| *number).eq(0..waiters), "requests went out of order");
        let each = |time: Duration| time.as_secs_f64() * 1e6 / waiters as f64;
        Self {
            future: size as f64,
            queue: allocated.bytes_current as f64 / waiters as f64,
            enqueue: each(enqueue),
            release: each(release),
        }
    }
}

/// One key has room 5 ms after each request. Beside it, plain timers of tokio, which have a resolution of 1 ms.
fn in_real_time() {
    const PERIOD: Duration = Duration::from_millis(5);
    let waiters = if is_benchmark() { 400 } else { 5 };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let pool = pools::builder(1).quota(Quota::per_second(200).burst(1)).build().unwrap();
    let traits = Traits::new().scope("model");
    let late = runtime.block_on(async {
        drop(pools::lease(&pool, &traits));
        let start = Instant::now();
        let waiting = (0..waiters).map(|_| async {
            drop(pool.lease_within(&traits, HOUR).await.unwrap());
            start.elapsed()
        });
        Lateness::of(futures_util::future::join_all(waiting).await, PERIOD)
    });
    let timers = runtime.block_on(async {
        let (start, mut times) = (Instant::now(), Vec::new());
        for _ in 0..waiters {
            tokio::time::sleep(PERIOD).await;
            times.push(start.elapsed());
        }
        Lateness::of(times, PERIOD)
    });
    late.print("requests");
    timers.print("timers of tokio");
    Bar::AtMost(1.0).print("median lateness of a request in real time", late.at(0.5), " ms");
    Bar::AtMost(1.0).print("the same beyond a timer of tokio", late.at(0.5) - timers.at(0.5), " ms");
}

/// How late events were that should be a period apart, in ms, in order.
struct Lateness(Vec<f64>);

impl Lateness {
    fn of(times: Vec<Duration>, period: Duration) -> Self {
        let before = [Duration::ZERO].into_iter().chain(times.iter().copied());
        let late = times.iter().zip(before).map(|(time, before)| time.saturating_sub(before + period));
        let mut late: Vec<_> = late.map(|late| late.as_secs_f64() * 1e3).collect();
        late.sort_by(f64::total_cmp);
        Self(late)
    }

    fn at(&self, share: f64) -> f64 {
        self.0[((self.0.len() - 1) as f64 * share) as usize]
    }

    fn print(&self, what: &str) {
        let [median, p90, p99] = [0.5, 0.9, 0.99].map(|share| self.at(share));
        println!("late in real time, {what}: median {median:.2} ms, p90 {p90:.2} ms, p99 {p99:.2} ms");
    }
}
