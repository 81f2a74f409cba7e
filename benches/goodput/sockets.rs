//! The simulated service behind an HTTP server of this process, and a client that reaches it over TCP.

use std::io;

use axum::{Router, extract::State, routing::post};
use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::Full;
use tokio::net::TcpListener;
use tower::service_fn;

use crate::{
    arrivals::Job,
    clients::{Client, paced},
    run::PATIENCE,
    upstream::{Body, SentAt, Upstream, key_of},
};

/// Starts the server, and creates the client: this crate with pacing, over `reqwest`.
///
/// The body of a request is its [`Job`] as JSON, and the key is in `authorization`.
pub(crate) async fn client(upstream: &Upstream) -> io::Result<Client> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}/", listener.local_addr()?);
    let server = Router::new().route("/", post(answer)).with_state(upstream.clone());
    tokio::spawn(async { axum::serve(listener, server).await });

    let (http, upstream_of_client) = (reqwest::Client::new(), upstream.clone());
    let over_tcp = service_fn(move |request: Request<Full<Bytes>>| {
        let sent = SentAt(upstream_of_client.now());
        let job = request.extensions().get::<Job>().expect("a job in each request");
        let body = serde_json::to_vec(job).expect("a job as JSON");
        let response = http.post(&url).headers(request.headers().clone()).body(body).send();
        async move {
            let mut response = Response::<reqwest::Body>::from(response.await?);
            response.extensions_mut().insert(sent);
            Ok::<_, reqwest::Error>(response)
        }
    });
    Ok(paced::over(over_tcp, upstream, PATIENCE))
}

async fn answer(State(upstream): State<Upstream>, headers: HeaderMap, body: Bytes) -> Response<Body> {
    let job: Job = serde_json::from_slice(&body).expect("a job as JSON");
    upstream.answer(key_of(&headers), &job).await
}
