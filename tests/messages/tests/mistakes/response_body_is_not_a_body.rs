use std::convert::Infallible;

use http::{Request, Response};
use tower::{Layer, Service, service_fn};
use tower_key_rotation::{Failover, KeyPool, KeyRotationLayer};

fn sends<Req>(_: impl Service<Req>, _: Req) {}

fn main() {
    let pool = KeyPool::builder().build().unwrap();
    let client = service_fn(async |_: Request<String>| Ok::<_, Infallible>(Response::new("answer")));
    let client = KeyRotationLayer::new(&pool).failover(Failover::attempts(3)).layer(client);
    sends(client, Request::new(String::new()));
}
