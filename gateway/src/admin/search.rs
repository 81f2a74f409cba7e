//! Search, filter and pages of the key list.

use serde::{Deserialize, Serialize};
use tower_key_rotation::Status;

use super::{
    keys::{Key, Shown},
    live::Live,
    refusal::Refusal,
};

const MOST_PER_PAGE: usize = 500;

/// The longest text to search for, in characters.
const LONGEST_SEARCH: usize = 256;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Search {
    #[serde(default)]
    search: String,
    status: Option<Group>,
    upstream: Option<String>,
    #[serde(default = "first_page")]
    page: usize,
    #[serde(default = "usual_per_page")]
    per_page: usize,
}

/// A status, or a group of statuses.
#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Group {
    Healthy,
    RateLimited,
    Exhausted,
    Revoked,
    Suspected,
    Disabled,
    /// Unavailable, and recovers without an operator.
    Resting,
    /// Unavailable until an operator acts.
    OutOfService,
}

#[derive(Serialize)]
pub(super) struct Page {
    keys: Vec<Shown>,
    matches: usize,
    page: usize,
    pages: usize,
    totals: Totals,
}

#[derive(Default, Serialize)]
struct Totals {
    total: usize,
    healthy: usize,
    resting: usize,
    out_of_service: usize,
}

fn first_page() -> usize {
    1
}

fn usual_per_page() -> usize {
    50
}

impl Search {
    pub(super) fn of(&self, live: &Live) -> Result<Page, Refusal> {
        if self.page == 0 || !(1..=MOST_PER_PAGE).contains(&self.per_page) {
            return Err(Refusal::bad_request(format!(
                "page must be at least 1, and per_page between 1 and {MOST_PER_PAGE}"
            )));
        }
        if self.search.chars().count() > LONGEST_SEARCH {
            return Err(Refusal::bad_request(format!(
                "search must have at most {LONGEST_SEARCH} characters"
            )));
        }
        let text = self.search.to_lowercase();
        Ok(live.all(|keys, now| {
            let totals = Totals::of(&keys);
            let matching: Vec<_> = keys.into_iter().filter(|key| self.matches(key, &text)).collect();
            let page =
                matching.iter().skip((self.page - 1).saturating_mul(self.per_page)).take(self.per_page);
            Page {
                keys: page.map(|key| key.shown(now)).collect(),
                matches: matching.len(),
                page: self.page,
                pages: matching.len().div_ceil(self.per_page),
                totals,
            }
        }))
    }

    fn matches(&self, key: &Key, search: &str) -> bool {
        let holds = |text: &str| text.to_lowercase().contains(search);
        self.upstream.as_deref().is_none_or(|upstream| upstream == key.upstream())
            && self.status.is_none_or(|group| group.has(key.status()))
            && (holds(key.id().as_str()) || holds(key.masked_secret()))
    }
}

impl Group {
    fn has(self, status: Status) -> bool {
        match self {
            Self::Healthy => status == Status::Healthy,
            Self::RateLimited => status == Status::RateLimited,
            Self::Exhausted => status == Status::Exhausted,
            Self::Revoked => status == Status::Revoked,
            Self::Suspected => status == Status::Suspected,
            Self::Disabled => status == Status::Disabled,
            Self::Resting => rests(status),
            Self::OutOfService => matches!(status, Status::Revoked | Status::Disabled),
        }
    }
}

/// Whether a key with this status recovers without an operator.
pub(super) fn rests(status: Status) -> bool {
    matches!(status, Status::RateLimited | Status::Exhausted | Status::Suspected)
}

impl Totals {
    fn of(keys: &[&Key]) -> Self {
        let count = |group: Group| keys.iter().filter(|key| group.has(key.status())).count();
        Self {
            total: keys.len(),
            healthy: count(Group::Healthy),
            resting: count(Group::Resting),
            out_of_service: count(Group::OutOfService),
        }
    }
}
