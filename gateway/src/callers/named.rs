//! One caller: what it may use, its limits, and its usage.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use super::limits::{Budgets, CallerLimits, Held, OverLimit};
use crate::config::{CallerConfig, below};

pub(crate) struct NamedCaller {
    config: CallerConfig,
    budgets: Arc<Budgets>,
    usage: Arc<Usage>,
}

/// Since the start of the gateway.
#[derive(Default)]
struct Usage {
    requests: AtomicU64,
    tokens: AtomicU64,
    /// Requests that were beyond a limit of the caller.
    over_limit: AtomicU64,
    in_flight: AtomicU64,
}

/// A request of a caller, in flight until this is dropped.
pub(crate) struct UnderWay {
    caller: Arc<NamedCaller>,
    held: Held,
}

impl NamedCaller {
    pub(super) fn new(config: CallerConfig, before: Option<&Self>) -> Self {
        let same = before.filter(|before| before.config.limits == config.limits);
        let budgets = same.map_or_else(
            // Quotas per minute are always valid.
            || Arc::new(Budgets::of(config.limits).unwrap_or_default()),
            |same| same.budgets.clone(),
        );
        let usage = before.map_or_else(Arc::default, |before| before.usage.clone());
        Self { config, budgets, usage }
    }

    pub(crate) fn name(&self) -> &str {
        &self.config.name
    }

    pub(super) fn has_token(&self, given: &str) -> bool {
        self.config.token.as_ref().is_some_and(|token| token.is(given))
    }

    pub(crate) fn may_use_upstream(&self, upstream: &str) -> bool {
        let upstreams = &self.config.upstreams;
        upstreams.is_empty() || upstreams.iter().any(|allowed| allowed == upstream)
    }

    /// Whether the caller may use a path, as it sends it.
    pub(crate) fn may_use_path(&self, path: &str) -> bool {
        let paths = &self.config.paths;
        paths.is_empty() || paths.iter().any(|prefix| below(path, prefix).is_some())
    }

    /// Whether the caller may use some models only.
    pub(crate) fn has_models(&self) -> bool {
        !self.config.models.is_empty()
    }

    pub(crate) fn may_use_model(&self, model: &str) -> bool {
        let is = |allowed: &String| match allowed.strip_suffix('*') {
            Some(beginning) => model.starts_with(beginning),
            None => model == allowed,
        };
        !self.has_models() || self.config.models.iter().any(is)
    }

    /// Whether the caller's limits depend on the tokens of a request.
    pub(crate) fn limits_tokens(&self) -> bool {
        self.budgets.limits_tokens()
    }

    /// Counts a request, if the caller has room for one.
    pub(crate) fn begin(self: &Arc<Self>) -> Result<UnderWay, OverLimit> {
        let held = self.budgets.begin().inspect_err(|_| self.count_over_limit())?;
        self.usage.requests.fetch_add(1, Relaxed);
        self.usage.in_flight.fetch_add(1, Relaxed);
        Ok(UnderWay { caller: self.clone(), held })
    }

    fn count_over_limit(&self) {
        self.usage.over_limit.fetch_add(1, Relaxed);
    }

    pub(crate) fn limits(&self) -> CallerLimits {
        self.config.limits
    }

    /// How many requests and tokens there is room for now.
    pub(crate) fn left(&self) -> [Option<f64>; 2] {
        self.budgets.left()
    }

    pub(crate) fn requests(&self) -> u64 {
        self.usage.requests.load(Relaxed)
    }

    pub(crate) fn tokens(&self) -> u64 {
        self.usage.tokens.load(Relaxed)
    }

    /// Requests that were beyond a limit of the caller.
    pub(crate) fn over_limit(&self) -> u64 {
        self.usage.over_limit.load(Relaxed)
    }

    pub(crate) fn in_flight(&self) -> u64 {
        self.usage.in_flight.load(Relaxed)
    }
}

impl UnderWay {
    /// Takes room for the tokens of the request.
    pub(crate) fn reserve(&mut self, tokens: Option<u64>) -> Result<(), OverLimit> {
        let reserved = self.caller.budgets.reserve(&mut self.held, tokens);
        reserved.inspect_err(|_| self.caller.count_over_limit())
    }

    /// The upstream served the request. Otherwise it costs no tokens.
    pub(crate) fn was_served(&self) {
        self.held.was_served();
    }

    /// Counts the tokens that the response reports.
    pub(crate) fn used(&self, tokens: u64) {
        self.caller.usage.tokens.fetch_add(tokens, Relaxed);
        self.held.used(tokens);
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.caller.usage.in_flight.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller(change: impl FnOnce(&mut CallerConfig)) -> Arc<NamedCaller> {
        let mut config = CallerConfig::unlimited("website", None);
        change(&mut config);
        Arc::new(NamedCaller::new(config, None))
    }

    #[test]
    fn a_caller_may_use_what_its_lists_name() {
        let any = caller(|_| {});
        assert!(
            any.may_use_upstream("openai")
                && any.may_use_path("/v1")
                && any.may_use_model("gpt-5")
                && !any.has_models()
        );
        let some = caller(|config| {
            config.upstreams = vec!["openai".to_owned()];
            config.paths = vec!["/openai/v1/chat".to_owned(), "/openai/v1/models".to_owned()];
            config.models = vec!["gpt-5-mini".to_owned(), "gpt-4*".to_owned()];
        });
        assert!(some.may_use_upstream("openai") && !some.may_use_upstream("gemini"));
        for (path, is_allowed) in [
            ("/openai/v1/chat/completions", true),
            ("/openai/v1/models", true),
            ("/openai/v1/chats", false),
            ("/v1/models", false),
        ] {
            assert_eq!(some.may_use_path(path), is_allowed, "{path}");
        }
        for (model, is_allowed) in [("gpt-5-mini", true), ("gpt-4o", true), ("gpt-5", false), ("", false)] {
            assert_eq!(some.may_use_model(model), is_allowed, "{model}");
        }
    }

    #[test]
    fn requests_in_flight_are_limited_until_one_ends() {
        let one = caller(|config| config.limits.max_in_flight = std::num::NonZeroU32::new(1));
        let first = one.begin().unwrap();
        assert_eq!(one.begin().err().unwrap().limit, "requests in flight");
        drop(first);
        assert!(one.begin().is_ok());
        assert_eq!((one.requests(), one.over_limit(), one.in_flight()), (2, 1, 0));
    }

    #[test]
    fn requests_a_minute_are_limited() {
        let two = caller(|config| config.limits.requests_per_minute = Some(2));
        assert!(two.begin().is_ok() && two.begin().is_ok());
        let over = two.begin().err().unwrap();
        assert_eq!(over.limit, "requests per minute");
        assert!((25..=30).contains(&over.wait.as_secs()), "{over:?}");
    }

    #[test]
    fn reported_tokens_correct_what_was_reserved() {
        let some = caller(|config| config.limits.tokens_per_minute = Some(1_000));
        let mut failed = some.begin().unwrap();
        failed.reserve(Some(900)).unwrap();
        drop(failed);
        let mut served = some.begin().unwrap();
        served.reserve(Some(900)).unwrap();
        served.was_served();
        served.used(100);
        drop(served);
        let mut next = some.begin().unwrap();
        next.reserve(Some(850)).unwrap();
        assert_eq!(some.tokens(), 100);
        let mut over = some.begin().unwrap();
        assert_eq!(over.reserve(Some(850)).err().unwrap().limit, "tokens per minute");
    }

    #[test]
    fn a_request_larger_than_the_limit_takes_all_of_it() {
        let some = caller(|config| config.limits.tokens_per_minute = Some(1_000));
        some.begin().unwrap().reserve(Some(5_000)).unwrap();
    }

    #[test]
    fn a_changed_caller_keeps_its_usage_and_equal_limits() {
        let before = caller(|config| config.limits.requests_per_minute = Some(1));
        assert!(before.begin().is_ok());
        let mut config = before.config.clone();
        config.models = vec!["m".to_owned()];
        let after = Arc::new(NamedCaller::new(config.clone(), Some(&before)));
        assert!(after.begin().is_err());
        config.limits.requests_per_minute = Some(2);
        let wider = Arc::new(NamedCaller::new(config, Some(&after)));
        assert!(wider.begin().is_ok());
        assert_eq!(wider.requests(), 2);
    }
}
