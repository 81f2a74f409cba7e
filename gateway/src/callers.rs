//! Authentication of callers by client token. Without client tokens, every request passes this check.

use std::str::FromStr;

use axum::http::{HeaderName, header::AUTHORIZATION, request::Parts};
use subtle::ConstantTimeEq;

use crate::guesses::{Denied, Guesses, Tokens};

/// Headers in which clients send their API key.
pub(crate) const CREDENTIALS: [HeaderName; 4] = [
    AUTHORIZATION,
    HeaderName::from_static("x-api-key"),
    HeaderName::from_static("api-key"),
    HeaderName::from_static("x-goog-api-key"),
];

/// Minimum length of a token. A shorter one can be guessed.
const SHORTEST: usize = 8;

/// A client or admin token. It has no `Debug`, so that no log can show it.
#[derive(Clone)]
pub(crate) struct Token(String);

impl Token {
    /// Compares in constant time for tokens of equal length.
    pub(crate) fn is(&self, given: &str) -> bool {
        self.0.as_bytes().ct_eq(given.as_bytes()).into()
    }
}

impl FromStr for Token {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.len() < SHORTEST || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err("a token is at least 8 printable ASCII characters, without spaces");
        }
        Ok(Self(text.to_owned()))
    }
}

pub(crate) struct Callers {
    tokens: Vec<Token>,
    guesses: Guesses,
}

impl Callers {
    pub(crate) fn with(tokens: Vec<Token>) -> Self {
        Self { tokens, guesses: Guesses::new(Tokens::Client) }
    }

    /// Whether no client token is set, so that only this machine may call.
    pub(crate) fn are_all_here(&self) -> bool {
        self.tokens.is_empty()
    }

    pub(crate) fn admit(&self, head: &Parts) -> Result<(), Denied> {
        if self.tokens.is_empty() {
            return Ok(());
        }
        let given = CREDENTIALS.into_iter().flat_map(|name| head.headers.get_all(name));
        let given = given.filter_map(|value| value.to_str().ok()).map(without_scheme);
        self.guesses.check(head, given, |given| self.knows(given))
    }

    /// Compares with every token, so that the response time does not reveal which one matches.
    fn knows(&self, given: &str) -> bool {
        self.tokens.iter().fold(false, |known, token| known | token.is(given))
    }
}

fn without_scheme(value: &str) -> &str {
    match value.split_once(' ') {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => token.trim_start(),
        _ => value,
    }
}
