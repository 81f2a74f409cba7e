//! Fair shares: of the requests that wait for a key, each caller has one in the pool's queue at a time.
//!
//! The pool serves its queue in the order of arrival. Without turns, a caller with a hundred requests would delay all
//! others by a hundred requests. With them, callers that wait in one scope are served in rotation.

use std::{
    collections::HashMap,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use axum::http::Request;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep_until, timeout_at},
};

/// So many lines are kept before those are forgotten in which nobody waits.
const MANY: usize = 1_024;

/// The lines of callers before the queue of an upstream's pool, one for each caller and scope.
#[derive(Default)]
pub(crate) struct Turns(Mutex<HashMap<(String, u64), Weak<Semaphore>>>);

/// The turn of one request, until it has its key or is dropped.
#[derive(Clone)]
pub(super) struct Turn(Arc<Mutex<Option<OwnedSemaphorePermit>>>);

impl Turns {
    /// Waits for the turn of a caller's request. Returns `None` if it does not come in time.
    pub(super) async fn next(&self, caller: &str, scope: u64, in_time: Instant) -> Option<Turn> {
        let turn = timeout_at(in_time, self.line(caller, scope).acquire_owned()).await.ok()?;
        // Nobody closes a line.
        Some(Turn(Arc::new(Mutex::new(turn.ok()))))
    }

    fn line(&self, caller: &str, scope: u64) -> Arc<Semaphore> {
        let mut lines = lock(&self.0);
        if lines.len() >= MANY {
            lines.retain(|_, line| line.strong_count() > 0);
        }
        let line = lines.entry((caller.to_owned(), scope)).or_default();
        line.upgrade().unwrap_or_else(|| {
            let next = Arc::new(Semaphore::new(1));
            *line = Arc::downgrade(&next);
            next
        })
    }
}

impl Turn {
    /// Completes as `call` does, unless the request still has no key at that time.
    pub(super) async fn in_time<F: Future>(&self, in_time: Instant, call: F) -> Option<F::Output> {
        let mut call = pin!(call);
        tokio::select! {
            biased;
            answer = &mut call => return Some(answer),
            () = sleep_until(in_time) => {}
        }
        if lock(&self.0).is_some() { None } else { Some(call.await) }
    }
}

/// The request has its key: it is the turn of its caller's next one.
pub(super) fn end_turn<B>(request: Request<B>) -> Request<B> {
    if let Some(Turn(turn)) = request.extensions().get() {
        drop(lock(turn).take());
    }
    request
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    async fn next(turns: &Turns, caller: &str, scope: u64) -> Option<Turn> {
        turns.next(caller, scope, Instant::now() + SECOND).await
    }

    #[tokio::test(start_paused = true)]
    async fn a_callers_next_turn_comes_with_the_key() {
        let turns = Turns::default();
        let mut request = Request::new(());
        request.extensions_mut().insert(next(&turns, "batch", 1).await.unwrap());
        assert!(next(&turns, "batch", 1).await.is_none());
        assert!(next(&turns, "batch", 2).await.is_some());
        assert!(next(&turns, "website", 1).await.is_some());
        // A failover may keep the request.
        let _kept = end_turn(request);
        assert!(next(&turns, "batch", 1).await.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_dropped_request_gives_its_turn_up() {
        let turns = Turns::default();
        drop(next(&turns, "batch", 1).await);
        assert!(next(&turns, "batch", 1).await.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn only_requests_without_key_run_out_of_time() {
        let turns = Turns::default();
        let soon = Instant::now() + SECOND;
        let turn = next(&turns, "batch", 1).await.unwrap();
        assert_eq!(turn.in_time(soon, std::future::pending::<()>()).await, None);
        let mut request = Request::new(());
        request.extensions_mut().insert(turn.clone());
        end_turn(request);
        let late = async { tokio::time::sleep(2 * SECOND).await };
        assert_eq!(turn.in_time(soon, late).await, Some(()));
    }

    #[tokio::test]
    async fn lines_without_requests_are_forgotten() {
        let turns = Turns::default();
        let waiting = next(&turns, "batch", 0).await;
        for scope in 1..3_000 {
            next(&turns, "batch", scope).await.unwrap();
        }
        assert!(lock(&turns.0).len() <= MANY + 1);
        assert!(next(&turns, "batch", 0).await.is_none());
        drop(waiting);
    }
}
