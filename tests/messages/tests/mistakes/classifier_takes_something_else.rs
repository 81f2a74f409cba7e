use http::StatusCode;
use tower_key_rotation::{KeyPool, KeyRotationLayer, classify::Verdict};

fn main() {
    let pool = KeyPool::builder().build().unwrap();
    let _ = KeyRotationLayer::new(&pool).classify(|status: StatusCode| match status {
        StatusCode::TOO_MANY_REQUESTS => Verdict::RateLimited { wait: None },
        _ => Verdict::Nothing,
    });
}
