//! The newest message of each process, in memory.

use std::{collections::BTreeMap, sync::PoisonError, time::Duration};

use super::Heard;
use crate::sync::Mutex;

/// Older messages are dropped.
const MESSAGES_LIVE: Duration = Duration::from_secs(60);

/// Each message with the time of its publication.
#[derive(Debug, Default)]
pub(super) struct Messages(Mutex<BTreeMap<u64, (Duration, Vec<u8>)>>);

impl Messages {
    pub(super) fn heard(&self, now: Duration) -> Vec<Heard> {
        let mut messages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        messages.retain(|_, (at, _)| now.saturating_sub(*at) < MESSAGES_LIVE);
        let heard = |(process, (at, body)): (&u64, &(Duration, Vec<u8>))| {
            Heard::new(*process, now.saturating_sub(*at), body.clone())
        };
        messages.iter().map(heard).collect()
    }

    pub(super) fn publish(&self, process: u64, body: Vec<u8>, now: Duration) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(process, (now, body));
    }
}
