//! What the models of a pool have in common: a client whose requests the test answers one by one, and what an
//! answer means for a key. Nothing here knows how a pool does it.

use std::{
    convert::Infallible,
    future::Future,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::{FutureExt, future::BoxFuture};
use http::{Request, Response};
use tokio::sync::oneshot;
use tower::{Layer, Service, service_fn, util::BoxService};
use tower_key_rotation::{
    Error, KeyId, KeyPool, KeyRotationLayer, NoKeyAvailable, Status,
    classify::{ResponseHead, Verdict},
};

pub const COOLDOWN: Duration = Duration::from_secs(120);
pub const EXHAUSTED: Duration = Duration::from_secs(24 * 60 * 60);
pub const LONGEST_HINT: Duration = Duration::from_secs(60 * 60);

pub const FINE: Answer = Answer { status: 200, retry_after: None };
pub const LIMITED: Answer = Answer { status: 429, retry_after: None };

/// What the service answers.
#[derive(Clone, Copy, Debug)]
pub struct Answer {
    pub status: u16,
    pub retry_after: Option<u64>,
}

impl Answer {
    /// What it says of its key, if it says anything.
    pub fn rest(self, now: Duration) -> Option<Rest> {
        let (status, until) = match self.status {
            401 => (Status::Revoked, None),
            402 => (Status::Exhausted, Some(now + EXHAUSTED)),
            429 => {
                let hint = self.retry_after.map_or(Duration::ZERO, Duration::from_secs).min(LONGEST_HINT);
                (Status::RateLimited, Some(now + hint.max(COOLDOWN)))
            }
            _ => return None,
        };
        Some(Rest { status, until: until.map(to_the_millisecond) })
    }
}

impl Answer {
    /// The same, but for a key that would be revoked although it is the last one available: pools do not do that.
    pub fn unless_last(self, has_another: bool) -> Self {
        if self.status == 401 && !has_another { Self { status: 429, ..self } } else { self }
    }
}

/// What an answer says of its key. Nothing is left to a pool's guess: `refusals.rs` tests those.
pub fn verdict(head: &ResponseHead<'_>) -> Verdict {
    match head.status().as_u16() {
        401 => Verdict::Revoked,
        402 => Verdict::Exhausted { wait: Some(EXHAUSTED) },
        429 => Verdict::RateLimited { wait: head.wait() },
        _ => Verdict::Nothing,
    }
}

/// Pools end no rest before its time, and in whole milliseconds.
pub fn to_the_millisecond(time: Duration) -> Duration {
    Duration::from_nanos((time.as_nanos() as u64).next_multiple_of(1_000_000))
}

/// As what a key rests, and until when; `None` is for good.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rest {
    pub status: Status,
    pub until: Option<Duration>,
}

impl Rest {
    pub fn is_over(&self, now: Duration) -> bool {
        self.until.is_some_and(|until| until <= now)
    }

    /// Whether it ends later than the other one, or as late with a graver reason.
    pub fn outlasts(&self, other: Option<Self>) -> bool {
        other.is_none_or(|other| self.order() > other.order())
    }

    fn order(&self) -> (Duration, u8) {
        let gravity = match self.status {
            Status::RateLimited => 0,
            Status::Exhausted => 1,
            _ => 2,
        };
        (self.until.unwrap_or(Duration::MAX), gravity)
    }
}

/// What is known of a key, here or in a store.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Condition {
    pub rest: Option<Rest>,
    pub disabled: bool,
}

impl Condition {
    /// The rest that is not over yet.
    pub fn rest(&self, now: Duration) -> Option<Rest> {
        self.rest.filter(|rest| !rest.is_over(now))
    }

    pub fn time_left(&self, now: Duration) -> Option<Duration> {
        self.rest(now).and_then(|rest| rest.until).map(|until| until - now)
    }

    pub fn status(&self, now: Duration) -> Status {
        match self.rest(now) {
            _ if self.disabled => Status::Disabled,
            Some(rest) => rest.status,
            None => Status::Healthy,
        }
    }

    pub fn is_available(&self, now: Duration) -> bool {
        self.status(now) == Status::Healthy
    }

    /// Deadlines only move later. Says whether this one did.
    pub fn extend(&mut self, rest: Rest) -> bool {
        let longer = rest.outlasts(self.rest);
        if longer {
            self.rest = Some(rest);
        }
        longer
    }
}

/// How long until the first of these keys is back by itself.
pub fn retry_in<'a>(keys: impl IntoIterator<Item = &'a Condition>, now: Duration) -> Option<Duration> {
    keys.into_iter().filter(|key| !key.disabled).filter_map(|key| key.time_left(now)).min()
}

/// Which secret a request carries: a key of the same name with another secret is another key.
pub type SecretNumber = u32;

pub fn secret(number: SecretNumber) -> String {
    format!("sk-{number}")
}

pub fn secret_number(secret: &str) -> Option<SecretNumber> {
    secret.strip_prefix("sk-")?.parse().ok()
}

pub fn key_id(id: &str) -> KeyId {
    KeyId::new(id).expect("a valid id")
}

pub fn immediately<T>(future: impl Future<Output = T>) -> T {
    future.now_or_never().expect("nothing here waits")
}

/// The secret that the service last saw, and where it waits for its answer.
type Sent = Arc<Mutex<Option<(String, oneshot::Sender<Answer>)>>>;

/// A client with the layer, over a service that the test answers for.
pub struct Caller {
    client: BoxService<Request<()>, Response<()>, Error<Infallible>>,
    sent: Sent,
}

/// A request under way.
pub struct Flight {
    secret: String,
    reply: oneshot::Sender<Answer>,
    response: BoxFuture<'static, Result<Response<()>, Error<Infallible>>>,
}

impl Caller {
    pub fn new(pool: &KeyPool) -> Self {
        let sent = Sent::default();
        let seen = sent.clone();
        let inner = service_fn(move |request: Request<()>| {
            let header = request.headers()["authorization"].to_str().expect("text");
            let secret = header.strip_prefix("Bearer ").expect("a secret").to_owned();
            let (reply, answered) = oneshot::channel::<Answer>();
            *seen.lock().expect("not poisoned") = Some((secret, reply));
            async move {
                let answer = answered.await.expect("an answer");
                let mut response = Response::builder().status(answer.status);
                if let Some(seconds) = answer.retry_after {
                    response = response.header("retry-after", seconds);
                }
                Ok(response.body(()).expect("a response"))
            }
        });
        let layer = KeyRotationLayer::new(pool).classify(verdict as fn(&ResponseHead<'_>) -> Verdict);
        let layer = layer.expose_key();
        Self { client: BoxService::new(layer.layer(inner)), sent }
    }

    /// Sends a request, which then waits for its answer.
    pub fn send(&mut self) -> Result<Flight, NoKeyAvailable> {
        let request = Request::get("https://api.example.com/v1").body(()).expect("a request");
        let response = self.client.call(request);
        match self.sent.lock().expect("not poisoned").take() {
            Some((secret, reply)) => Ok(Flight { secret, reply, response }),
            None => {
                let error = immediately(response).expect_err("no key");
                Err(*NoKeyAvailable::find(&error).expect("about keys"))
            }
        }
    }
}

impl Flight {
    /// Which of a model's secrets it carries.
    pub fn secret(&self) -> SecretNumber {
        secret_number(&self.secret).expect("a secret of the model")
    }

    pub fn answer(self, answer: Answer) -> Response<()> {
        self.reply.send(answer).expect("the request is under way");
        let response = immediately(self.response).expect("a response");
        assert_eq!(response.status().as_u16(), answer.status);
        response
    }
}
