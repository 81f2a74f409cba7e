//! A service for the examples to talk to where no other is named: it limits the key `sk-1`.

use axum::{
    Router,
    http::{HeaderMap, StatusCode, header::AUTHORIZATION},
    response::{IntoResponse, Response},
    routing::any,
};
use tokio::net::TcpListener;

/// Starts it on a free port of this machine, and says under which URL it is there.
pub(crate) async fn serve() -> std::io::Result<String> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    let url = format!("http://{}/v1/models", listener.local_addr()?);
    tokio::spawn(async move { axum::serve(listener, Router::new().fallback(any(answer))).await });
    Ok(url)
}

async fn answer(headers: HeaderMap) -> Response {
    match headers.get(AUTHORIZATION) {
        Some(key) if key == "Bearer sk-1" => (StatusCode::TOO_MANY_REQUESTS, "slow down").into_response(),
        Some(_) => "hello".into_response(),
        None => StatusCode::UNAUTHORIZED.into_response(),
    }
}
