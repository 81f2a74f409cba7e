//! From the fields of an entry to a key with an id.

use std::sync::Arc;

use super::fields::Fields;
use crate::key::{
    rejected::{ParsedKey, Place, Reason, Rejected},
    secret::KeyId,
    spec::KeySpec,
};

const MOST_KEYS: usize = 1_000_000;

/// What becomes of a key without an id.
#[derive(Clone, Copy)]
pub(crate) enum Unnamed {
    Rejected,
    /// It is called `key-N`, where this many keys come before the text's first.
    Numbered {
        before: usize,
    },
}

/// The keys of a text so far.
pub(super) struct Entries {
    unnamed: Unnamed,
    keys: Vec<ParsedKey>,
    too_many: bool,
}

impl Entries {
    pub(super) fn new(unnamed: Unnamed) -> Self {
        Self { unnamed, keys: Vec::new(), too_many: false }
    }

    pub(super) fn len(&self) -> usize {
        self.keys.len()
    }

    pub(super) fn push(&mut self, place: Place, fields: Fields) {
        if self.keys.len() == MOST_KEYS {
            self.too_many = true;
            return;
        }
        self.keys.push(self.parsed(place, fields));
    }

    pub(super) fn parsed(&self, place: Place, fields: Fields) -> ParsedKey {
        let (id, spec) = self.spec(fields);
        let key = spec.map_err(|reason| Rejected::new(place.clone(), id, reason));
        ParsedKey { place, key }
    }

    /// Returns the id also where something else is wrong with the key.
    fn spec(&self, fields: Fields) -> (Option<KeyId>, Result<KeySpec, Reason>) {
        let id = match fields.id() {
            Some(id) => KeyId::new(id).map_err(Reason::from),
            None => self.numbered(),
        };
        let known = id.as_ref().ok().cloned();
        (known, fields.into_spec(id))
    }

    fn numbered(&self) -> Result<KeyId, Reason> {
        match self.unnamed {
            Unnamed::Numbered { before } => Ok(KeyId::new(format!("key-{}", before + self.keys.len() + 1))?),
            Unnamed::Rejected => Err(Reason::NoId),
        }
    }

    pub(super) fn all(self, name: Arc<str>) -> Result<Vec<ParsedKey>, Rejected> {
        if self.too_many {
            return Err(Rejected::new(Place::Whole(name), None, Reason::TooMany(MOST_KEYS)));
        }
        Ok(self.keys)
    }
}
