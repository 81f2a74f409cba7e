//! The limits of one caller, kept by the library's own budgets: a pool with one key stands for the caller.

use std::{num::NonZeroU32, time::Duration};

use tower_key_rotation::{
    BuildError, KeyId, KeyLease, KeyPool, KeySpec, Quota, Traits, Unit, classify::Verdict,
};

/// What a caller may use at most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct CallerLimits {
    pub(crate) requests_per_minute: Option<u32>,
    pub(crate) tokens_per_minute: Option<u32>,
    pub(crate) max_in_flight: Option<NonZeroU32>,
}

/// The budgets of a caller. Requests are apart from tokens: whether there is room for a request is known before its
/// body has been read, and the body says how many tokens it needs.
#[derive(Default)]
pub(super) struct Budgets {
    requests: Option<KeyPool>,
    tokens: Option<KeyPool>,
}

/// A limit that a caller has reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OverLimit {
    pub(crate) limit: &'static str,
    /// Time until there is room.
    pub(crate) wait: Duration,
}

/// What one request holds of its caller's budgets. It is in flight until this is dropped.
pub(super) struct Held {
    _request: Option<KeyLease>,
    tokens: Option<KeyLease>,
}

impl Budgets {
    pub(super) fn of(limits: CallerLimits) -> Result<Self, BuildError> {
        let CallerLimits { requests_per_minute, tokens_per_minute, max_in_flight } = limits;
        // A minute's worth at once, as the limits of most APIs allow.
        let requests = requests_per_minute.map(|most| Quota::per_minute(most).burst(most));
        let tokens = tokens_per_minute.map(|most| Quota::per_minute(most).burst(most).tokens());
        let has_requests = requests.is_some() || max_in_flight.is_some();
        Ok(Self {
            requests: if has_requests { Some(pool(requests, max_in_flight)?) } else { None },
            tokens: if tokens.is_some() { Some(pool(tokens, None)?) } else { None },
        })
    }

    /// Takes room for a request.
    pub(super) fn begin(&self) -> Result<Held, OverLimit> {
        let lease = |pool: &KeyPool| pool.lease(&Traits::new()).map_err(|no_key| no_key.retry_in());
        let request = self.requests.as_ref().map(lease).transpose().map_err(|wait| match wait {
            Some(wait) if !wait.is_zero() => OverLimit { limit: "requests per minute", wait },
            // A place is free when another request ends.
            _ => OverLimit { limit: "requests in flight", wait: Duration::from_secs(1) },
        })?;
        Ok(Held { _request: request, tokens: None })
    }

    /// Takes room for the tokens of a request. Without an estimate, those of an average one.
    pub(super) fn reserve(&self, held: &mut Held, tokens: Option<u64>) -> Result<(), OverLimit> {
        let Some(pool) = &self.tokens else { return Ok(()) };
        let traits = tokens.map_or_else(Traits::new, |tokens| Traits::new().tokens(tokens));
        let lease = pool.lease(&traits).map_err(|no_key| OverLimit {
            limit: "tokens per minute",
            wait: no_key.retry_in().unwrap_or(Duration::from_secs(60)),
        })?;
        held.tokens = Some(lease);
        Ok(())
    }

    pub(super) fn limits_tokens(&self) -> bool {
        self.tokens.is_some()
    }

    /// How many requests and tokens there is room for now.
    pub(super) fn left(&self) -> [Option<f64>; 2] {
        let left = |pool: &Option<KeyPool>, unit| {
            let budgets = pool.as_ref()?.explain(&Traits::new()).keys.pop()?.budgets;
            budgets.iter().filter(|budget| budget.unit == unit).map(|budget| budget.left).reduce(f64::min)
        };
        [left(&self.requests, Unit::Requests), left(&self.tokens, Unit::Tokens)]
    }
}

impl Held {
    /// The upstream served the request: its tokens stay taken. Otherwise they are given back.
    pub(super) fn was_served(&self) {
        if let Some(tokens) = &self.tokens {
            tokens.answered_with(Verdict::Nothing);
        }
    }

    /// Corrects the tokens by what the response says.
    pub(super) fn used(&self, tokens: u64) {
        if let Some(held) = &self.tokens {
            held.used(tokens);
        }
    }
}

/// A pool with one key, whose quota and limit are the caller's.
fn pool(quota: Option<Quota>, max_in_flight: Option<NonZeroU32>) -> Result<KeyPool, BuildError> {
    let builder = quota.into_iter().fold(KeyPool::builder(), |builder, quota| builder.quota(quota));
    let pool = builder;
    let Ok(id) = KeyId::new("caller") else { return pool.build() };
    let mut caller = KeySpec::new(id, "caller");
    caller.max_in_flight = max_in_flight;
    pool.key_spec(caller).build()
}
