//! Sends a request by a client, in each of the modes.

use std::{future::Future, sync::Arc};

use tower_service::Service;

use super::{
    clone::CloneRequest,
    error::{Error, Refused},
    failover::Failover,
    future::{FailoverFuture, ResponseFuture},
    mode::{Attempt, Once, Waiting},
    rotation::Rotation,
};
use crate::{
    classify::ClassifyResponse,
    limit::Traits,
    message::{ReadableResponse, RequestMessage, ResponseMessage},
    pool::Lease,
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
        let pick = |request: &Self| match rotation.needed(traits(request), request) {
            None => rotation.pick(),
            Some(traits) => rotation.pick_for(&traits),
        };
        match prepare(rotation, &mut self, pick) {
            Ok(Some(lease)) => ResponseFuture::keyed(client.call(self), rotation.judge.clone(), lease),
            Ok(None) => ResponseFuture::keyless(client.call(self)),
            Err(refused) => ResponseFuture::refused(refused),
        }
    }
}

/// Puts a key into a request that wants one.
#[inline(always)]
fn prepare<C, Req: RequestMessage>(
    rotation: &Rotation<C, Once>,
    request: &mut Req,
    pick: impl FnOnce(&Req) -> Result<Lease, Box<Refused>>,
) -> Result<Option<Lease>, Box<Refused>> {
    if !rotation.wants_key(request)? {
        return Ok(None);
    }
    pick(request).and_then(|lease| rotation.insert_key(lease, request)).map(Some)
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
            return FailoverFuture::first(response, None, None, None, client.clone(), rotation.clone());
        }
        Err(refused) => return FailoverFuture::refused(*refused, client.clone(), rotation.clone()),
    }
    let traits = rotation.needed(traits(&request), &request);
    if rotation.has_queue(traits.as_ref()) {
        return send_in_turn(client, rotation, request, traits);
    }
    let kept = rotation.mode.keep(&request);
    let lease = match &traits {
        None => rotation.pick(),
        Some(traits) => rotation.pick_for(traits),
    };
    match lease.and_then(|lease| rotation.insert_key(lease, &mut request)) {
        Ok(lease) => {
            let response = client.call(request);
            FailoverFuture::first(response, Some(lease), kept, traits, client.clone(), rotation.clone())
        }
        // Another request took the last key since, or no key has room.
        Err(refused) if refused.is_no_key() && rotation.may_queue(traits.as_ref()) => {
            send_in_turn(client, rotation, request, traits)
        }
        Err(refused) => FailoverFuture::refused(*refused, client.clone(), rotation.clone()),
    }
}

#[cold]
fn send_in_turn<S, C, M, Req>(
    client: &mut S,
    rotation: &Arc<Rotation<C, M>>,
    request: Req,
    traits: Option<Traits>,
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
    FailoverFuture::in_turn(request, traits, client.clone(), rotation.clone())
}
