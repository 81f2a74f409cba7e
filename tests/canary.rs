//! No secret is in anything that the crate says, or has others say of it: s01.

mod support;

use std::{
    any::type_name,
    cell::RefCell,
    collections::BTreeSet,
    env,
    error::Error as StdError,
    fmt::{Debug, Display},
    fs, future, io,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
};

use axum::body::Body;
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE, Engine};
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt, stream};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header::AUTHORIZATION};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, client, server, service::service_fn as hyper_service_fn};
use hyper_util::{
    client::legacy::Client,
    rt::{TokioExecutor, TokioIo},
};
use metrics_util::debugging::DebuggingRecorder;
use mongodb::{
    Client as MongoClient, IndexModel,
    bson::{DateTime, doc},
    options::IndexOptions,
};
use serde_json::json;
use support::{canary::*, mongo::*, *};
use tokio::{net::TcpListener, sync::mpsc, time::sleep};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{ServerConfig, pki_types::PrivateKeyDer},
};
use tower::{Layer, Service, ServiceBuilder, ServiceExt, service_fn, timeout::TimeoutLayer};
use tower_key_rotation::{
    classify::{
        Anthropic, AzureOpenAi, Cohere, DeepSeek, Discord, Gemini, Generic, GitHub, Groq, Grpc, HuggingFace,
        LlmGateway, Mistral, Notion, OpenAi, OpenRouter, ResponseHead, Shopify, Slack, Stripe,
        TooManyRequests, Verdict, XAi,
    },
    clock::{ManualClock, SystemClock},
    service::TryClone,
    source::{self, KeyDirectory, KeyFile, KeySource, KeyVariable, SourcedKey},
    store::{
        Born, Change, Heard, KeyRecord, KeyStore, Loaded, Mark, MemoryStore, Operation, Planted, Recovered,
        Replaced, Resting, Scope, Standing, StoreError, StoreFuture, Unreadable, Until, Usage, Words, Writes,
        file::{FileStore, OpenError},
        mongodb::{ConnectError, DataKeys, Encrypted, Fields, InvalidDataKeys, MongoStore},
    },
    *,
};

const NAMES: [&str; 12] = [
    "alpha", "beta", "gamma", "delta", "broken", "password", "spare", "other", "note", "file", "variable",
    "json",
];

static CANARIES: LazyLock<Canaries> = LazyLock::new(|| Canaries::of(&NAMES));

fn secret(name: &str) -> &'static str {
    CANARIES.secret(name)
}

thread_local! {
    /// The types that a test has shown.
    static SHOWN: RefCell<BTreeSet<&'static str>> = RefCell::default();
}

/// Asserts that there is no secret in what values say of themselves: in `Debug`, in `Display` and `Serialize` where
/// they have it, and in all sources of an error.
macro_rules! show {
    ($($value:expr),+ $(,)?) => {{
        $({
            let value = &$value;
            let said = format!("{value:?}\n{value:#?}\n");
            shown(value, said + &(&Says(value)).text() + &(&Says(value)).json() + &(&Says(value)).sources());
        })+
    }};
}

#[track_caller]
fn shown<T: ?Sized>(_: &T, said: String) {
    let (path, name) =
        type_name::<T>().split('<').next().and_then(|name| name.rsplit_once("::")).unwrap_or_default();
    if path.contains("tower_key_rotation") {
        SHOWN.with_borrow_mut(|shown| shown.insert(name));
    }
    CANARIES.assert_absent(&said);
}

fn show_error<T, E: StdError + 'static>(result: Result<T, E>) {
    if let Err(error) = result {
        show!(error);
    }
}

/// A value that has the methods below by `Display`, `Serialize` and `Error`, or else by [`SaysNothing`], which is only
/// found where the others are not.
struct Says<'a, T: ?Sized>(&'a T);

trait SaysText {
    fn text(&self) -> String;
}

impl<T: Display + ?Sized> SaysText for Says<'_, T> {
    fn text(&self) -> String {
        format!("{}\n", self.0)
    }
}

trait SaysJson {
    fn json(&self) -> String;
}

impl<T: serde::Serialize + ?Sized> SaysJson for Says<'_, T> {
    fn json(&self) -> String {
        serde_json::to_string(self.0).unwrap()
    }
}

trait SaysSources {
    fn sources(&self) -> String;
}

impl<T: StdError + 'static> SaysSources for Says<'_, T> {
    fn sources(&self) -> String {
        all_that_it_says(self.0)
    }
}

trait SaysNothing {
    fn text(&self) -> String {
        String::new()
    }

    fn json(&self) -> String {
        String::new()
    }

    fn sources(&self) -> String {
        String::new()
    }
}

impl<T: ?Sized> SaysNothing for &Says<'_, T> {}

#[test]
fn s01_canaries_are_found_in_every_form_or_piece() {
    let forms = forms(secret("alpha"));
    for (form, written) in &forms {
        let others = forms.iter().filter(|(_, other)| other == written).map(|(name, _)| name.as_str());
        // Text without control characters is escaped as JSON is.
        let same = others.filter(|name| *name != "as Debug of text").count();
        assert!(same == 1 || form == "as Debug of text", "{form} is nothing of its own: {written}");
        for around in ["", "x", "xx", "key=", "…"] {
            let found = CANARIES.find(&format!("{around}{written}{around}"));
            assert!(found.is_some(), "not found {form}: {written}");
        }
    }
    let secret = secret("alpha");
    for at in 0..=secret.len() - PIECE {
        assert!(CANARIES.find(&format!("…{}…", &secret[at..at + PIECE])).is_some(), "{at}");
        assert_eq!(CANARIES.find(&secret[at..at + PIECE - 1]), None, "{at}");
    }
    for before in ["", "u", "us", "user:"] {
        for padded in
            [BASE64_STANDARD, BASE64_URL_SAFE].map(|base64| base64.encode(format!("{before}{secret}")))
        {
            assert!(CANARIES.find(&format!("Basic {padded}")).is_some(), "{padded}");
        }
    }
    assert_eq!(CANARIES.find("key alpha, the secret has a newline, at sk-…"), None);
}

#[test]
fn s01_logs_of_all_threads_and_panics_are_captured() {
    listen();
    // Others than those that must not be heard.
    let heard = Canaries::of(&["in a span", "in an event", "in a panic"]);
    let [in_span, in_event, in_panic] =
        ["in a span", "in an event", "in a panic"].map(|name| heard.secret(name).to_owned());
    let thread = std::thread::spawn(move || {
        tracing::trace_span!("span", in_span).in_scope(|| ());
        tracing::trace!(header = ?HeaderValue::from_str(&in_event).unwrap());
        panic!("with {in_panic}");
    });
    thread.join().unwrap_err();
    for name in ["in a span", "in an event", "in a panic"] {
        assert!(Canaries::of(&[name]).find(&said()).is_some(), "what is said {name} is not heard");
    }
}

/// What a service answers that quotes the whole request, key included, in the bodies of its errors. The last part of the
/// path says what: a status, or a fault.
async fn quoting<B: Debug>(request: Request<B>) -> Answer {
    static WAIT: AtomicUsize = AtomicUsize::new(60);
    let quote = json!({ "error": { "message": "wrong API key", "request": format!("{request:?}") } });
    match request.uri().path().rsplit('/').next().unwrap_or_default() {
        "longer" => {
            let wait = WAIT.fetch_add(1, SeqCst).to_string();
            answer_with(429, [("retry-after", wait.as_str())], quote.to_string())
        }
        "again" => answer_with(302, [("location", request.uri().to_string().as_str())], ""),
        "never" => future::pending().await,
        "cut" => {
            let cut = async {
                // The head and the first part are on their way by then.
                sleep(SECOND / 100).await;
                Err(io::Error::other("cut"))
            };
            let begun = stream::iter([Ok(Bytes::from(quote.to_string()))]);
            answer(429, Body::from_stream(begun.chain(stream::once(cut))))
        }
        status => answer(status.parse().unwrap(), quote.to_string()),
    }
}

const PATHS: [&str; 11] = ["200", "429", "401", "402", "403", "400", "500", "404", "again", "never", "cut"];

/// So many of them are statuses.
const STATUSES: usize = 8;

const IDS: [&str; 4] = ["alpha", "beta", "gamma", "delta"];

/// Every way for a key into a request.
fn injections() -> [Inject; 5] {
    let basic = Inject::custom(|secret, credentials| {
        let value = format!("Basic {}", BASE64_STANDARD.encode(format!("user:{secret}")));
        credentials.header(AUTHORIZATION, &value)?;
        show!(credentials);
        Ok(())
    });
    let everywhere = Inject::bearer().and(Inject::header("x-api-key")).and(Inject::query("key"));
    [Inject::bearer(), Inject::header("x-api-key"), Inject::query("api key"), basic, everywhere]
}

/// A pool of good keys and bad ones over a store that fails as it is told.
struct Keys {
    clock: ManualClock,
    store: FaultyStore,
    pool: KeyPool,
    recovery: RecoveryHandle,
}

impl Keys {
    async fn going_by(inject: Inject) -> Self {
        let clock = ManualClock::new();
        let store = FaultyStore::new(&clock);
        store.insert("unusable in the store", &format!("{}\n", secret("other"))).await;
        store.insert("stored", secret("alpha")).await;
        let builder = KeyPool::builder()
            .keys(IDS.map(|id| (id, secret(id))))
            .keys(unusable())
            .cooldown(SECOND)
            .inject(inject)
            .clock(clock.clone());
        show!(builder);
        let pool = builder.open(store.clone()).await.unwrap();
        let recovery = RecoveryHandle::spawn_with(&pool, passes_by_hand());
        let keys = Self { clock, store, pool, recovery };
        keys.show();
        keys
    }

    fn show(&self) {
        show!(self.pool, self.pool.stats(), self.pool.rejected(), self.recovery, self.recovery.last_report());
        show!(self.store, self.store.marks(), self.store.used());
        show!(self.pool.stats().keys.iter().map(|key| self.pool.masked_secret(&key.id)).collect::<Vec<_>>());
    }

    /// Every key is good again.
    async fn refresh(&self) {
        self.clock.advance(24 * 60 * MINUTE);
        for key in self.pool.stats().keys {
            self.pool.reset(key.id).await.unwrap();
        }
    }

    /// Sends everything that there is to ask for, and looks at what comes back. Says how many answers that were.
    async fn ask_with<S>(&self, client: &S, url: &str, paths: &[&str]) -> usize
    where
        S: Service<reqwest::Request, Response = reqwest::Response> + Clone,
        S::Error: StdError + 'static,
    {
        let mut answers = 0;
        for path in paths {
            let mut request = get_request(&format!("{url}/{path}?a=1"));
            let time = if *path == "never" { SECOND / 50 } else { 10 * SECOND };
            *request.timeout_mut() = Some(time);
            match send(client, request).await {
                Ok(response) => {
                    answers += 1;
                    show!(response, response.extensions());
                    show_error(response.error_for_status_ref());
                    show!(response.json::<u32>().await.unwrap_err());
                }
                Err(error) => show!(error),
            }
            self.refresh().await;
        }
        answers
    }

    /// Has every key rest, for longer than anybody waits.
    async fn wear_out<S>(&self, client: &S, url: &str)
    where
        S: Service<reqwest::Request, Response = reqwest::Response> + Clone,
        S::Error: StdError + 'static,
    {
        // They all have a key by the time that the first one is answered.
        let longer = format!("{url}/longer");
        let at_once = (0..12).map(|_| get(client, &longer));
        for answer in futures_util::future::join_all(at_once).await {
            match answer {
                Ok(response) => show!(response),
                Err(error) => show!(error),
            }
        }
        show!(get(client, &format!("{url}/200")).await.unwrap_err());
        self.refresh().await;
    }
}

/// What can't be used as a key, with a secret in it.
fn unusable() -> [(String, String); 9] {
    let broken = secret("broken");
    let with_an_id_that_is_too_long = "x".repeat(300);
    [
        ("newline", format!("{broken}\n")),
        ("control", format!("{}\u{7f}{}", &broken[..20], &broken[20..])),
        ("tab", format!("{}\t{}", &broken[..20], &broken[20..])),
        ("beyond ASCII", format!("{broken}é")),
        ("spaces", format!(" {broken} ")),
        ("empty", String::new()),
        ("alpha", secret("other").to_owned()),
        ("of the same secret", secret("alpha").to_owned()),
        (with_an_id_that_is_too_long.as_str(), broken.to_owned()),
    ]
    .map(|(id, secret)| (id.to_owned(), secret))
}

/// A clock that goes on by itself, ten times as fast as real time, until this is dropped.
struct Ticking(tokio::task::JoinHandle<()>);

impl Ticking {
    fn start(clock: &ManualClock) -> Self {
        let clock = clock.clone();
        Self(tokio::spawn(async move {
            loop {
                sleep(SECOND / 100).await;
                clock.advance(SECOND / 10);
            }
        }))
    }
}

impl Drop for Ticking {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[tokio::test]
async fn s01_no_request_outcome_shows_a_key() {
    let logs = listen();
    let server = Server::start(quoting).await;
    let http = http();
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    for inject in injections() {
        show!(inject);
        let keys = Keys::going_by(inject).await;
        let pool = &keys.pool;
        let _ticking = Ticking::start(&keys.clock);
        let gateway = KeyRotationLayer::new(pool).classify(LlmGateway::new()).expose_key();
        let reading = gateway.clone().read_error_bodies(1024);
        let failover = reading.clone().failover(Failover::attempts(3)).wait_up_to(2 * SECOND);
        show!(gateway, reading, failover);

        let heads_only = gateway.layer(http.clone());
        let with_bodies = reading.layer(http.clone());
        let with_failover = failover.layer(http.clone());
        let middleware = failover.clone();
        show!(heads_only, with_bodies, with_failover, middleware);
        let as_middleware = reqwest_middleware::ClientBuilder::new(http.clone()).with(middleware).build();
        let over_middleware = reading.layer(reqwest_middleware::ClientBuilder::new(http.clone()).build());
        let (closed, cleartext) = (format!("http://{closed}"), "http://api.example.com".to_owned());
        for (url, paths) in [(server.url(), &PATHS[..]), (closed, &PATHS[..1]), (cleartext, &PATHS[..1])] {
            let answers = [
                keys.ask_with(&heads_only, &url, paths).await,
                keys.ask_with(&with_bodies, &url, paths).await,
                keys.ask_with(&with_failover, &url, paths).await,
                keys.ask_with(&as_middleware, &url, paths).await,
                keys.ask_with(&over_middleware, &url, paths).await,
            ];
            // What is redirected without an end, and what is not answered, are errors of the client.
            assert_eq!(answers, [if paths.len() == 1 { 0 } else { PATHS.len() - 2 }; 5]);
        }
        keys.wear_out(&heads_only, &server.url()).await;
        keys.wear_out(&with_failover, &server.url()).await;
        for _ in pool.stats().keys {
            show!(get(&heads_only, &format!("{}/429", server.url())).await.unwrap());
        }
        show!(get(&with_failover, &format!("{}/200", server.url())).await.unwrap());
        keys.show();
        keys.recovery.shutdown().await.unwrap();
    }
    for said in ["key rests", "key rests longer", "cooldown over", "key rejected", "not used as a key"] {
        assert!(logs.count(said) > 0, "not logged, so not tested: {said}");
    }
    CANARIES.assert_absent(&said());
}

/// Speaks HTTP/2 with a service that quotes, without a network.
async fn http2()
-> impl Service<Request<Full<Bytes>>, Response = Response<Incoming>, Error = hyper::Error, Future: Send>
+ Clone
+ Send
+ 'static {
    let (ours, theirs) = tokio::io::duplex(64 * 1024);
    let quoting = hyper_service_fn(async |request| Ok::<_, io::Error>(quoting::<Incoming>(request).await));
    tokio::spawn(
        server::conn::http2::Builder::new(TokioExecutor::new())
            .serve_connection(TokioIo::new(theirs), quoting),
    );
    let (client, connection) =
        client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(ours)).await.unwrap();
    tokio::spawn(connection);
    service_fn(move |request| client.clone().send_request(request))
}

/// A service that quotes, by TLS with a certificate that nobody has signed.
async fn tls_service() -> String {
    let of_its_own = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let key = PrivateKeyDer::Pkcs8(of_its_own.signing_key.serialize_der().into());
    let config = ServerConfig::builder().with_no_client_auth();
    let config = config.with_single_cert(vec![of_its_own.cert.der().clone()], key).unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://localhost:{}/v1", listener.local_addr().unwrap().port());
    tokio::spawn(async move {
        while let Ok((connection, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let Ok(connection) = acceptor.accept(connection).await else { return };
                let quoting =
                    hyper_service_fn(async |request| Ok::<_, io::Error>(quoting::<Incoming>(request).await));
                let _ = server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(connection), quoting)
                    .await;
            });
        }
    });
    url
}

/// The same with requests of `http`; looks also at what the client is given.
async fn ask_http<S, B>(keys: &Keys, client: S, url: &str) -> usize
where
    S: Service<Request<Full<Bytes>>, Response = Response<B>> + Clone + Send + 'static,
    S::Error: StdError + Send + 'static,
    S::Future: Send,
    B: http_body::Body<Data: Send> + Debug + Send + 'static,
    B::Error: StdError + Send + 'static,
{
    let seen = client.map_request(|request: Request<Full<Bytes>>| {
        show!(request.headers());
        request
    });
    let reading = KeyRotationLayer::new(&keys.pool).classify(LlmGateway::new()).read_error_bodies(1024);
    let client = reading.failover(Failover::attempts(3)).layer(seen);
    let mut answers = 0;
    for path in &PATHS[..STATUSES] {
        let request = Request::post(format!("{url}/{path}?a=1")).body(Full::from("ask")).unwrap();
        match client.clone().oneshot(request).await {
            Ok(response) => {
                answers += 1;
                show!(response, response.extensions());
                response.into_body().collect().await.unwrap();
            }
            Err(error) => show!(error),
        }
        keys.refresh().await;
    }
    answers
}

#[tokio::test]
async fn s01_other_clients_and_protocols_show_no_key() {
    let logs = listen();
    let server = Server::start(quoting).await;
    let tls = tls_service().await;
    let builder = || reqwest::Client::builder().no_proxy();
    let trusting = builder().tls_danger_accept_invalid_certs(true).build().unwrap();
    let suspicious = builder().build().unwrap();
    for inject in injections() {
        let keys = Keys::going_by(inject).await;
        let hyper = Client::builder(TokioExecutor::new()).build_http::<Full<Bytes>>();
        assert_eq!(ask_http(&keys, hyper.clone(), &server.url()).await, STATUSES);
        assert_eq!(ask_http(&keys, hyper, "http://127.0.0.1:1").await, 0);
        assert_eq!(ask_http(&keys, http2().await, "https://api.example.com").await, STATUSES);

        let rotation = KeyRotationLayer::new(&keys.pool);
        let paths = &PATHS[..STATUSES];
        assert_eq!(keys.ask_with(&rotation.layer(trusting.clone()), &tls, paths).await, STATUSES);
        let refused = rotation.layer(suspicious.clone());
        assert_eq!(keys.ask_with(&refused, &tls, &PATHS[..1]).await, 0);
        assert_eq!(keys.ask_with(&refused, &tls.replace("https", "ftp"), &PATHS[..1]).await, 0);
    }
    for target in ["hyper_util::client", "h2::", "rustls::", "reqwest::"] {
        assert!(logs.text().contains(target), "nothing is heard of {target}");
    }
    CANARIES.assert_absent(&said());
}

/// A store that panics once it is told to, and says in it all that it knows.
#[derive(Clone, Debug, Default)]
struct Panicking {
    inner: MemoryStore,
    now: Arc<AtomicBool>,
}

impl Panicking {
    async fn perhaps(&self, what: impl Debug) {
        if self.now.load(SeqCst) {
            panic!("{ON_PURPOSE}: {what:?}, with {}", secret("alpha"));
        }
    }
}

impl KeyStore for Panicking {
    fn load<'a>(&'a self, only: Option<&'a [KeyId]>) -> StoreFuture<'a, Loaded> {
        Box::pin(async move {
            self.perhaps("load").await;
            self.inner.load(only).await
        })
    }

    fn changes(&self) -> Option<mpsc::Receiver<Change>> {
        let (changes, receiver) = mpsc::channel(1);
        changes.try_send(Change::Anything).unwrap();
        Some(receiver)
    }

    fn merge(&self, mark: Mark) -> StoreFuture<'_, Option<Standing>> {
        Box::pin(async move {
            self.perhaps(&mark).await;
            self.inner.merge(mark).await
        })
    }

    fn operate(&self, id: KeyId, operation: Operation) -> StoreFuture<'_, Option<Standing>> {
        self.inner.operate(id, operation)
    }

    fn sweep(&self) -> StoreFuture<'_, Recovered> {
        Box::pin(async {
            self.perhaps("sweep").await;
            self.inner.sweep().await
        })
    }

    fn add_usage(&self, usage: Vec<Usage>) -> StoreFuture<'_, ()> {
        Box::pin(async move {
            self.perhaps(usage).await;
            Ok(())
        })
    }
}

#[tokio::test]
async fn s01_a_panicking_store_or_client_shows_no_key() {
    let logs = listen();
    let store = Panicking::default();
    let clock = ManualClock::new();
    let builder = KeyPool::builder().key("alpha", secret("alpha")).clock(clock.clone());
    let pool = builder.open(store.clone()).await.unwrap();
    let recovery = RecoveryHandle::spawn_with(&pool, passes_by_hand());
    let server = Server::start(quoting).await;
    assert_eq!(status(&rotating(&pool), &format!("{}/200", server.url())).await, 200);

    store.now.store(true, SeqCst);
    assert_eq!(status(&rotating(&pool), &format!("{}/429", server.url())).await, 429);
    eventually("a write panics", || logs.count("a write panicked") > 0).await;
    let report = recovery.sweep_now().await;
    let failed = report.outcome.clone().unwrap_err();
    assert_eq!(failed.to_string(), "the pass panicked");
    show!(report, failed, recovery, pool, store);
    show!(recovery.shutdown().await.unwrap_err());

    pool.reset("alpha").await.unwrap();
    let panics = service_fn(async |request: Request<()>| -> io::Result<Response<()>> {
        panic!("the client panics with {:?} {request:?}", request.headers())
    });
    let client = KeyRotationLayer::new(&pool).layer(panics);
    let sent = tokio::spawn(client.oneshot(Request::get("https://api.example.com").body(()).unwrap()));
    show!(sent.await.unwrap_err());
    assert!(said().contains(r#"the client panics with {"authorization": Sensitive}"#));
    CANARIES.assert_absent(&said());
}

#[tokio::test]
async fn s01_operator_calls_and_failing_stores_show_no_key() {
    let logs = listen();
    let recorder = DebuggingRecorder::new();
    let metrics = recorder.snapshotter();
    let _recorded = metrics::set_default_local_recorder(&recorder);
    let keys = Keys::going_by(Inject::bearer()).await;
    let (pool, store) = (&keys.pool, &keys.store);
    show!(pool.insert("beta", secret("other")).await.unwrap_err());
    for (id, secret) in
        unusable().into_iter().filter(|(id, _)| !["alpha", "of the same secret"].contains(&&**id))
    {
        show!(pool.insert(id, secret).await.unwrap_err());
    }
    pool.insert("spare", secret("spare")).await.unwrap();
    pool.disable("spare").await.unwrap();
    keys.show();
    pool.enable("spare").await.unwrap();
    pool.remove("spare").await.unwrap();
    show!(pool.reset("spare").await.unwrap_err(), pool.remove("spare").await.unwrap_err());

    let server = Server::start(quoting).await;
    let client = KeyRotationLayer::new(pool).classify(ByStatus).layer(http());
    for path in ["200", "429", "402", "401"] {
        get(&client, &format!("{}/{path}", server.url())).await.unwrap();
    }
    pool.record_usage(&KeyId::new("beta").unwrap(), 7);
    eventually("marks are written", || !store.marks().is_empty()).await;
    show!(keys.recovery.sweep_now().await);
    store.tell(Change::Keys(vec![KeyId::new("beta").unwrap()])).await;
    keys.clock.advance(2 * SECOND);
    show!(keys.recovery.sweep_now().await);
    keys.show();

    store.set(Mode::Fails);
    keys.refresh().await;
    get(&client, &format!("{}/401", server.url())).await.unwrap();
    eventually("a write has failed", || logs.count("could not be written and stay pending") > 0).await;
    store.tell(Change::Anything).await;
    show!(pool.reload().await.unwrap_err());
    let report = keys.recovery.sweep_now().await;
    show!(report, report.outcome.clone().unwrap_err());
    show!(KeyPool::builder().key("beta", secret("beta")).open(store.clone()).await.unwrap_err());
    let waiting = KeyPool::builder().key("beta", secret("beta")).open_when_ready(store.clone()).unwrap();
    show!(waiting, waiting.insert("gamma", secret("gamma")).await.unwrap_err());
    keys.show();
    pool.record_metrics();
    let metrics = format!("{:?}", metrics.snapshot().into_vec());
    assert!(metrics.contains("key_rotation_store_errors_total"), "{metrics}");
    CANARIES.assert_absent(&metrics);
    show!(keys.recovery.shutdown().await.unwrap_err());
    for said in ["keys recovered", "recovery pass failed", "marks could not be written", "recovery stopped"] {
        assert!(logs.count(said) > 0, "not logged, so not tested: {said}");
    }
    CANARIES.assert_absent(&said());
}

/// A file of that name and text, for one test.
fn file(name: &str, text: impl AsRef<[u8]>) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("canary-{name}"));
    fs::write(&path, text).unwrap();
    path
}

/// A pool of those keys, or an error; and an error of all that is wrong with them.
fn show_all_of(keys: impl Fn() -> KeyPoolBuilder) {
    show!(keys());
    match keys().build() {
        Ok(pool) => show!(pool, pool.stats(), pool.rejected()),
        Err(error) => show!(error),
    }
    show_error(keys().strict().build());
}

#[test]
fn s01_loading_from_files_shows_no_key() {
    listen();
    let lines: String = unusable().iter().map(|(id, secret)| format!("{id}|{secret}\n")).collect();
    let lines = format!("# {}\nalpha|{}\n{}\n{lines}", secret("note"), secret("alpha"), secret("beta"));
    let entries = json!([
        { "id": "alpha", "secret": secret("json") },
        { "id": 7, "secret": secret("other") },
        { "id": "nested", "secret": { "secret": secret("other") } },
        { "secret": secret("gamma"), "note": secret("note") },
        [secret("other")],
        secret("delta"),
        secret("delta"),
    ]);
    let good = entries.to_string();
    let table = |field: &str| format!("[[key]]\nid = 'alpha'\n{field} = {}\n", json!(secret("other")));
    let tables = ["secret", "id", "tier", "tire", "note"].map(table).concat();
    let one = json!({ "id": "alpha", "secret": secret("alpha") });
    let mut files = vec![
        file("lines.txt", &lines),
        file("entries.json", &good),
        file("object.json", json!({ "alpha": secret("alpha"), "beta": [secret("beta")] }).to_string()),
        file("one.json", one.to_string()),
        file("tables.toml", &tables),
        file("unquoted.toml", tables.replace('\'', "")),
        file("text.json", json!(secret("alpha")).to_string()),
        file("no-text.txt", [secret("alpha").as_bytes(), &[0xff]].concat()),
        PathBuf::from("no/such/file"),
    ];
    // Broken at every place where the secret has something before it, in it and behind it.
    let broken = one.to_string();
    for (number, at) in (0..broken.len()).step_by(5).enumerate() {
        files.push(file(&format!("cut-{number}.json"), &broken[..at]));
        files.push(file(&format!("split-{number}.json"), format!("{}\n{}", &broken[..at], &broken[at..])));
    }
    for path in files {
        show_all_of(|| KeyPool::builder().keys_from_file(&path));
    }
    CANARIES.assert_absent(&said());
}

const VARIABLE: &str = "CANARY_KEYS";
const BROKEN_VARIABLE: &str = "CANARY_BROKEN_KEYS";

/// Runs a test of this file in a process of its own with these keys in its environment, where it looks at them and what
/// it writes is looked at: to set variables here would not be safe beside other tests.
fn with_variable(test: &str, keys: &str, looks: impl Fn()) {
    if env::var_os(VARIABLE).is_some() {
        listen();
        looks();
        return CANARIES.assert_absent(&said());
    }
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", test, "--include-ignored", "--nocapture"])
        .env(VARIABLE, keys)
        .env(BROKEN_VARIABLE, not_text(secret("variable")))
        .output()
        .unwrap();
    let written = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    CANARIES.assert_absent(&written);
    assert!(output.status.success() && written.contains("1 passed"), "{written}");
}

#[test]
fn s01_loading_from_the_environment_shows_no_key() {
    let bare = secret("variable").replace('=', "");
    let unusable: String = unusable().iter().map(|(id, secret)| format!(",{id}={secret}")).collect();
    let keys = format!("alpha={}, beta={},{bare}{unusable}", secret("alpha"), secret("beta"));
    with_variable("s01_loading_from_the_environment_shows_no_key", &keys, || {
        assert_eq!(KeyPool::builder().keys_from_env(VARIABLE).build().unwrap().stats().healthy, 3);
        for variable in [VARIABLE, BROKEN_VARIABLE, "CANARY_UNSET"] {
            show_all_of(|| KeyPool::builder().keys_from_env(variable));
        }
    });
}

#[test]
fn s01_loading_from_a_variable_shows_no_padded_key() {
    // Of a length that no base64 has, by what stands before it.
    let bare = format!("sk-{}", BASE64_STANDARD.encode(&secret("variable")[..40]));
    assert!(bare.ends_with('=') && bare.len() % 4 == 3, "{bare}");
    with_variable("s01_loading_from_a_variable_shows_no_padded_key", &bare, || {
        show_all_of(|| KeyPool::builder().keys_from_env(VARIABLE));
    });
}

#[cfg(unix)]
fn not_text(secret: &str) -> std::ffi::OsString {
    use std::os::unix::ffi::OsStringExt;
    std::ffi::OsString::from_vec([secret.as_bytes(), &[0xff]].concat())
}

#[cfg(not(unix))]
fn not_text(secret: &str) -> String {
    format!("{secret}\n")
}

/// A bad value, a right that is missing, a wrong password, and a server that steps down.
const CODES: [i32; 4] = [2, 13, 18, 11_602];
const COMMANDS: [&str; 8] =
    ["ping", "find", "aggregate", "getMore", "update", "findAndModify", "insert", "delete"];

/// Documents with keys, of which the server refuses some changes, and says then what stands in them.
async fn with_documents(server: &Mongod) -> Mongo {
    let mongo = Mongo::at(&server.uri()).await;
    for name in ["alpha", "beta", "gamma", "delta"] {
        mongo.insert(name).await;
        mongo.set(name, doc! { "apiKey": secret(name), "note": secret("note") }).await;
    }
    for (id, name) in [("spare", "spare"), ("alpha", "other"), ("another", "file")] {
        let mut document = standby(id);
        document.insert("apiKey", secret(name));
        mongo.standby().insert_one(document).await.unwrap();
    }
    for (id, secret) in [("broken", format!("{}\n", secret("broken"))), ("ä\nid", secret("json").to_owned())]
    {
        mongo.keys().insert_one(doc! { "_id": id, "apiKey": secret, "status": "healthy" }).await.unwrap();
    }
    let unique = IndexOptions::builder().unique(true).build();
    let unique = IndexModel::builder().keys(doc! { "apiKey": 1 }).options(unique).build();
    mongo.keys().create_index(unique).await.unwrap();
    // One is not to be limited, one not to be retired, and one not to be used much. The key is what the server then says
    // it has considered.
    let considered = doc! { "$type": "string" };
    let refused = [
        doc! { "apiKey": &considered, "_id": "gamma", "status": { "$ne": "healthy" } },
        doc! { "apiKey": &considered, "_id": "delta", "retiredAt": { "$exists": true } },
        doc! { "apiKey": considered, "_id": "alpha", "tokensUsed": { "$gt": 10 } },
    ];
    let refuse = doc! { "collMod": "keys", "validator": { "$nor": refused.to_vec() } };
    mongo.database.run_command(refuse).await.unwrap();
    mongo
}

/// Everything that an operator and a recovery ask the store for, and what they are told.
async fn show_failures_of(process: &Process) {
    let pool = &process.pool;
    show_error(pool.reload().await);
    show_error(pool.reset("alpha").await);
    show_error(pool.disable("alpha").await);
    show_error(pool.enable("alpha").await);
    show_error(pool.insert("new", secret("variable")).await);
    show_error(pool.remove("new").await);
    show_error(process.recovery.sweep_now().await.outcome);
    show!(process.recovery, pool.stats());
}

async fn no_key_is_said_of_mongodb(kind: Kind) {
    let logs = listen();
    let server = own(kind).await;
    let mongo = with_documents(&server).await;
    let proxy = Proxy::to(server.address()).await;
    let uri = format!("{}&serverSelectionTimeoutMS=300", proxy.uri());
    let builder = mongo.builder().standby_collection("standby_keys").poll_interval(SECOND / 5);
    show!(builder);
    let store = builder.clone().connect(&uri).await.unwrap();
    let process = Process::over(store.clone()).await;
    show!(store, process.pool, process.recovery);
    let sees = async |name, answer| process.sees(secret(name).trim_start_matches("sk-"), answer).await;

    sees("alpha", 429).await;
    process.pass().await;
    // As another process leaves them.
    let failed = doc! { "$set": { "status": "error", "failedAt": DateTime::now() } };
    mongo.keys().update_many(doc! { "_id": { "$in": ["beta", "delta"] } }, failed).await.unwrap();
    show!(process.recovery.sweep_now().await);
    assert_eq!(process.status("spare"), Some(Status::Healthy));
    sees("spare", 402).await;
    show!(process.recovery.sweep_now().await);
    show!(process.pool.insert("beta", secret("variable")).await.unwrap_err());
    show!(process.pool.insert("new", secret("spare")).await.unwrap_err());
    show!(process.pool.insert("new", format!("{}\n", secret("variable"))).await.unwrap_err());
    show!(process.pool.disable("gamma").await.unwrap_err());
    process.pool.enable("gamma").await.unwrap();
    sees("gamma", 429).await;
    show!(process.recovery.sweep_now().await.outcome.unwrap_err());
    process.pool.reset("alpha").await.unwrap();
    process.pool.record_usage(&id("alpha"), 7);
    mongo.end_cooldown("alpha").await;
    show!(process.recovery.sweep_now().await);

    proxy.set(Fault::Quote(secret("password")));
    for code in CODES {
        let fault = doc! { "failCommands": COMMANDS.to_vec(), "errorCode": code };
        fail_command(&server, "alwaysOn", fault).await;
        let driver = MongoClient::with_uri_str(proxy.uri()).await.unwrap();
        let raw = driver.database("admin").run_command(doc! { "ping": 1 }).await.unwrap_err();
        assert!(CANARIES.find(&raw.to_string()).is_some(), "the server quotes nothing: {raw}");
        show_failures_of(&process).await;
        show!(builder.clone().connect(&uri).await.unwrap_err());
    }
    let password = &forms(secret("password"))[1].1;
    let as_somebody = builder.clone().connect(uri.replace("://", &format!("://user:{password}@"))).await;
    show!(as_somebody.unwrap_err());
    let said_beside = doc! { "code": 64, "codeName": "WriteConcernFailed", "errmsg": secret("password") };
    let fault = doc! { "failCommands": COMMANDS.to_vec(), "writeConcernError": said_beside };
    fail_command(&server, "alwaysOn", fault).await;
    show_failures_of(&process).await;
    stop_failing(&server).await;

    proxy.set(Fault::Cut);
    sees("file", 401).await;
    show!(process.pool.reload().await.unwrap_err());
    show!(process.recovery.sweep_now().await.outcome.unwrap_err());
    show!(process.recovery.shutdown().await.unwrap_err());
    let way_of_changes = match kind {
        Kind::Standalone => "no change stream",
        Kind::ReplicaSet | Kind::Member => "the change stream broke off",
    };
    for what in [
        "not used as a key",
        "not used as a standby key",
        "replaced by",
        "could not be replaced",
        "refused to add usage up",
        "could not be written",
        way_of_changes,
    ] {
        assert!(logs.count(what) > 0, "not logged, so not tested: {what}");
    }
    CANARIES.assert_absent(&said());
}

#[tokio::test]
async fn s01_a_failing_mongodb_shows_no_key() {
    no_key_is_said_of_mongodb(Kind::Standalone).await;
}

#[tokio::test]
async fn s01_a_failing_replica_set_shows_no_key() {
    no_key_is_said_of_mongodb(Kind::ReplicaSet).await;
}

fn pool_with_key_in_query() -> KeyPool {
    KeyPool::builder().key("alpha", secret("alpha")).inject(Inject::query("key")).build().unwrap()
}

/// Nothing listens there.
const NOWHERE: &str = "http://127.0.0.1:1/v1";

#[tokio::test]
async fn s01_boxed_errors_show_no_query_key() {
    let client = ServiceBuilder::new()
        .layer(KeyRotationLayer::new(&pool_with_key_in_query()))
        .layer(TimeoutLayer::new(10 * SECOND))
        .service(reqwest_middleware::ClientBuilder::new(http()).build());
    let error = client.oneshot(get_request(NOWHERE)).await.unwrap_err();
    CANARIES.assert_absent(&format!("{error:?}"));
    CANARIES.assert_absent(&all_that_it_says(&*error.into_inner()));
}

#[tokio::test]
async fn s01_nested_pools_show_no_query_key() {
    let elsewhere =
        KeyPool::builder().key("beta", secret("beta")).allowed_hosts(["example.com"]).build().unwrap();
    let client = KeyRotationLayer::new(&pool_with_key_in_query()).layer(rotating(&elsewhere));
    show!(get(&client, NOWHERE).await.unwrap_err());
}

#[tokio::test]
async fn s01_responses_show_no_query_key_moved_by_redirects() {
    let server = Server::start(async |request: Request<Bytes>| match request.uri().path() {
        "/v1" => {
            let asked = &forms(&request.uri().to_string())[1].1;
            answer_with(302, [("location", format!("/login?next={asked}").as_str())], "")
        }
        _ => answer(401, "log in"),
    })
    .await;
    let response = get(&rotating(&pool_with_key_in_query()), &server.url()).await.unwrap();
    show!(response, response.error_for_status_ref().unwrap_err());
}

#[test]
fn s01_a_response_head_shows_no_quoted_key() {
    let mut headers = HeaderMap::new();
    headers.insert("x-wrong-key", secret("alpha").parse().unwrap());
    show!(ResponseHead::new(StatusCode::UNAUTHORIZED, &headers).with_body(secret("alpha").as_bytes()));
}

async fn show_sources() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("keys.json");
    let broken = json!({ "id": "broken", "secret": format!("{}\n", secret("broken")) });
    let keys = json!([{ "id": "alpha", "secret": secret("alpha") }, broken]);
    fs::write(&path, keys.to_string()).unwrap();
    let token = || async {
        let key = KeySpec::new(id("beta"), secret("beta"));
        Ok::<_, io::Error>(SourcedKey::from(key).expires_in(SECOND))
    };
    let (file, token) = (KeyFile::new(&path).interval(SECOND / 100), source::from_fn("token", token));
    show!(file, token, KeyDirectory::new(directory.path()), KeyVariable::new("KEYS"));
    let set = file.read().await.unwrap();
    show!(set, set.keys[0]);
    let builder = KeyPool::builder().source(file).await.unwrap().source(token).await.unwrap();
    show!(builder);
    let pool = builder.build().unwrap();
    let recovery = RecoveryHandle::spawn(&pool);
    show!(pool.sources());
    fs::write(&path, format!("[{{\"id\": \"alpha\", \"secret\": \"{}\"", secret("other"))).unwrap();
    eventually("the file can't be used", || pool.sources()[0].error.is_some()).await;
    show!(pool.sources(), pool.sources()[0]);
    show_error(KeyPool::builder().source(KeyFile::new(&path)).await);
    show_error(KeyFile::new(&path).read().await);
    recovery.shutdown().await.unwrap();
}

/// The structs and enums that users can name: what is public in the crate's root and in its public modules.
fn public_types() -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let mut declared = BTreeSet::new();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for text in sources_below(&source) {
        declared.extend(names_after(&text, &["pub struct ", "pub enum "]));
    }
    add_public_names(&source, "lib.rs", &mut names);
    names.intersection(&declared).cloned().collect()
}

fn sources_below(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let texts = entries.map(|path| {
        if path.is_dir() { sources_below(&path) } else { vec![fs::read_to_string(path).unwrap()] }
    });
    texts.flatten().collect()
}

fn names_after(text: &str, keywords: &[&str]) -> Vec<String> {
    let name = |line: &str| {
        let rest = keywords.iter().find_map(|keyword| line.trim_start().strip_prefix(keyword))?;
        let name = rest.split(|c: char| !c.is_alphanumeric() && c != '_').next()?;
        // A macro's variable has a `$` before it.
        (!name.is_empty()).then(|| name.to_owned())
    };
    text.lines().filter_map(name).collect()
}

fn add_public_names(folder: &Path, file: &str, names: &mut BTreeSet<String>) {
    let text = fs::read_to_string(folder.join(file)).unwrap();
    names.extend(names_after(&text, &["pub struct ", "pub enum "]));
    for used in text.split("\npub use ").skip(1) {
        let used = used.split(';').next().unwrap();
        assert!(!used.contains('*'), "what is public here can't be seen: pub use {used}");
        names.extend(used.split(|c: char| !c.is_alphanumeric() && c != '_').map(str::to_owned));
    }
    for module in names_after(&text, &["pub mod "]) {
        let as_file = format!("{module}.rs");
        if folder.join(&as_file).exists() {
            add_public_names(folder, &as_file, names);
        } else {
            add_public_names(&folder.join(module), "mod.rs", names);
        }
    }
}

/// They stand in the types of others, or are there for the fuzz targets alone, and nobody ever holds one.
const NEVER_HELD: [&str; 4] = ["Documents", "FromExtensions", "Once", "Waiting"];

fn id(name: &str) -> KeyId {
    KeyId::new(name).unwrap()
}

fn show_keys_and_stores() {
    let alpha = || Secret::new(secret("alpha"));
    let store = MemoryStore::new();
    let spec = || KeySpec::new(id("alpha"), alpha());
    let operation = Operation::Insert(spec());
    show!(operation);
    let standing = store.operate(id("alpha"), operation).now_or_never().unwrap().unwrap().unwrap();
    let resting = Resting { until: Until::After(SECOND), reason: Rest::Exhausted };
    let words = Words { key: Some(resting), ..Words::default() };
    let record = KeyRecord::new(spec(), standing.clone());
    let mark = Mark::new(id("alpha"), standing.born, words.clone());
    show!(standing.born, Born::now(), resting, words, Until::Reset, standing.clone());
    show!(Scope::new("model").unwrap(), Scope::new("").unwrap_err());
    let usage = Usage::new(id("alpha"), 1, 2);
    show!(
        id("alpha"),
        KeyId::new("").unwrap_err(),
        alpha(),
        store,
        record,
        mark,
        Loaded::from(vec![record.clone()])
    );
    show!(Unreadable::new("alpha", "no secret"), Change::Keys(vec![id("alpha")]), Change::Anything);
    show!(Change::Standing(id("alpha"), standing), usage, Replaced::new(id("alpha"), id("beta")));
    show!(Recovered::new(1, vec![id("alpha")]), StoreError::new("gone"), ServedBy(id("alpha")));
    show!(Heard::new(1, SECOND, vec![1]), Planted::new(id("alpha"), id("beta")), Writes::default());
    show!(Status::Healthy, Status::RateLimited, Status::Exhausted, Status::Revoked);
    show!(Status::Suspected, Status::Disabled, RestCause::Service, RestCause::Guessed, RestCause::Store);
    show!(Rest::RateLimited, Rest::Exhausted, Rest::Revoked);

    let mut credentials = Credentials::default();
    credentials.header(AUTHORIZATION, secret("alpha")).unwrap();
    credentials.query("key", secret("alpha"));
    show!(credentials, credentials.header(AUTHORIZATION, &format!("{}\n", secret("alpha"))).unwrap_err());
    for inject in injections() {
        show!(inject);
    }
    show!(UnusableSecret::new("the secret has no colon"));
    let spec = KeySpec::new(id("alpha"), secret("alpha"));
    show!(spec, KeySpec::from_json(format!("{{\"{}\": 1}}", secret("alpha"))).unwrap_err());
    let lines = format!("alpha|{0}\n{0}\n|{0}", secret("alpha"));
    for parsed in KeySpec::parse_all("keys.txt", lines).unwrap() {
        show!(parsed);
    }
    show!(Fields::default(), MongoStore::builder(), SystemClock::new(), ManualClock::new());
}

async fn show_scopes() {
    let store = MemoryStore::new();
    let insert = Operation::Insert(KeySpec::new(id("alpha"), secret("alpha")));
    let standing = store.operate(id("alpha"), insert).await.unwrap().unwrap();
    let resting = Resting { until: Until::After(MINUTE), reason: Rest::RateLimited };
    let words = Words { scopes: [(Scope::new("model").unwrap(), resting)].into(), ..Words::default() };
    store.merge(Mark::new(id("alpha"), standing.born, words)).await.unwrap();
    let pool = KeyPool::builder().open(store).await.unwrap();
    show!(pool.stats().keys[0].scopes[0].clone());
}

async fn show_what_a_shutdown_loses() {
    let store = FaultyStore::new(&ManualClock::new());
    let pool = KeyPool::builder().key("alpha", secret("alpha")).open(store.clone()).await.unwrap();
    pool.record_usage(&id("alpha"), 1);
    store.usage.set(Mode::Fails);
    show!(RecoveryHandle::spawn_with(&pool, passes_by_hand()).shutdown().await.unwrap_err());
}

async fn show_errors() {
    show_scopes().await;
    let keys = || KeyPool::builder().keys(unusable());
    show!(keys(), keys().build().unwrap().rejected()[0].clone(), keys().strict().build().unwrap_err());
    show!(keys().allowed_hosts(["https://host"]).build().unwrap_err());
    show!(keys().keys_from_file("no/such/file").build().unwrap_err());
    show!(keys().keys_from_env("TOWER_KEY_ROTATION_UNSET").build().unwrap_err());
    show!(keys().inject(Inject::header("no header")).build().unwrap_err());
    show!(KeySpec::parse_all("keys.json", secret("alpha")).unwrap_err());
    show!(KeySpec::parse_all("keys.toml", format!("[[key]]\nsecret = {}", secret("alpha"))).unwrap_err());
    show_failures_of_operators().await;
    show!(StoreError::new("gone"));
    show_what_a_shutdown_loses().await;
    let cleartext = refused_in_cleartext("name").await;
    show!(cleartext, Error::<io::Error>::Inject(cleartext.clone()));
    show_data_keys();
    show_file().await;
    let uri = format!("mongodb://user:{}@127.0.0.1:1/keys", forms(secret("password"))[1].1);
    show!(MongoStore::builder().connect_later(&uri).await.unwrap());
    let unreachable: ConnectError =
        MongoStore::builder().connect_limit(SECOND / 10).connect(&uri).await.unwrap_err();
    show!(
        unreachable,
        MongoStore::builder().connect_later(uri.replace("/keys", "/?w=none")).await.unwrap_err()
    );
}

async fn show_file() {
    let directory = tempfile::tempdir().unwrap();
    let store = FileStore::open(directory.path().join("keys.redb")).unwrap();
    let insert = Operation::Insert(KeySpec::new(id("alpha"), secret("alpha")));
    store.operate(id("alpha"), insert).await.unwrap().unwrap();
    show!(store, FileStore::builder());
    let in_use: OpenError = FileStore::open(store.path()).unwrap_err();
    let lines = file("txt", format!("alpha|{}", secret("alpha")));
    show!(in_use, FileStore::open(&lines).unwrap_err());
}

async fn show_failures_of_operators() {
    let clock = ManualClock::new();
    let store = FaultyStore::new(&clock);
    let builder = KeyPool::builder().key("alpha", secret("alpha")).clock(clock);
    let pool = builder.open(store.clone()).await.unwrap();
    let recovery = RecoveryHandle::spawn_with(&pool, passes_by_hand());
    let failed: OperateError = pool.reset("name").await.unwrap_err();
    show!(failed, pool.insert("alpha", "sk-1").await.unwrap_err());
    show!(pool.insert("beta", secret("alpha")).await.unwrap_err());
    show!(pool.insert("", secret("alpha")).await.unwrap_err());
    show!(pool.insert("beta", format!("{}\n", secret("alpha"))).await.unwrap_err());
    let mut unsupported = KeySpec::new(id("beta"), format!("{}-beta", secret("alpha")));
    unsupported.endpoint = Some("https://eu.example.com".to_owned());
    show!(pool.insert_all([unsupported]).await.remove(0).unwrap_err());
    store.set(Mode::Fails);
    store.operators.set(Mode::Fails);
    let many =
        (0..20).map(|key| KeySpec::new(id(&format!("key-{key}")), format!("{}-{key}", secret("alpha"))));
    for inserted in pool.insert_all(many).await {
        show!(inserted.unwrap_err());
    }
    let failed: PassError = recovery.sweep_now().await.outcome.unwrap_err();
    show!(failed);
}

/// The error of a request whose key would travel in cleartext to that host.
async fn refused_in_cleartext(host: &str) -> InjectError {
    let pool = KeyPool::builder().key("alpha", secret("alpha")).build().unwrap();
    let client = service_fn(async |_: Request<()>| -> Result<Response<()>, io::Error> { unreachable!() });
    let request = Request::get(format!("http://{host}")).body(()).unwrap();
    match KeyRotationLayer::new(&pool).layer(client).oneshot(request).await.unwrap_err() {
        Error::Inject(error) => error,
        error => panic!("{error}"),
    }
}

fn show_data_keys() {
    let bytes: Vec<u8> = secret("alpha").bytes().cycle().take(64).collect();
    let keys = DataKeys::parse(format!("2026a={}", BASE64_STANDARD.encode(bytes))).unwrap();
    show!(keys, MongoStore::builder().encrypt_with(keys.clone()), Encrypted::default());
    let short = format!("short={}", BASE64_STANDARD.encode(secret("alpha")));
    let wrong = [secret("alpha").to_owned(), format!("name={}", secret("alpha")), short];
    for wrong in wrong {
        let wrong: InvalidDataKeys = DataKeys::parse(wrong).unwrap_err();
        show!(wrong);
    }
}

async fn show_layers() {
    let inject = Inject::bearer().and(Inject::query("key"));
    let pool = KeyPool::builder().key("alpha", secret("alpha")).inject(inject).build().unwrap();
    let recovery = RecoveryHandle::spawn_with(&pool, passes_by_hand());
    show!(
        pool,
        pool.stats(),
        stats_of(&pool, "alpha"),
        recovery.sweep_now().await,
        recovery,
        passes_by_hand()
    );

    let limited = service_fn(async |_: Request<Full<Bytes>>| {
        let quote = Full::<Bytes>::from(secret("alpha"));
        Ok::<_, io::Error>(Response::builder().status(429).body(quote).unwrap())
    });
    let request = || Request::get("https://api.example.com").body(Full::<Bytes>::default()).unwrap();
    let layer = KeyRotationLayer::new(&pool).classify(LlmGateway::new()).read_error_bodies(1024);
    let mut rotation = layer.layer(limited);
    let failing_over = layer.clone().failover(Failover::attempts(3));
    show!(layer, failing_over, Failover::attempts(3), TryClone);
    show!(Quota::per_minute(60), Traits::new().scope("model").key(id("alpha")));
    show!(pool.lease(&Traits::new()).unwrap(), KeyLeases::new(&pool));
    let paced = KeyPool::builder().key("alpha", secret("alpha")).paced().build().unwrap();
    let served = service_fn(async |_: Request<()>| Ok::<_, io::Error>(Response::new("")));
    let request_of_paced = Request::get("https://api.example.com").body(()).unwrap();
    let served = KeyRotationLayer::new(&paced).layer(served).oneshot(request_of_paced).await.unwrap();
    show!(served, *served.extensions().get::<Reservation>().unwrap());
    show_explanations();
    // Services whose own type has `Debug`; that of a function hasn't.
    let reqwest = layer.layer(http());
    show!(reqwest, http(), failing_over.layer(http()));
    let mut failover = failing_over.layer(limited);
    let mut once = KeyRotationLayer::new(&pool).layer(limited);
    show!(once.call(request()), rotation.call(request()), failover.call(request()));

    let response = failover.oneshot(request()).await.unwrap();
    show!(response, *response.body());
    let no_key = rotation.oneshot(request()).await.unwrap_err();
    show!(no_key, *NoKeyAvailable::find(&no_key).unwrap(), Error::Inner(io::Error::other("closed")));
    let headers = HeaderMap::new();
    show!(ResponseHead::new(StatusCode::OK, &headers), TooManyRequests::new(), LlmGateway::new());
    show!(Generic, OpenAi, AzureOpenAi, Anthropic, Gemini, Mistral, Groq, OpenRouter, XAi, DeepSeek, Cohere);
    show!(HuggingFace, GitHub, Slack, Discord, Stripe, Shopify, Notion, Grpc);
    let wait = None;
    show!(Verdict::Nothing, Verdict::RateLimited { wait }, Verdict::Exhausted { wait });
    show!(Verdict::ScopeExhausted { wait }, Verdict::Revoked, Verdict::Refused);
}

fn show_explanations() {
    let pool = KeyPool::builder().key("alpha", secret("alpha")).key("beta", secret("beta"));
    let pool = pool.quota(Quota::per_minute(60)).build().unwrap();
    let lease = pool.lease(&Traits::new()).unwrap();
    let explanation = pool.explain(&Traits::new().session("user-7"));
    let short = explanation.keys.iter().find(|key| key.passed_over.is_some()).unwrap();
    show!(explanation, short.clone(), short.passed_over.clone().unwrap(), short.budgets[0]);
    show!(short.budgets[0].unit, short.budgets[0].known_by, pool.scopes()[0].clone());
    drop(lease);
}

#[tokio::test]
async fn s01_no_key_is_shown_by_any_public_type() {
    listen();
    show_keys_and_stores();
    show_errors().await;
    show_layers().await;
    show_sources().await;
    let public = public_types();
    assert!(public.len() > 50 && public.contains("MongoStore"), "{public:?}");
    let shown = SHOWN.take();
    let forgotten: Vec<_> = public
        .iter()
        .map(String::as_str)
        .filter(|name| !shown.contains(name) && !NEVER_HELD.contains(name))
        .collect();
    assert!(forgotten.is_empty(), "public types that are not shown here: {forgotten:?}");
    CANARIES.assert_absent(&said());
}
