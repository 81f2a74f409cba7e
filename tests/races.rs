//! What threads that pick, mark and take back the same keys at once must never see.

use std::{
    convert::Infallible,
    future::ready,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

use futures_util::FutureExt;
use http::{Request, Response};
use tower::{Layer, Service, service_fn};
use tower_key_rotation::{KeyPool, KeyRotationLayer, NoKeyAvailable};

/// With the two indexes written in the other order, half a million of these errors came in four seconds.
#[test]
fn rapid_cooldown_cycles_always_report_a_retry_time() {
    let pool = KeyPool::builder().key("alpha", "sk-1").cooldown(Duration::from_micros(3)).build().unwrap();
    let answered = AtomicU64::new(0);
    let end = Instant::now() + Duration::from_millis(700);
    std::thread::scope(|scope| {
        for status in [429, 200, 200] {
            let (pool, answered) = (&pool, &answered);
            scope.spawn(move || {
                let service = service_fn(move |_: Request<()>| {
                    let mut response = Response::new(());
                    *response.status_mut() = http::StatusCode::from_u16(status).unwrap();
                    ready(Ok::<_, Infallible>(response))
                });
                let mut client = KeyRotationLayer::new(pool).layer(service);
                while Instant::now() < end {
                    let request = Request::get("https://api.example.com").body(()).unwrap();
                    match client.call(request).now_or_never().unwrap() {
                        Ok(_) => drop(answered.fetch_add(1, Relaxed)),
                        Err(error) => {
                            assert!(NoKeyAvailable::find(&error).unwrap().retry_in().is_some(), "{error}")
                        }
                    }
                }
            });
        }
    });
    assert!(answered.into_inner() > 1_000);
    let _ = pool.stats();
}
