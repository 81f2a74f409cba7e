//! The clocks of pools.

use std::time::Duration;

use tower_key_rotation::clock::{Clock, ManualClock, SystemClock};

#[tokio::test]
async fn a_sleeper_wakes_exactly_at_its_deadline() {
    let clock = ManualClock::new();
    let mut sleeper = tokio_test::task::spawn(clock.sleep_until(Duration::from_secs(2)));
    assert!(sleeper.poll().is_pending());
    clock.advance(Duration::from_secs(1));
    assert!(sleeper.poll().is_pending());
    clock.advance(Duration::from_secs(1));
    assert!(sleeper.is_woken());
    assert!(sleeper.poll().is_ready());
}

#[tokio::test(start_paused = true)]
async fn the_system_clock_follows_a_paused_tokio_clock() {
    let clock = SystemClock::new();
    clock.sleep_until(Duration::from_secs(120)).await;
    assert!(clock.now() >= Duration::from_secs(120));
}
