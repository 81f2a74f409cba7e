//! Wrong tokens: counts and logs them, and stops an address that guesses.
//!
//! An address that has sent too many wrong tokens within a minute gets no further look at its tokens until the minute
//! is over. A right token makes its address an exception: the callers behind one router share an address, and one of them
//! with an old token must not lock out the others. Neither is a loopback address locked out: it may be a proxy's, which
//! all callers share.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::{Mutex, PoisonError, RwLock},
    time::{Duration, Instant},
};

use axum::{extract::ConnectInfo, http::request::Parts};

use crate::{audit::AUDIT, metrics};

/// How many wrong tokens an address may send within a [`WINDOW`].
const MOST: usize = 20;

const WINDOW: Duration = Duration::from_secs(60);

/// How many addresses are remembered. Whoever has more of them is not slowed down by a limit for each.
const ADDRESSES: usize = 10_000;

/// Whose tokens are guessed.
#[derive(Clone, Copy)]
pub(crate) enum Tokens {
    Admin,
    Client,
}

impl Tokens {
    fn name(self) -> &'static str {
        match self {
            Self::Admin => "admin",
            Self::Client => "client",
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Denied {
    /// None of the tokens is right, or there is none.
    Wrong,
    /// The tokens were not looked at, and will be after this time.
    TooMany { wait: Duration },
}

pub(crate) struct Guesses {
    of: Tokens,
    /// Addresses that have sent a right token.
    known: RwLock<HashSet<IpAddr>>,
    wrong: Mutex<HashMap<IpAddr, Wrong>>,
}

/// The wrong tokens of an address since the beginning of its window.
struct Wrong {
    since: Instant,
    count: usize,
}

impl Wrong {
    /// How long its window lasts.
    fn left(&self, now: Instant) -> Duration {
        WINDOW.saturating_sub(now.saturating_duration_since(self.since))
    }
}

impl Guesses {
    pub(crate) fn new(of: Tokens) -> Self {
        metrics::wrong_tokens(of.name(), 0);
        Self { of, known: RwLock::default(), wrong: Mutex::default() }
    }

    /// Checks the tokens of a request: one right token is enough.
    pub(crate) fn check<'t>(
        &self,
        head: &Parts,
        tokens: impl Iterator<Item = &'t str>,
        is_right: impl Fn(&str) -> bool,
    ) -> Result<(), Denied> {
        let peer = head.extensions.get().map(|ConnectInfo(peer): &ConnectInfo<SocketAddr>| peer.ip());
        self.check_from(peer.unwrap_or(UNKNOWN).to_canonical(), tokens, is_right, Instant::now())
    }

    fn check_from<'t>(
        &self,
        peer: IpAddr,
        tokens: impl Iterator<Item = &'t str>,
        is_right: impl Fn(&str) -> bool,
        now: Instant,
    ) -> Result<(), Denied> {
        let address = network(peer);
        let is_known = self.known.read().unwrap_or_else(PoisonError::into_inner).contains(&address);
        if !is_known
            && !peer.is_loopback()
            && let Some(wait) = self.wait_of(address, now)
        {
            return Err(Denied::TooMany { wait });
        }
        let (mut given, mut has_right) = (0, false);
        for token in tokens {
            given += 1;
            has_right |= is_right(token);
        }
        if !has_right {
            self.note(peer, given, now);
            return Err(Denied::Wrong);
        }
        if !is_known {
            let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
            if known.len() >= ADDRESSES {
                known.clear();
            }
            known.insert(address);
        }
        Ok(())
    }

    fn wait_of(&self, address: IpAddr, now: Instant) -> Option<Duration> {
        let addresses = self.wrong.lock().unwrap_or_else(PoisonError::into_inner);
        let wrong = addresses.get(&address).filter(|wrong| wrong.count >= MOST)?;
        Some(wrong.left(now)).filter(|left| !left.is_zero())
    }

    /// Counts wrong tokens. The first one of an address in its window is logged, and the one that is too many.
    fn note(&self, peer: IpAddr, given: usize, now: Instant) {
        if given == 0 {
            return;
        }
        metrics::wrong_tokens(self.of.name(), given as u64);
        let mut addresses = self.wrong.lock().unwrap_or_else(PoisonError::into_inner);
        if addresses.len() >= ADDRESSES {
            addresses.retain(|_, wrong| !wrong.left(now).is_zero());
        }
        if addresses.len() >= ADDRESSES {
            addresses.clear();
        }
        let wrong = addresses.entry(network(peer)).or_insert(Wrong { since: now, count: 0 });
        if wrong.left(now).is_zero() {
            *wrong = Wrong { since: now, count: 0 };
        }
        let before = wrong.count;
        wrong.count = before.saturating_add(given);
        let (count, of) = (wrong.count, self.of.name());
        drop(addresses);
        if before == 0 {
            tracing::warn!(target: AUDIT, address = %peer, "wrong {of} token");
        }
        if before < MOST && count >= MOST {
            tracing::warn!(target: AUDIT, address = %peer, count, "too many wrong {of} tokens within a minute");
        }
    }
}

/// Stands for the address of a peer that has none.
const UNKNOWN: IpAddr = IpAddr::V6(Ipv6Addr::UNSPECIFIED);

/// Returns the address, or the first 64 bits of an IPv6 address: a network of that size usually has one owner.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from(u128::from(address) >> 64 << 64).into(),
        address => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    struct Door {
        guesses: Guesses,
        now: Instant,
    }

    impl Door {
        fn new() -> Self {
            Self { guesses: Guesses::new(Tokens::Client), now: Instant::now() }
        }

        fn tries(&self, address: &str, tokens: &[&str]) -> Result<(), Denied> {
            let peer = address.parse().unwrap();
            self.guesses.check_from(peer, tokens.iter().copied(), |token| token == "right", self.now)
        }

        fn guess(&self, address: &str) {
            for _ in 0..MOST {
                assert_eq!(self.tries(address, &["wrong"]), Err(Denied::Wrong));
            }
        }
    }

    #[test]
    fn after_twenty_wrong_tokens_an_address_waits() {
        let mut door = Door::new();
        door.guess("10.0.0.1");
        door.now += 20 * SECOND;
        for token in ["wrong", "right"] {
            assert_eq!(door.tries("10.0.0.1", &[token]), Err(Denied::TooMany { wait: 40 * SECOND }));
        }
        assert_eq!(door.tries("10.0.0.2", &["right"]), Ok(()), "another address");
        door.now += 40 * SECOND;
        assert_eq!(door.tries("10.0.0.1", &["right"]), Ok(()));
    }

    #[test]
    fn every_token_of_a_request_counts() {
        let door = Door::new();
        assert_eq!(door.tries("10.0.0.1", &["wrong"; MOST]), Err(Denied::Wrong));
        assert!(matches!(door.tries("10.0.0.1", &["right"]), Err(Denied::TooMany { .. })));
    }

    #[test]
    fn requests_without_a_token_are_no_guesses() {
        let door = Door::new();
        for _ in 0..=MOST {
            assert_eq!(door.tries("10.0.0.1", &[]), Err(Denied::Wrong));
        }
        assert_eq!(door.tries("10.0.0.1", &["right"]), Ok(()));
    }

    #[test]
    fn an_address_that_sent_a_right_token_is_never_locked_out() {
        let door = Door::new();
        assert_eq!(door.tries("10.0.0.1", &["right"]), Ok(()));
        door.guess("10.0.0.1");
        assert_eq!(door.tries("10.0.0.1", &["wrong", "right"]), Ok(()));
    }

    #[test]
    fn loopback_addresses_are_never_locked_out() {
        let door = Door::new();
        for address in ["127.0.0.1", "::1"] {
            door.guess(address);
            assert_eq!(door.tries(address, &["right"]), Ok(()));
        }
    }

    #[test]
    fn addresses_of_one_ipv6_network_are_one() {
        let door = Door::new();
        door.guess("2001:db8::1");
        assert!(matches!(door.tries("2001:db8::ffff:1", &["right"]), Err(Denied::TooMany { .. })));
        assert_eq!(door.tries("2001:db8:0:1::1", &["right"]), Ok(()));
    }

    #[test]
    fn remembered_addresses_are_bounded() {
        let mut door = Door::new();
        for number in 0..=ADDRESSES as u32 {
            let address = std::net::Ipv4Addr::from(number).to_string();
            assert_eq!(door.tries(&address, &["wrong"]), Err(Denied::Wrong));
            assert_eq!(door.tries(&address, &["right"]), Ok(()));
            door.now += SECOND / 1_000;
        }
        assert!(door.guesses.wrong.lock().unwrap().len() <= ADDRESSES);
        assert!(door.guesses.known.read().unwrap().len() <= ADDRESSES);
    }
}
