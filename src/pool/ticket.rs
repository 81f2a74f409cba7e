//! What a request took of its key's limit, until the end of the response's body.

use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use super::{
    in_flight::InFlight,
    key::Key,
    scoped::{Picked, Scoped},
    scopes::WORTH_SHARING,
};
use crate::{
    lending::Token,
    limit::{Answered, Limit, NEVER, Remaining, Rest, Taken, nanos},
};

/// No request uses more tokens: a larger number comes from a subtraction below zero, in 32 or 64 bits.
const MOST_TOKENS: u64 = 1_000_000_000;

/// Dropped without an answer, it gives back what nobody knows to be used. Dropped after that, it ends the request.
#[derive(Debug)]
pub(crate) struct Ticket {
    scoped: Arc<Scoped>,
    slot: u32,
    stage: Stage,
    /// `None` if the key had no limit in its scope when it was picked.
    taken: Option<Taken>,
    /// Held until the request has ended.
    place: Option<InFlight>,
    /// The tokens that the request used, as far as the caller has said.
    used: Option<u64>,
    /// The token of another process that the request uses: then that process counts it, not the key's limit here.
    token: Option<Box<Token>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// There is no answer yet.
    Sent,
    /// There is the head of a response.
    HasHead,
    /// Nothing counts as in flight any more.
    Ended,
}

/// What the head of a response says of a request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Head<'a> {
    /// Whether the service refused the request for its limit.
    pub(crate) is_limited: bool,
    /// Whether the request failed otherwise: then it used no tokens.
    pub(crate) is_error: bool,
    pub(crate) wait: Option<Duration>,
    pub(crate) said: &'a Remaining,
}

impl Ticket {
    pub(crate) fn new(scoped: Arc<Scoped>, Picked { slot, taken, place, token }: Picked) -> Self {
        Self { scoped, slot: slot as u32, stage: Stage::Sent, taken, place, used: None, token }
    }

    pub(crate) fn key(&self) -> &Arc<Key> {
        self.scoped.key(self.slot as usize)
    }

    pub(crate) fn is_probe(&self) -> bool {
        self.taken.is_some_and(|taken| taken.is_probe)
    }

    /// The request was not sent.
    pub(crate) fn put_back(mut self) {
        self.stage = Stage::Ended;
        if let Some(taken) = &self.taken {
            let now = self.scoped.now();
            if let Some(token) = self.token.take() {
                self.scoped.common.borrowing.lock_stock().add(*token);
                return self.scoped.common.waiting.look_again();
            }
            self.limit(now).put_back(taken, now);
            self.refresh(now);
        }
    }

    /// The service answered. If it refused the request for its limit, the limit rests.
    pub(crate) fn answered(&mut self, head: Head<'_>) {
        if self.stage != Stage::Sent {
            return;
        }
        let now = self.scoped.now();
        if head.is_limited {
            self.scoped.count_refused();
        }
        let has_body = !head.is_limited && !head.is_error && self.lasts_until_the_end(now);
        self.stage = if has_body { Stage::HasHead } else { Stage::Ended };
        match self.token.is_some() {
            true => self.report_answer(head, now),
            false => self.note_answer(head, has_body, now),
        }
        if let Some(taken) = self.taken.as_mut().filter(|_| head.is_limited) {
            // Given back with the refusal: what the caller says afterwards is all that counts.
            taken.tokens = 0;
        }
        if !has_body {
            // Last: that wakes others.
            self.place = None;
        }
    }

    /// Whether the end of the body makes a difference.
    fn lasts_until_the_end(&self, now: u64) -> bool {
        let lasts = |taken: &Taken| match self.token {
            // Its owner counts a loan as in flight for some seconds, however long its request takes.
            Some(_) => taken.tokens != 0,
            None => self.limit(now).lasts_until_the_end(taken),
        };
        self.place.is_some() || self.taken.as_ref().is_some_and(lasts)
    }

    /// Tells the owner of the limit what became of a request that used a token of it.
    fn report_answer(&mut self, Head { is_limited, is_error, wait, said }: Head<'_>, now: u64) {
        let common = &self.scoped.common;
        let wait = wait.map(|wait| wait.min(self.scoped.longest_wait()));
        if let Some((token, taken)) = self.token.as_ref().zip(self.taken) {
            common.borrowing.answered(token, taken.at, is_limited, wait, said, now);
        }
        if is_error && !is_limited {
            self.count_tokens(self.used.unwrap_or(0), now);
        }
        if let Some(wait) = wait.filter(|_| is_limited) {
            // Until the owner hears of it, and for requests that wait for no owner.
            self.limit(now).rest_until(now.saturating_add(nanos(wait)));
            self.share_rest(Rest::RateLimited, Some(wait));
        }
        self.scoped.common.waiting.look_again();
        self.note_organisation(said);
    }

    fn note_answer(&mut self, head: Head<'_>, has_body: bool, now: u64) {
        let Head { is_limited, is_error, wait, said } = head;
        match self.taken {
            Some(taken) => {
                if self.scoped.learns() {
                    self.learn(&taken, head, has_body, now);
                } else {
                    self.limit(now).answered(&taken, is_limited, has_body, now);
                }
                if is_error && !is_limited {
                    self.count_tokens(self.used.unwrap_or(0), now);
                }
            }
            None if is_limited => {}
            None => return,
        }
        if let Some(tokens) = said.tokens {
            self.scoped.common.tokens_are_limited(tokens.limit as u64);
        }
        if is_limited && !self.scoped.learns() {
            self.rest_for(Rest::RateLimited, wait, now);
        } else if let Some(wait) = wait.filter(|_| is_limited) {
            // What the pool has learned itself is no rest of the service's.
            self.share_rest(Rest::RateLimited, Some(wait.min(self.scoped.longest_wait())));
        }
        self.refresh(now);
        self.note_organisation(said);
    }

    fn note_organisation(&self, said: &Remaining) {
        if said.organisation != 0 && self.scoped.learns() {
            self.scoped.note_organisation(self.key(), said.organisation);
        }
    }

    /// The service refused the request because a quota of its scope is used up: the limit rests. That says nothing of
    /// the rate that the service allows, so the pool does not slow down.
    pub(crate) fn exhausted(&mut self, wait: Option<Duration>) {
        let now = self.scoped.now();
        self.rest_for(Rest::Exhausted, wait, now);
        // Afterwards: it wakes others, which must find the limit closed.
        let said = &Remaining::default();
        self.answered(Head { is_limited: false, is_error: true, wait: None, said });
        self.refresh(now);
    }

    /// An error within the response's body says that the key's limit in the scope of the request rests.
    pub(crate) fn rest(&self, reason: Rest, wait: Option<Duration>) {
        let now = self.scoped.now();
        self.rest_for(reason, wait, now);
        self.refresh(now);
    }

    fn rest_for(&self, reason: Rest, wait: Option<Duration>, now: u64) {
        let rest = self.scoped.cooldown(reason, wait);
        let until = rest.map_or(NEVER, |rest| now.saturating_add(nanos(rest)));
        // The key may have got its limit since, in another snapshot.
        self.scoped.in_newest(|newest| match newest.slot_of(self.key()) {
            Some(slot) => newest.limit(slot, now).rest_until(until),
            None => self.limit(now).rest_until(until),
        });
        if self.rests_apart() {
            self.share_rest(reason, rest);
        }
    }

    /// Has other processes, and the next one here, know of a rest that the service asked for.
    fn share_rest(&self, reason: Rest, rest: Option<Duration>) {
        if rest.is_none_or(|rest| rest >= WORTH_SHARING) {
            self.key().rest_in_scope(&self.scoped.common.name_of_rests(), reason, rest);
        }
    }

    /// Whether the request has its answer, and is in flight until its body ends.
    pub(crate) fn has_body(&self) -> bool {
        self.stage == Stage::HasHead
    }

    /// The request has used so many tokens, beside those that were said before.
    ///
    /// In flight, it counts for what it reserved at least: there may be more to come.
    pub(crate) fn used(&mut self, tokens: u64) {
        let used = self.used.unwrap_or(0).saturating_add(tokens);
        if used > MOST_TOKENS {
            // It would close the key for years.
            tracing::debug!(key = %self.key().id, tokens, "usage ignored: no request uses so many tokens");
            return;
        }
        self.used = Some(used);
        // The owner of a token is told once, when the request has ended.
        let counts_now = self.token.is_none() && self.taken.is_some_and(|taken| used > taken.tokens);
        if self.stage == Stage::Ended || counts_now {
            let now = self.scoped.now();
            self.count_tokens(used, now);
            self.refresh(now);
        }
    }

    /// The response's body has ended. If it was dropped before its end, and nobody said what the request used, half of its
    /// tokens are given back: its input was used, and the service may write no further.
    pub(crate) fn body_ended(&mut self, is_whole: bool) {
        self.end_body(|reserved| if is_whole { reserved } else { reserved.div_ceil(2) });
    }

    /// The response's body began with an error: the service refused the request after all. All tokens are given back.
    pub(crate) fn body_refused(&mut self) {
        self.end_body(|_| 0);
    }

    fn end_body(&mut self, unsaid: impl FnOnce(u64) -> u64) {
        if self.stage != Stage::HasHead {
            return;
        }
        self.stage = Stage::Ended;
        if let Some(taken) = self.taken {
            let now = self.scoped.now();
            if self.token.is_none() {
                self.limit(now).body_ended();
            }
            self.count_tokens(self.used.unwrap_or_else(|| unsaid(taken.tokens)), now);
            self.refresh(now);
        }
        self.place = None;
    }

    /// Whether a refusal rests the limit alone. In a pool that does not learn, a refused request without a scope rests the
    /// whole key, and with it the other keys of its quota group.
    pub(crate) fn rests_apart(&self) -> bool {
        self.scoped.learns() || self.scoped.scope().is_some()
    }

    fn limit(&self, now: u64) -> &Arc<Limit> {
        self.scoped.limit(self.slot as usize, now)
    }

    fn count_tokens(&mut self, used: u64, now: u64) {
        let Self { scoped, slot, taken, token, .. } = self;
        match (taken, token) {
            (Some(taken), None) => scoped.limit(*slot as usize, now).correct_tokens(taken, used, now),
            (Some(taken), Some(token)) if taken.tokens != used => {
                taken.tokens = used;
                scoped.common.borrowing.uses(token, used);
            }
            _ => {}
        }
    }

    fn learn(&self, taken: &Taken, head: Head<'_>, has_body: bool, now: u64) {
        let Head { is_limited, wait, said, .. } = head;
        let scoped = &self.scoped;
        let wait = wait.map(|wait| wait.min(scoped.longest_wait()));
        let (keys, waiting) = (scoped.count_limits(), scoped.common.waiting.queued());
        let answered = Answered { is_limited, has_body, wait, now, keys, waiting };
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
        match self.stage {
            Stage::Sent if self.taken.is_some() => {
                self.stage = Stage::Ended;
                let now = self.scoped.now();
                self.count_tokens(self.used.unwrap_or(0), now);
                if self.token.is_none() {
                    self.limit(now).failed();
                }
                self.refresh(now);
            }
            Stage::HasHead => self.body_ended(true),
            Stage::Sent | Stage::Ended => {}
        }
        if let Some(used) = self.used {
            self.scoped.common.note_used(used);
        }
    }
}
