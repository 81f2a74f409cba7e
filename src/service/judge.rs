//! Judges responses: classifies them and rests keys.

use std::sync::Arc;

use http::StatusCode;

use super::{error::Error, redact, reservation::Held, served_by};
use crate::{
    classify::{ClassifyResponse, ResponseHead, Verdict, forbids_retry},
    key::query::Parameter,
    limit::{Remaining, Rest},
    message::JudgedResponse,
    pool::{Head, Key, Lease},
};

/// Each request has a clone of its own: every thread would write to a shared reference count.
#[derive(Clone)]
pub(crate) struct Judge<C> {
    pub(crate) classifier: C,
    pub(crate) expose_key: bool,
}

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// With a response that does not speak against the key.
    Answered,
    /// With an answer that rests the key. The request was carried out.
    KeyRested,
    /// With an error that rests the key. The request may be sent again.
    Refused,
    /// With an error that is about the key or about the request. Sent again with another key, the request finds out.
    Unclear,
    /// With an error within a stream that is not about the key: the service has no capacity. The request may be sent again.
    Overloaded,
    /// Without a response.
    Failed,
}

/// In the extensions of a response that rested a key: layers of other pools further out leave it alone.
#[derive(Clone, Copy, Debug)]
struct Attributed;

impl<C: ClassifyResponse> Judge<C> {
    /// Rests the key if the response speaks against it, and removes the key from whatever remembers it. `keep` gets the
    /// responses of requests that may be in flight until the body ends.
    pub(crate) fn settle<R, E>(
        &self,
        lease: &mut Lease,
        result: &mut Result<R, Error<E>>,
        body: Option<&[u8]>,
        keep: impl FnOnce(&mut Lease, &mut R),
    ) -> Outcome
    where
        R: JudgedResponse,
        E: 'static,
    {
        self.settle_here(lease, result, body, keep)
    }

    /// The same, inlined into its caller: for the usual way of a request.
    #[inline(always)]
    pub(crate) fn settle_here<R, E>(
        &self,
        lease: &mut Lease,
        result: &mut Result<R, Error<E>>,
        body: Option<&[u8]>,
        keep: impl FnOnce(&mut Lease, &mut R),
    ) -> Outcome
    where
        R: JudgedResponse,
        E: 'static,
    {
        let outcome = match result {
            Ok(response) => {
                let head = ResponseHead::new(response.status(), response.headers());
                let head = body.map_or(head, |body| head.with_body(body));
                let outcome = match self.classifier.classify(&head) {
                    Verdict::Nothing => {
                        if lease.holds_anything() {
                            apply(lease, Verdict::Nothing, &head);
                            keep(lease, response);
                        }
                        Outcome::Answered
                    }
                    _ if is_attributed(response) => {
                        let (is_error, said) = (is_error(response.status()), &Remaining::default());
                        lease.settle(Head { is_limited: false, is_error, wait: None, said });
                        Outcome::Answered
                    }
                    verdict => {
                        apply(lease, verdict, &head);
                        attribute(response, verdict)
                    }
                };
                if self.expose_key {
                    served_by::expose(lease, response);
                }
                outcome
            }
            Err(_) => Outcome::Failed,
        };
        let parameters = lease.credentials().query_parameters();
        if !parameters.is_empty() {
            forget_query(result, parameters);
        }
        outcome
    }

    /// The response refused a secret that the key no longer has, so it counts against nothing.
    pub(crate) fn settle_outdated<R, E>(&self, lease: &mut Lease, result: &mut Result<R, Error<E>>) -> Outcome
    where
        R: JudgedResponse,
        E: 'static,
    {
        lease.drop_ticket();
        if let Ok(response) = result {
            response.extensions_mut().insert(Attributed);
            if self.expose_key {
                served_by::expose(lease, response);
            }
        }
        let parameters = lease.credentials().query_parameters();
        if !parameters.is_empty() {
            forget_query(result, parameters);
        }
        Outcome::Refused
    }

    /// Whether the classifier wants to see this response's body.
    pub(crate) fn wants_body<R: JudgedResponse>(&self, response: &R) -> bool {
        let status = response.status();
        is_error(status)
            && !is_attributed(response)
            && self.classifier.wants_body(&ResponseHead::new(status, response.headers()))
    }
}

pub(super) fn is_error(status: StatusCode) -> bool {
    status.is_client_error() || status.is_server_error()
}

/// Whether an answer without a verdict shows that the service accepts its key. An error of the service and a firewall's page
/// show nothing.
pub(super) fn has_served(status: StatusCode) -> bool {
    !status.is_server_error() && !matches!(status.as_u16(), 401 | 402 | 403 | 429)
}

/// Whether an error says that the service has no capacity for anybody: also 498, which is Groq's, and 529, Anthropic's.
pub(super) fn is_without_capacity(status: StatusCode) -> bool {
    matches!(status.as_u16(), 498 | 503 | 529)
}

/// Whether a layer further in has judged the response by a key of its own.
pub(super) fn is_attributed<R: JudgedResponse>(response: &R) -> bool {
    response.extensions().get::<Attributed>().is_some()
}

/// Notes an answer at the request's key and at the key's limit, as it was judged.
#[cold]
pub(super) fn apply(lease: &mut Lease, verdict: Verdict, head: &ResponseHead<'_>) {
    let is_error = head.is_error();
    let (rest, wait) = match verdict {
        Verdict::Nothing => {
            if has_served(head.status()) {
                lease.has_served();
            }
            if lease.ticket().is_some() {
                lease.settle(Head { is_limited: false, is_error, wait: None, said: &head.remaining() });
            }
            return;
        }
        Verdict::RateLimited { wait } => {
            // A service limits the keys that it knows.
            lease.has_served();
            (Rest::RateLimited, wait)
        }
        Verdict::Exhausted { wait } => (Rest::Exhausted, wait),
        Verdict::ScopeExhausted { wait } if lease.rests_apart() => {
            lease.has_served();
            return lease.exhaust_scope(wait, head.status().as_u16());
        }
        Verdict::ScopeExhausted { wait } => (Rest::Exhausted, wait),
        Verdict::Revoked => (Rest::Revoked, None),
        Verdict::Refused => {
            if lease.ticket().is_some() {
                lease.settle(Head { is_limited: false, is_error, wait: None, said: &head.remaining() });
            }
            return lease.refuse(head.status().as_u16());
        }
    };
    let status = head.status().as_u16();
    let rests_apart = rest == Rest::RateLimited && lease.rests_apart();
    match rest {
        Rest::RateLimited if lease.ticket().is_some() => {
            let said = head.remaining();
            // A bucket's reset is when all of it is back; room for one request comes earlier.
            let wait = if said.is_known() && rests_apart { head.explicit_wait() } else { wait };
            lease.settle(Head { is_limited: true, is_error, wait, said: &said });
        }
        // Nobody knows whether the service counted the request.
        _ => lease.drop_ticket(),
    }
    if rests_apart {
        lease.count_limited(status);
    } else {
        lease.mark(rest, wait, status);
    }
}

/// Notes an error within a response's body at the key, or at its limit in the scope of the request.
pub(super) fn apply_within(key: &Arc<Key>, held: Option<&Held>, verdict: Verdict, status: StatusCode) {
    let http_status = status.as_u16();
    let rests_apart = |rest, wait| held.is_some_and(|held| held.rest(rest, wait));
    let (rest, wait, rests_apart) = match verdict {
        Verdict::Nothing => return,
        Verdict::Refused => return key.refuse(http_status),
        Verdict::RateLimited { wait } => (Rest::RateLimited, wait, rests_apart(Rest::RateLimited, wait)),
        Verdict::ScopeExhausted { wait } => (Rest::Exhausted, wait, rests_apart(Rest::Exhausted, wait)),
        Verdict::Exhausted { wait } => (Rest::Exhausted, wait, false),
        Verdict::Revoked => (Rest::Revoked, None, false),
    };
    if rests_apart {
        key.count_limited(http_status);
    } else {
        key.mark(rest, wait, http_status);
    }
}

/// Notes that a response counted against its key.
#[cold]
fn attribute<R: JudgedResponse>(response: &mut R, verdict: Verdict) -> Outcome {
    response.extensions_mut().insert(Attributed);
    let head = ResponseHead::new(response.status(), response.headers());
    match head.is_error() && !forbids_retry(response.headers()) {
        true if verdict == Verdict::Refused => Outcome::Unclear,
        true => Outcome::Refused,
        false => Outcome::KeyRested,
    }
}

#[cold]
fn forget_query<R, E>(result: &mut Result<R, Error<E>>, parameters: &[Parameter])
where
    R: JudgedResponse,
    E: 'static,
{
    match result {
        Ok(response) => response.forget_query(parameters),
        Err(Error::Inner(error)) => redact::redact(error, parameters),
        Err(_) => {}
    }
}
