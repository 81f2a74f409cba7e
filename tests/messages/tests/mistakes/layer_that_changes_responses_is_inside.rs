use std::convert::Infallible;

use http::{Request, Response};
use tower::{ServiceBuilder, Service, service_fn};
use tower_key_rotation::{KeyPool, KeyRotationLayer};

fn sends<Req>(_: impl Service<Req>, _: Req) {}

fn main() {
    let pool = KeyPool::builder().build().unwrap();
    let client = service_fn(async |_: Request<()>| Ok::<_, Infallible>(Response::new("answer")));
    let client = ServiceBuilder::new()
        .layer(KeyRotationLayer::new(&pool))
        .map_response(|response: Response<&'static str>| response.into_body())
        .service(client);
    sends(client, Request::new(()));
}
