use tower::{Layer, Service};
use tower_key_rotation::{KeyPool, KeyRotationLayer};

fn sends<Req>(_: impl Service<Req>, _: Req) {}

fn main() {
    let pool = KeyPool::builder().build().unwrap();
    let client = KeyRotationLayer::new(&pool).layer(reqwest_0_12::Client::new());
    let request = reqwest_0_12::Request::new(reqwest_0_12::Method::GET, "https://api.example.com".parse().unwrap());
    sends(client, request);
}
