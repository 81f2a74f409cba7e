//! The queue of requests that wait for a key.
//!
//! The first waiter watches the pool. When a key is back, it goes; the next waiter follows only while fewer are in
//! flight than the window allows. Like a TCP congestion window, it doubles with each round of answers and falls back to
//! one at a 429. So one request tries a key that comes back to a long queue, not all of them.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::sync::Notify;

use crate::pool::{KeyPool, NoKeyAvailable};

/// The largest window: so many waiters are in flight at most.
const WIDEST: usize = 1024;

/// How often the first waiter checks the pool if no key comes back by itself.
const NO_KEY_IN_SIGHT: Duration = Duration::from_secs(1);

/// After this time without an answer, another waiter goes: a success may take minutes, a 429 rarely does.
const SLOW_ANSWER: Duration = Duration::from_millis(250);

#[derive(Debug)]
pub(crate) struct Gate {
    queue: tokio::sync::Mutex<()>,
    waiting: AtomicUsize,
    window: Mutex<Window>,
    answered: Notify,
}

#[derive(Debug)]
struct Window {
    size: usize,
    on_their_way: usize,
}

impl Gate {
    pub(crate) fn new() -> Self {
        Self {
            queue: tokio::sync::Mutex::new(()),
            waiting: AtomicUsize::new(0),
            window: Mutex::new(Window { size: 1, on_their_way: 0 }),
            answered: Notify::new(),
        }
    }

    /// Whether a new request has to queue.
    pub(crate) fn is_closed(&self, pool: &KeyPool) -> bool {
        self.waiting.load(Relaxed) > 0 || !pool.engine().has_available()
    }

    /// Waits for a key and for the turn. Gives up at once if the first key is back later than `limit`, and after
    /// `limit` in any case.
    pub(crate) async fn enter(
        self: Arc<Self>,
        pool: &KeyPool,
        limit: Duration,
    ) -> Result<Pass, NoKeyAvailable> {
        let no_key = pool.no_key();
        if no_key.retry_in().is_none_or(|time| time > limit) {
            return Err(no_key);
        }
        let clock = pool.clock();
        let time_over = clock.sleep_until(clock.now().saturating_add(limit));
        tokio::select! {
            biased;
            () = self.turn(pool) => Ok(Pass { gate: self }),
            () = time_over => Err(pool.no_key()),
        }
    }

    async fn turn(&self, pool: &KeyPool) {
        let _waiting = Waiting::new(&self.waiting);
        let _first = self.queue.lock().await;
        let engine = pool.engine();
        loop {
            // Subscribed before the check, so that no event after it is missed.
            let answered = self.answered.notified();
            let returned = engine.returned();
            let available = engine.has_available();
            if available && self.lock().admit(engine.count_available()) {
                return;
            }
            if !available {
                // The keys have been limited since the last success.
                self.lock().size = 1;
            }
            let clock = pool.clock();
            // Read before the checks below: waking too early is harmless, too late is not.
            let now = clock.now();
            let look_again = if available {
                engine.next_end_of_a_rest().map_or(SLOW_ANSWER, |end| end.min(SLOW_ANSWER))
            } else {
                // Zero if another thread has returned a key since the check: that sends no event.
                pool.next_return().unwrap_or(NO_KEY_IN_SIGHT)
            };
            tokio::select! {
                () = clock.sleep_until(now.saturating_add(look_again)) => {
                    if available {
                        self.lock().widen();
                    }
                }
                () = answered => {}
                () = returned => {}
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Window> {
        self.window.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Window {
    fn widen(&mut self) {
        self.size = (self.size.max(self.on_their_way) + 1).min(WIDEST);
    }

    /// Admits at least one waiter for each available key.
    fn admit(&mut self, available: usize) -> bool {
        let admitted = self.on_their_way < self.size.max(available);
        self.on_their_way += usize::from(admitted);
        admitted
    }
}

struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(waiting: &'a AtomicUsize) -> Self {
        waiting.fetch_add(1, Relaxed);
        Self(waiting)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// A waiter in flight. Dropped without an answer, it makes room for the next waiter and leaves the window as it is.
#[derive(Debug)]
pub(crate) struct Pass {
    gate: Arc<Gate>,
}

impl Pass {
    /// Adjusts the window by an answer.
    pub(crate) fn answered(self, spoke_against_key: bool) {
        let mut window = self.gate.lock();
        window.size = if spoke_against_key { 1 } else { (window.size + 1).min(WIDEST) };
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.gate.lock().on_their_way -= 1;
        self.gate.answered.notify_waiters();
    }
}
