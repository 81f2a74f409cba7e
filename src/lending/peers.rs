//! The other processes, by their newest messages.

use std::{collections::BTreeMap, time::Duration};

use super::message::{Item, Message, Part};
use crate::limit::nanos;

/// A process that was not heard of for so long has ended, in ns.
const ENDED: u64 = 5_000_000_000;

/// A loan is on its way for so long at most, in ns.
const ON_ITS_WAY: u64 = 4_000_000_000;

/// The usual time between two messages of a process, in ns.
const BETWEEN: u64 = 1_000_000_000;

#[derive(Debug, Default)]
pub(crate) struct Peers {
    /// By their ids.
    live: BTreeMap<u64, Peer>,
    /// Scope, borrower, and the time at which the loan could be read.
    loans: Vec<(u64, u32, u64)>,
}

#[derive(Debug)]
struct Peer {
    message: Message,
    /// When the message was written, by this process's clock.
    written: u64,
}

/// What a peer says of a scope.
#[derive(Clone, Debug)]
pub(crate) struct Says {
    pub(crate) process: u64,
    /// Without items.
    pub(crate) part: Part,
    /// When the peer last read messages.
    pub(crate) read_at: u64,
}

impl Peers {
    /// Takes a message of another process. `hear` gets each item that is new.
    pub(crate) fn hear(
        &mut self,
        process: u64,
        bytes: &[u8],
        age: Duration,
        now: u64,
        mut hear: impl FnMut(u64, u64, &Item),
    ) {
        let written = now.saturating_sub(nanos(age));
        if now - written > ENDED {
            return;
        }
        let Some(message) = Message::decode(bytes, written) else { return };
        let before = self.live.get(&process).map(|peer| peer.message.number);
        if before.is_some_and(|before| message.number <= before) {
            return;
        }
        // Of a process that is new here, older items are over or were not for this one.
        let news = before.map_or(1, |before| message.number - before);
        for part in &message.parts {
            for (age, item) in part.items.iter().filter(|(age, _)| u32::from(*age) < news) {
                if let Item::Loan(loan) = item {
                    self.lent(part.scope, loan.to, written.saturating_sub(u64::from(*age) * BETWEEN));
                }
                hear(process, part.scope, item);
            }
        }
        // The items are done with.
        let parts = message.parts.iter().map(|part| Part { items: Vec::new(), ..part.clone() }).collect();
        self.live.insert(process, Peer { message: Message { parts, ..message }, written });
    }

    /// Notes a loan that can be read from then on.
    pub(crate) fn lent(&mut self, scope: u64, to: u32, published: u64) {
        self.loans.push((scope, to, published));
    }

    /// Forgets processes that have ended.
    pub(crate) fn forget(&mut self, now: u64) {
        self.live.retain(|_, peer| now.saturating_sub(peer.written) < ENDED);
        self.loans.retain(|(.., published)| now.saturating_sub(*published) < ON_ITS_WAY);
    }

    /// While the store is away, nobody is thought dead.
    pub(crate) fn keep(&mut self, by: u64) {
        for peer in self.live.values_mut() {
            peer.written += by;
        }
    }

    /// Returns what each peer says that uses a scope, in the order of their ids.
    pub(crate) fn of_scope(&self, scope: u64) -> Vec<Says> {
        let says = |(process, peer): (&u64, &Peer)| {
            let part = peer.message.parts.iter().find(|part| part.scope == scope)?;
            let read_at = peer.written.saturating_sub(peer.message.read_before);
            Some(Says { process: *process, part: part.clone(), read_at })
        };
        self.live.iter().filter_map(says).collect()
    }

    /// Counts the loans to a process that it had not read yet at that time.
    pub(crate) fn on_their_way(&self, scope: u64, to: u64, read_at: u64) -> usize {
        let is_on_its_way = |(of, borrower, published): &&(u64, u32, u64)| {
            *of == scope && *borrower == to as u32 && *published > read_at
        };
        self.loans.iter().filter(is_on_its_way).count()
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::message::{Back, Loan},
        *,
    };

    const SECOND: u64 = 1_000_000_000;

    fn message(number: u32, items: Vec<(u8, Item)>) -> Vec<u8> {
        let part = Part { scope: 7, items, ..Part::default() };
        Message { number, read_before: SECOND / 10, parts: vec![part] }.encode(0)
    }

    fn back(number: u32) -> Item {
        Item::Back(Back { lender: 1, number })
    }

    fn heard(peers: &mut Peers, bytes: &[u8], now: u64) -> Vec<Item> {
        let mut heard = Vec::new();
        peers.hear(5, bytes, Duration::ZERO, now, |_, _, item| heard.push(item.clone()));
        heard
    }

    #[test]
    fn each_item_is_heard_once() {
        let mut peers = Peers::default();
        assert_eq!(heard(&mut peers, &message(1, vec![(0, back(1))]), SECOND), [back(1)]);
        let second = message(2, vec![(1, back(1)), (0, back(2))]);
        assert_eq!(heard(&mut peers, &second, 2 * SECOND), [back(2)]);
        assert!(heard(&mut peers, &second, 3 * SECOND).is_empty());
    }

    #[test]
    fn items_of_a_missed_message_are_heard_later() {
        let mut peers = Peers::default();
        heard(&mut peers, &message(1, Vec::new()), SECOND);
        let third = message(3, vec![(1, back(2)), (0, back(3))]);
        assert_eq!(heard(&mut peers, &third, 3 * SECOND), [back(2), back(3)]);
    }

    #[test]
    fn silent_processes_are_forgotten_unless_the_store_is_away() {
        let mut peers = Peers::default();
        heard(&mut peers, &message(1, Vec::new()), SECOND);
        peers.forget(5 * SECOND);
        assert_eq!(peers.of_scope(7).len(), 1);
        peers.keep(5 * SECOND);
        peers.forget(10 * SECOND);
        assert_eq!(peers.of_scope(7).len(), 1);
        peers.forget(11 * SECOND);
        assert!(peers.of_scope(7).is_empty());
        peers.hear(5, &message(9, Vec::new()), Duration::from_secs(6), 20 * SECOND, |_, _, _| {});
        assert!(peers.of_scope(7).is_empty());
    }

    #[test]
    fn loans_count_until_their_borrower_has_read_them() {
        let mut peers = Peers::default();
        let loan = Loan { to: 9, number: 1, limit: 3, at: 0, until: SECOND, reports: false };
        heard(&mut peers, &message(1, vec![(0, Item::Loan(loan))]), 2 * SECOND);
        assert_eq!(peers.on_their_way(7, 9, SECOND), 1);
        assert_eq!(peers.on_their_way(7, 9, 3 * SECOND), 0);
        assert_eq!(peers.on_their_way(7, 8, SECOND), 0);
        peers.forget(7 * SECOND);
        assert_eq!(peers.on_their_way(7, 9, SECOND), 0);
    }
}
