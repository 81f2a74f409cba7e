//! Tells a webhook what an operator should know soon: a key is revoked, few keys are healthy, or none is.

use std::{
    collections::{HashMap, HashSet},
    io, mem,
    str::FromStr,
    time::Duration,
};

use axum::body::Bytes;
use http::{Request, Uri, header::CONTENT_TYPE};
use http_body_util::Full;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde::Serialize;
use tokio::time::{Instant, sleep, timeout};
use tower_key_rotation::{KeyId, PoolStats, Status};

use crate::{served::Current, with_sources};

/// Interval of looks at the keys.
const INTERVAL: Duration = Duration::from_secs(1);

/// The same event of an upstream is told once in this time: keys may rest and return all the time.
const QUIET: Duration = Duration::from_secs(5 * 60);

/// How long the receiver has for its answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Pauses before further attempts.
const PAUSES: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(5)];

/// The URL of a webhook. It often holds a secret, so it has no `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct WebhookUrl(Uri);

impl FromStr for WebhookUrl {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let uri: Uri = text.parse().map_err(|_| "not a URL")?;
        let is_http = ["http", "https"].iter().any(|scheme| uri.scheme_str() == Some(scheme));
        if is_http && uri.authority().is_some() {
            Ok(Self(uri))
        } else {
            Err("it must be http://… or https://…")
        }
    }
}

/// What the webhook is told, as JSON.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Event {
    event: Kind,
    upstream: String,
    /// The key that is revoked.
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<KeyId>,
    healthy: usize,
    keys: usize,
    /// For people: Slack, Mattermost and others show it.
    text: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    KeyRevoked,
    FewHealthyKeys,
    NoHealthyKey,
}

/// Follows the keys of all upstreams.
struct Watcher {
    /// Fewer healthy keys are few.
    few: usize,
    upstreams: HashMap<String, Seen>,
}

/// What was seen of an upstream.
#[derive(Default)]
struct Seen {
    revoked: HashSet<KeyId>,
    told: HashMap<Kind, Instant>,
}

/// Follows the keys, and tells a URL.
pub(crate) struct Webhook {
    url: WebhookUrl,
    current: Current,
    watcher: Watcher,
    /// What was so at the start.
    first: Vec<Event>,
}

impl Webhook {
    /// Looks at the keys for the first time: what becomes of them from now on is news.
    pub(crate) fn new(url: WebhookUrl, few: usize, current: Current) -> Self {
        let mut watcher = Watcher { few, upstreams: HashMap::new() };
        let first = watcher.look_at(&current);
        Self { url, current, watcher, first }
    }

    /// Tells the webhook of what happens. Never completes.
    pub(crate) async fn run(mut self) {
        let client = match client() {
            Ok(client) => client,
            Err(error) => return tracing::error!("the webhook can't be told: {}", with_sources(&error)),
        };
        let mut events = mem::take(&mut self.first);
        loop {
            for event in events {
                tell(&client, &self.url, &event).await;
            }
            sleep(INTERVAL).await;
            events = self.watcher.look_at(&self.current);
        }
    }
}

impl Watcher {
    fn look_at(&mut self, current: &Current) -> Vec<Event> {
        let served = current.get();
        let upstreams = served.upstreams.iter().map(|upstream| (upstream.name(), upstream.pool.stats()));
        self.look(Instant::now(), upstreams)
    }

    fn look<'s>(
        &mut self,
        now: Instant,
        upstreams: impl IntoIterator<Item = (&'s str, PoolStats)>,
    ) -> Vec<Event> {
        let mut events = Vec::new();
        for (name, stats) in upstreams {
            let revoked = stats.keys.iter().filter(|key| key.status == Status::Revoked);
            let revoked: HashSet<_> = revoked.map(|key| key.id.clone()).collect();
            let is_new = !self.upstreams.contains_key(name);
            let seen = self.upstreams.entry(name.to_owned()).or_default();
            // What was revoked before the start is no news.
            let news: Vec<_> =
                if is_new { Vec::new() } else { revoked.difference(&seen.revoked).cloned().collect() };
            seen.revoked = revoked;
            events.extend(news.into_iter().map(|key| Event::of(Kind::KeyRevoked, name, Some(key), &stats)));
            let kind = match stats.healthy {
                0 => Kind::NoHealthyKey,
                healthy if healthy < self.few => Kind::FewHealthyKeys,
                _ => continue,
            };
            if seen.told.get(&kind).is_none_or(|told| now - *told >= QUIET) {
                events.push(Event::of(kind, name, None, &stats));
            }
            // As long as it lasts, it is told once.
            seen.told.insert(kind, now);
        }
        events
    }
}

impl Event {
    fn of(event: Kind, upstream: &str, key: Option<KeyId>, stats: &PoolStats) -> Self {
        let (healthy, keys) = (stats.healthy, stats.keys.len());
        let text = match (event, &key) {
            (Kind::KeyRevoked, Some(key)) => {
                format!("{upstream}: key {key} is revoked; {healthy} of {keys} keys are healthy")
            }
            (Kind::NoHealthyKey, _) => format!("{upstream}: none of {keys} keys is healthy"),
            _ => format!("{upstream}: only {healthy} of {keys} keys are healthy"),
        };
        Self { event, upstream: upstream.to_owned(), key, healthy, keys, text }
    }
}

type WebhookClient = Client<HttpsConnector<HttpConnector>, Full<Bytes>>;

fn client() -> io::Result<WebhookClient> {
    let tls = HttpsConnectorBuilder::new().try_with_platform_verifier().map_err(io::Error::other)?;
    Ok(Client::builder(TokioExecutor::new()).build(tls.https_or_http().enable_http1().build()))
}

/// Sends an event, up to three times.
async fn tell(client: &WebhookClient, url: &WebhookUrl, event: &Event) {
    let Ok(body) = serde_json::to_vec(event) else { return };
    let mut pauses = PAUSES.into_iter();
    loop {
        let mut request = Request::post(url.0.clone()).header(CONTENT_TYPE, "application/json");
        request = request.header("user-agent", crate::NAME);
        let Ok(request) = request.body(Full::from(body.clone())) else { return };
        let failure = match timeout(PATIENCE, client.request(request)).await {
            Ok(Ok(response)) if response.status().is_success() => return,
            Ok(Ok(response)) => format!("it answered {}", response.status().as_u16()),
            Ok(Err(error)) => with_sources(&error),
            Err(_) => format!("no answer within {PATIENCE:?}"),
        };
        match pauses.next() {
            Some(pause) => sleep(pause).await,
            None => return tracing::warn!(event = event.text, "the webhook was not told: {failure}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use tower_key_rotation::{KeyPool, Traits, classify::Verdict};

    use super::*;

    fn pool() -> KeyPool {
        KeyPool::builder().keys([("alpha", "sk-1"), ("beta", "sk-2"), ("gamma", "sk-3")]).build().unwrap()
    }

    fn answer(pool: &KeyPool, key: &str, verdict: Verdict) {
        let key = KeyId::new(key).unwrap();
        pool.lease(&Traits::new().key(key)).unwrap().answered_with(verdict);
    }

    fn kinds(events: &[Event]) -> Vec<Kind> {
        events.iter().map(|event| event.event).collect()
    }

    #[tokio::test]
    async fn each_event_is_told_once_while_it_lasts() {
        let (pool, now) = (pool(), Instant::now());
        let mut watcher = Watcher { few: 2, upstreams: HashMap::new() };
        let mut look = |at: Duration| watcher.look(now + at, [("openai", pool.stats())]);
        answer(&pool, "gamma", Verdict::Revoked);
        assert_eq!(look(Duration::ZERO), [], "it was revoked before the first look");
        answer(&pool, "alpha", Verdict::Revoked);
        let events = look(INTERVAL);
        assert_eq!(kinds(&events), [Kind::KeyRevoked, Kind::FewHealthyKeys]);
        assert_eq!(
            serde_json::to_value(&events[0]).unwrap(),
            serde_json::json!({
                "event": "key_revoked", "upstream": "openai", "key": "alpha", "healthy": 1, "keys": 3,
                "text": "openai: key alpha is revoked; 1 of 3 keys are healthy",
            })
        );
        assert_eq!(look(2 * INTERVAL), []);
        answer(&pool, "beta", Verdict::RateLimited { wait: None });
        assert_eq!(kinds(&look(3 * INTERVAL)), [Kind::NoHealthyKey]);
        pool.reset("beta").await.unwrap();
        assert_eq!(kinds(&look(4 * INTERVAL)), [], "keys come and go");
        answer(&pool, "beta", Verdict::RateLimited { wait: None });
        assert_eq!(kinds(&look(5 * INTERVAL)), []);
        pool.reset("beta").await.unwrap();
        pool.reset("alpha").await.unwrap();
        assert_eq!(kinds(&look(6 * INTERVAL)), []);
        answer(&pool, "alpha", Verdict::RateLimited { wait: None });
        assert_eq!(kinds(&look(6 * INTERVAL + QUIET)), [Kind::FewHealthyKeys]);
    }
}
