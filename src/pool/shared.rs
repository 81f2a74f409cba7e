//! One scope that several processes use: which limits this process owns, and how it comes by the others.

use std::{collections::HashMap, sync::Arc};

use super::{
    layout::Layout,
    scoped::{Common, Scoped},
};
use crate::{
    lending::{Item, Need, Origin, Outbox, Part, Release, Row, Says, Spent, owner},
    limit::Known,
};

const SECOND: u64 = 1_000_000_000;

/// Tokens are lent that come within this time: until those of the next message are there.
pub(super) const HORIZON: u64 = 2 * SECOND;

/// Who has used a scope for so much longer than another process has its limits first.
const LONGER: u64 = 2 * SECOND;

/// A new owner begins by itself if no release comes within this time, after a process joined, and after one ended.
const AFTER_A_JOIN: u64 = 3 * SECOND;
const AFTER_AN_END: u64 = SECOND / 2;

/// The most limits of a scope that are handed over with what is known of them, per message.
const HANDED_OVER: usize = 128;

/// The rate of requests is that of so many seconds.
const RATE_OF: f64 = 5.0;

/// When a probe was served although nothing should be left, about so many processes make sure.
const PROBES_AT_ONCE: usize = 3;

/// A lender is told what is spent for so long after its last loan.
const TOLD_FOR: u64 = 10 * SECOND;

/// While the store is away, limits stay with their owners if each process has so many of them.
const MANY: usize = 4;

/// The tokens that this process has until the horizon.
#[derive(Clone, Copy, Default)]
pub(super) struct Tokens {
    /// Of its own limits: of preferred keys, and of spare ones.
    pub(super) supply: f64,
    pub(super) spare: f64,
    /// That it holds.
    pub(super) stock: f64,
}

pub(super) struct Shared {
    since: u64,
    common: Arc<Common>,
    /// All processes that share the scope, this one included; empty while there are no others.
    members: Vec<u64>,
    /// Whether this process should own each limit, in the order of the names of this layout.
    mine: Vec<bool>,
    mine_of: Option<Arc<Layout>>,
    /// When limits are taken over of which no release came.
    takes_at: u64,
    releases: HashMap<u32, (Option<Known>, u64)>,
    /// The number after the newest loan of each lender, and when that came.
    lenders: HashMap<u32, (u32, u64)>,
    pub(super) outbox: Outbox,
    rate: f64,
    served: u64,
    waiting: usize,
    /// For how long the first request has been waiting, in seconds.
    oldest: f64,
    ticked: u64,
}

impl Shared {
    pub(super) fn new(scoped: &Scoped, now: u64) -> Self {
        Self {
            since: now,
            common: scoped.common.clone(),
            members: Vec::new(),
            mine: Vec::new(),
            mine_of: None,
            takes_at: 0,
            releases: HashMap::new(),
            lenders: HashMap::new(),
            outbox: Outbox::default(),
            rate: 0.0,
            served: 0,
            waiting: 0,
            oldest: 0.0,
            ticked: now,
        }
    }

    /// Whether other processes share the scope.
    pub(super) fn is_on(&self) -> bool {
        !self.members.is_empty()
    }

    /// Measures what this process needs.
    pub(super) fn measure(&mut self, now: u64) {
        let (served, waiting) = (self.common.borrowing.served(), self.common.waiting.count());
        let arrived = served.saturating_sub(self.served) as f64 + waiting as f64 - self.waiting as f64;
        let passed = now.saturating_sub(self.ticked) as f64 / 1e9;
        if passed > 0.0 {
            self.rate += (1.0 - (-passed / RATE_OF).exp()) * (arrived.max(0.0) / passed - self.rate);
        }
        (self.served, self.waiting, self.ticked) = (served, waiting, now);
        self.oldest = self.common.waiting.oldest(now) as f64 / 1e9;
    }

    /// Takes what the others know of the service. Returns whether the scope can be shared: the service must say what is left,
    /// or nobody would know what there is to lend.
    pub(super) fn can_share(&self, scoped: &Scoped, said: &[Says], now: u64) -> bool {
        let mut sharing = scoped.lock_sharing();
        let probed: f64 = said.iter().map(|peer| f64::from(peer.part.probed)).sum();
        let ignored = sharing.judge_with(probed, said.iter().any(|peer| peer.part.is_lying));
        if probed + sharing.probed() > 0.0 && fastrand::usize(..=said.len()) < PROBES_AT_ONCE {
            scoped.lock_probing().hurry(now);
        }
        for alike in said.iter().filter_map(|peer| peer.part.alike) {
            sharing.join_alike(alike);
        }
        let (is_lying, has_headers) = (sharing.is_lying(), sharing.has_headers());
        drop(sharing);
        match ignored {
            (false, true) => {
                tracing::info!(
                    scope = scoped.scope(),
                    "limit headers contradict the service's answers: ignored"
                );
                scoped.distrust(now);
            }
            (true, false) => {
                tracing::info!(
                    scope = scoped.scope(),
                    "no process distrusts the limit headers any more: followed"
                );
                scoped.trust();
            }
            _ => {}
        }
        !is_lying && (has_headers || said.iter().any(|peer| peer.part.is_sharing))
    }

    // ---- ownership ----

    /// Goes by those that share the scope: releases what is another's, and takes over what is this process's.
    pub(super) fn meet(
        &mut self,
        scoped: &Scoped,
        scope: u64,
        said: &[Says],
        me: u64,
        message: u32,
        now: u64,
    ) {
        if !self.is_on() {
            // Whoever was here before owns the limits.
            let longer = now.saturating_sub(self.since) + LONGER;
            self.begin(scoped, said.iter().any(|peer| peer.part.since > longer), now);
        }
        let mut members: Vec<u64> = said.iter().map(|peer| peer.process).chain([me]).collect();
        members.sort_unstable();
        if members != self.members {
            let has_joined = members.iter().any(|member| !self.members.contains(member));
            self.takes_at = now + if has_joined { AFTER_A_JOIN } else { AFTER_AN_END };
            self.common.borrowing.shared_by(members.len());
            self.members = members;
            self.mine_of = None;
        }
        self.share_out(scoped, scope, me, message, now);
    }

    fn begin(&self, scoped: &Scoped, is_late: bool, now: u64) {
        scoped.lock_sharing().set_by_messages(true);
        if is_late {
            for (slot, _) in scoped.layout.names(&scoped.keys).limits() {
                scoped.limit(*slot, now).set_elsewhere(true);
                scoped.refresh_limit(*slot, now);
            }
        }
    }

    fn share_out(&mut self, scoped: &Scoped, scope: u64, me: u64, message: u32, now: u64) {
        let limits = scoped.layout.names(&scoped.keys).limits();
        if self.mine_of.as_ref().is_none_or(|layout| !Arc::ptr_eq(layout, &scoped.layout)) {
            let is_mine = |(_, name): &(usize, u64)| owner(&self.members, scope, *name) == Some(me);
            self.mine = limits.iter().map(is_mine).collect();
            self.mine_of = Some(scoped.layout.clone());
        }
        let mut handed_over = 0;
        for ((slot, name), is_mine) in limits.iter().zip(&self.mine) {
            let limit = scoped.limit(*slot, now);
            match (limit.is_elsewhere(), is_mine) {
                (false, false) => {
                    limit.set_elsewhere(true);
                    if let Some(known) = limit.known(now).filter(|_| handed_over < HANDED_OVER) {
                        handed_over += 1;
                        let release = Release { limit: *name as u32, at: now, known: Some(known) };
                        self.outbox.push(message, Item::Release(release));
                    }
                }
                (is_elsewhere, true) => {
                    let released = self.releases.get(&(*name as u32)).copied();
                    let is_due = is_elsewhere && (now >= self.takes_at || released.is_some());
                    let is_news = !is_elsewhere && released.is_some() && !limit.is_known_from_headers();
                    if is_due || is_news {
                        let known = released.and_then(|(known, at)| Some((known?, at)));
                        let alike = scoped.lock_sharing().alike;
                        limit.take_over(known, alike, now);
                    }
                }
                (true, false) => continue,
            }
            scoped.refresh_limit(*slot, now);
        }
        self.releases.clear();
    }

    pub(super) fn released(&mut self, release: Release) {
        self.releases.insert(release.limit, (release.known, release.at));
    }

    /// Whether no other process is left, and all limits have been taken over.
    pub(super) fn is_last(&self, scoped: &Scoped) -> bool {
        let limits = scoped.layout.names(&scoped.keys).limits();
        let is_here = |slot: usize| scoped.known_limit(slot).is_none_or(|limit| !limit.is_elsewhere());
        self.members.len() == 1 && limits.iter().all(|(slot, _)| is_here(*slot))
    }

    /// Goes on as if there were no other processes.
    pub(super) fn end(&mut self, scoped: &Scoped, now: u64) {
        if !self.is_on() {
            return;
        }
        self.members.clear();
        self.mine_of = None;
        scoped.common.borrowing.shared_by(0);
        scoped.lock_sharing().set_by_messages(false);
        let tokens = scoped.common.borrowing.lock_stock().take_all();
        let names = scoped.layout.names(&scoped.keys);
        for token in tokens {
            if let Origin::Here(limit, taken) = token.origin {
                limit.not_sent(&taken, now);
            }
        }
        for (slot, _) in names.limits() {
            if let Some(limit) = scoped.known_limit(*slot) {
                limit.set_elsewhere(false);
                scoped.refresh_limit(*slot, now);
            }
        }
        scoped.common.waiting.look_again();
    }

    /// The store has been away for so long that the others may think this process has ended.
    pub(super) fn store_is_away(&self, scoped: &Scoped, now: u64) {
        let limits = scoped.layout.names(&scoped.keys).limits();
        if !self.is_on() {
            return;
        }
        if limits.len() >= MANY * self.members.len() {
            // What others send with the limits of this process shows in what is left.
            return scoped.lock_sharing().set_by_messages(false);
        }
        let alike = scoped.lock_sharing().alike;
        scoped.lock_sharing().assume_processes(self.members.len());
        for (slot, _) in limits {
            let limit = scoped.limit(*slot, now);
            if limit.is_elsewhere() {
                limit.take_over(None, alike, now);
                scoped.refresh_limit(*slot, now);
            }
        }
        scoped.common.waiting.look_again();
    }

    pub(super) fn store_is_back(&self) {
        if self.is_on() {
            self.common.lock_sharing().set_by_messages(true);
        }
    }

    // ---- messages ----

    /// A loan came.
    pub(super) fn has_lent(&mut self, lender: u32, number: u32, now: u64) {
        self.lenders.insert(lender, (number.wrapping_add(1), now));
    }

    /// What this process needs and has.
    pub(super) fn row(&self, process: u64, tokens: Tokens) -> Row {
        let (expected, Tokens { supply, spare, stock }) = (expected(self.rate), tokens);
        Row { process, waiting: self.waiting as f64, oldest: self.oldest, expected, supply, spare, stock }
    }

    pub(super) fn part(&mut self, scope: u64, message: u32, tokens: Tokens, now: u64) -> Part {
        self.lenders.retain(|_, (_, at)| now.saturating_sub(*at) < TOLD_FOR);
        let held = self.common.borrowing.lock_stock().first_numbers();
        let spent = self.lenders.iter().map(|(lender, (next, _))| {
            let before = held.get(lender).copied().unwrap_or(*next);
            (0, Item::Spent(Spent { lender: *lender, before }))
        });
        // These come first: if there are too many items for a message, the last ones are left out.
        let mut items: Vec<_> = spent.collect();
        let told = self.outbox.items(message).iter();
        items.extend(told.map(|(first, item)| (message.wrapping_sub(*first) as u8, item.clone())));
        let need = Need {
            waiting: self.waiting as f32,
            oldest: self.oldest as f32,
            rate: self.rate as f32,
            supply: tokens.supply as f32,
            spare: tokens.spare as f32,
            stock: tokens.stock as f32,
        };
        let sharing = self.common.lock_sharing();
        Part {
            scope,
            since: now.saturating_sub(self.since),
            need,
            is_sharing: self.is_on() || (sharing.has_headers() && !sharing.is_lying()),
            is_lying: sharing.has_caught_them(),
            probed: sharing.probed() as f32,
            alike: sharing.alike,
            items,
        }
    }
}

/// How many requests come within the horizon.
pub(super) fn expected(rate: f64) -> f64 {
    rate * HORIZON as f64 / 1e9
}
