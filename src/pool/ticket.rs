//! What a request took of its key's limit, until its answer.

use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use super::{
    in_flight::InFlight,
    key::Key,
    scoped::{Picked, Scoped},
};
use crate::{
    lending::Token,
    limit::{Answered, Limit, NEVER, Remaining, Taken, nanos},
};

/// Dropped without an answer, it gives back what nobody knows to be used.
#[derive(Debug)]
pub(crate) struct Ticket {
    scoped: Arc<Scoped>,
    slot: u32,
    /// `None` if the key had no limit in its scope when it was picked, and once the request has ended.
    taken: Option<Taken>,
    /// Held until the request has ended.
    _place: Option<InFlight>,
    /// The token of another process that the request uses: then the key's limit here has nothing to do with it.
    token: Option<Token>,
}

impl Ticket {
    pub(crate) fn new(scoped: Arc<Scoped>, Picked { slot, taken, place, token }: Picked) -> Self {
        Self { scoped, slot: slot as u32, taken, _place: place, token }
    }

    pub(crate) fn key(&self) -> &Arc<Key> {
        self.scoped.key(self.slot as usize)
    }

    pub(crate) fn is_probe(&self) -> bool {
        self.taken.is_some_and(|taken| taken.is_probe)
    }

    /// The request was not sent.
    pub(crate) fn put_back(mut self) {
        if let Some(taken) = self.taken.take() {
            let now = self.scoped.now();
            if let Some(token) = self.token {
                self.scoped.common.borrowing.lock_stock().add(token);
                return self.scoped.common.waiting.look_again();
            }
            self.limit(now).put_back(&taken, now);
            self.refresh(now);
        }
    }

    /// The service answered. If it refused the request for its limit, the limit rests.
    pub(crate) fn answered(mut self, is_limited: bool, wait: Option<Duration>, said: &Remaining) {
        let now = self.scoped.now();
        if is_limited {
            self.scoped.count_refused();
        }
        let taken = self.taken.take();
        if let Some((token, taken)) = self.token.zip(taken) {
            let common = &self.scoped.common;
            let wait = wait.map(|wait| wait.min(self.scoped.longest_wait()));
            common.borrowing.answered(&token, taken.at, is_limited, wait, said, now);
            return common.waiting.look_again();
        }
        match taken {
            Some(taken) if self.scoped.learns() => self.learn(&taken, is_limited, wait, said, now),
            Some(taken) => self.limit(now).ended(&taken, is_limited, now),
            None if is_limited => {}
            None => return,
        }
        if is_limited && !self.scoped.learns() {
            let rest = self.scoped.cooldown(wait);
            let until = rest.map_or(NEVER, |rest| now.saturating_add(nanos(rest)));
            // The key may have got its limit since, in another snapshot.
            self.scoped.in_newest(|newest| match newest.slot_of(self.key()) {
                Some(slot) => newest.limit(slot, now).rest_until(until),
                None => self.limit(now).rest_until(until),
            });
        }
        self.refresh(now);
        if said.organisation != 0 && self.scoped.learns() {
            self.scoped.note_organisation(self.key(), said.organisation);
        }
    }

    /// Whether a refusal rests the limit alone. In a pool that does not learn, a refused request without a scope rests the
    /// whole key, and with it the other keys of its quota group.
    pub(crate) fn rests_apart(&self) -> bool {
        self.scoped.learns() || self.scoped.scope().is_some()
    }

    fn limit(&self, now: u64) -> &Arc<Limit> {
        self.scoped.limit(self.slot as usize, now)
    }

    fn learn(&self, taken: &Taken, is_limited: bool, wait: Option<Duration>, said: &Remaining, now: u64) {
        let scoped = &self.scoped;
        let wait = wait.map(|wait| wait.min(scoped.longest_wait()));
        let (keys, waiting) = (scoped.count_limits(), scoped.common.waiting.queued());
        let answered = Answered { is_limited, wait, now, keys, waiting };
        let is_caught = {
            let mut sharing = scoped.lock_sharing();
            let is_caught = self.limit(now).learn(taken, said, answered, &mut sharing);
            scoped.common.is_mixed.store(sharing.is_mixed, Relaxed);
            is_caught
        };
        if taken.is_probe {
            let processes = scoped.common.borrowing.processes();
            scoped.lock_probing().answered(is_limited, now, processes);
        }
        if is_caught {
            tracing::info!(scope = scoped.scope(), "limit headers contradict the service's answers: ignored");
            scoped.in_newest(|newest| newest.distrust(now));
        }
    }

    fn refresh(&self, now: u64) {
        self.scoped.in_newest(|newest| {
            // Of a key that has left the pool, others of its quota group may be there.
            let slot = newest.slot_of(self.key());
            if let Some(slot) = slot.or_else(|| newest.slot_of_limit(self.limit(now))) {
                newest.refresh_limit(slot, now);
                newest.common.waiting.look_again();
            }
        });
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if let Some(taken) = self.taken.take().filter(|_| self.token.is_none()) {
            let now = self.scoped.now();
            self.limit(now).failed(&taken, now);
            self.refresh(now);
        }
    }
}
