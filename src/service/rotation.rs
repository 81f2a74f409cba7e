//! The work itself: pick, inject, classify, mark. The tower service and the reqwest middleware both call it.

use std::{fmt, time::Duration};

use bytes::Bytes;
use http::StatusCode;

#[cfg(feature = "failover")]
use super::tried;
use crate::{
    classify::{ClassifyResponse, ResponseHead, TooManyRequests, Verdict},
    key::KeyId,
    key::query::Parameter,
    key::{InjectError, hosts::Ruling},
    limit::Rest,
    message::{self, ReadableResponse, RequestMessage, ResponseMessage},
    pool::{KeyPool, Lease},
    service::{
        error::{Error, Refused},
        redact,
    },
};

/// Says in a response's extensions which key it was asked for with.
///
/// It is there where the layer was told to
/// [`expose_key`](crate::KeyRotationLayer::expose_key):
///
/// ```
/// use tower_key_rotation::{KeyPool, ServedBy};
///
/// fn credit<B>(pool: &KeyPool, response: &http::Response<B>, tokens: u64) {
///     if let Some(ServedBy(key)) = response.extensions().get() {
///         pool.record_usage(key, tokens);
///     }
/// }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServedBy(pub KeyId);

/// Says in a response's extensions that it spoke against its key, and which that is.
#[cfg(feature = "failover")]
#[derive(Clone)]
pub(crate) struct SpokeAgainstKey(pub(crate) Lease);

/// The beginning of an error's body, in its response's extensions.
#[derive(Clone, Debug)]
struct ErrorBody(Bytes);

#[derive(Clone)]
pub(crate) struct Rotation<C> {
    pub(crate) pool: KeyPool,
    pub(crate) observer: Observer<C>,
}

/// What looks at responses. Each request has a clone of its own: a count of those who share one would be what
/// all threads write to.
#[derive(Clone)]
pub(crate) struct Observer<C> {
    classifier: C,
    pub(crate) expose_key: bool,
}

impl Rotation<TooManyRequests> {
    pub(crate) fn new(pool: &KeyPool) -> Self {
        let observer = Observer { classifier: TooManyRequests::new(), expose_key: false };
        Self { pool: pool.clone(), observer }
    }
}

impl<C> Rotation<C> {
    pub(crate) fn classify<D>(self, classifier: D) -> Rotation<D> {
        let observer = Observer { classifier, expose_key: self.observer.expose_key };
        Rotation { pool: self.pool, observer }
    }

    /// Puts a key into the request. Without one, it goes to a host that gets no key.
    ///
    /// The refusal is boxed so that what is usual stays small.
    #[inline(always)]
    pub(crate) fn prepare<R: RequestMessage>(&self, request: &mut R) -> Result<Option<Lease>, Box<Refused>> {
        match message::rule(self.pool.hosts(), request) {
            Ruling::Key => {}
            Ruling::PassThrough => return Ok(None),
            Ruling::RefuseCleartext => return Err(refuse_cleartext(request)),
        }
        let Some(lease) = self.pick() else { return Err(self.no_key()) };
        let credentials = lease.credentials();
        credentials.insert_into(request.headers_mut());
        let parameters = credentials.query_parameters();
        if !parameters.is_empty() {
            request.set_query(parameters).map_err(refuse)?;
        }
        Ok(Some(lease))
    }

    // A request's only call of it; whether to inline it is otherwise decided by how many clients a program has.
    #[inline(always)]
    fn pick(&self) -> Option<Lease> {
        #[cfg(feature = "failover")]
        if let Some(lease) = tried::with_tried(|tried| self.pool.pick_besides(tried)) {
            return lease;
        }
        self.pool.pick()
    }

    #[cold]
    fn no_key(&self) -> Box<Refused> {
        self.pool.meter().no_key();
        Box::new(Refused::NoKeyAvailable(self.pool.no_key()))
    }
}

#[cold]
fn forget_query<R, E>(result: &mut Result<R, Error<E>>, parameters: &[Parameter])
where
    R: ResponseMessage,
    E: 'static,
{
    match result {
        Ok(response) => response.forget_query(parameters),
        Err(Error::Inner(error)) => redact::redact(error, parameters),
        Err(_) => {}
    }
}

/// Bodies are read of errors only.
#[inline]
fn is_error(status: StatusCode) -> bool {
    status.is_client_error() || status.is_server_error()
}

#[cold]
fn expose<R: ResponseMessage>(lease: &Lease, response: &mut R) {
    response.extensions_mut().insert(ServedBy(lease.id().clone()));
}

/// Tells a failover around the rotation which key a response speaks against.
fn note_for_failover<R: ResponseMessage>(lease: &Lease, response: &mut R) {
    #[cfg(feature = "failover")]
    response.extensions_mut().insert(SpokeAgainstKey(lease.clone()));
    #[cfg(not(feature = "failover"))]
    let _ = (lease, response);
}

#[cold]
fn refuse(error: InjectError) -> Box<Refused> {
    Box::new(Refused::Inject(error))
}

#[cold]
fn refuse_cleartext<R: RequestMessage>(request: &R) -> Box<Refused> {
    let host = request.destination().host.unwrap_or_default().to_owned();
    refuse(InjectError::Cleartext { host })
}

impl<C: ClassifyResponse> Observer<C> {
    /// Marks the key by what came of its request, and takes it out of what remembers it.
    #[inline]
    pub(crate) fn settle<R, E>(&self, lease: &Lease, result: Result<R, E>) -> Result<R, Error<E>>
    where
        R: ResponseMessage,
        E: 'static,
    {
        // In the place where it is returned: a response is large, and is moved once less.
        let mut result = result.map_err(Error::Inner);
        if let Ok(response) = &mut result {
            match self.verdict(response) {
                Verdict::Nothing => {}
                verdict => self.mark(lease, verdict, response),
            }
            if self.expose_key {
                expose(lease, response);
            }
        }
        let parameters = lease.credentials().query_parameters();
        if !parameters.is_empty() {
            forget_query(&mut result, parameters);
        }
        result
    }

    #[inline]
    fn verdict<R: ResponseMessage>(&self, response: &R) -> Verdict {
        let head = ResponseHead::new(response.status(), response.headers());
        if is_error(response.status())
            && let Some(ErrorBody(body)) = response.extensions().get()
        {
            return self.classifier.classify(&head.with_body(body));
        }
        self.classifier.classify(&head)
    }

    #[cold]
    fn mark<R: ResponseMessage>(&self, lease: &Lease, verdict: Verdict, response: &mut R) {
        let (rest, wait) = match verdict {
            Verdict::Nothing => return,
            Verdict::RateLimited { wait } => (Rest::RateLimited, wait),
            Verdict::Exhausted { wait } => (Rest::Exhausted, wait),
            Verdict::Revoked => (Rest::Revoked, None),
        };
        if let Some(pool) = lease.pool() {
            pool.mark(lease, rest, wait, response.status().as_u16());
        }
        note_for_failover(lease, response);
    }

    /// Whether the classifier wants to see this response's body.
    pub(crate) fn wants_body<R: ResponseMessage>(&self, response: &R) -> bool {
        let status = response.status();
        is_error(status) && self.classifier.wants_body(&ResponseHead::new(status, response.headers()))
    }
}

/// How much of an error's body is read, and how long that may take.
#[derive(Clone, Copy, Debug)]
pub struct BodyLimits {
    pub(crate) bytes: usize,
    pub(crate) time: Duration,
}

impl BodyLimits {
    pub(crate) fn bytes(bytes: usize) -> Self {
        Self { bytes, time: Duration::from_secs(1) }
    }

    /// Reads a body within these limits, and notes in the response what was read.
    pub(crate) async fn read<R: ReadableResponse>(self, pool: &KeyPool, response: R) -> R::Replayed {
        let clock = pool.clock();
        let time_over = clock.sleep_until(clock.now().saturating_add(self.time));
        let (mut response, beginning) = response.begin(self.bytes, time_over).await;
        response.extensions_mut().insert(ErrorBody(beginning));
        response
    }
}

impl<C> fmt::Debug for Rotation<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rotation").field("pool", &self.pool).finish_non_exhaustive()
    }
}
