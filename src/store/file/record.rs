//! What is kept of a key, as JSON: the key in one table, and what it rests for in another.
//!
//! Another process may have the file next, which is of an older version of this crate: a field that such a version does not
//! know takes another number of the format.

use std::{collections::BTreeMap, num::NonZeroU32, time::Duration};

use serde::{Deserialize, Serialize};

use super::error::Failure;
use crate::{
    key::{KeyId, KeySpec},
    limit::{Rest, Resting, Scope, Until, Words},
    store::{Born, encryption::AtRest},
};

/// A key, and whether it is in service.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Record {
    pub(super) secret: String,
    pub(super) born: u64,
    #[serde(default, skip_serializing_if = "is_false")]
    pub(super) disabled: bool,
    /// Whether it came from the builder of a pool, and not from an operator.
    #[serde(default, skip_serializing_if = "is_false")]
    pub(super) planted: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    group: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tier: Option<u8>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    weight: Option<NonZeroU32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    max_in_flight: Option<NonZeroU32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    endpoint: Option<String>,
}

fn is_false(flag: &bool) -> bool {
    !flag
}

impl Record {
    /// A key in service.
    pub(super) fn new(spec: &KeySpec, born: Born, at_rest: &AtRest) -> Result<Self, Failure> {
        let KeySpec { id, secret, group, tier, weight, max_in_flight, endpoint } = spec;
        Ok(Self {
            secret: at_rest.stored(id, secret)?,
            born: born.0,
            disabled: false,
            planted: false,
            group: group.clone(),
            tier: *tier,
            weight: *weight,
            max_in_flight: *max_in_flight,
            endpoint: endpoint.clone(),
        })
    }

    /// Reads a record, or says why it is none. No reason holds a secret.
    pub(super) fn decode(json: &[u8]) -> Result<Self, String> {
        // Without the error, which may quote anything.
        serde_json::from_slice(json).map_err(|_| "the record is damaged".to_owned())
    }

    pub(super) fn encode(&self) -> Result<Vec<u8>, Failure> {
        serde_json::to_vec(self).map_err(|_| Failure::NotEncoded)
    }

    pub(super) fn spec(&self, id: KeyId, at_rest: &AtRest) -> Result<KeySpec, String> {
        let secret = at_rest.secret(&id, &self.secret)?;
        let mut spec = KeySpec::new(id, secret);
        spec.group.clone_from(&self.group);
        spec.tier = self.tier;
        spec.weight = self.weight;
        spec.max_in_flight = self.max_in_flight;
        spec.endpoint.clone_from(&self.endpoint);
        Ok(spec)
    }
}

/// The state of all limits of a key. Its times are those of the file's clock.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Rests {
    generation: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    key: Option<Ends>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    scopes: BTreeMap<String, Ends>,
}

/// When a rest ends, in ms since 1970, and never without that; and the number of its reason.
#[derive(Serialize, Deserialize)]
struct Ends(Option<u64>, u8);

impl Rests {
    pub(super) fn encode(words: &Words) -> Result<Vec<u8>, Failure> {
        let scope = |(scope, resting): (&Scope, &Resting)| (scope.as_str().to_owned(), Ends::new(*resting));
        let rests = Self {
            generation: words.generation,
            key: words.key.map(Ends::new),
            scopes: words.scopes.iter().map(scope).collect(),
        };
        serde_json::to_vec(&rests).map_err(|_| Failure::NotEncoded)
    }

    /// Reads words. A scope or a reason that this version can't read is dropped.
    pub(super) fn decode(json: &[u8]) -> Result<Words, String> {
        let rests: Self = serde_json::from_slice(json).map_err(|_| "its rests are damaged".to_owned())?;
        let scope = |(name, ends): (String, Ends)| Some((Scope::new(name).ok()?, ends.resting()?));
        Ok(Words {
            generation: rests.generation,
            key: rests.key.and_then(Ends::resting),
            scopes: rests.scopes.into_iter().filter_map(scope).collect(),
        })
    }
}

impl Ends {
    fn new(Resting { until, reason }: Resting) -> Self {
        let reason = match reason {
            Rest::RateLimited => 1,
            Rest::Exhausted => 2,
            Rest::Revoked => 3,
        };
        Self(until.left().map(millis_up), reason)
    }

    fn resting(self) -> Option<Resting> {
        let reason = match self.1 {
            1 => Rest::RateLimited,
            2 => Rest::Exhausted,
            3 => Rest::Revoked,
            _ => return None,
        };
        let until = self.0.map_or(Until::Reset, |ms| Until::After(Duration::from_millis(ms)));
        Some(Resting { until, reason })
    }
}

/// Rounded up: no rest is shorter than asked.
fn millis_up(time: Duration) -> u64 {
    u64::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_rounded_up_to_milliseconds() {
        let resting = |until| Some(Resting { until, reason: Rest::Exhausted });
        let mut words = Words { generation: 7, ..Words::default() };
        words.scopes.insert(Scope::new("gpt-5").unwrap(), resting(Until::Reset).unwrap());
        for (until, kept) in [
            (Until::After(Duration::from_nanos(1)), Until::After(Duration::from_millis(1))),
            (Until::After(Duration::from_secs(3)), Until::After(Duration::from_secs(3))),
            (Until::After(Duration::MAX), Until::After(Duration::from_millis(u64::MAX))),
            (Until::Reset, Until::Reset),
        ] {
            words.key = resting(until);
            let read = Rests::decode(&Rests::encode(&words).unwrap()).unwrap();
            assert_eq!(read, Words { key: resting(kept), ..words.clone() });
        }
    }

    #[test]
    fn damaged_records_are_not_quoted() {
        let reason = Record::decode(br#"{"secret":"sk-1","born":"sk-2"}"#).unwrap_err();
        assert_eq!(reason, "the record is damaged");
        assert!(Rests::decode(b"{}").is_err());
    }
}
