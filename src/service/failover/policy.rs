//! Whether to go again.

use std::{fmt, sync::Arc, time::Duration};

use tower::retry::budget::Budget;

use super::{attempts::History, budget::EarnedBudget, gate::Gate};
use crate::{
    key::hosts::Ruling,
    message::{ReadableResponse, RequestMessage, rule},
    pool::{KeyPool, Lease},
    service::error::Error,
    service::rotation::{BodyLimits, SpokeAgainstKey},
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
            budget: Arc::new(EarnedBudget::new(pool.clock().clone())),
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
        self.is_closed() && rule(self.pool.hosts(), request) == Ruling::Key
    }

    /// What to do after an attempt that [settled](Self::settles) nothing, of a request that can be sent again.
    pub(super) fn after<R: ReadableResponse, E>(
        &self,
        history: &mut History,
        result: &Result<R, Error<E>>,
    ) -> Next {
        match result.as_ref().ok().and_then(spoke_against) {
            Some(limited) => self.after_a_limit(history, limited),
            None if self.can_wait(history.waited) => Next::AfterWaiting,
            None => Next::Stop,
        }
    }

    /// Whether there is nothing more to do after that; what went well is paid into the budget.
    #[inline]
    pub(super) fn settles<R: ReadableResponse, E>(&self, result: &Result<R, Error<E>>) -> bool {
        match result {
            Ok(response) if spoke_against(response).is_some() => false,
            Ok(_) => {
                self.budget.deposit();
                true
            }
            Err(error) => error.no_key_available().is_none(),
        }
    }

    fn after_a_limit(&self, history: &mut History, limited: &Lease) -> Next {
        history.tried.push(limited.clone());
        history.sent += 1;
        if history.sent >= self.attempts {
            return Next::Stop;
        }
        let at_once = !self.is_closed() && self.pool.has_available();
        if !at_once && !self.can_wait(history.waited) {
            return Next::Stop;
        }
        if !self.budget.withdraw() {
            self.pool.meter().budget_is_used_up();
            tracing::debug!("failover budget used up, the limited response is passed on");
            return Next::Stop;
        }
        if at_once { Next::AtOnce } else { Next::AfterWaiting }
    }

    fn can_wait(&self, waited: Duration) -> bool {
        let left = self.wait.saturating_sub(waited);
        let next = self.pool.next_return();
        !left.is_zero() && next.is_some_and(|next| next <= left)
    }
}

/// Whether to send a request again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    Stop,
    AtOnce,
    AfterWaiting,
}

/// The key that a response speaks against, if it does.
#[inline]
pub(super) fn spoke_against<R: ReadableResponse>(response: &R) -> Option<&Lease> {
    response.extensions().get().map(|SpokeAgainstKey(lease)| lease)
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Failover")
            .field("pool", &self.pool)
            .field("attempts", &self.attempts)
            .field("wait", &self.wait)
            .finish_non_exhaustive()
    }
}

/// Decides for all requests of a layer.
#[derive(Clone, Debug)]
pub(crate) struct FailoverPolicy<K> {
    pub(super) shared: Arc<Shared>,
    pub(super) clone: K,
}
