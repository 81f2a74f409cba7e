//! Where requests wait for a key, and are let through in a bounded way.
//!
//! Waiters stand in a queue. The first of them watches the pool; when a key is back it goes, and the next one
//! follows only while fewer are on their way than the window allows. The window doubles with each round of
//! answers and falls back to one at a 429, as a TCP sender's does, so that a key which comes back to a long
//! queue is tried by one request, not by all.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::sync::Notify;

use crate::pool::{KeyPool, NoKeyAvailable};

/// The most waiters that are on their way at once, however well it goes.
const WIDEST: usize = 1024;

/// How often the first waiter looks where no key comes back by itself.
const NO_KEY_IN_SIGHT: Duration = Duration::from_secs(1);

/// After this time without an answer, another waiter goes: answers may take minutes, a 429 rarely does.
const SLOW_ANSWER: Duration = Duration::from_millis(250);

#[derive(Debug)]
pub(super) struct Gate {
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
    pub(super) fn new() -> Self {
        Self {
            queue: tokio::sync::Mutex::new(()),
            waiting: AtomicUsize::new(0),
            window: Mutex::new(Window { size: 1, on_their_way: 0 }),
            answered: Notify::new(),
        }
    }

    /// Whether a request that comes now has to queue.
    pub(super) fn is_closed(&self, pool: &KeyPool) -> bool {
        self.waiting.load(Relaxed) > 0 || !pool.has_available()
    }

    /// Waits for a key and for the turn. Gives up at once where the first key is back too late, and after
    /// `limit` in any case.
    pub(super) async fn enter(
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
        loop {
            // Both listen before the look, so that nothing that happens after it is missed.
            let answered = self.answered.notified();
            let returned = pool.returned();
            let available = pool.has_available();
            if available && self.lock().admit(pool.count_available()) {
                return;
            }
            if !available {
                // Whatever went well before, the keys have been limited since.
                self.lock().size = 1;
            }
            let clock = pool.clock();
            // Before the looks: rather too early than too late.
            let now = clock.now();
            let look_again = if available {
                pool.next_end_of_a_rest().map_or(SLOW_ANSWER, |end| end.min(SLOW_ANSWER))
            } else {
                // Zero where somebody else has brought a key back since the look: nobody says so.
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

    /// Each available key can be tried by one.
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

/// A waiter on its way. Dropped without an answer, it only makes room for the next.
#[derive(Debug)]
pub(crate) struct Pass {
    gate: Arc<Gate>,
}

impl Pass {
    /// Says how it went.
    pub(super) fn answered(self, spoke_against_key: bool) {
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

#[cfg(test)]
mod tests {
    use std::sync::OnceLock;

    use super::*;
    use crate::{
        clock::{Clock, ManualClock, Sleep},
        limit::Rest,
    };

    const FIRST_IS_BACK: Duration = Duration::from_secs(1);
    const SECOND_IS_BACK: Duration = Duration::from_secs(100);

    /// Stands still until it has been read a number of times. Then, in the middle of that reading, the first key's rest
    /// ends and somebody else takes the key back.
    #[derive(Debug)]
    struct Interrupting {
        clock: ManualClock,
        readings_left: AtomicUsize,
        pool: Arc<OnceLock<KeyPool>>,
    }

    impl Clock for Interrupting {
        fn now(&self) -> Duration {
            if let Some(pool) = self.pool.get()
                && self.readings_left.fetch_sub(1, Relaxed) == 0
            {
                self.clock.advance(FIRST_IS_BACK);
                assert_eq!(pool.stats().healthy, 1);
            }
            self.clock.now()
        }

        fn sleep_until(&self, deadline: Duration) -> Sleep {
            self.clock.sleep_until(deadline)
        }
    }

    #[tokio::test]
    async fn a_key_that_somebody_else_takes_back_is_not_slept_past_whenever_that_is() {
        for readings in 0..30 {
            let later = Arc::new(OnceLock::new());
            let clock = Interrupting {
                clock: ManualClock::new(),
                readings_left: AtomicUsize::new(readings),
                pool: later.clone(),
            };
            let manual = clock.clock.clone();
            let keys = [("alpha", "sk-1"), ("beta", "sk-2")];
            let pool = KeyPool::builder().keys(keys).exact_hints().clock(clock).build().unwrap();
            for back in [FIRST_IS_BACK, SECOND_IS_BACK] {
                pool.mark(&pool.pick().unwrap(), Rest::RateLimited, Some(back), 429);
            }
            later.set(pool.clone()).unwrap();

            let gate = Arc::new(Gate::new());
            let mut waiter = tokio_test::task::spawn(gate.enter(&pool, SECOND_IS_BACK));
            let entered = waiter.poll().is_ready();
            if manual.now() == Duration::ZERO {
                // It was not interrupted.
                assert!(!entered);
                manual.advance(FIRST_IS_BACK);
            }
            assert!(entered || waiter.poll().is_ready(), "after {readings} readings of the clock");
        }
    }
}
