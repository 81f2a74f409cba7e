use std::convert::Infallible;

use http::Response;
use tower::{Layer, Service, service_fn};
use tower_key_rotation::{KeyPool, KeyRotationLayer};

fn sends<Req>(_: impl Service<Req>, _: Req) {}

fn main() {
    let pool = KeyPool::builder().build().unwrap();
    let client = service_fn(async |_: String| Ok::<_, Infallible>(Response::new(())));
    let client = KeyRotationLayer::new(&pool).layer(client);
    sends(client, "prompt".to_owned());
}
