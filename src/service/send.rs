//! Sends a request by a client, in each of the modes.

use std::{future::Future, sync::Arc};

use tower_service::Service;

use super::{
    clone::CloneRequest,
    error::Error,
    failover::Failover,
    future::{FailoverFuture, ResponseFuture},
    mode::{Attempt, Once, Waiting},
    rotation::Rotation,
};
use crate::{
    classify::ClassifyResponse,
    message::{ReadableResponse, RequestMessage, ResponseMessage},
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

    fn send(self, client: &mut S, rotation: &Arc<Rotation<C, M>>) -> Self::Future;
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
    fn send(mut self, client: &mut S, rotation: &Arc<Rotation<C, Once>>) -> Self::Future {
        match rotation.wants_key(&self) {
            Ok(true) => {}
            Ok(false) => return ResponseFuture::keyless(client.call(self)),
            Err(refused) => return ResponseFuture::refused(refused),
        }
        match rotation.insert_key(rotation.pool.engine().pick(), &mut self) {
            Ok(lease) => ResponseFuture::keyed(client.call(self), rotation.judge.clone(), lease),
            Err(refused) => ResponseFuture::refused(refused),
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

    fn send(self, client: &mut S, rotation: &Arc<Rotation<C, Waiting>>) -> Self::Future {
        send_more_than_once(client, rotation, self)
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
    fn send(self, client: &mut S, rotation: &Arc<Rotation<C, Failover<K>>>) -> Self::Future {
        send_more_than_once(client, rotation, self)
    }
}

#[inline]
fn send_more_than_once<S, C, M, Req>(
    client: &mut S,
    rotation: &Arc<Rotation<C, M>>,
    mut request: Req,
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
            return FailoverFuture::first(response, None, None, client.clone(), rotation.clone());
        }
        Err(refused) => return FailoverFuture::refused(*refused, client.clone(), rotation.clone()),
    }
    if rotation.has_queue() {
        return send_in_turn(client, rotation, request);
    }
    let kept = rotation.mode.keep(&request);
    match rotation.insert_key(rotation.pool.engine().pick(), &mut request) {
        Ok(lease) => {
            let response = client.call(request);
            FailoverFuture::first(response, Some(lease), kept, client.clone(), rotation.clone())
        }
        // Another request took the last key since.
        Err(refused) if refused.is_no_key() && rotation.has_queue() => {
            send_in_turn(client, rotation, request)
        }
        Err(refused) => FailoverFuture::refused(*refused, client.clone(), rotation.clone()),
    }
}

#[cold]
fn send_in_turn<S, C, M, Req>(
    client: &mut S,
    rotation: &Arc<Rotation<C, M>>,
    request: Req,
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
    FailoverFuture::in_turn(request, client.clone(), rotation.clone())
}
