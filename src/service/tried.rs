//! Which keys a request must not go out with again. A `reqwest::Request` carries no extensions that we could
//! reach, so this goes beside the request.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use crate::pool::Lease;

tokio::task_local! {
    static TRIED: Vec<Lease>;
}

/// How many requests are just being sent again; with a future to be driven, until it has its answer. Who finds none
/// need not look into the task, which costs more.
static SENT_AGAIN: AtomicUsize = AtomicUsize::new(0);

struct SentAgain;

impl SentAgain {
    fn new() -> Self {
        SENT_AGAIN.fetch_add(1, Relaxed);
        Self
    }
}

impl Drop for SentAgain {
    fn drop(&mut self) {
        SENT_AGAIN.fetch_sub(1, Relaxed);
    }
}

/// Calls a service that is not to use these keys.
pub(crate) fn call_without<T>(tried: Vec<Lease>, call: impl FnOnce() -> T) -> T {
    if tried.is_empty() {
        return call();
    }
    let _sent_again = SentAgain::new();
    TRIED.sync_scope(tried, call)
}

/// Drives a future that is not to use these keys.
#[cfg(feature = "reqwest-middleware")]
pub(crate) async fn drive_without<T>(tried: Vec<Lease>, future: impl Future<Output = T>) -> T {
    if tried.is_empty() {
        return future.await;
    }
    let _sent_again = SentAgain::new();
    TRIED.scope(tried, future).await
}

/// What `pick` makes of these keys, if there are any.
#[inline]
pub(crate) fn with_tried<T>(pick: impl FnOnce(&[Lease]) -> T) -> Option<T> {
    if SENT_AGAIN.load(Relaxed) == 0 {
        return None;
    }
    TRIED.try_with(|tried| pick(tried)).ok()
}
