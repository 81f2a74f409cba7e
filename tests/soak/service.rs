//! The service. It lets a key be used for a while, then limits it for a while, whatever the number of requests: so
//! the callers always have enough to do, on a slow machine as on a fast one, and keys are limited all the time.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{Relaxed, SeqCst},
        },
    },
    time::Duration,
};

use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{
        HeaderMap, StatusCode,
        header::{AUTHORIZATION, RETRY_AFTER},
    },
    response::{IntoResponse, Response},
    routing::post,
};
use tokio::net::TcpListener;
use tower_key_rotation::KeyId;

use crate::{
    ledger::{Books, Ledger},
    support::SECOND,
    watch,
};

/// What the pools are told to have an exhausted key rest for: the service doesn't say.
pub(crate) const EXHAUSTED_FOR: Duration = Duration::from_secs(2);
/// So long that it outlives a fault of the store, and it can be seen that no mark gets lost in one.
const LONG: Duration = Duration::from_secs(30);
/// In the end, so that the last marks can be looked for.
const LONGEST: Duration = Duration::from_secs(120);

/// So often, and for so long, all keys are limited at once.
const STORMS_EVERY: Duration = Duration::from_secs(30);
const STORM: Duration = Duration::from_millis(200);
const FIRST_STORM_AFTER: Duration = Duration::from_secs(4);

pub(crate) struct Service {
    accounts: Mutex<HashMap<String, Account>>,
    is_closing: AtomicBool,
    is_closed: AtomicBool,
    pub(crate) answers: Answers,
}

/// How many there were of each.
#[derive(Default)]
pub(crate) struct Answers {
    pub(crate) good: AtomicU64,
    pub(crate) limited: AtomicU64,
    pub(crate) exhausted: AtomicU64,
    pub(crate) revoked: AtomicU64,
    /// To a key that never was, or that nobody should have any more.
    pub(crate) unknown: AtomicU64,
}

struct Account {
    id: KeyId,
    number: usize,
    /// When its time began: in the first part of which it is good, in the second one limited.
    began: Option<Duration>,
    /// Which process was told so first.
    told: Option<usize>,
}

/// What is said against a key.
#[derive(Clone, Copy)]
enum Trouble {
    Limited(Duration),
    Exhausted,
    Revoked,
}

/// The service as one pool's requests come to it.
#[derive(Clone)]
struct Door {
    service: Arc<Service>,
    pool: usize,
    ledger: Arc<Ledger>,
}

impl Service {
    /// Starts it, and says where it is for each pool.
    pub(crate) async fn start(books: &Arc<Books>) -> (Arc<Self>, [String; 2]) {
        let (accounts, is_closing, is_closed, answers) = Default::default();
        let service = Arc::new(Self { accounts, is_closing, is_closed, answers });
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let door =
            |pool| post(answer).with_state(Door { service: service.clone(), pool, ledger: books.of(pool) });
        let router = Router::new().route("/0", door(0)).route("/1", door(1));
        tokio::spawn(async move { axum::serve(listener, router).await });
        (service, [0, 1].map(|pool| format!("http://{address}/{pool}")))
    }

    pub(crate) fn open_account(&self, number: usize, id: &KeyId) {
        let account = Account { id: id.clone(), number, began: None, told: None };
        self.accounts().insert(format!("Bearer sk-{id}"), account);
    }

    pub(crate) fn close_account(&self, id: &KeyId) {
        self.accounts().remove(&format!("Bearer sk-{id}"));
    }

    /// From now on, limited keys are to rest for very long.
    pub(crate) fn begin_to_close(&self) {
        self.is_closing.store(true, SeqCst);
    }

    /// From now on, every key is limited.
    pub(crate) fn close(&self) {
        self.is_closed.store(true, SeqCst);
    }

    fn trouble(&self, account: &mut Account, pool: usize, now: Duration) -> Option<Trouble> {
        if self.is_closed.load(SeqCst) {
            return Some(Trouble::Limited(LONGEST));
        }
        match account.trouble(pool, now) {
            Some(Trouble::Limited(_)) if self.is_closing.load(SeqCst) => Some(Trouble::Limited(LONGEST)),
            trouble => trouble,
        }
    }

    fn accounts(&self) -> MutexGuard<'_, HashMap<String, Account>> {
        self.accounts.lock().unwrap()
    }
}

impl Account {
    /// What there is to be said against a request of that process that comes now.
    fn trouble(&mut self, pool: usize, now: Duration) -> Option<Trouble> {
        let trouble = self.kind_of_trouble();
        let good_for = SECOND / 2 * (1 + self.number as u32 % 7);
        let since = now.saturating_sub(*self.began.get_or_insert(now));
        if since < good_for {
            return is_storm(now).then_some(Trouble::Limited(SECOND));
        }
        if since - good_for > trouble.rest() {
            // It begins anew with this request.
            (self.began, self.told) = (Some(now), None);
            return None;
        }
        // Of half of the keys, the other process can know only from the store that they are limited.
        let is_told = *self.told.get_or_insert(pool) == pool || self.number % 4 < 2;
        is_told.then_some(trouble)
    }

    fn kind_of_trouble(&self) -> Trouble {
        match self.number % 16 {
            5 => Trouble::Revoked,
            9 | 14 => Trouble::Exhausted,
            3 | 12 => Trouble::Limited(LONG),
            _ => Trouble::Limited(SECOND * (1 + self.number as u32 % 3)),
        }
    }
}

fn is_storm(now: Duration) -> bool {
    (now + STORMS_EVERY - FIRST_STORM_AFTER).as_millis() % STORMS_EVERY.as_millis() < STORM.as_millis()
}

impl Trouble {
    fn rest(self) -> Duration {
        match self {
            Self::Limited(rest) => rest,
            Self::Exhausted => EXHAUSTED_FOR,
            Self::Revoked => Duration::MAX,
        }
    }

    fn status(self) -> StatusCode {
        match self {
            Self::Limited(_) => StatusCode::TOO_MANY_REQUESTS,
            Self::Exhausted => StatusCode::PAYMENT_REQUIRED,
            Self::Revoked => StatusCode::UNAUTHORIZED,
        }
    }
}

impl Answers {
    fn count(&self, trouble: Option<Trouble>) {
        let count = match trouble {
            None => &self.good,
            Some(Trouble::Limited(_)) => &self.limited,
            Some(Trouble::Exhausted) => &self.exhausted,
            Some(Trouble::Revoked) => &self.revoked,
        };
        count.fetch_add(1, Relaxed);
    }
}

async fn answer(State(door): State<Door>, headers: HeaderMap, _body: Bytes) -> Response {
    let Door { service, pool, ledger } = door;
    let arrived_at = ledger.now();
    let mut accounts = service.accounts();
    let account = headers.get(AUTHORIZATION).and_then(|key| accounts.get_mut(key.to_str().ok()?));
    let Some(account) = account else {
        service.answers.unknown.fetch_add(1, Relaxed);
        return StatusCode::UNAUTHORIZED.into_response();
    };
    let before_pick = watch::stamped(&headers, &watch::BEFORE_PICK).expect("the time is in each request");
    ledger.arrived(&account.id, before_pick, arrived_at);
    let trouble = service.trouble(account, pool, arrived_at);
    service.answers.count(trouble);
    let Some(trouble) = trouble else {
        return r#"{"choices":[{"message":{"role":"assistant","content":"Hello!"}}]}"#.into_response();
    };
    let answered_at = ledger.now();
    ledger.told(&account.id, answered_at, trouble.rest());
    let mut response = trouble.status().into_response();
    response.headers_mut().insert(watch::ANSWERED, watch::stamp(answered_at));
    response.headers_mut().insert(watch::KEY, account.id.as_str().parse().unwrap());
    if let Trouble::Limited(rest) = trouble {
        response.headers_mut().insert(RETRY_AFTER, rest.as_secs().into());
    }
    response
}
