//! Whether to go again.

use std::{
    fmt,
    future::Future,
    mem,
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use tower::retry::{
    Policy,
    budget::{Budget, TpsBudget},
};

use super::{
    attempt::{Attempt, History, Tracked, lock},
    clone::CloneRequest,
    gate::{Gate, Pass},
};
use crate::{
    error::Error,
    hosts::Ruling,
    message::{ReadableResponse, RequestMessage},
    pool::{KeyPool, Lease, NoKeyAvailable},
    rotation::BodyLimits,
};

/// What all requests of a layer share.
#[derive(Clone)]
pub(super) struct Shared {
    pub(super) pool: KeyPool,
    pub(super) attempts: u32,
    pub(super) budget: Arc<dyn Budget + Send + Sync>,
    pub(super) wait: Duration,
    pub(super) bodies: BodyLimits,
    pub(super) gate: Arc<Gate>,
}

impl Shared {
    pub(super) fn new(pool: &KeyPool) -> Self {
        Self {
            pool: pool.clone(),
            attempts: 3,
            budget: Arc::new(TpsBudget::default()),
            wait: Duration::ZERO,
            bodies: BodyLimits::bytes(64 * 1024),
            gate: Arc::new(Gate::new()),
        }
    }

    /// Whether a request that needs a key has to queue for it.
    fn is_closed(&self) -> bool {
        !self.wait.is_zero() && self.gate.is_closed(&self.pool)
    }

    /// Whether this request has to queue before it is sent at all.
    pub(super) fn is_closed_to<Req: RequestMessage>(&self, request: &Req) -> bool {
        self.is_closed() && self.pool.hosts().rule(request) == Ruling::Key
    }

    /// Waits for a turn before a request is sent at all.
    pub(super) fn first_wait(self: Arc<Self>) -> Pin<Box<dyn Future<Output = Waited> + Send>> {
        Box::pin(async move { self.wait(Duration::ZERO).await })
    }

    /// Waits for a turn, having waited before for `waited`; says for how long in all.
    async fn wait(&self, waited: Duration) -> Waited {
        let clock = self.pool.clock();
        let before = clock.now();
        let limit = self.wait.saturating_sub(waited);
        let turn = self.gate.clone().enter(&self.pool, limit).await;
        (turn, waited + clock.now().saturating_sub(before))
    }
}

/// What came of waiting, and how long a request has waited in all.
pub(super) type Waited = (Result<Pass, NoKeyAvailable>, Duration);

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Failover")
            .field("pool", &self.pool)
            .field("attempts", &self.attempts)
            .field("wait", &self.wait)
            .finish_non_exhaustive()
    }
}

/// Decides for one request; each has a clone of its own.
#[derive(Clone, Debug)]
pub struct FailoverPolicy<K> {
    pub(super) shared: Arc<Shared>,
    pub(super) clone: K,
}

impl<K> FailoverPolicy<K> {
    /// The same request for another attempt, if it can be sent again.
    pub(super) fn keep<Req, R>(&self, tracked: &Tracked<Req, R>) -> Option<Tracked<Req, R>>
    where
        K: CloneRequest<Req>,
    {
        let request = self.clone.clone_request(&tracked.request)?;
        Some(tracked.again(request))
    }

    fn fail_over<Req, R, E>(
        &self,
        limited: Lease,
        request: &mut Tracked<Req, R::Replayed>,
        result: &mut Result<Attempt<R>, Error<E>>,
    ) -> Option<BeforeNextAttempt>
    where
        R: ReadableResponse + Send + 'static,
        R::Replayed: Send + 'static,
    {
        let history = request.history();
        let waited = {
            let mut history = lock(&history);
            history.tried.push(limited);
            history.sent += 1;
            if history.sent >= self.shared.attempts {
                return None;
            }
            history.waited
        };
        let at_once = !self.shared.is_closed() && self.shared.pool.has_available();
        if !at_once && !self.can_wait(waited) {
            return None;
        }
        if !self.shared.budget.withdraw() {
            tracing::debug!("failover budget used up, the limited response is passed on");
            return None;
        }
        // The next attempt's result takes the place of this one's; until then something has to stand there.
        let Ok(Attempt::Fresh(response)) =
            mem::replace(result, Err(Error::NoKeyAvailable(self.shared.pool.no_key())))
        else {
            return None;
        };
        let shared = self.shared.clone();
        Some(Box::pin(async move {
            let response = shared.bodies.read(&shared.pool, response).await;
            lock(&history).kept = Some(response);
            if !at_once {
                wait(&shared, &history).await;
            }
        }))
    }

    /// What to do where an attempt found no key: wait for one, or give the caller the response of the attempt
    /// before.
    fn find_key_or_give_back<Req, R, E>(
        &self,
        request: &mut Tracked<Req, R::Replayed>,
        result: &mut Result<Attempt<R>, Error<E>>,
    ) -> Option<BeforeNextAttempt>
    where
        R: ReadableResponse,
        R::Replayed: Send + 'static,
    {
        let history = request.history();
        if self.can_wait(lock(&history).waited) {
            let shared = self.shared.clone();
            return Some(Box::pin(async move { wait(&shared, &history).await }));
        }
        if let Some(kept) = lock(&history).kept.take() {
            *result = Ok(Attempt::Kept(kept));
        }
        None
    }

    fn can_wait(&self, waited: Duration) -> bool {
        let left = self.shared.wait.saturating_sub(waited);
        let next = self.shared.pool.next_return();
        !left.is_zero() && next.is_some_and(|next| next <= left)
    }
}

async fn wait<R>(shared: &Shared, history: &Mutex<History<R>>) {
    let waited = lock(history).waited;
    let (turn, waited) = shared.wait(waited).await;
    let mut history = lock(history);
    // Who has waited may go with any key whose cooldown is over.
    history.tried.clear();
    history.waited = waited;
    history.turn = Some(turn);
}

type BeforeNextAttempt = Pin<Box<dyn Future<Output = ()> + Send>>;

impl<K, Req, R, E> Policy<Tracked<Req, R::Replayed>, Attempt<R>, Error<E>> for FailoverPolicy<K>
where
    K: CloneRequest<Req>,
    R: ReadableResponse + Send + 'static,
    R::Replayed: Send + 'static,
{
    type Future = BeforeNextAttempt;

    fn retry(
        &mut self,
        request: &mut Tracked<Req, R::Replayed>,
        result: &mut Result<Attempt<R>, Error<E>>,
    ) -> Option<Self::Future> {
        match result {
            Ok(attempt) => match attempt.spoke_against().cloned() {
                Some(limited) => self.fail_over(limited, request, result),
                None => {
                    self.shared.budget.deposit();
                    None
                }
            },
            Err(Error::NoKeyAvailable(_)) => self.find_key_or_give_back(request, result),
            Err(_) => None,
        }
    }

    fn clone_request(&mut self, tracked: &Tracked<Req, R::Replayed>) -> Option<Tracked<Req, R::Replayed>> {
        self.keep(tracked)
    }
}
