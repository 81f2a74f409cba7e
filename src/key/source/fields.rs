//! The fields of a key, from whatever format they come.

use std::num::NonZeroU32;

use crate::key::{
    rejected::Reason,
    secret::{KeyId, Secret},
    spec::KeySpec,
};

/// A field's value, as far as keys have such.
pub(super) enum Value {
    Text(String),
    Number(u64),
    Other,
}

const TEXT: &str = "text";
const TIER: &str = "a whole number from 0 to 255";
const COUNT: &str = "a whole number from 1 to 4294967295";

/// The fields of one key so far, and the first thing that is wrong with them.
#[derive(Default)]
pub(super) struct Fields {
    id: Option<String>,
    secret: Option<Secret>,
    group: Option<String>,
    tier: Option<u8>,
    weight: Option<NonZeroU32>,
    max_in_flight: Option<NonZeroU32>,
    endpoint: Option<String>,
    has_note: Option<()>,
    problem: Option<Reason>,
}

impl Fields {
    pub(super) fn new(id: Option<String>, secret: impl Into<Secret>) -> Self {
        Self { id, secret: Some(secret.into()), ..Self::default() }
    }

    pub(super) fn wrong(id: Option<String>, problem: Reason) -> Self {
        Self { id, problem: Some(problem), ..Self::default() }
    }

    pub(super) fn set(&mut self, name: &str, value: Value) {
        if let Err(problem) = self.try_set(name, value) {
            self.problem.get_or_insert(problem);
        }
    }

    fn try_set(&mut self, name: &str, value: Value) -> Result<(), Reason> {
        match name {
            "id" => put("id", &mut self.id, value.text(), TEXT),
            "secret" => put("secret", &mut self.secret, value.text().map(Secret::new), TEXT),
            "group" => put("group", &mut self.group, value.text(), TEXT),
            "tier" => put("tier", &mut self.tier, value.number(), TIER),
            "weight" => put("weight", &mut self.weight, value.count(), COUNT),
            "max_in_flight" => put("max_in_flight", &mut self.max_in_flight, value.count(), COUNT),
            "endpoint" => put("endpoint", &mut self.endpoint, value.text(), TEXT),
            "note" => put("note", &mut self.has_note, value.text().map(drop), TEXT),
            unknown => Err(Reason::unknown_field(unknown)),
        }
    }

    pub(super) fn id(&self) -> Option<&str> {
        self.id.as_deref()
    }

    /// A problem of another field comes before one of the id: an id of the wrong type is not a missing one.
    pub(super) fn into_spec(self, id: Result<KeyId, Reason>) -> Result<KeySpec, Reason> {
        if let Some(problem) = self.problem {
            return Err(problem);
        }
        let mut spec = KeySpec::new(id?, self.secret.ok_or(Reason::NoSecret)?);
        spec.group = self.group;
        spec.tier = self.tier;
        spec.weight = self.weight;
        spec.max_in_flight = self.max_in_flight;
        spec.endpoint = self.endpoint;
        Ok(spec)
    }
}

fn put<T>(
    field: &'static str,
    place: &mut Option<T>,
    value: Option<T>,
    expected: &'static str,
) -> Result<(), Reason> {
    let value = value.ok_or(Reason::Type { field, expected })?;
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(Reason::Twice(field)),
    }
}

impl Value {
    pub(super) fn text(self) -> Option<String> {
        match self {
            Self::Text(text) => Some(text),
            Self::Number(_) | Self::Other => None,
        }
    }

    fn number<N: TryFrom<u64>>(self) -> Option<N> {
        match self {
            Self::Number(number) => number.try_into().ok(),
            Self::Text(_) | Self::Other => None,
        }
    }

    fn count(self) -> Option<NonZeroU32> {
        self.number().and_then(NonZeroU32::new)
    }
}
