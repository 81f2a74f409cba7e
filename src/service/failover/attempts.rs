//! A request's attempts, one after the other.

use std::{pin::Pin, time::Duration};

use super::{
    clone::CloneRequest,
    gate::Pass,
    policy::{FailoverPolicy, Next, Shared, spoke_against},
};
use crate::{
    message::{ReadableResponse, RequestMessage},
    pool::{Lease, NoKeyAvailable},
    service::error::Error,
};

/// Makes one attempt, with a key that is picked for it and is none of `tried`.
pub(crate) trait SendOnce<Req, R, E> {
    // Boxed: the compiler can't see yet that an async closure which borrows is `Send`.
    fn send(&mut self, request: Req, tried: Vec<Lease>) -> Sending<'_, R, E>;
}

pub(crate) type Sending<'a, R, E> = Pin<Box<dyn Future<Output = Result<R, Error<E>>> + Send + 'a>>;

/// What has become of a request so far.
#[derive(Default)]
pub(super) struct History {
    /// The keys that it has been limited on, as long as it must not be sent with them again.
    pub(super) tried: Vec<Lease>,
    pub(super) sent: u32,
    pub(super) waited: Duration,
    /// To be given back with the answer of an attempt that had to wait for its turn.
    pass: Option<Pass>,
}

impl History {
    /// Waits for a turn, for as long as there is left of what a request may wait in all.
    async fn wait(&mut self, shared: &Shared) -> Result<(), NoKeyAvailable> {
        let clock = shared.pool.clock();
        let before = clock.now();
        let limit = shared.wait.saturating_sub(self.waited);
        let turn = shared.gate.clone().enter(&shared.pool, limit).await;
        let waited = clock.now().saturating_sub(before);
        self.waited += waited;
        shared.pool.meter().waited(waited);
        // Who has waited may go with any key whose cooldown is over.
        self.tried.clear();
        self.pass = Some(turn?);
        Ok(())
    }

    /// Tells the gate how an attempt went that had waited at it.
    fn answered<R: ReadableResponse, E>(&mut self, result: &Result<R, Error<E>>) {
        if let (Some(pass), Ok(response)) = (self.pass.take(), result) {
            pass.answered(spoke_against(response).is_some());
        }
    }
}

/// Sends a request as often as the policy has it, but waits first where others wait.
pub(crate) async fn send_with_failover<K, Req, R, E>(
    policy: FailoverPolicy<K>,
    request: Req,
    mut client: impl SendOnce<Req, R, E>,
) -> Result<R::Replayed, Error<E>>
where
    K: CloneRequest<Req>,
    Req: RequestMessage,
    R: ReadableResponse,
{
    let mut history = History::default();
    if policy.shared.is_closed_to(&request) {
        history.wait(&policy.shared).await.map_err(Error::NoKeyAvailable)?;
    }
    let again = policy.clone.clone_request(&request);
    let result = client.send(request, Vec::new()).await;
    history.answered(&result);
    go_on(policy, again, client, history, result).await
}

/// What comes after an attempt, if the request can be sent again.
pub(super) async fn go_on<K, Req, R, E>(
    policy: FailoverPolicy<K>,
    mut again: Option<Req>,
    mut client: impl SendOnce<Req, R, E>,
    mut history: History,
    mut result: Result<R, Error<E>>,
) -> Result<R::Replayed, Error<E>>
where
    K: CloneRequest<Req>,
    R: ReadableResponse,
{
    let shared = &policy.shared;
    // The last limited response, for the caller where no further attempt can be made.
    let mut kept = None;
    while let Some(request) = again {
        if shared.settles(&result) || !policy.clone.can_send_again(&request) {
            break;
        }
        let next = shared.after(&mut history, &result);
        if next == Next::Stop {
            break;
        }
        if let Ok(limited) = result {
            kept = Some(shared.bodies.read(&shared.pool, limited).await);
        }
        if next == Next::AfterWaiting
            && let Err(no_key) = history.wait(shared).await
        {
            result = Err(Error::NoKeyAvailable(no_key));
            again = Some(request);
            continue;
        }
        again = policy.clone.clone_request(&request);
        shared.pool.meter().failed_over();
        result = client.send(request, history.tried.clone()).await;
        history.answered(&result);
    }
    match (result, kept) {
        (Err(Error::NoKeyAvailable(_)), Some(kept)) => Ok(kept),
        (result, _) => result.map(ReadableResponse::untouched),
    }
}
