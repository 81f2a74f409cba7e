//! A wait that parks the thread: for callers without a runtime.

use std::{
    future::Future,
    pin::{Pin, pin},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Wake, Waker},
    thread::{self, Thread},
    time::{Duration, Instant},
};

use crate::clock::{Clock, Sleep};

/// The pool's clock, for one thread that waits.
///
/// A clock that can't wake a thread without a runtime is taken to run as fast as the machine's.
#[derive(Debug)]
pub(crate) struct Parked {
    clock: Arc<dyn Clock>,
    /// When the thread has to look again, told by the sleeps of the last poll.
    next: Arc<Mutex<Option<Instant>>>,
}

impl Clock for Parked {
    fn now(&self) -> Duration {
        self.clock.now()
    }

    fn sleep_until(&self, deadline: Duration) -> Sleep {
        if let Some(sleep) = self.clock.sleep_without_runtime(deadline) {
            return sleep;
        }
        // `None` if that is further away than an `Instant` can say.
        let at = Instant::now().checked_add(deadline.saturating_sub(self.clock.now()));
        Box::pin(ParkedSleep { at, next: self.next.clone() })
    }
}

struct ParkedSleep {
    at: Option<Instant>,
    next: Arc<Mutex<Option<Instant>>>,
}

impl Future for ParkedSleep {
    type Output = ();

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        let Some(at) = self.at else { return Poll::Pending };
        if at <= Instant::now() {
            return Poll::Ready(());
        }
        let mut next = lock(&self.next);
        *next = Some(next.map_or(at, |next| next.min(at)));
        Poll::Pending
    }
}

struct Unparks(Thread);

impl Wake for Unparks {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Waits in this thread for a future that sleeps by nothing but the clock that it gets.
pub(crate) fn block_on<T>(clock: &Arc<dyn Clock>, wait: impl AsyncFnOnce(&Parked) -> T) -> T {
    let parked = Parked { clock: clock.clone(), next: Arc::default() };
    // Within a task of tokio, its budget would not be renewed until this returns, and tokio's locks would never be ready.
    let mut future = pin!(tokio::task::unconstrained(wait(&parked)));
    let waker = Waker::from(Arc::new(Unparks(thread::current())));
    loop {
        *lock(&parked.next) = None;
        if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return value;
        }
        // Others may have unparked the thread for reasons of their own: then it looks once more.
        match *lock(&parked.next) {
            Some(next) => thread::park_timeout(next.saturating_duration_since(Instant::now())),
            None => thread::park(),
        }
    }
}

fn lock(next: &Mutex<Option<Instant>>) -> MutexGuard<'_, Option<Instant>> {
    next.lock().unwrap_or_else(PoisonError::into_inner)
}
