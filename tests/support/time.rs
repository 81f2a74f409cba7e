use std::{future::Future, time::Duration};

use tokio::time::{sleep, timeout};

pub const SECOND: Duration = Duration::from_secs(1);
pub const MINUTE: Duration = Duration::from_secs(60);
pub const INSTANT: Duration = Duration::from_nanos(1);

/// Waits up to 20 s of real time until a background task has made the condition true.
pub async fn eventually(what: &str, holds: impl Fn() -> bool) {
    for _ in 0..20_000 {
        if holds() {
            return;
        }
        sleep(Duration::from_millis(1)).await;
    }
    panic!("this did not happen within 20 s: {what}");
}

/// Gives background tasks time to do what they must not do.
pub async fn settle() {
    for _ in 0..20 {
        sleep(Duration::from_millis(1)).await;
    }
}

/// Fails after 10 s instead of hanging.
pub async fn in_time<F: Future>(what: F) -> F::Output {
    timeout(30 * SECOND, what).await.expect("it hangs")
}
