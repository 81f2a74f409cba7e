//! The tokens that a process holds in one scope: borrowed ones, and its own that are set aside.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use crate::limit::{Limit, Taken};

/// The right to send one request with the keys of a limit. Times are ns of the pool's clock.
#[derive(Debug)]
pub(crate) struct Token {
    /// The lower half of the limit's name.
    pub(crate) limit: u32,
    pub(crate) at: u64,
    pub(crate) until: u64,
    pub(crate) origin: Origin,
}

/// Whose token it is.
#[derive(Debug)]
pub(crate) enum Origin {
    /// This process owns the limit, and has taken the token out of its budgets. The limit may get another name meanwhile.
    Here(Arc<Limit>, Taken),
    /// The loan of another process.
    Lender {
        process: u32,
        number: u32,
        /// Whether the lender wants to know the answer, whatever it is.
        reports: bool,
    },
}

/// Tokens in the order in which they may be used.
#[derive(Debug, Default)]
pub(crate) struct Stock(VecDeque<Token>);

impl Stock {
    pub(crate) fn add(&mut self, token: Token) {
        let place = self.0.partition_point(|held| held.at <= token.at);
        self.0.insert(place, token);
    }

    /// Takes the first token that may be used now and suits; if there is none, returns when one may be.
    pub(crate) fn take(
        &mut self,
        now: u64,
        mut suits: impl FnMut(&Token) -> bool,
    ) -> Result<Token, Option<u64>> {
        let mut later = None;
        for (place, token) in self.0.iter().enumerate() {
            if token.at > now {
                later = Some(token.at);
                break;
            }
            if token.until > now && suits(token) {
                return self.0.remove(place).ok_or(None);
            }
        }
        Err(later)
    }

    /// Removes the tokens whose time is over.
    pub(crate) fn take_ended(&mut self, now: u64) -> Vec<Token> {
        let (ended, kept) = self.0.drain(..).partition(|token| token.until <= now);
        self.0 = kept;
        Vec::from(ended)
    }

    /// The service refused a request with a key of that limit: the limit's tokens are good from then on.
    pub(crate) fn put_off(&mut self, limit: u32, until: u64) {
        let (put_off, kept): (VecDeque<_>, _) =
            self.0.drain(..).partition(|token| token.limit == limit && token.at < until);
        self.0 = kept;
        for token in put_off {
            self.add(Token { at: until, ..token });
        }
    }

    /// Counts the tokens that can still be used then.
    pub(crate) fn count_at(&self, then: u64) -> usize {
        self.0.iter().filter(|token| token.until > then).count()
    }

    /// Returns the first number of each lender's loans that is still here.
    pub(crate) fn first_numbers(&self) -> BTreeMap<u32, u32> {
        let mut first = BTreeMap::new();
        for token in &self.0 {
            if let Origin::Lender { process, number, .. } = token.origin {
                let lowest = first.entry(process).or_insert(number);
                *lowest = number.min(*lowest);
            }
        }
        first
    }

    /// Removes all tokens.
    pub(crate) fn take_all(&mut self) -> Vec<Token> {
        self.0.drain(..).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(number: u32, at: u64) -> Token {
        Token { limit: 1, at, until: at + 100, origin: Origin::Lender { process: 2, number, reports: false } }
    }

    fn number(token: &Token) -> u32 {
        match token.origin {
            Origin::Lender { number, .. } => number,
            Origin::Here(..) => u32::MAX,
        }
    }

    #[test]
    fn tokens_are_used_in_the_order_of_their_times() {
        let mut stock = Stock::default();
        [token(1, 30), token(2, 10), token(3, 50)].into_iter().for_each(|token| stock.add(token));
        assert_eq!(stock.take(5, |_| true).unwrap_err(), Some(10));
        assert_eq!(number(&stock.take(40, |_| true).unwrap()), 2);
        assert_eq!(number(&stock.take(40, |_| true).unwrap()), 1);
        assert_eq!(stock.take(40, |_| true).unwrap_err(), Some(50));
    }

    #[test]
    fn tokens_that_do_not_suit_are_passed_over() {
        let mut stock = Stock::default();
        [token(1, 10), token(2, 20)].into_iter().for_each(|token| stock.add(token));
        assert_eq!(number(&stock.take(30, |token| token.at == 20).unwrap()), 2);
        assert_eq!(stock.take(30, |_| false).unwrap_err(), None);
    }

    #[test]
    fn tokens_end() {
        let mut stock = Stock::default();
        [token(1, 10), token(2, 60)].into_iter().for_each(|token| stock.add(token));
        assert_eq!((stock.count_at(0), stock.count_at(120)), (2, 1));
        assert!(stock.take(110, |_| true).is_ok_and(|token| number(&token) == 2));
        assert_eq!(stock.take_ended(110).iter().map(number).collect::<Vec<_>>(), [1]);
        assert_eq!(stock.count_at(0), 0);
    }

    #[test]
    fn the_first_loan_that_is_left_is_known() {
        let mut stock = Stock::default();
        [token(7, 10), token(5, 20), token(6, 30)].into_iter().for_each(|token| stock.add(token));
        assert_eq!(stock.first_numbers(), BTreeMap::from([(2, 5)]));
    }

    #[test]
    fn a_refusal_puts_off_the_other_tokens_of_its_limit() {
        let mut stock = Stock::default();
        [token(1, 10), Token { limit: 9, ..token(2, 20) }].into_iter().for_each(|token| stock.add(token));
        stock.put_off(1, 80);
        assert_eq!(number(&stock.take(30, |_| true).unwrap()), 2);
        assert_eq!(stock.take(30, |_| true).unwrap_err(), Some(80));
    }
}
