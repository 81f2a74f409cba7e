//! Prepares requests: decides whether a request gets a key, and puts one in.

use std::{fmt, sync::Arc, time::Duration};

use super::{
    error::Refused,
    gate::Gate,
    judge::Judge,
    stream_head::{self, StreamHead, Watches},
};
use crate::{
    classify::{ClassifyResponse, TooManyRequests},
    key::{
        InjectError,
        hosts::{NoKeyBecause, Ruling},
    },
    limit::Traits,
    message::{JudgedResponse, RequestMessage},
    pool::{KeyPool, Lease, NoKeyAvailable, Trials},
};

/// A layer's pool and options.
#[derive(Clone)]
pub struct Rotation<C, M> {
    pub(crate) pool: KeyPool,
    pub(crate) judge: Judge<C>,
    /// How long a request may wait for a key in all.
    pub(crate) wait: Duration,
    pub(crate) gate: Arc<Gate>,
    /// How many bytes are read of an error body that the classifier wants to see.
    pub(crate) error_bodies: Option<usize>,
    pub(crate) stream_head: Option<StreamHead>,
    pub(crate) mode: M,
}

impl<M> Rotation<TooManyRequests, M> {
    pub(crate) fn new(pool: &KeyPool, mode: M) -> Self {
        Self {
            pool: pool.clone(),
            judge: Judge { classifier: TooManyRequests::new(), expose_key: false },
            wait: Duration::ZERO,
            gate: Arc::new(Gate::new()),
            error_bodies: None,
            stream_head: None,
            mode,
        }
    }
}

impl<C, M> Rotation<C, M> {
    pub(crate) fn classify<D>(self, classifier: D) -> Rotation<D, M> {
        let Self { pool, judge: Judge { expose_key, .. }, wait, gate, error_bodies, stream_head, mode } =
            self;
        let judge = Judge { classifier, expose_key };
        Rotation { pool, judge, wait, gate, error_bodies, stream_head, mode }
    }

    pub(crate) fn map_mode<N>(self, map: impl FnOnce(M) -> N) -> Rotation<C, N> {
        let Self { pool, judge, wait, gate, error_bodies, stream_head, mode } = self;
        Rotation { pool, judge, wait, gate, error_bodies, stream_head, mode: map(mode) }
    }

    /// Whether a request gets a key.
    #[inline(always)]
    pub(crate) fn wants_key<Req: RequestMessage>(&self, request: &Req) -> Result<bool, Box<Refused>> {
        let hosts = self.pool.hosts();
        if hosts.allows_all() && request.is_https() {
            return Ok(true);
        }
        // Costs more: the host has to be found.
        match hosts.rule(request.destination()) {
            Ruling::Key => Ok(true),
            Ruling::NoKey(because) => {
                self.sent_without_key(request, because);
                Ok(false)
            }
            Ruling::RefuseCleartext => Err(refuse_cleartext(request)),
        }
    }

    /// Picks a key for a request.
    ///
    /// The refusal is boxed to keep the usual result small.
    #[inline(always)]
    pub(crate) fn pick(&self, trials: Trials) -> Result<Lease, Box<Refused>> {
        self.pool.engine().pick(trials).ok_or_else(|| self.no_key())
    }

    /// Picks a key for a request that is served by some keys only.
    pub(crate) fn pick_for(&self, traits: &Traits, trials: Trials) -> Result<Lease, Box<Refused>> {
        let engine = self.pool.engine();
        engine.pick_for(traits, trials).map_err(|until| self.refuse_without_key(engine.no_room(until)))
    }

    /// Puts a key into a request that wants one.
    #[inline(always)]
    pub(crate) fn insert_key<Req: RequestMessage>(
        &self,
        lease: Lease,
        request: &mut Req,
    ) -> Result<Lease, Box<Refused>> {
        let credentials = lease.credentials();
        credentials.insert_into(request.headers_mut());
        let parameters = credentials.query_parameters();
        if !parameters.is_empty()
            && let Err(error) = request.set_query(parameters)
        {
            lease.put_back();
            return Err(refuse(error));
        }
        Ok(lease)
    }

    /// Whether a request has to queue for a key.
    #[inline]
    pub(crate) fn has_queue(&self, traits: Option<&Traits>) -> bool {
        !self.wait.is_zero()
            && match traits {
                None => self.gate.is_closed(&self.pool),
                Some(traits) => self.pool.engine().has_waiting(traits),
            }
    }

    /// Whether a request that got no key may wait for one.
    pub(crate) fn may_queue(&self, traits: Option<&Traits>) -> bool {
        if traits.is_some() { !self.wait.is_zero() } else { self.has_queue(None) }
    }

    /// The traits of a request whose key depends on what the request is: those that describe it, or those in its extensions.
    #[inline(always)]
    pub(crate) fn needed<Req: RequestMessage>(
        &self,
        described: Option<Traits>,
        request: &Req,
    ) -> Option<Traits> {
        let traits = described.or_else(|| request.traits());
        traits.or_else(|| self.pool.engine().chooses().then(Traits::new))
    }

    /// Whether a source may have another secret for the key of a request that was refused.
    #[cold]
    pub(crate) fn may_be_outdated(&self, lease: &Lease) -> bool {
        self.pool.engine().may_be_outdated(&lease.key)
    }

    /// Whether a key is back before a request that has waited that long gives up.
    pub(crate) fn can_wait(&self, waited: Duration) -> bool {
        let left = self.wait.saturating_sub(waited);
        !left.is_zero() && self.pool.next_return().is_some_and(|next| next <= left)
    }

    #[cold]
    pub(crate) fn no_key(&self) -> Box<Refused> {
        self.refuse_without_key(self.pool.no_key())
    }

    #[cold]
    pub(crate) fn refuse_without_key(&self, error: NoKeyAvailable) -> Box<Refused> {
        self.pool.meter().no_key();
        Box::new(Refused::NoKeyAvailable(error))
    }

    #[cold]
    fn sent_without_key<Req: RequestMessage>(&self, request: &Req, because: NoKeyBecause) {
        self.pool.meter().unkeyed.sent(request.destination().host, because);
    }
}

#[cold]
fn refuse(error: InjectError) -> Box<Refused> {
    Box::new(Refused::Inject(error))
}

#[cold]
fn refuse_cleartext<Req: RequestMessage>(request: &Req) -> Box<Refused> {
    refuse(InjectError::cleartext(request.destination().host.unwrap_or_default()))
}

impl<C: ClassifyResponse, M> Rotation<C, M> {
    /// Whether the bodies of some responses are read before these are judged, in a mode that can see bodies.
    #[inline]
    pub(crate) fn reads_bodies(&self) -> bool {
        self.error_bodies.is_some() || self.stream_head.is_some() || self.judge.classifier.wants_trailers()
    }

    /// Whether the body of this response is read, for such a layer.
    pub(crate) fn reads<R: JudgedResponse>(&self, response: &R) -> bool {
        self.error_bodies.is_some() && self.judge.wants_body(response) || self.watches(response).is_some()
    }

    /// What of a response is looked at beyond its head, if it is no error.
    pub(super) fn watches<R: JudgedResponse>(&self, response: &R) -> Option<Watches> {
        let events = self.stream_head.filter(|_| stream_head::is_stream(response)).map(Watches::Events);
        let trailers = || self.judge.classifier.wants_trailers() && stream_head::is_call(response);
        events.or_else(|| trailers().then_some(Watches::Trailers))
    }
}

impl<C, M> fmt::Debug for Rotation<C, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rotation").field("pool", &self.pool).field("wait", &self.wait).finish_non_exhaustive()
    }
}
