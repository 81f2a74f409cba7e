use std::convert::Infallible;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{Empty, combinators::UnsyncBoxBody};
use tower::{Layer, Service, service_fn};
use tower_key_rotation::{Failover, KeyPool, KeyRotationLayer};

fn sends<Req>(_: impl Service<Req>, _: Req) {}

fn main() {
    let pool = KeyPool::builder().build().unwrap();
    let client = service_fn(async |_: Request<UnsyncBoxBody<Bytes, Infallible>>| {
        Ok::<_, Infallible>(Response::new(String::new()))
    });
    let client = KeyRotationLayer::new(&pool).failover(Failover::attempts(3)).layer(client);
    sends(client, Request::new(UnsyncBoxBody::new(Empty::new())));
}
