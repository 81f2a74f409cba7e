//! How errors are logged.

use std::{error::Error, fmt, iter::successors};

/// An error and its sources on one line, of bounded length.
pub(crate) struct Chain<'a>(pub(crate) &'a (dyn Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const LONGEST: usize = 400;
        let errors = successors(Some(self.0), |&error| error.source());
        let text = errors.map(ToString::to_string).collect::<Vec<_>>().join(": ");
        let printable = text.chars().map(|c| if c.is_control() { ' ' } else { c });
        f.write_str(&printable.take(LONGEST).collect::<String>())
    }
}
