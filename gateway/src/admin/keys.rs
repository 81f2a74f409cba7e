//! The state of each key as the admin shows it, and its changes. The caller passes in the time.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use serde::{Serialize, Serializer};
use tower_key_rotation::{KeyId, KeyPool, KeyStats, RestCause, Status};

use super::history::{History, Since, millis};

/// Tolerance for equal deadlines, which are recomputed from the time left at each look.
const SAME_DEADLINE: Duration = Duration::from_millis(100);

/// The keys of all upstreams, by the upstream's name.
#[derive(Default)]
pub(super) struct Keys(HashMap<Arc<str>, HashMap<KeyId, Key>>);

pub(super) struct Key {
    facts: Facts,
    history: History,
    /// Position of the upstream, and of the key in its rotation.
    place: (usize, usize),
}

/// The visible state of a key.
#[derive(Clone, PartialEq, Eq)]
struct Facts {
    upstream: Arc<str>,
    id: KeyId,
    masked_secret: String,
    status: Status,
    cause: Option<RestCause>,
    returns_at: Option<Duration>,
    last_reason: Option<u16>,
    requests: u64,
    limited: u64,
    recovered: u64,
    tokens: u64,
    used_at: Option<Duration>,
}

/// A serialized key: complete, or its upstream, its id and the changed members.
#[derive(Serialize)]
pub(super) struct Shown {
    #[serde(serialize_with = "as_text")]
    upstream: Arc<str>,
    id: KeyId,
    #[serde(skip_serializing_if = "Option::is_none")]
    masked_secret: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<Status>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cause: Option<Option<RestCause>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    time_left_ms: Option<Option<u64>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_reason: Option<Option<u16>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    requests: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    limited: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    recovered: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tokens: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_used_ms_ago: Option<Option<u64>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    history: Option<Vec<Since>>,
}

#[derive(Default, Serialize)]
pub(super) struct Changes {
    keys: Vec<Shown>,
    removed: Vec<Removed>,
}

#[derive(Serialize)]
struct Removed {
    #[serde(serialize_with = "as_text")]
    upstream: Arc<str>,
    id: KeyId,
}

fn as_text<S: Serializer>(text: &Arc<str>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(text)
}

impl Changes {
    pub(super) fn is_empty(&self) -> bool {
        self.keys.is_empty() && self.removed.is_empty()
    }
}

/// The extent of a look at the pool.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Look {
    /// Statuses and deadlines, which are urgent.
    Statuses,
    /// Counters and secrets as well.
    Everything,
}

impl Keys {
    /// Takes over the current state of the upstreams' pools and returns the changes.
    pub(super) fn look<'p>(
        &mut self,
        now: Duration,
        pools: impl IntoIterator<Item = (&'p str, &'p KeyPool)>,
        look: Look,
    ) -> Changes {
        let mut changes = Changes::default();
        let mut upstreams = HashSet::new();
        for (place, (upstream, pool)) in pools.into_iter().enumerate() {
            upstreams.insert(upstream);
            self.look_at(now, (place, upstream), pool, look, &mut changes);
        }
        let gone = self.0.extract_if(|upstream, _| !upstreams.contains(&**upstream));
        for (upstream, keys) in gone {
            let removed = keys.into_keys().map(|id| Removed { upstream: upstream.clone(), id });
            changes.removed.extend(removed);
        }
        changes
    }

    fn look_at(
        &mut self,
        now: Duration,
        (at, upstream): (usize, &str),
        pool: &KeyPool,
        look: Look,
        changes: &mut Changes,
    ) {
        let stats = pool.stats().keys;
        let upstream: Arc<str> = match self.0.get_key_value(upstream) {
            Some((upstream, _)) => upstream.clone(),
            None => upstream.into(),
        };
        let keys = self.0.entry(upstream.clone()).or_default();
        for (place, stats) in stats.iter().enumerate() {
            let new = match keys.get_mut(&stats.id) {
                Some(key) => {
                    key.place = (at, place);
                    key.look(now, pool, stats, look)
                }
                None => {
                    let key = Key::new(now, &upstream, pool, stats, (at, place));
                    let shown = key.shown(now);
                    keys.insert(stats.id.clone(), key);
                    Some(shown)
                }
            };
            changes.keys.extend(new);
        }
        if keys.len() > stats.len() {
            let there: HashSet<_> = stats.iter().map(|key| &key.id).collect();
            let gone = keys.extract_if(|id, _| !there.contains(id));
            changes.removed.extend(gone.map(|(id, _)| Removed { upstream: upstream.clone(), id }));
        }
    }

    pub(super) fn get(&self, upstream: &str, id: &str) -> Option<&Key> {
        self.0.get(upstream)?.get(id)
    }

    /// Returns all keys, in the order of the upstreams and of their rotation.
    pub(super) fn in_order(&self) -> Vec<&Key> {
        let mut keys: Vec<_> = self.0.values().flat_map(HashMap::values).collect();
        keys.sort_unstable_by_key(|key| key.place);
        keys
    }
}

impl Key {
    fn new(
        now: Duration,
        upstream: &Arc<str>,
        pool: &KeyPool,
        stats: &KeyStats,
        place: (usize, usize),
    ) -> Self {
        let facts = Facts::new(now, upstream, pool, stats, None);
        Self { history: History::beginning(now, facts.status), facts, place }
    }

    fn look(&mut self, now: Duration, pool: &KeyPool, stats: &KeyStats, look: Look) -> Option<Shown> {
        self.history.note(now, stats.status);
        let is_pressing = stats.status != self.facts.status
            || !same(self.facts.returns_at, stats.time_left.map(|left| now + left));
        if !is_pressing && look == Look::Statuses {
            return None;
        }
        let facts = Facts::new(now, &self.facts.upstream, pool, stats, Some(&self.facts));
        let new = (facts != self.facts).then(|| facts.shown(now, Some(&self.facts), None));
        self.facts = facts;
        new
    }

    pub(super) fn upstream(&self) -> &str {
        &self.facts.upstream
    }

    pub(super) fn id(&self) -> &KeyId {
        &self.facts.id
    }

    pub(super) fn masked_secret(&self) -> &str {
        &self.facts.masked_secret
    }

    pub(super) fn status(&self) -> Status {
        self.facts.status
    }

    pub(super) fn shown(&self, now: Duration) -> Shown {
        self.facts.shown(now, None, Some(&self.history))
    }
}

impl Facts {
    fn new(
        now: Duration,
        upstream: &Arc<str>,
        pool: &KeyPool,
        stats: &KeyStats,
        before: Option<&Self>,
    ) -> Self {
        let returns_at = stats.time_left.map(|left| now + left);
        let unchanged = before.map(|before| before.returns_at).filter(|before| same(*before, returns_at));
        let is_used = stats.requests > before.map_or(0, |before| before.requests);
        Self {
            upstream: upstream.clone(),
            id: stats.id.clone(),
            masked_secret: pool.masked_secret(&stats.id).unwrap_or_default(),
            status: stats.status,
            cause: stats.cause,
            returns_at: unchanged.unwrap_or(returns_at),
            last_reason: stats.last_reason,
            requests: stats.requests,
            limited: stats.limited,
            recovered: stats.recovered,
            tokens: stats.tokens,
            used_at: if is_used { Some(now) } else { before.and_then(|before| before.used_at) },
        }
    }

    fn shown(&self, now: Duration, before: Option<&Self>, history: Option<&History>) -> Shown {
        Shown {
            upstream: self.upstream.clone(),
            id: self.id.clone(),
            masked_secret: news(before, self, |facts| facts.masked_secret.clone()),
            status: news(before, self, |facts| facts.status),
            cause: news(before, self, |facts| facts.cause),
            time_left_ms: news(before, self, |facts| facts.returns_at)
                .map(|at| at.map(|at| millis(at.saturating_sub(now)))),
            last_reason: news(before, self, |facts| facts.last_reason),
            requests: news(before, self, |facts| facts.requests),
            limited: news(before, self, |facts| facts.limited),
            recovered: news(before, self, |facts| facts.recovered),
            tokens: news(before, self, |facts| facts.tokens),
            last_used_ms_ago: news(before, self, |facts| facts.used_at)
                .map(|at| at.map(|at| millis(now.saturating_sub(at)))),
            history: history.map(|history| history.seen_from(now)),
        }
    }
}

/// Returns a fact if it differs from the last one sent.
fn news<T: PartialEq>(before: Option<&Facts>, facts: &Facts, of: impl Fn(&Facts) -> T) -> Option<T> {
    Some(of(facts)).filter(|fact| before.is_none_or(|before| of(before) != *fact))
}

fn same(one: Option<Duration>, other: Option<Duration>) -> bool {
    match (one, other) {
        (Some(one), Some(other)) => one.abs_diff(other) < SAME_DEADLINE,
        _ => one == other,
    }
}

#[cfg(test)]
mod tests {
    use http::{Request, Response};
    use serde_json::{Value, json};
    use tower::{Layer, ServiceExt, service_fn};
    use tower_key_rotation::{
        KeyRotationLayer,
        clock::{Clock, ManualClock},
    };

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// A pool with a scripted service, and the last seen state of its keys.
    struct Looked {
        clock: ManualClock,
        pool: KeyPool,
        keys: Keys,
    }

    impl Looked {
        fn at<const N: usize>(ids: [&str; N]) -> Self {
            let clock = ManualClock::new();
            let keys = ids.map(|id| (id, format!("sk-secret-of-{id}")));
            let pool =
                KeyPool::builder().keys(keys).cooldown(2 * SECOND).clock(clock.clone()).build().unwrap();
            let mut looked = Self { clock, pool, keys: Keys::default() };
            looked.look(Look::Everything);
            looked
        }

        async fn request_answered_with(&self, status: u16) {
            let answer = move |_: Request<()>| {
                std::future::ready(Response::builder().status(status).body(()).map_err(std::io::Error::other))
            };
            let request = Request::get("https://api.example.com").body(()).unwrap();
            KeyRotationLayer::new(&self.pool).layer(service_fn(answer)).oneshot(request).await.unwrap();
        }

        fn look(&mut self, look: Look) -> Value {
            let pools = [("openai", &self.pool)];
            serde_json::to_value(self.keys.look(self.clock.now(), pools, look)).unwrap()
        }

        fn shown(&self, id: &str) -> Value {
            serde_json::to_value(self.keys.get("openai", id).unwrap().shown(self.clock.now())).unwrap()
        }
    }

    #[tokio::test]
    async fn a_shown_key_reports_times_relative_to_now() {
        let mut looked = Looked::at(["alpha"]);
        looked.clock.advance(SECOND);
        looked.request_answered_with(429).await;
        looked.look(Look::Everything);
        looked.clock.advance(SECOND / 2);
        assert_eq!(
            looked.shown("alpha"),
            json!({
                "upstream": "openai", "id": "alpha", "masked_secret": "…lpha", "status": "rate_limited",
                "cause": "guessed", "time_left_ms": 1500,
                "last_reason": 429, "requests": 1, "limited": 1, "recovered": 0, "tokens": 0,
                "last_used_ms_ago": 500,
                "history": [{ "status": "healthy", "ms_ago": 1500 }, { "status": "rate_limited", "ms_ago": 500 }],
            })
        );
    }

    #[tokio::test]
    async fn status_changes_are_published_with_other_changed_fields() {
        let mut looked = Looked::at(["alpha", "beta"]);
        looked.request_answered_with(429).await;
        assert_eq!(
            looked.look(Look::Statuses),
            json!({
                "keys": [{
                    "upstream": "openai", "id": "alpha", "status": "rate_limited", "cause": "guessed", "time_left_ms": 2000,
                    "last_reason": 429,
                    "requests": 1, "limited": 1, "last_used_ms_ago": 0,
                }],
                "removed": [],
            })
        );
        looked.clock.advance(SECOND);
        assert_eq!(looked.look(Look::Everything), json!({ "keys": [], "removed": [] }));
        looked.clock.advance(SECOND);
        assert_eq!(
            looked.look(Look::Statuses)["keys"],
            json!([{
                "upstream": "openai", "id": "alpha", "status": "healthy", "cause": null, "time_left_ms": null,
                "recovered": 1,
            }])
        );
    }

    #[tokio::test]
    async fn counters_are_news_where_everything_is_looked_at() {
        let mut looked = Looked::at(["alpha"]);
        looked.request_answered_with(200).await;
        looked.pool.record_usage(&KeyId::new("alpha").unwrap(), 7);
        assert_eq!(looked.look(Look::Statuses)["keys"], json!([]));
        assert_eq!(
            looked.look(Look::Everything)["keys"],
            json!([{ "upstream": "openai", "id": "alpha", "requests": 1, "tokens": 7, "last_used_ms_ago": 0 }])
        );
        assert_eq!(looked.look(Look::Everything)["keys"], json!([]));
    }

    #[tokio::test]
    async fn added_and_removed_keys_are_published_in_order() {
        let mut looked = Looked::at(["gamma", "alpha"]);
        looked.pool.insert("beta", "sk-b").await.unwrap();
        looked.pool.remove("gamma").await.unwrap();
        let changes = looked.look(Look::Statuses);
        let removed = json!([{ "upstream": "openai", "id": "gamma" }]);
        assert_eq!((&changes["keys"][0], &changes["removed"]), (&looked.shown("beta"), &removed));
        let order: Vec<_> = looked.keys.in_order().iter().map(|key| key.id().to_string()).collect();
        assert_eq!(order, ["alpha", "beta"]);
    }

    #[tokio::test]
    async fn another_secret_of_the_same_name_is_news() {
        let mut looked = Looked::at(["alpha"]);
        looked.pool.remove("alpha").await.unwrap();
        looked.pool.insert("alpha", "sk-another").await.unwrap();
        assert_eq!(
            looked.look(Look::Everything)["keys"],
            json!([{ "upstream": "openai", "id": "alpha", "masked_secret": "…er" }])
        );
    }

    #[tokio::test]
    async fn keys_of_two_upstreams_may_have_one_id() {
        let (here, there) = (Looked::at(["alpha"]), Looked::at(["alpha"]));
        let mut keys = Keys::default();
        keys.look(SECOND, [("b", &here.pool), ("a", &there.pool)], Look::Everything);
        there.request_answered_with(429).await;
        let changes = keys.look(SECOND, [("b", &here.pool), ("a", &there.pool)], Look::Statuses);
        let changes = serde_json::to_value(changes).unwrap();
        assert_eq!((&changes["keys"][0]["upstream"], &changes["keys"][1]), (&json!("a"), &Value::Null));
        let order: Vec<_> = keys.in_order().iter().map(|key| key.upstream().to_owned()).collect();
        assert_eq!(order, ["b", "a"]);
        let changes = serde_json::to_value(keys.look(SECOND, [("a", &there.pool)], Look::Statuses)).unwrap();
        assert_eq!(changes["removed"], json!([{ "upstream": "b", "id": "alpha" }]));
    }
}
