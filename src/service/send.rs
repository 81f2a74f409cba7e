//! Sends a request by a client, in each of the modes.

use std::{future::Future, sync::Arc};

use tower_service::Service;

use super::{
    clone::CloneRequest,
    error::{Error, Refused},
    failover::{Failover, Resend},
    future::{FailoverFuture, ResponseFuture},
    mode::{Attempt, Once, Waiting},
    rotation::Rotation,
    trace::{self, Trace},
};
use crate::{
    classify::ClassifyResponse,
    limit::Traits,
    message::{ReadableResponse, RequestMessage, ResponseMessage},
    pool::{Lease, Trials},
};

/// A request that a client of this type can send in this mode.
///
/// It is the request that implements this, and there is one way for each mode, for the sake of error messages: until the
/// request's type is known, the compiler takes `ready` and `oneshot` for possible, and then it names the bound that a
/// request or a client misses.
pub trait SendBy<S, C, M>: Sized
where
    S: Service<Self>,
{
    type Response;
    type Future: Future<Output = Result<Self::Response, Error<S::Error>>>;

    /// Sends a request by the key that its traits lead to, or by the next one in turn.
    ///
    /// The traits are asked for here, not by the caller: a request is large, and would be moved once more.
    fn send(
        self,
        client: &mut S,
        rotation: &Arc<Rotation<C, M>>,
        traits: impl FnOnce(&Self) -> Option<Traits>,
    ) -> Self::Future;
}

impl<Req, S, C> SendBy<S, C, Once> for Req
where
    Req: RequestMessage,
    S: Service<Req>,
    S::Response: ResponseMessage,
    S::Error: 'static,
    C: ClassifyResponse + Clone,
{
    type Response = S::Response;
    type Future = ResponseFuture<S::Future, C>;

    #[inline]
    fn send(
        mut self,
        client: &mut S,
        rotation: &Arc<Rotation<C, Once>>,
        traits: impl FnOnce(&Self) -> Option<Traits>,
    ) -> Self::Future {
        let rotation = &**rotation;
        // Asked once the key is needed, and not before: the usual way of a request must not get longer.
        let pick = |request: &Self| match rotation.needed(traits(request), request) {
            None if trace::is_on() => Err(Instead::explain(None)),
            None => rotation.pick(Trials::OfSuspects).map_err(Instead::refused),
            Some(traits) => pick_for(rotation, traits),
        };
        match prepare(rotation, &mut self, pick) {
            Ok(Some(lease)) => ResponseFuture::keyed(client.call(self), rotation.judge.clone(), lease),
            Ok(None) => ResponseFuture::keyless(client.call(self)),
            Err(instead) => match *instead {
                Instead::Refused(refused) => ResponseFuture::refused(refused),
                Instead::Explain(traits) => send_traced(client, rotation, self, traits),
            },
        }
    }
}

/// What becomes of a request that is not sent at once.
enum Instead {
    Refused(Box<Refused>),
    /// It is sent with an explanation.
    Explain(Option<Traits>),
}

impl Instead {
    #[cold]
    fn refused(refused: Box<Refused>) -> Box<Self> {
        Box::new(Self::Refused(refused))
    }

    #[cold]
    fn explain(traits: Option<Traits>) -> Box<Self> {
        Box::new(Self::Explain(traits))
    }
}

fn pick_for<C>(rotation: &Rotation<C, Once>, traits: Traits) -> Result<Lease, Box<Instead>> {
    if trace::is_on() {
        return Err(Instead::explain(Some(traits)));
    }
    rotation.pick_for(&traits, Trials::OfSuspects).map_err(Instead::refused)
}

/// Puts a key into a request that wants one.
#[inline(always)]
fn prepare<C, Req: RequestMessage>(
    rotation: &Rotation<C, Once>,
    request: &mut Req,
    pick: impl FnOnce(&Req) -> Result<Lease, Box<Instead>>,
) -> Result<Option<Lease>, Box<Instead>> {
    if !rotation.wants_key(request).map_err(Instead::refused)? {
        return Ok(None);
    }
    let lease = pick(request)?;
    rotation.insert_key(lease, request).map(Some).map_err(Instead::refused)
}

/// Sends a request that wants a key once, and explains it.
#[cold]
fn send_traced<Req, S, C>(
    client: &mut S,
    rotation: &Rotation<C, Once>,
    mut request: Req,
    traits: Option<Traits>,
) -> ResponseFuture<S::Future, C>
where
    Req: RequestMessage,
    S: Service<Req>,
    C: Clone,
{
    let mut trace = Trace::begin(&rotation.pool, traits.as_ref());
    let lease = match &traits {
        None => rotation.pool.engine().pick_apart().ok_or_else(|| rotation.no_key()),
        Some(traits) => rotation.pick_for(traits, Trials::OfSuspects),
    };
    match lease.and_then(|lease| rotation.insert_key(lease, &mut request)) {
        Ok(lease) => {
            trace.sends(&lease);
            let entered = trace.enter();
            let response = client.call(request);
            drop(entered);
            ResponseFuture::traced(response, rotation.judge.clone(), lease, trace)
        }
        Err(refused) => {
            trace.refused(&refused);
            ResponseFuture::refused(refused)
        }
    }
}

impl<Req, S, C> SendBy<S, C, Waiting> for Req
where
    Req: RequestMessage + Send + 'static,
    S: Service<Req, Error: Send + 'static, Future: Send + 'static> + Clone + Send + 'static,
    S::Response: ResponseMessage + Send + 'static,
    C: ClassifyResponse + Send + Sync + 'static,
{
    type Response = S::Response;
    type Future = FailoverFuture<S, C, Waiting, Req>;

    fn send(
        self,
        client: &mut S,
        rotation: &Arc<Rotation<C, Waiting>>,
        traits: impl FnOnce(&Self) -> Option<Traits>,
    ) -> Self::Future {
        send_more_than_once(client, rotation, self, traits)
    }
}

impl<Req, S, C, K> SendBy<S, C, Failover<K>> for Req
where
    Req: RequestMessage + Send + 'static,
    K: CloneRequest<Req, Kept: Send + 'static> + Send + Sync + 'static,
    S: Service<Req, Error: Send + 'static, Future: Send + 'static> + Clone + Send + 'static,
    S::Response: ReadableResponse<Replayed: Send + 'static> + Send + 'static,
    C: ClassifyResponse + Send + Sync + 'static,
{
    type Response = <S::Response as ReadableResponse>::Replayed;
    type Future = FailoverFuture<S, C, Failover<K>, Req>;

    #[inline]
    fn send(
        self,
        client: &mut S,
        rotation: &Arc<Rotation<C, Failover<K>>>,
        traits: impl FnOnce(&Self) -> Option<Traits>,
    ) -> Self::Future {
        send_more_than_once(client, rotation, self, traits)
    }
}

#[inline(always)]
fn send_more_than_once<S, C, M, Req>(
    client: &mut S,
    rotation: &Arc<Rotation<C, M>>,
    mut request: Req,
    traits: impl FnOnce(&Req) -> Option<Traits>,
) -> FailoverFuture<S, C, M, Req>
where
    Req: RequestMessage + Send + 'static,
    S: Service<Req, Error: Send + 'static, Future: Send + 'static> + Clone + Send + 'static,
    S::Response: ResponseMessage + Send + 'static,
    C: ClassifyResponse + Send + Sync + 'static,
    M: Attempt<Req, S::Response> + Send + Sync + 'static,
{
    match rotation.wants_key(&request) {
        Ok(true) => {}
        Ok(false) => {
            let response = client.call(request);
            let (client, rotation) = (client.clone(), rotation.clone());
            return FailoverFuture::first(response, None, None, None, Trace::none(), client, rotation);
        }
        Err(refused) => return FailoverFuture::refused(*refused, client.clone(), rotation.clone()),
    }
    let traits = rotation.needed(traits(&request), &request);
    let mut trace = Trace::begin(&rotation.pool, traits.as_ref());
    if rotation.has_queue(traits.as_ref()) {
        return send_in_turn(client, rotation, request, traits, trace);
    }
    let kept = rotation.mode.keep(&request);
    let trials =
        Trials::with_failover(kept.is_some() && rotation.mode.resend().is_some_and(Resend::has_failover));
    let lease = match &traits {
        None => rotation.pick(trials),
        Some(traits) => rotation.pick_for(traits, trials),
    };
    match lease.and_then(|lease| rotation.insert_key(lease, &mut request)) {
        Ok(lease) => {
            trace.sends(&lease);
            let entered = trace.enter();
            let response = client.call(request);
            drop(entered);
            let (client, rotation) = (client.clone(), rotation.clone());
            FailoverFuture::first(response, Some(lease), kept, traits, trace, client, rotation)
        }
        // Another request took the last key since, or no key has room.
        Err(refused) if refused.is_no_key() && rotation.may_queue(traits.as_ref()) => {
            send_in_turn(client, rotation, request, traits, trace)
        }
        Err(refused) => {
            trace.refused(&refused);
            FailoverFuture::refused(*refused, client.clone(), rotation.clone())
        }
    }
}

#[cold]
fn send_in_turn<S, C, M, Req>(
    client: &mut S,
    rotation: &Arc<Rotation<C, M>>,
    request: Req,
    traits: Option<Traits>,
    trace: Trace,
) -> FailoverFuture<S, C, M, Req>
where
    Req: RequestMessage + Send + 'static,
    S: Service<Req, Error: Send + 'static, Future: Send + 'static> + Clone + Send + 'static,
    S::Response: ResponseMessage + Send + 'static,
    C: ClassifyResponse + Send + Sync + 'static,
    M: Attempt<Req, S::Response> + Send + Sync + 'static,
{
    // The service that was made ready may hold a permit. It is given back while the request waits: a request before it
    // may need that permit.
    *client = client.clone();
    FailoverFuture::in_turn(request, traits, trace, client.clone(), rotation.clone())
}
