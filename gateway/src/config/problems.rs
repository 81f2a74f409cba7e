//! What is wrong with a configuration: all of it, not only the first.

use std::{error::Error, fmt, path::PathBuf};

/// Something wrong, with its place. It never contains a value, which may be a secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Problem {
    file: Option<PathBuf>,
    line: Option<usize>,
    reason: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(file) = &self.file {
            write!(f, "{}: ", file.display())?;
        }
        if let Some(line) = self.line {
            write!(f, "line {line}: ")?;
        }
        f.write_str(&self.reason)
    }
}

/// The problems of a configuration, as an error. There is at least one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Invalid(Vec<Problem>);

impl Invalid {
    pub(crate) fn because(reason: impl Into<String>) -> Self {
        Self(vec![Problem { file: None, line: None, reason: reason.into() }])
    }

    pub(crate) fn problems(&self) -> &[Problem] {
        &self.0
    }
}

/// Shows the first problem, and how many more there are.
impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0[..] {
            [] => f.write_str("invalid"),
            [only] => only.fmt(f),
            [first, rest @ ..] => {
                write!(f, "{first} (and {} more: `{} check` lists all)", rest.len(), crate::NAME)
            }
        }
    }
}

impl Error for Invalid {}

/// Collects problems.
#[derive(Default)]
pub(super) struct Problems {
    file: Option<PathBuf>,
    text: String,
    found: Vec<Problem>,
}

impl Problems {
    /// Problems of a file with this text.
    pub(super) fn of_file(file: PathBuf, text: String) -> Self {
        Self { file: Some(file), text, found: Vec::new() }
    }

    /// Adds a problem that is at this byte of the file.
    pub(super) fn add_at(&mut self, at: usize, reason: impl Into<String>) {
        let before = &self.text.as_bytes()[..at.min(self.text.len())];
        let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
        self.found.push(Problem { file: self.file.clone(), line: Some(line), reason: reason.into() });
    }

    /// Adds a problem that has no place in the file.
    pub(super) fn add(&mut self, reason: impl Into<String>) {
        self.found.push(Problem { file: None, line: None, reason: reason.into() });
    }

    pub(super) fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    /// Returns the problems in the order of their lines.
    pub(super) fn into_error(mut self) -> Option<Invalid> {
        self.found.sort_by_key(|problem| problem.line);
        (!self.found.is_empty()).then_some(Invalid(self.found))
    }
}
