//! How errors are logged.

use std::{error::Error, fmt};

/// An error and its sources on one line, of bounded length.
pub(super) struct Chain<'a>(pub(super) &'a (dyn Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const LONGEST: usize = 400;
        let mut text = self.0.to_string();
        let mut error = self.0;
        while let Some(source) = error.source() {
            text = format!("{text}: {source}");
            error = source;
        }
        let printable = text.chars().map(|c| if c.is_control() { ' ' } else { c });
        f.write_str(&printable.take(LONGEST).collect::<String>())
    }
}
