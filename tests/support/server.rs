use std::{
    collections::{HashMap, HashSet},
    convert::Infallible,
    future::Future,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};

use axum::{
    body::{Body, to_bytes},
    serve::ListenerExt,
};
use bytes::Bytes;
use http::{Request, Response, header::AUTHORIZATION};
use http_body_util::channel::{Channel, Sender};
use tokio::net::TcpListener;

pub type Answer = Response<Body>;

pub fn answer(status: u16, body: impl Into<Body>) -> Answer {
    answer_with(status, [], body)
}

pub fn answer_with<const N: usize>(status: u16, headers: [(&str, &str); N], body: impl Into<Body>) -> Answer {
    let answer = Response::builder().status(status);
    headers
        .into_iter()
        .fold(answer, |answer, header| answer.header(header.0, header.1))
        .body(body.into())
        .unwrap()
}

/// A body that the test sends in parts.
pub fn stream() -> (Sender<Bytes, Infallible>, Body) {
    let (sender, body) = Channel::new(16);
    (sender, Body::new(body))
}

/// The id of the key in a request's `Authorization`, where its secret is `sk-` and the id.
pub fn key_of<B>(request: &Request<B>) -> Option<&str> {
    request.headers().get(AUTHORIZATION)?.to_str().ok()?.strip_prefix("Bearer sk-")
}

/// A service on a socket of this machine, which records its requests.
#[derive(Clone)]
pub struct Server {
    address: SocketAddr,
    requests: Arc<Mutex<Vec<Request<Bytes>>>>,
    connections: Arc<AtomicUsize>,
    limited: Arc<Mutex<HashSet<String>>>,
}

impl Server {
    /// Answers each request by this function.
    pub async fn start<F, A>(answer: F) -> Self
    where
        F: Fn(Request<Bytes>) -> A + Clone + Send + Sync + 'static,
        A: Future<Output = Answer> + Send + 'static,
    {
        Self::start_limiting(Arc::default(), answer).await
    }

    /// Answers every request in the same way.
    pub async fn answering(reply: impl Fn() -> Answer + Clone + Send + Sync + 'static) -> Self {
        Self::start(move |_| std::future::ready(reply())).await
    }

    /// Answers 429 to these keys, until [`Server::lift`], and 200 to all others.
    pub async fn limiting<const N: usize>(keys: [&str; N]) -> Self {
        let limited: Arc<Mutex<HashSet<String>>> = Arc::default();
        limited.lock().unwrap().extend(keys.map(String::from));
        let seen = limited.clone();
        Self::start_limiting(limited, move |request| {
            let limited = key_of(&request).is_some_and(|key| seen.lock().unwrap().contains(key));
            let reply = if limited { answer(429, "too many requests") } else { answer(200, "fine") };
            std::future::ready(reply)
        })
        .await
    }

    /// Answers each key with the status that is set for it, and 200 where none is.
    pub async fn by_key(answers: &Arc<Mutex<HashMap<String, u16>>>) -> Self {
        let answers = answers.clone();
        Self::start(move |request| {
            let status = key_of(&request).and_then(|key| answers.lock().unwrap().get(key).copied());
            std::future::ready(answer(status.unwrap_or(200), ""))
        })
        .await
    }

    async fn start_limiting<F, A>(limited: Arc<Mutex<HashSet<String>>>, answer: F) -> Self
    where
        F: Fn(Request<Bytes>) -> A + Clone + Send + Sync + 'static,
        A: Future<Output = Answer> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = Self {
            address: listener.local_addr().unwrap(),
            requests: Arc::default(),
            connections: Arc::default(),
            limited,
        };
        let (requests, connections) = (server.requests.clone(), server.connections.clone());
        let handler = move |request: Request<Body>| {
            let (requests, answer) = (requests.clone(), answer.clone());
            async move {
                let (head, body) = request.into_parts();
                let request = Request::from_parts(head, to_bytes(body, usize::MAX).await.unwrap());
                requests.lock().unwrap().push(request.clone());
                answer(request).await
            }
        };
        let listener = listener.tap_io(move |_| _ = connections.fetch_add(1, SeqCst));
        let app = axum::Router::new().fallback(handler);
        tokio::spawn(async move { axum::serve(listener, app).await });
        server
    }

    pub fn limit(&self, key: &str) {
        self.limited.lock().unwrap().insert(key.into());
    }

    pub fn lift(&self, key: &str) {
        self.limited.lock().unwrap().remove(key);
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    /// Its requests, in the order of arrival.
    pub fn requests(&self) -> Vec<Request<Bytes>> {
        self.requests.lock().unwrap().clone()
    }

    pub fn count(&self) -> usize {
        self.requests.lock().unwrap().len()
    }

    /// The ids of the keys in its requests, in the order of arrival.
    pub fn keys(&self) -> Vec<String> {
        self.requests().iter().map(|request| key_of(request).unwrap_or("none").to_owned()).collect()
    }

    /// The number of connections that it accepted.
    pub fn connections(&self) -> usize {
        self.connections.load(SeqCst)
    }
}
