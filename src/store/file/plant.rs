//! The keys that a pool was built with are the truth for which keys there are, the file for their state.

use std::collections::{HashMap, HashSet};

use redb::ReadableTable;

use super::{
    error::Failure,
    record::{Record, Rests},
    tables::Tables,
};
use crate::{
    key::{KeyId, KeySpec, Secret},
    limit::Words,
    store::{Born, encryption::AtRest},
};

/// A key of the file that can be read.
struct Known {
    spec: KeySpec,
    record: Record,
}

/// A key as it shall be in the file.
struct Wanted<'a> {
    spec: &'a KeySpec,
    record: Record,
    /// The key that has the state of this one so far, if that is another one.
    from: Option<KeyId>,
    /// Whether the key's secret is another one than before, so that no state is its own.
    is_new: bool,
}

impl Tables<'_> {
    /// Makes these keys those of the file.
    ///
    /// A key keeps the state that its secret has in the file, under whatever id. With `removes`, keys that came from a
    /// builder before, and are not among these, are removed. Keys of operators stay.
    pub(super) fn plant(
        &mut self,
        seeds: &[KeySpec],
        removes: bool,
        at_rest: &AtRest,
    ) -> Result<(), Failure> {
        let (known, unreadable) = self.known(at_rest)?;
        let ids: HashSet<_> = seeds.iter().map(|seed| &seed.id).collect();
        let by_secret: HashMap<&Secret, &Known> = known.values().map(|key| (&key.spec.secret, key)).collect();
        // An entry that can't be read may be a key of another program version, or of other data keys: it stays as it is.
        let seeds = seeds.iter().filter(|seed| !unreadable.contains(seed.id.as_str()));
        let mut wanted = Vec::new();
        for spec in seeds {
            let here = known.get(&spec.id).filter(|key| key.spec.secret == spec.secret);
            let source = here.or_else(|| by_secret.get(&spec.secret).copied());
            let born = source.map_or_else(Born::now, |key| Born(key.record.born));
            let disabled = source.is_some_and(|key| key.record.disabled);
            let mut record = Record::new(spec, born, at_rest)?;
            (record.planted, record.disabled) = (true, disabled);
            if let Some(here) = here.filter(|key| key.spec == *spec) {
                // As it stands, which another data key may have encrypted.
                record.secret.clone_from(&here.record.secret);
                if here.record == record {
                    continue;
                }
            }
            let from = source.map(|key| &key.spec.id).filter(|id| **id != spec.id).cloned();
            wanted.push(Wanted { spec, record, from, is_new: source.is_none() });
        }
        let moved: HashSet<_> = wanted.iter().filter_map(|wanted| wanted.from.as_ref()).collect();
        let is_gone = |key: &&Known| {
            !ids.contains(&key.spec.id) && (moved.contains(&key.spec.id) || removes && key.record.planted)
        };
        let states = wanted.iter().map(|wanted| self.state(wanted)).collect::<Result<Vec<_>, _>>()?;
        for key in known.values().filter(is_gone) {
            self.remove(key.spec.id.as_str())?;
        }
        for (Wanted { spec, record, .. }, (words, usage)) in wanted.iter().zip(states) {
            self.put_key(&spec.id, record)?;
            self.put_words(&spec.id, &words)?;
            if let Some(sums) = usage {
                self.usage.insert(spec.id.as_str(), sums)?;
            }
        }
        Ok(())
    }

    /// The keys that can be read, and the ids of the others.
    fn known(&self, at_rest: &AtRest) -> Result<(HashMap<KeyId, Known>, HashSet<String>), Failure> {
        let (mut known, mut unreadable) = (HashMap::new(), HashSet::new());
        for entry in self.keys.iter()? {
            let (id, json) = entry?;
            let read = Record::decode(json.value()).and_then(|record| {
                let id = KeyId::new(id.value()).map_err(|error| error.to_string())?;
                Ok(Known { spec: record.spec(id, at_rest)?, record })
            });
            match read {
                Ok(key) => _ = known.insert(key.spec.id.clone(), key),
                Err(_) => _ = unreadable.insert(id.value().to_owned()),
            }
        }
        Ok((known, unreadable))
    }

    /// What a key rests for, and its usage so far.
    fn state(&self, wanted: &Wanted<'_>) -> Result<(Words, Option<(u64, u64)>), Failure> {
        if wanted.is_new {
            return Ok((Words::default(), None));
        }
        let id = wanted.from.as_ref().unwrap_or(&wanted.spec.id).as_str();
        let words = self.rests.get(id)?.and_then(|json| Rests::decode(json.value()).ok());
        Ok((words.unwrap_or_default(), self.usage.get(id)?.map(|sums| sums.value())))
    }
}
