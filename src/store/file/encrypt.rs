//! Puts an encrypted file in the place of one that holds secrets in another form.

use std::path::Path;

use redb::{Database, ReadTransaction, ReadableDatabase, ReadableTable};

use super::{
    create::{open, replace},
    error::{Failure, OpenError},
    record::Record,
    tables::{KEYS, RESTS, Tables, USAGE, last_moment, quotas},
};
use crate::{key::KeyId, store::encryption::AtRest};

/// Writes the file anew if a secret in it is not encrypted with the current data key. A file that is changed in place still
/// holds what was there before.
pub(super) fn encrypt(path: &Path, database: Database, at_rest: &AtRest) -> Result<Database, OpenError> {
    let failed = |failure: Failure| OpenError::of_failure(path, failure);
    let transaction = database.begin_read().map_err(|error| failed(error.into()))?;
    if is_current(&transaction, at_rest).map_err(failed)? {
        return Ok(database);
    }
    let at = last_moment(&transaction).map_err(failed)?.unwrap_or_default();
    // Not the link, if the path is one.
    let target = path.canonicalize().map_err(|error| OpenError::io(path, error))?;
    replace(&target, at, |tables| copy(&transaction, tables, at_rest), database)?;
    open(path)
}

fn is_current(transaction: &ReadTransaction, at_rest: &AtRest) -> Result<bool, Failure> {
    for entry in transaction.open_table(KEYS)?.iter()? {
        let (id, json) = entry?;
        if sealed_anew(id.value(), json.value(), at_rest)?.is_some() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The record with a secret in the current form; `None` if it has that, or can't be read.
fn sealed_anew(id: &str, json: &[u8], at_rest: &AtRest) -> Result<Option<Vec<u8>>, Failure> {
    let (Ok(id), Ok(mut record)) = (KeyId::new(id), Record::decode(json)) else { return Ok(None) };
    if at_rest.is_current(&record.secret) {
        return Ok(None);
    }
    let Ok(secret) = at_rest.secret(&id, &record.secret) else { return Ok(None) };
    record.secret = at_rest.stored(&id, &secret)?;
    record.encode().map(Some)
}

fn copy(transaction: &ReadTransaction, tables: &mut Tables<'_>, at_rest: &AtRest) -> Result<(), Failure> {
    for entry in transaction.open_table(KEYS)?.iter()? {
        let (id, json) = entry?;
        let sealed = sealed_anew(id.value(), json.value(), at_rest)?;
        tables.keys.insert(id.value(), sealed.as_deref().unwrap_or(json.value()))?;
    }
    for entry in transaction.open_table(RESTS)?.iter()? {
        let (id, json) = entry?;
        tables.rests.insert(id.value(), json.value())?;
    }
    for entry in transaction.open_table(USAGE)?.iter()? {
        let (id, sums) = entry?;
        tables.usage.insert(id.value(), sums.value())?;
    }
    if let Some(kept) = quotas(transaction)? {
        tables.keep_quotas(&kept)?;
    }
    Ok(())
}
