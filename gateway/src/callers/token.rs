//! Tokens by which callers and the admin prove who they are.

use std::str::FromStr;

use subtle::ConstantTimeEq;

/// Minimum length of a token. A shorter one can be guessed.
const SHORTEST: usize = 8;

/// A client or admin token. It has no `Debug`, so that no log can show it.
#[derive(Clone, PartialEq, Eq)]
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
