//! Who may call: whoever brings one of the client tokens, or anybody where there is none.

use std::str::FromStr;

use axum::http::{HeaderMap, HeaderName, header::AUTHORIZATION};
use subtle::ConstantTimeEq;

/// Where clients put what they take for their API key.
pub(crate) const CREDENTIALS: [HeaderName; 4] = [
    AUTHORIZATION,
    HeaderName::from_static("x-api-key"),
    HeaderName::from_static("api-key"),
    HeaderName::from_static("x-goog-api-key"),
];

/// A secret of the gateway's own, which is never shown.
#[derive(Clone)]
pub(crate) struct Token(String);

impl Token {
    /// How long it takes depends on the lengths, and on nothing else.
    pub(crate) fn is(&self, given: &str) -> bool {
        self.0.as_bytes().ct_eq(given.as_bytes()).into()
    }
}

impl FromStr for Token {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err("a token is at least one printable ASCII character, without spaces");
        }
        Ok(Self(text.to_owned()))
    }
}

#[derive(Clone)]
pub(crate) struct Callers {
    tokens: Vec<Token>,
}

impl Callers {
    pub(crate) fn with(tokens: Vec<Token>) -> Self {
        Self { tokens }
    }

    /// Whether anybody may call who is on this machine.
    pub(crate) fn are_all_here(&self) -> bool {
        self.tokens.is_empty()
    }

    pub(crate) fn admit(&self, headers: &HeaderMap) -> bool {
        let given =
            CREDENTIALS.into_iter().flat_map(|name| headers.get_all(name)).filter_map(|v| v.to_str().ok());
        self.tokens.is_empty() || given.map(without_scheme).any(|given| self.knows(given))
    }

    /// Compares with every token, so that the time doesn't say which it was.
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
