//! Which key serves a request: days of quotas, weights, in-flight caps, the order of keys, and discovered quota groups.

mod support;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::{HeaderMap, StatusCode};
use support::SECOND;
use tower_key_rotation::{
    KeyPool, NoKeyAvailable, Quota, Traits, classify::ResponseHead, clock::ManualClock,
};

const HOUR: Duration = Duration::from_secs(60 * 60);

/// The id of a key that answers well, if one has room.
fn send(pool: &KeyPool, traits: &Traits) -> Result<String, NoKeyAvailable> {
    let key = pool.lease(traits)?;
    let id = key.id().to_string();
    key.answered(&ResponseHead::new(StatusCode::OK, &HeaderMap::new()));
    Ok(id)
}

/// How many requests find room now, and the time until the next one does.
fn drain(pool: &KeyPool) -> (usize, Option<Duration>) {
    for served in 0.. {
        if let Err(error) = send(pool, &Traits::new()) {
            return (served, error.retry_in());
        }
    }
    unreachable!()
}

// ---- days ----

fn wall(time: &str) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(time.parse::<jiff::Timestamp>().unwrap().as_second() as u64)
}

fn daily(quota: Quota, now: &str) -> (KeyPool, ManualClock) {
    let clock = ManualClock::new();
    clock.set_wall(wall(now));
    let pool = KeyPool::builder().keys([("alpha", "sk-1"), ("beta", "sk-2")]);
    (pool.quota(quota).clock(clock.clone()).build().unwrap(), clock)
}

fn pacific() -> Quota {
    Quota::per_day(5).resets_at("00:00", "America/Los_Angeles")
}

#[test]
fn days_begin_at_the_time_of_their_zone() {
    // The evening before the day of 23 hours, and before the one of 25.
    for (evening, next) in [("2026-03-07T21:00:00-08:00", 23), ("2026-10-31T21:00:00-07:00", 25)] {
        let (pool, clock) = daily(pacific(), evening);
        assert_eq!(drain(&pool), (10, Some(3 * HOUR)));
        clock.advance(3 * HOUR - Duration::from_nanos(1));
        assert_eq!(drain(&pool).0, 0);
        clock.advance(Duration::from_nanos(1));
        assert_eq!(drain(&pool), (10, Some(next * HOUR)));
        clock.advance(next * HOUR);
        assert_eq!(drain(&pool), (10, Some(24 * HOUR)));
    }
}

#[test]
fn days_follow_a_wall_clock_that_is_set() {
    let (pool, clock) = daily(pacific(), "2026-11-29T00:00:01-08:00");
    assert_eq!(drain(&pool).0, 10);
    // Set forward: no day is lost.
    clock.set_wall(wall("2026-11-30T00:00:00-08:00"));
    clock.advance(SECOND);
    assert_eq!(drain(&pool), (10, Some(24 * HOUR - SECOND)));
    // Set back a little: no day is doubled.
    clock.set_wall(wall("2026-11-29T23:59:58-08:00"));
    clock.advance(3 * SECOND);
    assert_eq!(drain(&pool), (0, Some(24 * HOUR - SECOND)));
}

#[test]
fn a_quota_of_another_pool_has_its_own_clock() {
    let quota = pacific();
    let (first, _) = daily(quota.clone(), "2026-11-29T12:00:00-08:00");
    let (second, _) = daily(quota, "2026-11-29T23:00:00-08:00");
    assert_eq!(drain(&first).1, Some(12 * HOUR));
    assert_eq!(drain(&second).1, Some(HOUR));
}

#[tokio::test(start_paused = true)]
async fn requests_wait_for_the_next_day() {
    let pool = KeyPool::builder().key("alpha", "sk-1").quota(pacific()).build().unwrap();
    let (served, next) = drain(&pool);
    let next = next.unwrap();
    assert_eq!(served, 5);
    let began = tokio::time::Instant::now();
    let lease = pool.lease_within(&Traits::new(), 26 * HOUR).await;
    assert!(lease.is_ok());
    let late = began.elapsed().saturating_sub(next);
    assert!(began.elapsed() + 2 * SECOND > next && late < 2 * SECOND, "{:?}, not {next:?}", began.elapsed());
}

#[test]
fn unusable_resets_fail_the_build() {
    let why = |quota| KeyPool::builder().quota(quota).build().unwrap_err().to_string();
    let zone = why(Quota::per_day(5).resets_at("00:00", "Mars/Olympus"));
    assert!(zone.contains(r#"time zone "Mars/Olympus""#), "{zone}");
    let time = why(Quota::per_day(5).resets_at("25:00", "UTC"));
    assert!(time.contains(r#""25:00", which is not a time of day"#), "{time}");
    let period = why(Quota::per_hour(5).resets_at("00:00", "UTC"));
    assert!(period.contains("not per day"), "{period}");
}
