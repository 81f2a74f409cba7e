//! The file's tables, and what the operations of a store do with them, within a transaction.

use std::collections::HashMap;

use redb::{ReadTransaction, ReadableTable, Table, TableDefinition, TableError, WriteTransaction};

use super::{
    clock::Moment,
    error::Failure,
    record::{Record, Rests},
};
use crate::{
    key::{KeyId, KeySpec},
    limit::Words,
    store::{Born, KeyRecord, Loaded, Mark, Operation, Standing, Unreadable, Usage, encryption::AtRest},
};

/// The number of the format that this version writes.
pub(super) const FORMAT: u64 = 1;

/// About the file: its format, and its clock at the last commit.
const FILE: TableDefinition<'_, &str, u64> = TableDefinition::new("file");
const FORMAT_NUMBER: &str = "format";
const FILE_TIME: &str = "time";
const WALL_TIME: &str = "wall";

/// The [`Record`] of each key.
pub(super) const KEYS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("keys");

/// The [`Rests`] of each key that has any, or was ever reset.
pub(super) const RESTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("rests");

/// Requests and tokens of each key that was ever used.
pub(super) const USAGE: TableDefinition<'_, &str, (u64, u64)> = TableDefinition::new("usage");

/// What is left of the pool's quotas.
const QUOTAS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("quotas");
const WINDOWS: &str = "windows";

/// The tables in a transaction that writes.
pub(super) struct Tables<'t> {
    file: Table<'t, &'static str, u64>,
    pub(super) keys: Table<'t, &'static str, &'static [u8]>,
    pub(super) rests: Table<'t, &'static str, &'static [u8]>,
    pub(super) usage: Table<'t, &'static str, (u64, u64)>,
    quotas: Table<'t, &'static str, &'static [u8]>,
    /// Whether there is anything to commit.
    pub(super) changed: bool,
}

impl<'t> Tables<'t> {
    pub(super) fn open(transaction: &'t WriteTransaction) -> Result<Self, Failure> {
        Ok(Self {
            file: transaction.open_table(FILE)?,
            keys: transaction.open_table(KEYS)?,
            rests: transaction.open_table(RESTS)?,
            usage: transaction.open_table(USAGE)?,
            quotas: transaction.open_table(QUOTAS)?,
            changed: false,
        })
    }

    /// Makes this the tables of a new file.
    pub(super) fn begin(&mut self, at: Moment) -> Result<(), Failure> {
        self.file.insert(FORMAT_NUMBER, FORMAT)?;
        self.set_clock(at)
    }

    pub(super) fn set_clock(&mut self, at: Moment) -> Result<(), Failure> {
        let nanos = |time: std::time::Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.file.insert(FILE_TIME, nanos(at.file))?;
        self.file.insert(WALL_TIME, nanos(at.wall))?;
        self.changed = true;
        Ok(())
    }

    pub(super) fn merge(&mut self, mark: &Mark, at: Moment) -> Result<Option<Standing>, Failure> {
        let Some(mut standing) = self.standing(&mark.id)?.filter(|standing| standing.born == mark.born)
        else {
            return Ok(None);
        };
        let before = standing.words.clone();
        standing.words.join(&mark.words.clone().later(at.file));
        if standing.words != before {
            self.put_words(&mark.id, &standing.words)?;
        }
        Ok(Some(standing))
    }

    pub(super) fn operate(
        &mut self,
        id: &KeyId,
        operation: &Operation,
        at_rest: &AtRest,
    ) -> Result<Option<Standing>, Failure> {
        if let Operation::Insert(spec) = operation {
            return self.insert(spec, at_rest);
        }
        let Some(mut standing) = self.standing(id)? else { return Ok(None) };
        match operation {
            Operation::Insert(_) => {}
            Operation::Remove => self.remove(id.as_str())?,
            Operation::Reset(scope) => {
                standing.words.reset(scope.as_ref());
                self.put_words(id, &standing.words)?;
            }
            Operation::Disable | Operation::Enable => {
                standing.disabled = *operation == Operation::Disable;
                self.set_disabled(id, standing.disabled)?;
            }
        }
        Ok(Some(standing))
    }

    fn insert(&mut self, spec: &KeySpec, at_rest: &AtRest) -> Result<Option<Standing>, Failure> {
        if self.keys.get(spec.id.as_str())?.is_some() {
            return Ok(None);
        }
        let standing = Standing::healthy();
        self.put_key(&spec.id, &Record::new(spec, standing.born, at_rest)?)?;
        Ok(Some(standing))
    }

    fn set_disabled(&mut self, id: &KeyId, disabled: bool) -> Result<(), Failure> {
        match self.record(id)? {
            Some(mut record) if record.disabled != disabled => {
                record.disabled = disabled;
                self.put_key(id, &record)
            }
            _ => Ok(()),
        }
    }

    /// Removes what has ended by then from the rests of these keys. Returns the keys that had any.
    pub(super) fn drop_ended(&mut self, ids: &[KeyId], at: Moment) -> Result<Vec<KeyId>, Failure> {
        let mut dropped = Vec::new();
        for id in ids {
            let Some(words) = self.words(id)? else { continue };
            let left = without_ended(words.clone(), at);
            if left != words {
                self.put_words(id, &left)?;
                dropped.push(id.clone());
            }
        }
        Ok(dropped)
    }

    pub(super) fn add_usage(&mut self, used: &[Usage]) -> Result<(), Failure> {
        for Usage { id, requests, tokens } in used {
            let id = id.as_str();
            if self.keys.get(id)?.is_none() {
                continue;
            }
            let sums = self.usage.get(id)?.map_or((0, 0), |sums| sums.value());
            self.usage.insert(id, (sums.0.saturating_add(*requests), sums.1.saturating_add(*tokens)))?;
            self.changed = true;
        }
        Ok(())
    }

    pub(super) fn keep_quotas(&mut self, quotas: &[u8]) -> Result<(), Failure> {
        self.quotas.insert(WINDOWS, quotas)?;
        self.changed = true;
        Ok(())
    }

    pub(super) fn remove(&mut self, id: &str) -> Result<(), Failure> {
        self.keys.remove(id)?;
        self.rests.remove(id)?;
        self.usage.remove(id)?;
        self.changed = true;
        Ok(())
    }

    pub(super) fn put_key(&mut self, id: &KeyId, record: &Record) -> Result<(), Failure> {
        self.keys.insert(id.as_str(), record.encode()?.as_slice())?;
        self.changed = true;
        Ok(())
    }

    pub(super) fn put_words(&mut self, id: &KeyId, words: &Words) -> Result<(), Failure> {
        if *words == Words::default() {
            self.rests.remove(id.as_str())?;
        } else {
            self.rests.insert(id.as_str(), Rests::encode(words)?.as_slice())?;
        }
        self.changed = true;
        Ok(())
    }

    /// A key's record; `None` if there is none that can be read.
    fn record(&self, id: &KeyId) -> Result<Option<Record>, Failure> {
        Ok(self.keys.get(id.as_str())?.and_then(|json| Record::decode(json.value()).ok()))
    }

    /// A key's words; `None` if they can't be read.
    fn words(&self, id: &KeyId) -> Result<Option<Words>, Failure> {
        match self.rests.get(id.as_str())? {
            Some(json) => Ok(Rests::decode(json.value()).ok()),
            None => Ok(Some(Words::default())),
        }
    }

    fn standing(&self, id: &KeyId) -> Result<Option<Standing>, Failure> {
        let Some(Record { born, disabled, .. }) = self.record(id)? else { return Ok(None) };
        Ok(self.words(id)?.map(|words| Standing::new(Born(born), words, disabled)))
    }
}

fn without_ended(words: Words, at: Moment) -> Words {
    words.after(at.file).later(at.file)
}

// ---- in a transaction that reads ----

/// The number of the file's format; `None` if this is no file of this store.
pub(super) fn format(transaction: &ReadTransaction) -> Result<Option<u64>, TableError> {
    let file = transaction.open_table(FILE)?;
    Ok(file.get(FORMAT_NUMBER)?.map(|number| number.value()))
}

/// The clock at the last commit.
pub(super) fn last_moment(transaction: &ReadTransaction) -> Result<Option<Moment>, Failure> {
    let file = transaction.open_table(FILE)?;
    let nanos = |name| Ok::<_, Failure>(file.get(name)?.map(|nanos| nanos.value()));
    let moment = nanos(FILE_TIME)?.zip(nanos(WALL_TIME)?);
    let of = std::time::Duration::from_nanos;
    Ok(moment.map(|(file, wall)| Moment { file: of(file), wall: of(wall) }))
}

/// All keys, or these alone, with words by the file's clock.
pub(super) fn load(
    transaction: &ReadTransaction,
    only: Option<&[KeyId]>,
    at_rest: &AtRest,
) -> Result<Loaded, Failure> {
    let (keys, rests) = (transaction.open_table(KEYS)?, transaction.open_table(RESTS)?);
    let mut loaded = Loaded::default();
    let mut add = |id: &str, json: &[u8], rests: Option<Result<Words, String>>| {
        let read = KeyId::new(id).map_err(|error| error.to_string()).and_then(|id| {
            let record = Record::decode(json)?;
            let standing =
                Standing::new(Born(record.born), rests.transpose()?.unwrap_or_default(), record.disabled);
            Ok(KeyRecord::new(record.spec(id, at_rest)?, standing))
        });
        match read {
            Ok(record) => loaded.records.push(record),
            Err(reason) => loaded.unreadable.push(Unreadable::new(shown(id), reason)),
        }
    };
    match only {
        Some(ids) => {
            for id in ids {
                if let Some(json) = keys.get(id.as_str())? {
                    let rests = rests.get(id.as_str())?.map(|json| Rests::decode(json.value()));
                    add(id.as_str(), json.value(), rests);
                }
            }
        }
        None => {
            let mut resting = HashMap::new();
            for entry in rests.iter()? {
                let (id, json) = entry?;
                resting.insert(id.value().to_owned(), Rests::decode(json.value()));
            }
            for entry in keys.iter()? {
                let (id, json) = entry?;
                let rests = resting.remove(id.value());
                add(id.value(), json.value(), rests);
            }
        }
    }
    Ok(loaded)
}

/// An id as it can be logged, whoever wrote the file.
fn shown(id: &str) -> String {
    const LONGEST: usize = 256;
    id.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).take(LONGEST).collect()
}

/// The keys of which a rest has ended by then.
pub(super) fn ended(transaction: &ReadTransaction, at: Moment) -> Result<Vec<KeyId>, Failure> {
    let mut ended = Vec::new();
    for entry in transaction.open_table(RESTS)?.iter()? {
        let (id, json) = entry?;
        if let (Ok(id), Ok(words)) = (KeyId::new(id.value()), Rests::decode(json.value()))
            && without_ended(words.clone(), at) != words
        {
            ended.push(id);
        }
    }
    Ok(ended)
}

/// What was kept of the pool's quotas.
pub(super) fn quotas(transaction: &ReadTransaction) -> Result<Option<Vec<u8>>, Failure> {
    Ok(transaction.open_table(QUOTAS)?.get(WINDOWS)?.map(|quotas| quotas.value().to_vec()))
}

pub(super) fn usage(transaction: &ReadTransaction) -> Result<Vec<Usage>, Failure> {
    let mut usage = Vec::new();
    for entry in transaction.open_table(USAGE)?.iter()? {
        let (id, sums) = entry?;
        if let Ok(id) = KeyId::new(id.value()) {
            let (requests, tokens) = sums.value();
            usage.push(Usage::new(id, requests, tokens));
        }
    }
    Ok(usage)
}
