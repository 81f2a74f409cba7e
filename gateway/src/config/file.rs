//! The configuration file: settings under the names of the command line, and tables for upstreams and callers.

use std::{collections::BTreeMap, ffi::OsString, fs, path::Path};

use clap::Command;
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::problems::{Invalid, Problems};
use crate::settings::in_one_line;

/// Settings by name, as the command line would give them.
pub(crate) type Values = BTreeMap<String, Vec<String>>;

pub(super) struct File<'t> {
    pub(super) values: Values,
    /// `[[upstream]]` tables.
    pub(super) upstreams: Vec<Spanned<DeValue<'t>>>,
    /// `[[caller]]` tables.
    pub(super) callers: Vec<Spanned<DeValue<'t>>>,
    pub(super) problems: Problems,
    /// Where each setting stands.
    places: BTreeMap<String, usize>,
}

/// Reads the text of a configuration file.
pub(super) fn text(path: &Path) -> Result<String, Invalid> {
    fs::read_to_string(path).map_err(|error| Invalid::because(format!("{}: {error}", path.display())))
}

impl<'t> File<'t> {
    /// Without a file, nothing is set.
    pub(super) fn none() -> Self {
        Self {
            values: Values::new(),
            upstreams: Vec::new(),
            callers: Vec::new(),
            problems: Problems::default(),
            places: BTreeMap::new(),
        }
    }

    /// Parses the file's text. `command` knows the settings, and requires none.
    pub(super) fn parse(path: &Path, text: &'t str, command: &Command) -> Self {
        let mut file = Self { problems: Problems::of_file(path.to_owned(), text.to_owned()), ..Self::none() };
        let (table, errors) = DeTable::parse_recoverable(text);
        for error in &errors {
            // The error's own `Display` quotes the line, which may contain a token.
            file.problems.add_at(error.span().map_or(0, |span| span.start), error.message());
        }
        // What a broken document seems to say would only be noise.
        if !errors.is_empty() {
            return file;
        }
        for (name, value) in table.into_inner() {
            let at = name.span().start;
            match (&**name.get_ref(), value.get_ref()) {
                ("upstream", DeValue::Array(_)) => file.upstreams = array(value),
                ("caller", DeValue::Array(_)) => file.callers = array(value),
                _ => file.read_setting(name.into_inner().into_owned(), at, value.into_inner(), command),
            }
        }
        file
    }

    fn read_setting(&mut self, name: String, at: usize, value: DeValue<'_>, command: &Command) {
        let is_list = command
            .get_arguments()
            .any(|arg| arg.get_long() == Some(&name) && arg.get_value_delimiter().is_some());
        let values = match values(value) {
            _ if name == "config" => {
                return self.problems.add_at(at, "config: not allowed within a settings file");
            }
            None => {
                let reason = format!("{name}: it must be text, a number, true or false, or a list of these");
                return self.problems.add_at(at, reason);
            }
            Some(values) if is_list && values.iter().any(|value| value.contains(',')) => {
                let reason = format!("{name}: a value can't contain a comma: write several values as a list");
                return self.problems.add_at(at, reason);
            }
            Some(values) => values,
        };
        // Parsed as a command line of its own, so that each wrong setting is found.
        let arguments = values.iter().map(|value| OsString::from(format!("--{name}={value}")));
        let arguments = std::iter::once(crate::NAME.into()).chain(arguments);
        if let Err(error) = command.clone().try_get_matches_from(arguments) {
            return self.problems.add_at(at, in_one_line(&error));
        }
        self.places.insert(name.clone(), at);
        self.values.insert(name, values);
    }

    /// Adds a problem of a setting, at its place if the file has it.
    pub(super) fn wrong_setting(&mut self, name: &str, reason: impl Into<String>) {
        match self.places.get(name) {
            Some(at) => self.problems.add_at(*at, reason),
            None => self.problems.add(reason),
        }
    }
}

fn array(value: Spanned<DeValue<'_>>) -> Vec<Spanned<DeValue<'_>>> {
    match value.into_inner() {
        DeValue::Array(values) => values.into_iter().collect(),
        _ => Vec::new(),
    }
}

fn values(value: DeValue<'_>) -> Option<Vec<String>> {
    match value {
        DeValue::String(text) => Some(vec![text.into_owned()]),
        DeValue::Integer(number) => {
            i128::from_str_radix(number.as_str(), number.radix()).ok().map(|number| vec![number.to_string()])
        }
        DeValue::Float(number) => Some(vec![number.as_str().to_owned()]),
        DeValue::Boolean(flag) => Some(vec![flag.to_string()]),
        DeValue::Array(list) => {
            let lists = list.into_iter().map(|value| values(value.into_inner()));
            lists.collect::<Option<Vec<_>>>().map(|lists| lists.concat())
        }
        DeValue::Datetime(_) | DeValue::Table(_) => None,
    }
}
