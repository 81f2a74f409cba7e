//! Shares a pool's limits with the other processes over the same store: owns some, lends tokens of them, borrows others.
//!
//! Once a second, [`Lender::hear`] takes the messages of the others, and [`Lender::tick`] makes this process's own. Both
//! run in one task; requests only see which limits are elsewhere, and which tokens there are.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap},
    iter,
    sync::Arc,
};

use super::{
    engine::Engine,
    scoped::Scoped,
    shared::{HORIZON, Shared, Tokens, expected},
};
use crate::{
    lending::{
        Back, Item, Loan, Message, Origin, Part, Peers, Report, Row, Says, Spent, Token, Used, left_to_spare,
        shares,
    },
    limit::{Answered, Limit, NEVER, Taken, nanos},
    store::Heard,
};

const SECOND: u64 = 1_000_000_000;

/// How long a token may be used, while tokens are plenty, and while they are scarce.
const LIVES: u64 = 6 * SECOND;
const LIVES_IF_SCARCE: u64 = 3 * SECOND;

/// A loan that did not come back by then, after its end, was used.
const SETTLED: u64 = 4 * SECOND;

/// Answers that are older than a request with a token say nothing of it. They come within this time.
const ANSWERED: u64 = 2 * SECOND;

/// So long after the end of a loan the borrower may say what became of the request: an answer may take minutes.
const HEARD_OF: u64 = 120 * SECOND;

/// The most tokens of a scope that are set aside at once: three messages carry them, of 65,535 items at most.
const MOST_LOANS: usize = 10_000;

/// Who has not used a scope for so many seconds leaves its limits to the others.
const LEFT: u64 = 60;

/// The store is away when it has not answered for so long: others would take this process for ended.
const AWAY: u64 = 4 * SECOND;

pub(crate) struct Lender {
    me: u64,
    /// The number of the newest message.
    number: u32,
    loans: u32,
    peers: Peers,
    scopes: HashMap<u64, Shared>,
    lent: HashMap<u32, Lent>,
    /// When messages were last read.
    read_at: u64,
    is_store_away: bool,
    says_nothing: bool,
}

/// A token that another process has.
struct Lent {
    scope: u64,
    to: u32,
    name: u32,
    limit: Arc<Limit>,
    taken: Taken,
    until: u64,
    /// When the token was used at the latest, if that is known.
    spent: Option<u64>,
    /// It counts no more as in flight.
    is_settled: bool,
}

impl Lent {
    /// Whether that process may say what became of it.
    fn is_to(&self, process: u64, scope: u64) -> bool {
        (self.to, self.scope) == (process as u32, scope)
    }

    fn spent(&mut self, now: u64) {
        if self.spent.is_none() {
            self.spent = Some(now);
            self.limit.is_spent();
        }
    }

    fn is_over(&self, now: u64) -> bool {
        let is_over = match self.spent {
            Some(spent) => spent + ANSWERED <= now,
            None => self.until + SETTLED <= now,
        };
        is_over && !self.is_settled
    }

    /// Nothing counts as in flight any more, whatever became of the request.
    fn settle(&mut self, now: u64) {
        self.spent(now);
        if !std::mem::replace(&mut self.is_settled, true) {
            self.limit.settle(&self.taken, now);
        }
    }
}

impl Lender {
    pub(crate) fn new() -> Self {
        Self {
            me: fastrand::u64(..),
            number: 0,
            loans: 0,
            peers: Peers::default(),
            scopes: HashMap::new(),
            lent: HashMap::new(),
            read_at: 0,
            is_store_away: false,
            says_nothing: true,
        }
    }

    pub(crate) fn me(&self) -> u64 {
        self.me
    }

    /// Whether there is nothing to read and nothing to say: no scope was used of late.
    pub(crate) fn is_idle(&self, engine: &Engine) -> bool {
        let is_settled = || self.lent.values().all(|lent| lent.is_settled);
        self.says_nothing && is_settled() && in_use(engine, nanos_now(engine)).is_empty()
    }

    // ---- what others say ----

    /// Takes the messages of the other processes, which were read from the store at `read_at`.
    pub(crate) fn hear(&mut self, engine: &Engine, heard: Vec<Heard>, read_at: u64) {
        let now = nanos_now(engine);
        if std::mem::take(&mut self.is_store_away) {
            self.peers.keep(now.saturating_sub(self.read_at));
            self.scopes.values().for_each(Shared::store_is_back);
        }
        self.read_at = read_at;
        let scopes = in_use(engine, now);
        let mut items = Vec::new();
        for Heard { process, age, body } in heard.into_iter().filter(|heard| heard.process != self.me) {
            self.peers.hear(process, &body, age, now, |process, scope, item| {
                items.push((process, scope, item.clone()));
            });
        }
        self.peers.forget(now);
        for (process, scope, item) in items {
            if let Some(scoped) = scopes.get(&scope) {
                self.take_in(scoped, process, scope, item, now);
            }
        }
    }

    fn take_in(&mut self, scoped: &Scoped, process: u64, scope: u64, item: Item, now: u64) {
        let me = self.me as u32;
        match item {
            Item::Loan(Loan { to, number, limit, at, until, reports }) if to == me => {
                let Some(shared) = self.scopes.get_mut(&scope).filter(|shared| shared.is_on()) else {
                    return;
                };
                shared.has_lent(process as u32, number, now);
                let origin = Origin::Lender { process: process as u32, number, reports };
                scoped.common.borrowing.lock_stock().add(Token { limit, at, until, origin });
                scoped.common.waiting.look_again();
            }
            Item::Back(Back { lender, number }) if lender == me => {
                let is_out = |lent: &&mut Lent| lent.is_to(process, scope) && !lent.is_settled;
                let Some(lent) = self.lent.get_mut(&number).filter(is_out) else { return };
                lent.spent(now);
                lent.is_settled = true;
                lent.limit.give_back(&lent.taken, now);
                refresh(scoped, lent.name, now);
            }
            Item::Used(Used { lender, number, tokens }) if lender == me => {
                let is_it = |lent: &&mut Lent| lent.is_to(process, scope);
                let Some(lent) = self.lent.get_mut(&number).filter(is_it) else { return };
                lent.limit.correct_tokens(&mut lent.taken, tokens.into(), now);
                refresh(scoped, lent.name, now);
            }
            Item::Spent(Spent { lender, before }) if lender == me => {
                let is_spent =
                    |(number, lent): &(&u32, &mut Lent)| lent.is_to(process, scope) && **number < before;
                self.lent.iter_mut().filter(is_spent).for_each(|(_, lent)| lent.spent(now));
            }
            Item::Report(report) if report.lender == me => self.learn(scoped, process, scope, report, now),
            Item::Release(release) => {
                if let Some(shared) = self.scopes.get_mut(&scope) {
                    shared.released(release);
                }
            }
            _ => {}
        }
    }

    fn learn(&mut self, scoped: &Scoped, process: u64, scope: u64, report: Report, now: u64) {
        let is_it = |lent: &&mut Lent| lent.is_to(process, scope);
        let Some(lent) = self.lent.get_mut(&report.number).filter(is_it) else { return };
        lent.spent(now);
        let answered = Answered {
            is_limited: report.is_limited,
            has_body: false,
            wait: report.wait.map(|wait| wait.min(scoped.longest_wait())),
            now,
            keys: scoped.count_limits(),
            waiting: scoped.common.waiting.queued(),
        };
        let taken = lent.taken.used_at(report.sent_at.min(now));
        let is_caught = {
            let mut sharing = scoped.lock_sharing();
            // The entry stays: the borrower may say later how many tokens the request used.
            if std::mem::replace(&mut lent.is_settled, true) {
                lent.limit.learn_late(&taken, &report.said, answered, &mut sharing)
            } else {
                lent.limit.learn(&taken, &report.said, answered, &mut sharing)
            }
        };
        if report.is_limited {
            // Given back with the refusal.
            lent.taken.tokens = 0;
        }
        if is_caught {
            scoped.distrust(now);
        }
        refresh(scoped, lent.name, now);
    }

    /// The store did not answer. When others take this process for ended, it counts on them no more.
    pub(crate) fn store_failed(&mut self, engine: &Engine) {
        let now = nanos_now(engine);
        if self.is_store_away || now.saturating_sub(self.read_at) < AWAY {
            return;
        }
        self.is_store_away = true;
        let scopes = in_use(engine, now);
        for (scope, shared) in &self.scopes {
            if let Some(scoped) = scopes.get(scope) {
                shared.store_is_away(scoped, now);
            }
        }
    }

    // ---- what this process says ----

    /// Makes this process's message; `None` if it has nothing to say.
    pub(crate) fn tick(&mut self, engine: &Engine) -> Option<Vec<u8>> {
        let now = nanos_now(engine);
        self.number += 1;
        let scopes = in_use(engine, now);
        self.settle(&scopes, now);
        self.leave(engine, now, |scope| !scopes.contains_key(&scope));
        let parts: Vec<Part> = scopes.iter().map(|(scope, scoped)| self.part(*scope, scoped, now)).collect();
        // The last one says that this process has left all scopes.
        let is_silent = parts.is_empty() && self.says_nothing;
        self.says_nothing = parts.is_empty();
        let read_before = now.saturating_sub(self.read_at);
        (!is_silent).then(|| Message { number: self.number, read_before, parts }.encode(now))
    }

    /// The last message: this process uses no scope any more.
    pub(crate) fn farewell(&mut self, engine: &Engine) -> Option<Vec<u8>> {
        self.number += 1;
        let message = Message { number: self.number, ..Message::default() };
        (!self.says_nothing).then(|| message.encode(nanos_now(engine)))
    }

    /// Goes on as if there were no other processes.
    pub(crate) fn end(&mut self, engine: &Engine) {
        let now = nanos_now(engine);
        // Nobody says any more what becomes of them.
        self.lent.drain().for_each(|(_, mut lent)| lent.settle(now));
        self.leave(engine, now, |_| true);
    }

    /// Loans that are over, and were used.
    fn settle(&mut self, scopes: &HashMap<u64, Arc<Scoped>>, now: u64) {
        self.lent.retain(|_, lent| lent.until + HEARD_OF > now || !lent.is_settled);
        for lent in self.lent.values_mut().filter(|lent| lent.is_over(now)) {
            lent.settle(now);
            if let Some(scoped) = scopes.get(&lent.scope) {
                refresh(scoped, lent.name, now);
            }
        }
    }

    fn leave(&mut self, engine: &Engine, now: u64, is_left: impl Fn(u64) -> bool) {
        let mut left: HashMap<u64, Shared> = self.scopes.extract_if(|scope, _| is_left(*scope)).collect();
        if left.is_empty() {
            return;
        }
        engine.snapshot().scopes.each(|scoped| {
            if let Some(shared) = left.get_mut(&scoped.common.name()) {
                shared.end(scoped, now);
            }
        });
    }

    fn part(&mut self, scope: u64, scoped: &Scoped, now: u64) -> Part {
        let mut said = self.peers.of_scope(scope);
        let shared = self.scopes.entry(scope).or_insert_with(|| Shared::new(scoped, now));
        shared.measure(now);
        let can_share = shared.can_share(scoped, &said, now);
        said.retain(|peer| peer.part.is_sharing);
        if !can_share || (said.is_empty() && !shared.is_on()) {
            shared.end(scoped, now);
            return shared.part(scope, self.number, Tokens::default(), now);
        }
        shared.meet(scoped, scope, &said, self.me, self.number, now);
        self.return_tokens(scope, scoped, now);
        let limits = scoped.layout.names(&scoped.keys).limits();
        let owned: Vec<_> = limits.iter().filter_map(|limit| Owned::new(scoped, *limit)).collect();
        let usual = scoped.usual_tokens();
        owned.iter().for_each(|owned| owned.limit.hold_back_lent(now));
        let first_tier = &scoped.layout.tiers()[0];
        let (preferred, spare): (Vec<_>, Vec<_>) =
            owned.into_iter().partition(|owned| first_tier.contains(&owned.slot));
        let supply = |owned: &[Owned<'_>]| {
            owned.iter().map(|owned| owned.limit.supply(usual, now, now + HORIZON)).sum()
        };
        let stock = scoped.common.borrowing.lock_stock().count_at(now + HORIZON) as f64;
        let tokens = Tokens { supply: supply(&preferred), spare: supply(&spare), stock };
        let rows = self.rows(scope, &said, tokens);
        self.lend(scope, scoped, &preferred, shares(&rows, self.me), now);
        if let Some(rows) = left_to_spare(&rows) {
            self.lend(scope, scoped, &spare, shares(&rows, self.me), now);
        }
        let number = self.number;
        let Some(shared) = self.scopes.get_mut(&scope) else { return Part::default() };
        if shared.is_last(scoped) {
            shared.end(scoped, now);
        }
        shared.part(scope, number, tokens, now)
    }

    /// Tokens that were not used go back to their lenders.
    fn return_tokens(&mut self, scope: u64, scoped: &Scoped, now: u64) {
        let Some(shared) = self.scopes.get_mut(&scope) else { return };
        let ended = scoped.common.borrowing.lock_stock().take_ended(now);
        for token in ended {
            match token.origin {
                Origin::Here(limit, taken) => {
                    limit.not_sent(&taken, now);
                    refresh(scoped, token.limit, now);
                }
                Origin::Lender { process, number, .. } => {
                    shared.outbox.push(self.number, Item::Back(Back { lender: process, number }));
                }
            }
        }
        for news in scoped.common.borrowing.take_news() {
            shared.outbox.push(self.number, news);
        }
    }

    /// What each process needs and has, as far as is known.
    fn rows(&self, scope: u64, said: &[Says], tokens: Tokens) -> Vec<Row> {
        let of_peer = |peer: &Says| Row {
            process: peer.process,
            waiting: peer.part.need.waiting.into(),
            oldest: peer.part.need.oldest.into(),
            expected: expected(peer.part.need.rate.into()),
            supply: peer.part.need.supply.into(),
            spare: peer.part.need.spare.into(),
            stock: f64::from(peer.part.need.stock)
                + self.peers.on_their_way(scope, peer.process, peer.read_at) as f64,
        };
        let mine = self.scopes.get(&scope).map(|shared| shared.row(self.me, tokens));
        let mut rows: Vec<_> = said.iter().map(of_peer).chain(mine).collect();
        rows.sort_by_key(|row| row.process);
        rows
    }

    /// Sets so many tokens of these limits aside for each process: each time the one that comes first in the lowest tier.
    fn lend(&mut self, scope: u64, scoped: &Scoped, owned: &[Owned<'_>], shares: Vec<(u64, f64)>, now: u64) {
        let Some(shared) = self.scopes.get_mut(&scope) else { return };
        let is_scarce = shares.iter().any(|(process, _)| *process == self.me);
        let lives = if is_scarce { LIVES_IF_SCARCE } else { LIVES };
        // Rounded at random, so that small shares are not lost.
        let whole = |share: f64| (share + fastrand::f64()).floor() as usize;
        let tokens = |(process, share)| iter::repeat_n(process, whole(share));
        let mut wanted: Vec<u64> = shares.into_iter().flat_map(tokens).take(MOST_LOANS).collect();
        // Or one process would always get what comes first.
        fastrand::shuffle(&mut wanted);
        let usual = scoped.usual_tokens();
        let next = |place: usize| {
            let at = owned[place].limit.next_to_lend(usual, now);
            let tier = scoped.key(owned[place].slot).tier();
            let tie = if scoped.fills_first() { 0 } else { fastrand::u32(..) };
            (at != NEVER && at <= now + HORIZON).then_some(Reverse((tier, at, tie, place)))
        };
        let mut earliest: BinaryHeap<_> = (0..owned.len()).filter_map(next).collect();
        let mut changed = Vec::new();
        for to in wanted {
            let Some(Reverse((_, at, _, place))) = earliest.pop() else { break };
            let Owned { slot, name, limit } = owned[place];
            let (taken, until) = (limit.lend(usual, now), at + lives);
            if to == self.me {
                let origin = Origin::Here(limit.clone(), taken);
                scoped.common.borrowing.lock_stock().add(Token { limit: name, at, until, origin });
            } else {
                self.loans = self.loans.wrapping_add(1);
                let (number, reports) = (self.loans, limit.wants_reports(now));
                let loan = Loan { to: to as u32, number, limit: name, at, until, reports };
                shared.outbox.push(self.number, Item::Loan(loan));
                self.peers.lent(scope, to as u32, now);
                let (to, limit) = (to as u32, limit.clone());
                self.lent.insert(
                    number,
                    Lent { scope, to, name, limit, taken, until, spent: None, is_settled: false },
                );
            }
            changed.push(slot);
            earliest.extend(next(place));
        }
        changed.sort_unstable();
        changed.dedup();
        changed.into_iter().for_each(|slot| scoped.refresh_limit(slot, now));
        scoped.common.waiting.look_again();
    }
}

/// A limit that this process owns, of a key that does not rest.
#[derive(Clone, Copy)]
struct Owned<'a> {
    slot: usize,
    name: u32,
    limit: &'a Arc<Limit>,
}

impl<'a> Owned<'a> {
    fn new(scoped: &'a Scoped, (slot, name): (usize, u64)) -> Option<Self> {
        let limit = scoped.known_limit(slot).filter(|limit| !limit.is_elsewhere())?;
        let is_available = scoped.has_available_member(slot);
        is_available.then_some(Self { slot, name: name as u32, limit })
    }
}

/// The scopes that were used of late, by their names.
fn in_use(engine: &Engine, now: u64) -> HashMap<u64, Arc<Scoped>> {
    let since = (now / SECOND).saturating_sub(LEFT);
    let mut scopes = HashMap::new();
    engine.snapshot().scopes.each(|scoped| {
        if !scoped.is_idle(since) {
            scopes.insert(scoped.common.name(), scoped.clone());
        }
    });
    scopes
}

fn refresh(scoped: &Scoped, name: u32, now: u64) {
    if let Some(slot) = scoped.layout.names(&scoped.keys).slot(name) {
        scoped.refresh_limit(slot, now);
        scoped.common.waiting.look_again();
    }
}

fn nanos_now(engine: &Engine) -> u64 {
    nanos(engine.config.clock.now())
}
