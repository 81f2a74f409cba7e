//! The reverse proxy: one request, from the caller to the upstream and back.

mod ahead;
mod answer;
mod api;
mod asked;
mod body;
mod connections;
mod headers;
mod streams;
mod tokens;
mod upstream;

use std::{
    error::Error as StdError,
    io, mem,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::{Body, HttpBody},
    extract::{Request, State},
    http::{
        HeaderValue, Method, StatusCode, Uri, Version,
        header::{CONTENT_LENGTH, RETRY_AFTER},
        request::Parts,
    },
    response::Response,
};
use hyper::ext::ReasonPhrase;
use hyper_util::client::legacy;
use tokio::{sync::Semaphore, time::timeout};
use tower::{BoxError, ServiceExt, timeout::error::Elapsed};
use tower_key_rotation::{Error, KeyPool, NoKeyAvailable, ServedBy, Traits};

pub(crate) use self::upstream::Upstream;
use self::{
    api::{Api, Refusal},
    body::{BodyLimits, Caller, CutOff, KeptBody, TooLarge},
    streams::NoStreams,
    upstream::Client,
};
use crate::{
    callers::Callers, guesses::Denied, held::Held, metrics, settings::Settings, sources, this_machine,
    with_sources,
};

#[derive(Clone)]
pub(crate) struct Proxy {
    pool: KeyPool,
    client: Client,
    upstream: Arc<Upstream>,
    callers: Arc<Callers>,
    limits: BodyLimits,
    /// One for each request in flight.
    places: Arc<Semaphore>,
    sanitize_errors: bool,
    is_paced: bool,
    /// For a body that is read before its request is sent.
    body_timeout: Duration,
}

impl Proxy {
    pub(crate) fn new(pool: &KeyPool, settings: &Settings) -> io::Result<Self> {
        Ok(Self {
            pool: pool.clone(),
            client: upstream::client(pool, settings)?,
            upstream: Arc::new(settings.upstream.clone()),
            callers: Arc::new(Callers::with(settings.client_token.clone())),
            limits: BodyLimits {
                keep: settings.keep_body,
                most: settings.max_body,
                room: Arc::new(Semaphore::new(settings.keep_bodies.min(Semaphore::MAX_PERMITS))),
            },
            places: Arc::new(Semaphore::new(settings.max_requests)),
            sanitize_errors: settings.sanitize_errors,
            is_paced: settings.pace,
            body_timeout: settings.response_timeout.into(),
        })
    }

    /// Returns a router that proxies every request.
    pub(crate) fn router(self) -> Router {
        Router::new().fallback(answer).with_state(self)
    }

    async fn forward(&self, api: Api, head: Parts, body: Body) -> Result<Response, Refusal> {
        let uri = self.admit(&head, &body)?;
        let method = head.method.clone();
        let place = self.places.clone().try_acquire_owned().map_err(|_| Refusal {
            status: StatusCode::SERVICE_UNAVAILABLE,
            message: "this gateway has too many requests in flight".to_owned(),
            retry_after: Some(HeaderValue::from_static("1")),
        })?;
        let (traits, body) = self.traits(&head, body).await?;
        let body = KeptBody::new(body, self.limits.clone());
        let caller = body.caller();
        let mut request = Request::new(body);
        if let Some(traits) = &traits {
            request.extensions_mut().insert(traits.clone());
        }
        *request.method_mut() = head.method;
        *request.uri_mut() = uri;
        *request.headers_mut() = head.headers;
        headers::to_upstream(request.headers_mut());
        headers::announce_body(&mut request);

        let response = self.client.clone().oneshot(request).await.map_err(|error| refuse(error, &caller))?;
        // The gateway removes `Upgrade`, so no request asks for another protocol.
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            return Err(Refusal::new(StatusCode::BAD_GATEWAY, "the upstream switched to another protocol"));
        }
        let response = self.pass_on(api, &method, traits.as_ref(), response);
        Ok(response.map(|body| Body::new(Held::new(body, place))))
    }

    /// What the pool should know of a request, if it paces. The body is read ahead for that.
    async fn traits(&self, head: &Parts, body: Body) -> Result<(Option<Traits>, Body), Refusal> {
        if !self.is_paced {
            return Ok((None, body));
        }
        if !asked::is_in_the_body(head) {
            return Ok((Some(asked::traits(head, &[])), body));
        }
        let read = ahead::read_ahead(body, self.limits.keep, &self.limits.room);
        let read = timeout(self.body_timeout, read).await.map_err(|_| not_arrived())?;
        let (text, body) = read.map_err(|_| broke_off())?;
        Ok((Some(asked::traits(head, &text)), body))
    }

    /// Authorizes a request and returns its URI at the upstream.
    fn admit(&self, head: &Parts, body: &Body) -> Result<Uri, Refusal> {
        if !this_machine::has_valid_host(head) {
            return Err(Refusal::new(StatusCode::BAD_REQUEST, "a request must name exactly one valid host"));
        }
        // Servers differ in which one they use, so the framing is ambiguous (request smuggling).
        if head.headers.get_all(CONTENT_LENGTH).iter().count() > 1 {
            return Err(Refusal::new(
                StatusCode::BAD_REQUEST,
                "a request must not have several content-length headers",
            ));
        }
        self.callers.admit(head).map_err(denied)?;
        let is_asked_here = this_machine::asks(head) && !this_machine::is_for_another_page(head);
        if self.callers.are_all_here() && !is_asked_here {
            return Err(Refusal::new(
                StatusCode::FORBIDDEN,
                "without a client token this gateway answers only requests to localhost or a loopback address, not \
                 through another proxy and not from pages of other origins: set --client-token",
            ));
        }
        // A response to TRACE or to Microsoft's TRACK echoes the request with the key in it. CONNECT asks for a
        // tunnel.
        if ["TRACE", "TRACK", "CONNECT"]
            .iter()
            .any(|method| head.method.as_str().eq_ignore_ascii_case(method))
        {
            return Err(Refusal::new(
                StatusCode::NOT_IMPLEMENTED,
                format!("this gateway does not forward {}", head.method),
            ));
        }
        if body.size_hint().lower() > self.limits.most as u64 {
            return Err(too_large());
        }
        self.upstream
            .uri_of(&head.uri)
            .ok_or_else(|| Refusal::new(StatusCode::BAD_REQUEST, "this gateway does not forward this path"))
    }

    fn pass_on(
        &self,
        api: Api,
        method: &Method,
        traits: Option<&Traits>,
        mut response: Response,
    ) -> Response {
        headers::to_caller(response.headers_mut(), &self.upstream);
        response = response.map(answer::body);
        *response.version_mut() = Version::default();
        let status = response.status();
        if status == StatusCode::TOO_MANY_REQUESTS {
            self.correct_retry_after(traits, &mut response);
        }
        // Statuses above 599 are outside every class; treat them as errors.
        if self.sanitize_errors && status.as_u16() >= 400 {
            let refusal = Refusal {
                status,
                message: format!("the upstream answered {status}"),
                retry_after: response.headers_mut().remove(RETRY_AFTER),
            };
            let mut error = api.error(refusal);
            *error.extensions_mut() = mem::take(response.extensions_mut());
            // The reason phrase of HTTP/1.1 is the upstream's text, too.
            error.extensions_mut().remove::<ReasonPhrase>();
            return error;
        }
        tokens::count(&self.pool, method, response)
    }

    /// Replaces the `Retry-After` of a limited response, which is about one key, if no key has room.
    ///
    /// The new value is the time until the first key has room for such a request.
    fn correct_retry_after(&self, traits: Option<&Traits>, response: &mut Response) {
        let wait = traits.map_or_else(|| self.pool.next_return(), |traits| self.pool.next_room(traits));
        let Some(wait) = wait.filter(|wait| !wait.is_zero()) else { return };
        // Clients prefer these headers to `Retry-After`.
        for of_one_key in ["retry-after-ms", "x-ms-retry-after-ms"] {
            response.headers_mut().remove(of_one_key);
        }
        response.headers_mut().insert(RETRY_AFTER, whole_seconds(wait));
    }
}

async fn answer(State(proxy): State<Proxy>, request: Request) -> Response {
    let began = Instant::now();
    let (head, body) = request.into_parts();
    let api = Api::of(&head);
    let (method, path) = (head.method.clone(), head.uri.path().to_owned());
    let is_navigation = headers::is_navigation(&head.headers);
    let mut response = proxy.forward(api, head, body).await.unwrap_or_else(|refusal| api.error(refusal));
    if is_navigation {
        headers::sandbox(response.headers_mut());
    }
    let key = response.extensions().get().map(|ServedBy(key)| key.as_str());
    let (status, took) = (response.status(), began.elapsed());
    tracing::debug!(%method, path, status = status.as_u16(), key, ?took);
    metrics::answered(status, took);
    response
}

/// Turns an error of the client into an error for the caller.
fn refuse(error: Error<BoxError>, caller: &Caller) -> Refusal {
    match error {
        Error::NoKeyAvailable(no_key) => no_key_available(&no_key),
        Error::Inner(error) => not_answered(&*error, caller),
        other => Refusal::new(StatusCode::BAD_GATEWAY, other.to_string()),
    }
}

fn no_key_available(no_key: &NoKeyAvailable) -> Refusal {
    match no_key.retry_in() {
        Some(wait) => Refusal {
            status: StatusCode::TOO_MANY_REQUESTS,
            message: format!(
                "all keys rest or have no room; the first is available in {} s",
                seconds_up(wait)
            ),
            retry_after: Some(whole_seconds(wait)),
        },
        None if no_key.is_empty_pool() => {
            Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "this gateway has no keys")
        }
        // The keys are in use, or too many requests wait: nobody knows for how long.
        None if no_key.comes_back() => Refusal {
            status: StatusCode::TOO_MANY_REQUESTS,
            message: no_key.to_string(),
            retry_after: Some(HeaderValue::from_static("1")),
        },
        None => Refusal::new(StatusCode::SERVICE_UNAVAILABLE, no_key.to_string()),
    }
}

fn not_answered(error: &(dyn StdError + 'static), caller: &Caller) -> Refusal {
    if is_behind::<TooLarge>(error) {
        return too_large();
    }
    if is_behind::<CutOff>(error) {
        return broke_off();
    }
    if error.is::<Elapsed>() && caller.is_waited_for() {
        return not_arrived();
    }
    tracing::warn!("no answer from the upstream: {}", with_sources(error));
    if error.is::<Elapsed>() {
        return Refusal::new(StatusCode::GATEWAY_TIMEOUT, "the upstream did not answer in time");
    }
    if error.is::<NoStreams>() {
        return Refusal {
            status: StatusCode::SERVICE_UNAVAILABLE,
            message: NoStreams.to_string(),
            retry_after: Some(HeaderValue::from_static("1")),
        };
    }
    let unreachable = error.downcast_ref().is_some_and(legacy::Error::is_connect);
    let message = if unreachable {
        "the upstream can't be reached"
    } else {
        "the upstream broke off the connection before it answered"
    };
    Refusal::new(StatusCode::BAD_GATEWAY, message)
}

fn denied(denied: Denied) -> Refusal {
    match denied {
        Denied::Wrong => {
            Refusal::new(StatusCode::UNAUTHORIZED, "this gateway expects a client token as the API key")
        }
        Denied::TooMany { wait } => Refusal {
            status: StatusCode::TOO_MANY_REQUESTS,
            message: format!("too many wrong tokens from this address: wait {} s", seconds_up(wait)),
            retry_after: Some(whole_seconds(wait)),
        },
    }
}

fn not_arrived() -> Refusal {
    Refusal::new(StatusCode::REQUEST_TIMEOUT, "the request's body did not arrive in time")
}

fn broke_off() -> Refusal {
    Refusal::new(StatusCode::BAD_REQUEST, "the request's body broke off")
}

fn too_large() -> Refusal {
    Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, "the request's body is larger than this gateway accepts")
}

fn is_behind<E: StdError + 'static>(error: &(dyn StdError + 'static)) -> bool {
    sources(error).any(|error| error.is::<E>())
}

fn whole_seconds(wait: Duration) -> HeaderValue {
    seconds_up(wait).into()
}

/// The pool rounds rests up to milliseconds, so less than one is nothing.
pub(crate) fn seconds_up(wait: Duration) -> u64 {
    (wait.as_millis() as u64).div_ceil(1_000)
}
