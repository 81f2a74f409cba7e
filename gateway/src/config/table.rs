//! A table of the configuration file, field by field. Each wrong field is a problem with its line.

use std::{fmt::Display, str::FromStr};

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::problems::Problems;

/// The fields of a table that have not been read yet.
pub(super) struct Fields<'t> {
    /// What the table is, for problems: `upstream "openai"`.
    pub(super) name: String,
    at: usize,
    table: DeTable<'t>,
    /// Fields whose values are wrong.
    failed: Vec<String>,
}

/// A value, and where it stands in the file.
pub(super) struct At<T> {
    pub(super) at: usize,
    pub(super) value: T,
}

impl<'t> Fields<'t> {
    /// Reads a table. Anything else is a problem.
    pub(super) fn of(
        name: impl Into<String>,
        value: Spanned<DeValue<'t>>,
        problems: &mut Problems,
    ) -> Option<Self> {
        let (name, at) = (name.into(), value.span().start);
        match value.into_inner() {
            DeValue::Table(table) => Some(Self { name, at, table, failed: Vec::new() }),
            _ => {
                problems.add_at(at, format!("{name}: it must be a table"));
                None
            }
        }
    }

    /// Adds a problem of the whole table.
    pub(super) fn wrong(&self, problems: &mut Problems, reason: impl Display) {
        problems.add_at(self.at, format!("{}: {reason}", self.name));
    }

    /// Adds a problem of a field.
    pub(super) fn wrong_field(&self, problems: &mut Problems, at: usize, field: &str, reason: impl Display) {
        problems.add_at(at, format!("{}: {field}: {reason}", self.name));
    }

    fn take(&mut self, field: &str) -> Option<At<DeValue<'t>>> {
        let value = self.table.remove(field)?;
        Some(At { at: value.span().start, value: value.into_inner() })
    }

    fn read<T>(
        &mut self,
        problems: &mut Problems,
        field: &str,
        read: impl FnOnce(DeValue<'t>) -> Result<T, String>,
    ) -> Option<At<T>> {
        let At { at, value } = self.take(field)?;
        match read(value) {
            Ok(value) => Some(At { at, value }),
            Err(reason) => {
                self.wrong_field(problems, at, field, reason);
                self.failed.push(field.to_owned());
                None
            }
        }
    }

    /// Whether the field was there, but its value was wrong.
    pub(super) fn has_failed(&self, field: &str) -> bool {
        self.failed.iter().any(|failed| failed == field)
    }

    pub(super) fn text(&mut self, problems: &mut Problems, field: &str) -> Option<At<String>> {
        self.read(problems, field, text)
    }

    /// A text, or a number, that says a value of this type.
    pub(super) fn parsed<T: FromStr<Err: Display>>(
        &mut self,
        problems: &mut Problems,
        field: &str,
    ) -> Option<At<T>> {
        self.read(problems, field, |value| parsed(&scalar(value)?))
    }

    /// One value or a list of values.
    pub(super) fn list<T: FromStr<Err: Display>>(
        &mut self,
        problems: &mut Problems,
        field: &str,
    ) -> Option<At<Vec<T>>> {
        self.read(problems, field, |value| match value {
            DeValue::Array(values) => {
                values.into_iter().map(|value| parsed(&scalar(value.into_inner())?)).collect()
            }
            value => Ok(vec![parsed(&scalar(value)?)?]),
        })
    }

    pub(super) fn flag(&mut self, problems: &mut Problems, field: &str) -> Option<bool> {
        let flag = |value| match value {
            DeValue::Boolean(flag) => Ok(flag),
            _ => Err("it must be true or false".to_owned()),
        };
        self.read(problems, field, flag).map(|flag| flag.value)
    }

    /// A list of tables.
    pub(super) fn tables(&mut self, problems: &mut Problems, field: &str) -> Vec<Self> {
        let is_list = |value| match value {
            DeValue::Array(tables) => Ok(tables),
            _ => Err("it must be a list of tables".to_owned()),
        };
        let tables = self.read(problems, field, is_list).map(|tables| tables.value);
        let name = format!("{}: {field}", self.name);
        tables.into_iter().flatten().filter_map(|table| Fields::of(&name, table, problems)).collect()
    }

    /// The fields that nothing has read are unknown.
    pub(super) fn finish(self, problems: &mut Problems) {
        for (field, _) in self.table {
            let at = field.span().start;
            problems.add_at(at, format!("{}: there is no field {}", self.name, field.get_ref()));
        }
    }
}

fn text(value: DeValue<'_>) -> Result<String, String> {
    match value {
        DeValue::String(text) => Ok(text.into_owned()),
        _ => Err("it must be text".to_owned()),
    }
}

fn scalar(value: DeValue<'_>) -> Result<String, String> {
    match value {
        DeValue::String(text) => Ok(text.into_owned()),
        DeValue::Integer(number) if number.radix() == 10 => Ok(number.as_str().to_owned()),
        DeValue::Float(number) => Ok(number.as_str().to_owned()),
        _ => Err("it must be text or a number".to_owned()),
    }
}

fn parsed<T: FromStr<Err: Display>>(text: &str) -> Result<T, String> {
    text.parse().map_err(|error: T::Err| error.to_string())
}
