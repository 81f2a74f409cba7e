//! Tokens instead of keys: OAuth client credentials, whose tokens expire.
//!
//! ```text
//! cargo run --example oauth --features reqwest
//! ```
//!
//! It talks to a service of its own, whose tokens live for 4 seconds, and ends by itself after some seconds. The pool gets a
//! new token before the old one expires, once for all requests, and after a 401.

use std::{
    collections::HashMap,
    error::Error,
    future::ready,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use axum::{
    Router,
    extract::State,
    http::{HeaderMap, StatusCode, header::AUTHORIZATION},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use reqwest::{Client, Method, Request, header::CONTENT_TYPE};
use serde::Deserialize;
use serde_json::json;
use tokio::{net::TcpListener, time::sleep};
use tower::{Service, ServiceBuilder, ServiceExt};
use tower_key_rotation::{
    Failover, KeyId, KeyPool, KeyRotationLayer, KeySpec, RecoveryHandle,
    source::{self, SourcedKey},
};

type BoxError = Box<dyn Error + Send + Sync>;

/// The part of a token response that matters here.
#[derive(Deserialize)]
struct Token {
    access_token: String,
    expires_in: u64,
}

async fn fetch_token(http: Client, url: String) -> Result<SourcedKey, BoxError> {
    let request = http
        .post(url)
        .basic_auth("client-1", Some("the client's secret"))
        .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
        .body("grant_type=client_credentials");
    let token: Token = request.send().await?.error_for_status()?.json().await?;
    let key = KeySpec::new(KeyId::new("client-1")?, token.access_token);
    Ok(SourcedKey::from(key).expires_in(Duration::from_secs(token.expires_in)))
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let (service, url) = Issuer::start().await?;
    let http = Client::builder().no_proxy().build()?;

    let token = {
        let (http, url) = (http.clone(), format!("{url}/token"));
        source::from_fn("token endpoint", move || fetch_token(http.clone(), url.clone()))
    };
    let pool = KeyPool::builder().source(token).await?.build()?;
    let recovery = RecoveryHandle::spawn(&pool);
    let mut client = ServiceBuilder::new()
        .layer(KeyRotationLayer::new(&pool).failover(Failover::attempts(2)))
        .service(http);

    let began = Instant::now();
    for second in 0..8 {
        if second == 6 {
            println!("the service forgets all tokens");
            service.forget();
        }
        let request = Request::new(Method::GET, format!("{url}/v1/models").parse()?);
        let response = client.ready().await?.call(request).await?;
        let (status, body) = (response.status(), response.text().await?);
        println!("{:.0?}: {status} {body}, {} tokens issued", began.elapsed(), service.count());
        sleep(Duration::from_secs(1)).await;
    }
    recovery.shutdown().await?;
    Ok(())
}

/// A service that issues tokens and accepts them while they live.
#[derive(Clone, Default)]
struct Issuer(Arc<Mutex<Issued>>);

#[derive(Default)]
struct Issued {
    count: usize,
    /// When each token expires.
    tokens: HashMap<String, Instant>,
}

impl Issuer {
    async fn start() -> std::io::Result<(Self, String)> {
        let service = Self::default();
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let url = format!("http://{}", listener.local_addr()?);
        let routes = Router::new()
            .route("/token", post(|State(service): State<Self>| ready(service.issue())))
            .route("/v1/models", get(|State(service): State<Self>, headers| ready(service.answer(&headers))))
            .with_state(service.clone());
        tokio::spawn(async move { axum::serve(listener, routes).await });
        Ok((service, url))
    }

    fn issue(&self) -> Response {
        const LIFE: Duration = Duration::from_secs(4);
        let mut issued = self.0.lock().expect("no holder of this lock panics");
        issued.count += 1;
        let token = format!("token-{}", issued.count);
        issued.tokens.insert(token.clone(), Instant::now() + LIFE);
        let token = json!({ "access_token": token, "token_type": "Bearer", "expires_in": LIFE.as_secs() });
        ([(CONTENT_TYPE, "application/json")], token.to_string()).into_response()
    }

    fn answer(&self, headers: &HeaderMap) -> Response {
        let token = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
        let issued = self.0.lock().expect("no holder of this lock panics");
        match token.and_then(|token| issued.tokens.get_key_value(token)) {
            Some((token, until)) if *until > Instant::now() => format!("hello, {token}").into_response(),
            _ => StatusCode::UNAUTHORIZED.into_response(),
        }
    }

    fn forget(&self) {
        self.0.lock().expect("no holder of this lock panics").tokens.clear();
    }

    fn count(&self) -> usize {
        self.0.lock().expect("no holder of this lock panics").count
    }
}
