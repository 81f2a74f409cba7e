//! The attempts of one request, one after the other.

use std::{
    future::{Future, ready},
    sync::Arc,
    time::Duration,
};

use http::StatusCode;

use super::{
    error::{Error, Refused},
    experiment::Experiment,
    failover::Resend,
    gate::Pass,
    judge::{self, Outcome},
    mode::Attempt,
    reservation,
    rotation::Rotation,
    stream_head::Watches,
    stream_watch::StreamWatch,
    trace::Trace,
};
use crate::{
    classify::{ClassifyResponse, StreamError, Verdict, decoded},
    clock::Sleep,
    limit::Traits,
    message::{JudgedResponse, RequestMessage},
    pool::{Key, Lease, NoKeyAvailable, Trials},
};

/// A client that is asked whether it is ready before each attempt.
pub(crate) trait Client<Req, R, E> {
    fn ready(&mut self) -> impl Future<Output = Result<(), E>> + Send;
    fn send(&mut self, request: Req) -> impl Future<Output = Result<R, E>> + Send;
    /// Gives back what being ready holds, such as a permit, while the request waits: the request before it may need it.
    fn release(&mut self);
}

/// A request that is on its way, and what has happened to it.
pub(crate) struct Attempts<C, M, Req, R, S>
where
    M: Attempt<Req, R>,
{
    rotation: Arc<Rotation<C, M>>,
    client: S,
    kept: Option<M::Kept>,
    /// What the request is, if its key depends on that. It then waits in the queue of its scope, not at the gate.
    traits: Option<Traits>,
    /// The key of the next attempt of such a request.
    lease: Option<Lease>,
    /// The keys that it was limited on and must not be sent with again.
    tried: Vec<Arc<Key>>,
    experiment: Experiment,
    sent: u32,
    /// Whether a 401 has had the source of its key read.
    has_asked_source: bool,
    waited: Duration,
    /// Returned with the answer of an attempt that had to wait for its turn.
    pass: Option<Pass>,
    /// The last refused response: the caller's, if no further attempt can be made.
    refused: Option<M::Response>,
    trace: Trace,
}

type Answer<R, E> = Result<R, Error<E>>;

/// An answer, and what it means.
struct Settled<A> {
    answer: A,
    outcome: Outcome,
    /// The status of an error that the answer, a stream, began with.
    status: Option<StatusCode>,
}

impl<C, M, Req, R, S> Attempts<C, M, Req, R, S>
where
    C: ClassifyResponse + Send + Sync + 'static,
    M: Attempt<Req, R> + Send + Sync + 'static,
    Req: RequestMessage,
{
    pub(crate) fn new(
        rotation: Arc<Rotation<C, M>>,
        client: S,
        traits: Option<Traits>,
        trace: Trace,
    ) -> Self {
        Self {
            rotation,
            client,
            kept: None,
            traits,
            lease: None,
            tried: Vec::new(),
            experiment: Experiment::default(),
            sent: 0,
            has_asked_source: false,
            waited: Duration::ZERO,
            pass: None,
            refused: None,
            trace,
        }
    }

    /// Sends a request that wants a key, once it is its turn.
    pub(crate) async fn run<E>(mut self, request: Req) -> Answer<M::Response, E>
    where
        S: Client<Req, R, E>,
        E: 'static,
    {
        self.kept = self.rotation.mode.keep(&request);
        if self.traits.is_some() {
            let acquired = self.acquire(false).await;
            acquired.map_err(|error| {
                let refused = self.rotation.refuse_without_key(error);
                self.trace.refused(&refused);
                refused.into_error()
            })?;
        } else if self.rotation.has_queue(None) {
            self.wait().await.map_err(|error| {
                self.trace.refused(&Refused::NoKeyAvailable(error));
                Error::NoKeyAvailable(error)
            })?;
        }
        self.send_until_settled(request).await
    }

    /// Goes on after the first attempt, which ended so.
    pub(crate) async fn go_on<E>(
        mut self,
        kept: Option<M::Kept>,
        mut lease: Lease,
        answer: Answer<M::Response, E>,
        outcome: Option<Outcome>,
    ) -> Answer<M::Response, E>
    where
        S: Client<Req, R, E>,
        E: 'static,
    {
        self.kept = kept;
        let settled = match outcome {
            Some(outcome) => Settled { answer, outcome, status: None },
            None => self.settle(&mut lease, answer).await,
        };
        match self.after(lease, settled).await {
            Next::Settled(answer) => answer,
            Next::Again(request) => self.send_until_settled(request).await,
        }
    }

    async fn send_until_settled<E>(mut self, mut request: Req) -> Answer<M::Response, E>
    where
        S: Client<Req, R, E>,
        E: 'static,
    {
        loop {
            if let Err(error) = self.client.ready().await {
                self.lease.take().into_iter().for_each(Lease::put_back);
                return Err(Error::Inner(error));
            }
            let lease = self.lease.take().or_else(|| self.pick());
            let lease = lease.ok_or_else(|| self.rotation.no_key());
            let mut lease = match lease.and_then(|lease| self.rotation.insert_key(lease, &mut request)) {
                Ok(lease) => lease,
                Err(refused) => {
                    self.client.release();
                    let may_wait = refused.is_no_key() && self.experiment.has_not_begun();
                    if may_wait && self.rotation.can_wait(self.waited) && self.wait().await.is_ok() {
                        continue;
                    }
                    self.trace.refused(&refused);
                    return self.refused.ok_or_else(|| refused.into_error());
                }
            };
            self.trace.sends(&lease);
            let answer = self.client.send(request).await;
            let answer = answer.map(M::untouched).map_err(Error::Inner);
            let settled = self.settle(&mut lease, answer).await;
            match self.after(lease, settled).await {
                Next::Settled(answer) => return answer,
                Next::Again(again) => request = again,
            }
        }
    }

    /// The key of an attempt that does not wait for one.
    fn pick(&self) -> Option<Lease> {
        let engine = self.rotation.pool.engine();
        match self.experiment.has_not_begun() {
            true => engine.pick_besides(&self.tried, self.trials()),
            false => engine.pick_to_compare(&self.tried),
        }
    }

    /// Which keys in doubt the next attempt may try.
    fn trials(&self) -> Trials {
        match self.sent {
            0 => Trials::with_failover(
                self.kept.is_some() && self.rotation.mode.resend().is_some_and(Resend::has_failover),
            ),
            _ => Trials::No,
        }
    }

    /// Judges an answer, after reading its body if the classifier wants to see it, or the beginning of a stream.
    async fn settle<E: 'static>(
        &mut self,
        lease: &mut Lease,
        mut answer: Answer<M::Response, E>,
    ) -> Settled<Answer<M::Response, E>> {
        let is_refused = |response: &M::Response| {
            response.status() == StatusCode::UNAUTHORIZED && !judge::is_attributed(response)
        };
        if answer.as_ref().is_ok_and(is_refused) && self.is_outdated(lease).await {
            let outcome = self.rotation.judge.settle_outdated(lease, &mut answer);
            self.trace.answered(lease, &answer);
            return Settled { answer, outcome, status: None };
        }
        if M::SEES_BODIES
            && let Ok(response) = &answer
            && let Some(watches) = self.rotation.watches(response)
        {
            return self.settle_stream(lease, answer, watches).await;
        }
        let mut beginning = None;
        if let (Ok(response), Some(most)) = (&answer, self.rotation.error_bodies)
            && self.rotation.judge.wants_body(response)
            && let Ok(response) = answer
        {
            let (response, read) = M::read(response, most, self.time_for_a_body()).await;
            beginning = Some(decoded(response.headers(), read, most));
            answer = Ok(response);
        }
        let outcome = self.rotation.judge.settle(lease, &mut answer, beginning.as_deref(), |_, _| {});
        self.trace.answered(lease, &answer);
        Settled { answer, outcome, status: None }
    }

    /// Judges the head of a stream, and holds it until its first content. An error before that is judged as a response. Of a
    /// gRPC call, trailers are such an error, if they are there at once.
    async fn settle_stream<E: 'static>(
        &mut self,
        lease: &mut Lease,
        mut answer: Answer<M::Response, E>,
        watches: Watches,
    ) -> Settled<Answer<M::Response, E>> {
        let rotation = self.rotation.clone();
        // A trial succeeds with the first content.
        let is_trial = lease.take_trial();
        let outcome = rotation.judge.settle(lease, &mut answer, None, |_, _| {});
        let mut response = match answer {
            Ok(response) if outcome == Outcome::Answered => response,
            answer => {
                self.trace.answered(lease, &answer);
                return Settled { answer, outcome, status: None };
            }
        };
        let watch = StreamWatch::new(rotation.clone(), watches, lease, &mut response);
        let watch = Arc::new(watch);
        let clock = rotation.pool.clock();
        let time_over = match watches {
            Watches::Events(limits) => clock.sleep_until(clock.now().saturating_add(limits.time)),
            Watches::Trailers => Box::pin(ready(())),
        };
        let response = M::hold(response, watch.clone(), watch.end(), time_over).await;
        let error = watch.release();
        let verdict = error.as_ref().map(|error| watch.refuse(error));
        let forbids_retry = error.as_ref().is_some_and(StreamError::forbids_retry);
        let status = error.map(|error| error.status);
        if is_trial && shows_that_key_serves(verdict, status) {
            lease.key.serves();
        }
        self.trace.says_answer(lease, Some(status.unwrap_or_else(|| response.status()).as_u16()));
        let outcome = match (verdict, status) {
            (Some(Verdict::Nothing), Some(status)) if judge::is_without_capacity(status) => {
                Outcome::Overloaded
            }
            (Some(Verdict::Nothing) | None, _) => Outcome::Answered,
            (Some(_), _) if forbids_retry => Outcome::KeyRested,
            (Some(Verdict::Refused), _) => Outcome::Unclear,
            (Some(_), _) => Outcome::Refused,
        };
        Settled { answer: Ok(response), outcome, status }
    }

    /// Whether the key that a service refused has another secret by now. A request asks once, and only if it can be sent
    /// again.
    async fn is_outdated(&mut self, lease: &Lease) -> bool {
        let has_failover = self.rotation.mode.resend().is_some_and(Resend::has_failover);
        if self.kept.is_none() || !has_failover || std::mem::replace(&mut self.has_asked_source, true) {
            return false;
        }
        let pool = &self.rotation.pool;
        pool.engine().is_outdated(&lease.key, &**pool.clock()).await
    }

    async fn after<E>(
        &mut self,
        mut lease: Lease,
        settled: Settled<Answer<M::Response, E>>,
    ) -> Next<Req, Answer<M::Response, E>> {
        let Settled { mut answer, outcome, status } = settled;
        if let (Some(pass), true) = (self.pass.take(), answer.is_ok()) {
            pass.answered(!matches!(outcome, Outcome::Answered | Outcome::Unclear));
        }
        if let Ok(response) = &mut answer {
            reservation::keep(&mut lease, response, M::tell_end);
        }
        let rotation = self.rotation.clone();
        let (Some(kept), Some(resend)) = (self.kept.take(), rotation.mode.resend()) else {
            return Next::Settled(answer);
        };
        let engine = rotation.pool.engine();
        if outcome == Outcome::Answered {
            resend.deposit();
            if let Ok(response) = &answer {
                self.experiment.answered(engine, status.unwrap_or_else(|| response.status()));
            }
        }
        let response = match answer {
            Ok(response) if matches!(outcome, Outcome::Refused | Outcome::Unclear | Outcome::Overloaded) => {
                response
            }
            answer => return Next::Settled(answer),
        };
        let is_unclear = outcome == Outcome::Unclear;
        if is_unclear
            && !self.experiment.refused(engine, &lease.key, status.unwrap_or_else(|| response.status()))
        {
            return Next::Settled(Ok(response));
        }
        // After a wait for the same key, neither is known better.
        let needs_another = outcome == Outcome::Overloaded || !self.experiment.has_not_begun();
        let Some(mut request) = rotation.mode.again(&kept) else { return Next::Settled(Ok(response)) };
        let Some(when) = self.when_again(lease, resend, needs_another) else {
            return Next::Settled(Ok(response));
        };
        // A stream may stay open behind its error: what is there already is read.
        let time_over = if status.is_some() { Box::pin(ready(())) } else { self.time_for_a_body() };
        let (response, _) = M::read(response, resend.drain, time_over).await;
        self.trace.picks_again();
        if when == When::AfterWaiting {
            let has_turn = if self.traits.is_some() {
                self.acquire(needs_another).await.is_ok()
            } else {
                self.wait().await.is_ok()
            };
            // The body may have been consumed meanwhile.
            match rotation.mode.again(&kept).filter(|_| has_turn) {
                Some(again) => request = again,
                None => {
                    self.lease.take().into_iter().for_each(Lease::put_back);
                    return Next::Settled(Ok(response));
                }
            }
        }
        rotation.pool.meter().failed_over();
        self.kept = Some(kept);
        self.refused = Some(response);
        Next::Again(request)
    }

    /// When a refused request is sent again, if it is.
    fn when_again(&mut self, refused_with: Lease, resend: &Resend, needs_another: bool) -> Option<When> {
        let rotation = &self.rotation;
        self.tried.push(refused_with.key);
        self.sent += 1;
        if self.sent >= resend.attempts {
            return None;
        }
        let engine = rotation.pool.engine();
        if needs_another && !engine.has_available_besides(&self.tried) {
            return None;
        }
        let at_once = self.traits.is_none() && !rotation.has_queue(None) && engine.has_available();
        if self.traits.is_none() && !at_once && (needs_another || !rotation.can_wait(self.waited)) {
            return None;
        }
        if !resend.withdraw() {
            rotation.pool.meter().budget_is_used_up();
            tracing::debug!("retry budget used up: the refused response is returned");
            return None;
        }
        Some(if at_once { When::AtOnce } else { When::AfterWaiting })
    }

    /// Gets a key that has room in the request's scope, at once or after a wait.
    async fn acquire(&mut self, needs_another: bool) -> Result<(), NoKeyAvailable> {
        let Some(traits) = &self.traits else { return Ok(()) };
        let pool = &self.rotation.pool;
        // Another key first: those that refused the request may seem to have room.
        if !self.tried.is_empty() {
            let is_experiment = !self.experiment.has_not_begun();
            if let Some(lease) = pool.engine().pick_besides_for(traits, &self.tried, is_experiment) {
                self.lease = Some(lease);
                return Ok(());
            }
            if needs_another {
                return Err(pool.no_key());
            }
        }
        let before = pool.clock().now();
        let limit = self.rotation.wait.saturating_sub(self.waited);
        let acquired =
            pool.engine().acquire(traits, limit, self.sent > 0, self.trials(), &**pool.clock()).await;
        let waited = pool.clock().now().saturating_sub(before);
        self.waited += waited;
        self.trace.waited(waited);
        self.lease = Some(acquired?);
        Ok(())
    }

    /// Waits for a turn, for as long as is left of the request's limit.
    async fn wait(&mut self) -> Result<(), NoKeyAvailable> {
        // A request that still held its pass would wait for itself.
        self.pass = None;
        let pool = &self.rotation.pool;
        let before = pool.clock().now();
        let limit = self.rotation.wait.saturating_sub(self.waited);
        let turn = self.rotation.gate.clone().enter(pool, limit).await;
        let waited = pool.clock().now().saturating_sub(before);
        self.waited += waited;
        self.trace.waited(waited);
        pool.meter().waited(waited);
        // After a wait, any key will do whose cooldown is over.
        self.tried.clear();
        self.pass = Some(turn?);
        Ok(())
    }

    /// Completes when the time to read a body from now on is over.
    fn time_for_a_body(&self) -> Sleep {
        let clock = self.rotation.pool.clock();
        clock.sleep_until(clock.now().saturating_add(Duration::from_secs(1)))
    }
}

/// Whether a stream shows that the service accepts its key: by content, or by an error that is not about the key.
fn shows_that_key_serves(verdict: Option<Verdict>, status: Option<StatusCode>) -> bool {
    match verdict {
        None | Some(Verdict::RateLimited { .. } | Verdict::ScopeExhausted { .. }) => true,
        Some(Verdict::Nothing) => status.is_none_or(judge::has_served),
        Some(_) => false,
    }
}

/// What comes after an attempt.
enum Next<Req, A> {
    Settled(A),
    Again(Req),
}

#[derive(PartialEq, Eq)]
enum When {
    AtOnce,
    AfterWaiting,
}
