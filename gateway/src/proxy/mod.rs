//! The reverse proxy: one request, from the caller to the upstream and back.

mod ahead;
mod answer;
mod api;
mod asked;
mod body;
mod client;
mod connections;
mod headers;
mod json;
mod streams;
mod tokens;
mod turns;

use std::{
    error::Error as StdError,
    mem,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    body::{Body, HttpBody},
    http::{
        HeaderValue, Method, Request, StatusCode, Uri, Version,
        header::{CONTENT_LENGTH, RETRY_AFTER},
        request::Parts,
        uri,
    },
    response::Response,
};
use http_body_util::Either;
use hyper::ext::ReasonPhrase;
use hyper_util::client::legacy;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tower::{BoxError, ServiceExt, timeout::error::Elapsed};
use tower_key_rotation::{Error, NoKeyAvailable, ServedBy, Traits};

use self::{
    ahead::Ahead,
    answer::AnswerBody,
    api::{Api, Refusal},
    asked::Asked,
    body::{BodyLimits, Caller, CutOff, KeptBody, TooLarge},
    streams::NoStreams,
    tokens::{Counted, Counting},
};
pub(crate) use self::{
    client::{Client, UpstreamBody, client},
    turns::Turns,
};
use crate::{
    base_url::leads_out,
    callers::{NamedCaller, OverLimit, UnderWay},
    guesses::{Denied, Guesses, Tokens},
    held::Held,
    metrics,
    serve::{App, CallerBody},
    served::{Current, Served, without},
    settings::Settings,
    sources, this_machine,
    upstream::Upstream,
    with_sources,
};

/// The body of a request to an upstream.
pub(crate) type RequestBody = KeptBody<Ahead<CallerBody>>;

pub(crate) struct Proxy {
    current: Current,
    guesses: Arc<Guesses>,
    limits: BodyLimits,
    /// One for each request in flight.
    places: Arc<Semaphore>,
}

/// A request that may be sent.
struct Admitted {
    upstream: Arc<Upstream>,
    /// What the upstream does not see of the path.
    prefix: String,
    uri: Uri,
    caller: Arc<NamedCaller>,
    under_way: UnderWay,
    place: OwnedSemaphorePermit,
    /// Whether there are other callers, with whom this one takes turns.
    takes_turns: bool,
}

impl Proxy {
    pub(crate) fn new(current: Current, settings: &Settings) -> Self {
        Self {
            current,
            guesses: Arc::new(Guesses::new(Tokens::Client)),
            limits: BodyLimits {
                keep: settings.keep_body,
                most: settings.max_body,
                room: Arc::new(Semaphore::new(settings.keep_bodies.min(Semaphore::MAX_PERMITS))),
            },
            places: Arc::new(Semaphore::new(settings.max_requests)),
        }
    }

    /// Authorizes a request and finds its upstream.
    fn admit(&self, served: &Served, head: &mut Parts, body: &CallerBody) -> Result<Admitted, Refusal> {
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
        let caller = served.callers.admit(&self.guesses, head).map_err(denied)?;
        let is_asked_here = || this_machine::asks(head) && !this_machine::is_for_another_page(head);
        if served.callers.are_all_here() && !is_asked_here() {
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
        let may_use_path = caller.may_use_path(head.uri.path());
        let (upstream, prefix, uri) = route(served, head)?;
        if !may_use_path || !caller.may_use_upstream(upstream.name()) {
            return Err(Refusal::new(
                StatusCode::FORBIDDEN,
                "this client token is not for this upstream or path",
            ));
        }
        let place = self.places.clone().try_acquire_owned().map_err(|_| Refusal {
            status: StatusCode::SERVICE_UNAVAILABLE,
            message: "this gateway has too many requests in flight".to_owned(),
            retry_after: Some(HeaderValue::from_static("1")),
        })?;
        let under_way = caller.begin().map_err(over_limit)?;
        let takes_turns = served.callers.are_several();
        Ok(Admitted { upstream, prefix, uri, caller, under_way, place, takes_turns })
    }

    async fn forward(
        &self,
        api: impl Fn() -> Api,
        admitted: Admitted,
        head: Parts,
        body: CallerBody,
    ) -> Result<Response, Refusal> {
        let Admitted { upstream, prefix, uri, caller: from, mut under_way, place, takes_turns } = admitted;
        let method = head.method.clone();
        let (asked, body) = self.ask(&upstream, &from, &head, body).await?;
        let may_use_model = |asked: &Asked| asked.is_for(|model| from.may_use_model(model));
        if from.has_models() && !method.is_safe() && !asked.as_ref().is_some_and(may_use_model) {
            return Err(Refusal::new(
                StatusCode::FORBIDDEN,
                "this client token is for certain models only, and the request names none of them",
            ));
        }
        // Other methods use no tokens, and nothing would correct what they reserve.
        if method == Method::POST {
            under_way.reserve(asked.as_ref().and_then(|asked| asked.tokens)).map_err(over_limit)?;
        }
        let under_way = Arc::new(under_way);
        let body = KeptBody::new(body, self.limits.clone());
        let caller = body.caller();
        let mut request = Request::new(body);
        // It has room for the traits. What is in it concerns only the caller's connection.
        let mut extensions = head.extensions;
        extensions.clear();
        if let Some(asked) = &asked {
            extensions.insert(asked.traits.clone());
        }
        *request.extensions_mut() = extensions;
        *request.method_mut() = head.method;
        *request.uri_mut() = uri;
        *request.headers_mut() = head.headers;
        headers::to_upstream(request.headers_mut());
        headers::announce_body(&mut request);

        let wait = upstream.config.wait;
        let answered = if takes_turns && !wait.is_zero() {
            let in_time = tokio::time::Instant::now() + wait;
            let no_turn = || no_turn(&upstream, asked.as_ref());
            let scope = asked.as_ref().map_or(0, |asked| asked.scope);
            let turn = upstream.turns.next(from.name(), scope, in_time).await.ok_or_else(no_turn)?;
            request.extensions_mut().insert(turn.clone());
            let call = upstream.client.clone().oneshot(request);
            turn.in_time(in_time, call).await.ok_or_else(no_turn)?
        } else {
            upstream.client.clone().oneshot(request).await
        };
        let response = answered.map_err(|error| refuse(error, &caller))?;
        // The gateway removes `Upgrade`, so no request asks for another protocol.
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            return Err(Refusal::new(StatusCode::BAD_GATEWAY, "the upstream switched to another protocol"));
        }
        if response.status().as_u16() < 400 {
            under_way.was_served();
        }
        let sent = Sent {
            upstream: &upstream,
            prefix: &prefix,
            caller: &under_way,
            traits: asked.as_ref().map(|asked| &asked.traits),
        };
        let response = pass_on(&sent, api, &method, response);
        Ok(response.map(|body| Body::new(Held::new(body, (place, under_way)))))
    }

    /// What a request asks for, if limits of its upstream or its caller depend on it. The body is read ahead for that.
    async fn ask(
        &self,
        upstream: &Upstream,
        caller: &NamedCaller,
        head: &Parts,
        body: CallerBody,
    ) -> Result<(Option<Asked>, Ahead<CallerBody>), Refusal> {
        let mut body = Ahead::new(body);
        let config = &upstream.config;
        let matters_to_caller = caller.has_models() || caller.limits_tokens();
        if !config.pace && config.quotas.is_empty() && !matters_to_caller {
            return Ok((None, body));
        }
        if !asked::is_in_the_body(head) {
            return Ok((Some(asked::read(config.scope, head, &[])), body));
        }
        let read = body.read(self.limits.keep, &self.limits.room);
        let read = timeout(config.response_timeout, read).await.map_err(|_| not_arrived())?;
        let text = read.map_err(|_| broke_off())?;
        Ok((Some(asked::read(config.scope, head, &text)), body))
    }
}

/// Finds the upstream of a request, the prefix that its route takes away, and the URI there.
///
/// The path of the head becomes that at the upstream.
fn route(served: &Served, head: &mut Parts) -> Result<(Arc<Upstream>, String, Uri), Refusal> {
    let not_forwarded = || Refusal::new(StatusCode::BAD_REQUEST, "this gateway does not forward this path");
    let path = head.uri.path_and_query().ok_or_else(not_forwarded)?;
    if !path.as_str().starts_with('/') || leads_out(path.path()) {
        return Err(not_forwarded());
    }
    let (upstream, prefix) = served.route(|| this_machine::host(head), path.path()).ok_or_else(|| {
        Refusal::new(StatusCode::NOT_FOUND, "no upstream of this gateway has this path or host")
    })?;
    let path = without(prefix, path).ok_or_else(not_forwarded)?;
    let uri = upstream.config.url.uri_of(&path).ok_or_else(not_forwarded)?;
    if !prefix.is_empty() {
        let mut parts = uri::Parts::default();
        parts.path_and_query = Some(path);
        head.uri = Uri::from_parts(parts).map_err(|_| not_forwarded())?;
    }
    Ok((upstream.clone(), prefix.to_owned(), uri))
}

/// Where a request went, and as what.
struct Sent<'a> {
    upstream: &'a Upstream,
    /// What the upstream does not see of the path.
    prefix: &'a str,
    caller: &'a Arc<UnderWay>,
    traits: Option<&'a Traits>,
}

/// Turns the response of an upstream into one for the caller, or into an error of the gateway's own.
fn pass_on(
    sent: &Sent<'_>,
    api: impl Fn() -> Api,
    method: &Method,
    mut response: Response<UpstreamBody>,
) -> Response<Either<Counted<AnswerBody<UpstreamBody>>, Body>> {
    let upstream = sent.upstream;
    headers::to_caller(response.headers_mut(), &upstream.config.url, sent.prefix);
    *response.version_mut() = Version::default();
    let status = response.status();
    if status == StatusCode::TOO_MANY_REQUESTS {
        correct_retry_after(sent, &mut response);
    }
    // Statuses above 599 are outside every class; treat them as errors.
    if upstream.config.sanitize_errors && status.as_u16() >= 400 {
        let refusal = Refusal {
            status,
            message: format!("the upstream answered {status}"),
            retry_after: response.headers_mut().remove(RETRY_AFTER),
        };
        let mut error = api().error(refusal);
        *error.extensions_mut() = mem::take(response.extensions_mut());
        // The reason phrase of HTTP/1.1 is the upstream's text, too.
        error.extensions_mut().remove::<ReasonPhrase>();
        return error.map(Either::Right);
    }
    let counting = Counting::of(&upstream.pool, sent.caller, method, &response);
    let idle = upstream.config.idle_timeout;
    response.map(|body| Either::Left(Counted::new(AnswerBody::new(body, idle), counting)))
}

/// Replaces the `Retry-After` of a limited response, which is about one key, if no key has room.
///
/// The new value is the time until the first key has room for such a request.
fn correct_retry_after<B>(sent: &Sent<'_>, response: &mut Response<B>) {
    let pool = &sent.upstream.pool;
    let wait = sent.traits.map_or_else(|| pool.next_return(), |traits| pool.next_room(traits));
    let Some(wait) = wait.filter(|wait| !wait.is_zero()) else { return };
    // Clients prefer these headers to `Retry-After`.
    for of_one_key in ["retry-after-ms", "x-ms-retry-after-ms"] {
        response.headers_mut().remove(of_one_key);
    }
    response.headers_mut().insert(RETRY_AFTER, whole_seconds(wait));
}

impl App for Proxy {
    async fn answer(&self, request: Request<CallerBody>) -> Response {
        let began = Instant::now();
        let (mut head, body) = request.into_parts();
        let (method, uri) = (head.method.clone(), head.uri.clone());
        let has_version = Api::has_version(&head.headers);
        let api = || Api::of(uri.path(), has_version);
        let is_navigation = headers::is_navigation(&head.headers);
        // Not held while the request is in flight: a reload waits for the requests of an upstream.
        let admitted = self.admit(&self.current.get(), &mut head, &body);
        let (upstream, answered) = match admitted {
            Ok(admitted) => (Some(admitted.upstream.clone()), self.forward(api, admitted, head, body).await),
            Err(refusal) => (None, Err(refusal)),
        };
        let mut response = answered.unwrap_or_else(|refusal| api().error(refusal));
        if is_navigation {
            headers::sandbox(response.headers_mut());
        }
        let key = response.extensions().get().map(|ServedBy(key)| key.as_str());
        let (status, took) = (response.status(), began.elapsed());
        let name = upstream.as_deref().map(Upstream::name);
        tracing::debug!(%method, path = uri.path(), status = status.as_u16(), key, upstream = name, ?took);
        match &upstream {
            Some(upstream) => upstream.durations.record(status, took),
            None => metrics::refused(status, took),
        }
        response
    }
}

/// Turns an error of the client into an error for the caller.
fn refuse(error: Error<BoxError>, caller: &Caller<Ahead<CallerBody>>) -> Refusal {
    match error {
        Error::NoKeyAvailable(no_key) => no_key_available(&no_key),
        Error::Inner(error) => not_answered(&*error, caller),
        other => Refusal::new(StatusCode::BAD_GATEWAY, other.to_string()),
    }
}

/// Requests of the same caller have waited for so long that this one has no turn in time.
fn no_turn(upstream: &Upstream, asked: Option<&Asked>) -> Refusal {
    let pool = &upstream.pool;
    let wait = asked.map_or_else(|| pool.next_return(), |asked| pool.next_room(&asked.traits));
    Refusal {
        status: StatusCode::TOO_MANY_REQUESTS,
        message: "no key had room in time: other requests with this client token wait before this one"
            .to_owned(),
        retry_after: Some(whole_seconds(wait.unwrap_or_default().max(Duration::from_secs(1)))),
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

fn not_answered(error: &(dyn StdError + 'static), caller: &Caller<Ahead<CallerBody>>) -> Refusal {
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

fn over_limit(over: OverLimit) -> Refusal {
    // A limit that has room in less than a second has none now.
    let seconds = seconds_up(over.wait).max(1);
    Refusal {
        status: StatusCode::TOO_MANY_REQUESTS,
        message: format!("this client token has reached its limit of {}: wait {seconds} s", over.limit),
        retry_after: Some(seconds.into()),
    }
}

/// The body of a request that has none.
pub(crate) fn without_body() -> RequestBody {
    let room = Arc::new(Semaphore::new(0));
    KeptBody::new(Ahead::empty(), BodyLimits { keep: 0, most: 0, room })
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
