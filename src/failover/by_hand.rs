//! The failover without `tower::Service`: the same policy, driven by a loop.

use std::pin::Pin;

use tower::retry::Policy;

use super::{
    attempt::{Attempt, Tracked, answer},
    clone::CloneRequest,
    policy::FailoverPolicy,
};
use crate::{
    error::Error,
    message::{ReadableResponse, RequestMessage},
    tried,
};

/// Makes one attempt, with a key that is picked for it.
pub(crate) trait SendOnce<Req, R, E> {
    // Boxed: the compiler can't see yet that an async closure which borrows is `Send`.
    fn send(&mut self, request: Req) -> Pin<Box<dyn Future<Output = Result<R, Error<E>>> + Send + '_>>;
}

/// Sends a request as often as the policy has it.
pub(crate) async fn send_with_failover<K, Req, R, E>(
    mut policy: FailoverPolicy<K>,
    request: Req,
    mut client: impl SendOnce<Req, R, E>,
) -> Result<R::Replayed, Error<E>>
where
    K: CloneRequest<Req>,
    Req: RequestMessage,
    R: ReadableResponse + Send + 'static,
    R::Replayed: Send + 'static,
{
    let mut tracked = Tracked::new(request);
    if policy.shared.is_closed_to(&tracked.request) {
        let (turn, waited) = policy.shared.clone().first_wait().await;
        tracked = Tracked::admitted(tracked.request, turn.map_err(Error::NoKeyAvailable)?, waited);
    }
    loop {
        let again = policy.keep(&tracked);
        let mut result = match tracked.take_turn() {
            Some(Err(no_key)) => Err(Error::NoKeyAvailable(no_key)),
            turn => {
                let tried = tracked.tried();
                let result = tried::drive_without(tried, client.send(tracked.request)).await;
                let result = result.map(Attempt::Fresh);
                answer(turn.and_then(Result::ok), &result);
                result
            }
        };
        let wait =
            again.and_then(|mut again| policy.retry(&mut again, &mut result).map(|wait| (again, wait)));
        match wait {
            Some((again, wait)) => {
                wait.await;
                tracked = again;
            }
            None => return result.map(Attempt::into_response),
        }
    }
}
