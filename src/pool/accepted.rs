//! Which of the keys that were given can be used.

use std::collections::{HashMap, HashSet};

use super::key::UsableKey;
use crate::key::{
    KeyId, KeySpec, Rejected, Secret,
    inject::Inject,
    rejected::{ParsedKey, Reason},
};

/// The keys of several places that can be used together.
#[derive(Default)]
pub(super) struct Accepted {
    pub(super) keys: Vec<UsableKey>,
    pub(super) rejected: Vec<Rejected>,
    ids: HashSet<KeyId>,
    by_secret: HashMap<Secret, KeyId>,
    /// Those that were rejected included.
    pub(super) candidates: usize,
}

impl Accepted {
    pub(super) fn add(&mut self, parsed: ParsedKey, inject: &Inject) {
        self.candidates += 1;
        let spec = match parsed.key {
            Ok(spec) => spec,
            Err(rejected) => return self.rejected.push(rejected),
        };
        match self.check(&spec, inject) {
            Ok(key) => {
                self.ids.insert(spec.id.clone());
                self.by_secret.insert(spec.secret, spec.id);
                self.keys.push(key);
            }
            Err(reason) => self.rejected.push(Rejected::new(parsed.place, Some(spec.id), reason)),
        }
    }

    fn check(&self, spec: &KeySpec, inject: &Inject) -> Result<UsableKey, Reason> {
        if self.ids.contains(&spec.id) {
            return Err(Reason::DuplicateId);
        }
        if let Some(other) = self.by_secret.get(&spec.secret) {
            return Err(Reason::DuplicateSecret(other.clone()));
        }
        if let Some(field) = spec.unsupported() {
            return Err(Reason::Unsupported(field));
        }
        Ok(UsableKey::new(spec, inject)?)
    }
}
