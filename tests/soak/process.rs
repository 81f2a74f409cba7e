//! One of the two processes that share the keys: a store, a pool, its recovery, and callers that send all they can.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use reqwest::{Method, Request, Response};
use tokio::{task::JoinSet, time::sleep};
use tower::{Service, ServiceBuilder, ServiceExt, layer::layer_fn};
use tower_key_rotation::{
    Failover, KeyPool, KeyRotationLayer, NoKeyAvailable, RecoveryConfig, RecoveryHandle,
    clock::{Clock, Sleep, SystemClock},
};

use crate::{
    figures::Figures,
    ledger::{Books, Ledger},
    service::EXHAUSTED_FOR,
    support::{ByStatus, ClientError, MINUTE, Proxy, SECOND, http, mongo::Mongo},
    watch::{AroundRotation, InsideRotation, Witness},
};

const CALLERS: usize = 12;

/// The first process fails at once where there is no key, the second one waits for one.
const WAIT: [Duration; 2] = [Duration::ZERO, Duration::from_secs(2)];

const BODY: &str = r#"{"model":"local","messages":[{"role":"user","content":"Hello?"}]}"#;

pub(crate) struct Process {
    pub(crate) pool: KeyPool,
    pub(crate) recovery: RecoveryHandle,
    callers: JoinSet<()>,
}

impl Process {
    pub(crate) async fn open(mongo: &Mongo, proxy: &Proxy, held: &Arc<()>) -> Self {
        // As often as the driver looks after the server, its tasks look whether they are still needed.
        let uri = format!("{}&heartbeatFrequencyMS=1000", proxy.uri());
        let store = mongo.builder().operation_limit(2 * SECOND).connect_limit(MINUTE).connect(uri);
        let clock = PoolsClock { clock: SystemClock::new(), _held: held.clone() };
        let pool = KeyPool::builder().exact_hints().exhausted_for(EXHAUSTED_FOR).clock(clock);
        let pool = pool.open(store.await.unwrap()).await.unwrap();
        let config = RecoveryConfig::new().interval(SECOND / 2).start_jitter(SECOND / 2).limit(5 * SECOND);
        let recovery = RecoveryHandle::spawn_with(&pool, config);
        Self { pool, recovery, callers: JoinSet::new() }
    }

    /// Has callers send one request after the other, until they are to stop.
    pub(crate) fn call(
        &mut self,
        number: usize,
        url: &str,
        books: &Arc<Books>,
        figures: &Arc<Figures>,
        stop: &Arc<AtomicBool>,
    ) {
        let client = client(&self.pool, WAIT[number], &books.of(number));
        for _ in 0..CALLERS {
            let caller = Caller { books: books.clone(), figures: figures.clone(), stop: stop.clone() };
            self.callers.spawn(caller.call(client.clone(), url.parse().unwrap()));
        }
    }

    /// When the last request of each caller is answered.
    pub(crate) async fn callers_have_stopped(&mut self) {
        while let Some(caller) = self.callers.join_next().await {
            caller.unwrap();
        }
    }

    pub(crate) async fn shut_down(self, figures: &Figures) {
        figures.count("marks that waited for the shutdown", self.pool.stats().marks_waiting as u64);
        assert_eq!(self.recovery.shutdown().await, Ok(()));
    }
}

fn client(
    pool: &KeyPool,
    wait: Duration,
    ledger: &Arc<Ledger>,
) -> impl Service<Request, Response = Response, Error = ClientError, Future: Send> + Clone + Send + use<> {
    let (around, inside) = (ledger.clone(), ledger.clone());
    let rotation = KeyRotationLayer::new(pool).classify(ByStatus).failover(Failover::attempts(3));
    ServiceBuilder::new()
        .layer(layer_fn(move |inner| AroundRotation::new(inner, around.clone())))
        .layer(rotation.wait_up_to(wait))
        .layer(layer_fn(move |inner| InsideRotation::new(inner, inside.clone(), Witness::Service)))
        .service(http())
}

struct Caller {
    books: Arc<Books>,
    figures: Arc<Figures>,
    stop: Arc<AtomicBool>,
}

impl Caller {
    async fn call<S>(self, mut client: S, url: reqwest::Url)
    where
        S: Service<Request, Response = Response, Error = ClientError>,
    {
        while !self.stop.load(Relaxed) {
            let mut request = Request::new(Method::POST, url.clone());
            *request.body_mut() = Some(BODY.into());
            let (is_in_trouble, begun) = (self.books.is_in_trouble(), Instant::now());
            match async { client.ready().await?.call(request).await }.await {
                Ok(response) => self.answered(response, begun, is_in_trouble).await,
                Err(error) => self.failed(error).await,
            }
        }
    }

    async fn answered(&self, response: Response, begun: Instant, is_in_trouble: bool) {
        let status = response.status();
        // To the end, so that the connection is used again.
        match response.bytes().await {
            Ok(_) => self.figures.answered(status, begun.elapsed(), is_in_trouble),
            Err(error) => self.figures.failed(error.without_url().to_string()),
        }
    }

    async fn failed(&self, error: ClientError) {
        let Some(no_key) = NoKeyAvailable::find(&error) else {
            return self.figures.failed(format!("{error:?}"));
        };
        self.figures.no_key();
        match no_key.retry_in() {
            Some(time) => sleep(time.min(SECOND / 20)).await,
            None => self.figures.failed(no_key.to_string()),
        }
    }
}

/// The system's clock, by which it can be told how many still hold a pool: they hold its clock, too.
#[derive(Debug)]
struct PoolsClock {
    clock: SystemClock,
    _held: Arc<()>,
}

impl Clock for PoolsClock {
    fn now(&self) -> Duration {
        self.clock.now()
    }

    fn sleep_until(&self, deadline: Duration) -> Sleep {
        self.clock.sleep_until(deadline)
    }
}
