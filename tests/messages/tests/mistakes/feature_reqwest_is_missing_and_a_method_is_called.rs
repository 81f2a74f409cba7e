use tower::{Layer, ServiceExt};
use tower_key_rotation::{KeyPool, KeyRotationLayer};

fn main() {
    let pool = KeyPool::builder().build().unwrap();
    let client = KeyRotationLayer::new(&pool).layer(reqwest::Client::new());
    let request = reqwest::Request::new(reqwest::Method::GET, "https://api.example.com".parse().unwrap());
    let _ = client.oneshot(request);
}
