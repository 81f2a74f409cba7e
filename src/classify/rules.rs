//! The engine of the services' classifiers: a service is a table of rules, and the first rule that applies counts.

use std::time::Duration;

use http::{HeaderMap, StatusCode};

use super::{
    answer::{Answer, Form},
    classifier::{ResponseHead, Verdict},
};

/// The rules of one service.
pub(super) type Rules = [Rule];

/// What one kind of error means.
pub(super) struct Rule {
    pub(super) statuses: &'static [u16],
    pub(super) when: When,
    pub(super) means: Means,
    /// The page that says so. `docs/SERVICES.md` is written from it.
    #[cfg_attr(not(test), expect(dead_code))]
    pub(super) source: &'static str,
}

/// What an error has to say. All words are in lower case.
pub(super) enum When {
    /// One of its codes, types or reasons is one of these.
    Code(&'static [&'static str]),
    /// Its message begins with one of these. The rest of a message may quote the request, so it does not count.
    Begins(&'static [&'static str]),
    /// Its message begins so, and also contains one of these. For messages that quote nothing.
    BeginsAndContains(&'static str, &'static [&'static str]),
    /// It has this code, and its message begins with one of these.
    CodeAndBegins(&'static str, &'static [&'static str]),
    /// One of these headers is this.
    Header(&'static str, &'static [&'static str]),
    /// A condition of another kind, in words and as a function.
    Is(#[cfg_attr(not(test), expect(dead_code))] &'static str, fn(&Answer<'_>) -> bool),
}

/// What an error means for the key.
#[derive(Clone, Copy)]
pub(super) enum Means {
    /// The service refuses the request. It would refuse it with every key.
    TheRequest,
    /// The service, or a part of it, has no capacity for anybody.
    TheService,
    Limited,
    Exhausted,
    ExhaustedUntil(Reset),
    ScopeExhausted,
    ScopeExhaustedUntil(Reset),
    Revoked,
    Refused,
}

/// When a quota is reset, in words and as the time until then.
#[derive(Clone, Copy)]
pub(super) struct Reset {
    #[cfg_attr(not(test), expect(dead_code))]
    pub(super) words: &'static str,
    pub(super) wait: fn(&Answer<'_>) -> Option<Duration>,
}

/// The rules of every service, behind those of its own.
pub(super) const COMMON: &Rules = &[
    Rule {
        statuses: &[403],
        when: When::Is("an HTML page: a firewall's", |answer| answer.form() == Form::Page),
        means: Means::TheRequest,
        source: "https://github.com/lobehub/lobehub/issues/2147",
    },
    Rule {
        statuses: &[403],
        when: When::Is(
            "the text `error code: 10..`, for a refused address, country or client",
            is_of_cloudflare,
        ),
        means: Means::TheRequest,
        source: "https://developers.cloudflare.com/support/troubleshooting/http-status-codes/cloudflare-1xxx-errors/",
    },
    Rule {
        statuses: &[401, 403],
        when: When::Is("`WWW-Authenticate` says `insufficient_scope`", has_insufficient_scope),
        means: Means::TheRequest,
        source: "https://datatracker.ietf.org/doc/html/rfc6750#section-3.1",
    },
];

/// Cloudflare's errors about the client: addresses (1006 to 1008), countries (1009), browsers (1010), and rules (1020).
fn is_of_cloudflare(answer: &Answer<'_>) -> bool {
    const CODES: [&str; 8] = ["1005", "1006", "1007", "1008", "1009", "1010", "1012", "1020"];
    answer.form() == Form::Text
        && answer.message().strip_prefix("error code: ").is_some_and(|code| CODES.contains(&code.trim()))
}

fn has_insufficient_scope(answer: &Answer<'_>) -> bool {
    answer.header("www-authenticate").is_some_and(|value| value.contains("error=\"insufficient_scope\""))
}

/// Words of a 429 that may tell of a locked key, and may as well be quoted from the request.
const LOCKED_OUT: [&str; 4] = ["banned", "blocked", "suspended", "disabled"];

/// The statuses that mean something for a key whatever the service is.
pub(super) const fn is_common(status: StatusCode) -> bool {
    matches!(status.as_u16(), 401 | 402 | 403 | 429)
}

/// Whether a table says something of successful responses.
pub(super) const fn reads_success(rules: &Rules) -> bool {
    let mut at = 0;
    while at < rules.len() {
        let statuses = rules[at].statuses;
        let mut status = 0;
        while status < statuses.len() {
            if statuses[status] < 400 {
                return true;
            }
            status += 1;
        }
        at += 1;
    }
    false
}

/// Whether one of the tables has a rule for that status.
pub(super) fn concern(tables: &[&'static Rules], status: StatusCode) -> bool {
    is_common(status) || rules_of(tables, status).next().is_some()
}

fn rules_of(tables: &[&'static Rules], status: StatusCode) -> impl Iterator<Item = &'static Rule> {
    let all = tables.iter().copied().flatten();
    all.filter(move |rule| rule.statuses.contains(&status.as_u16()))
}

/// A status that comes with this error, if one of the tables has a rule for the error.
pub(super) fn status_with(tables: &[&'static Rules], body: &[u8]) -> Option<u16> {
    let headers = HeaderMap::new();
    let head = ResponseHead::new(StatusCode::OK, &headers).with_body(body);
    let answer = Answer::of(&head);
    let mut rules = tables.iter().copied().flatten();
    rules.find(|rule| rule.when.applies(&answer))?.statuses.last().copied()
}

/// The verdict on a response whose status [concerns](concern) one of the tables.
#[cold]
pub(super) fn judge(tables: &[&'static Rules], response: &ResponseHead<'_>) -> Verdict {
    let (status, answer) = (response.status(), Answer::of(response));
    let means = rules_of(tables, status).find(|rule| rule.when.applies(&answer)).map(|rule| rule.means);
    if let Some(Means::TheRequest | Means::TheService) = means {
        return Verdict::Nothing;
    }
    let is_refusal = is_common(status) && status != StatusCode::TOO_MANY_REQUESTS;
    // A refusal that ends by itself is a limit, whatever its words are.
    if is_refusal && let Some(wait) = answer.wait_of_refusal() {
        return Verdict::RateLimited { wait: Some(wait) };
    }
    if let Some(means) = means {
        return means.verdict(&answer);
    }
    if rules_of(&[COMMON], status).any(|rule| rule.when.applies(&answer)) {
        return Verdict::Nothing;
    }
    match status {
        StatusCode::TOO_MANY_REQUESTS => match answer.wait() {
            None if answer.has_word_of(&LOCKED_OUT) => Verdict::Refused,
            wait => Verdict::RateLimited { wait },
        },
        _ if is_refusal => Verdict::Refused,
        _ => Verdict::Nothing,
    }
}

/// Implements [`ClassifyResponse`](super::ClassifyResponse) by tables of rules.
macro_rules! by_rules {
    ($name:ident, $tables:expr) => {
        $crate::classify::rules::by_rules!($name, $tables, trailers: false);
    };
    ($name:ident, $tables:expr, trailers: $trailers:literal) => {
        impl $crate::classify::ClassifyResponse for $name {
            #[inline]
            fn classify(&self, response: &$crate::classify::ResponseHead<'_>) -> $crate::classify::Verdict {
                use $crate::classify::rules;
                const READS_SUCCESS: bool = {
                    let (tables, mut at, mut reads) = (&$tables, 0, false);
                    while at < tables.len() {
                        reads |= rules::reads_success(tables[at]);
                        at += 1;
                    }
                    reads
                };
                if (response.status().as_u16() < 400 && !READS_SUCCESS)
                    || !rules::concern(&$tables, response.status())
                {
                    return $crate::classify::Verdict::Nothing;
                }
                rules::judge(&$tables, response)
            }

            fn wants_body(&self, response: &$crate::classify::ResponseHead<'_>) -> bool {
                $crate::classify::rules::concern(&$tables, response.status())
            }

            #[inline]
            fn wants_trailers(&self) -> bool {
                $trailers
            }
        }
    };
}

/// The classifier of one service, by the rules of its file. Its documentation is written from them.
macro_rules! service {
    ($(#[$doc:meta])* $name:ident, $page:literal) => {
        $crate::classify::rules::service!($(#[$doc])* $name, $page, trailers: false);
    };
    ($(#[$doc:meta])* $name:ident, $page:literal, trailers: $trailers:literal) => {
        $(#[$doc])*
        ///
        #[doc = include_str!($page)]
        #[derive(Clone, Copy, Debug, Default)]
        pub struct $name;

        $crate::classify::rules::by_rules!($name, [RULES], trailers: $trailers);
    };
}

pub(super) use {by_rules, service};

impl When {
    pub(super) fn applies(&self, answer: &Answer<'_>) -> bool {
        let begins = |with: &[&str]| with.iter().any(|words| answer.message().starts_with(words));
        match self {
            Self::Code(codes) => answer.has_code_of(codes),
            Self::Begins(with) => begins(with),
            Self::BeginsAndContains(with, words) => {
                begins(&[with]) && words.iter().any(|words| answer.message().contains(words))
            }
            Self::CodeAndBegins(code, with) => answer.has_code_of(&[code]) && begins(with),
            Self::Header(name, values) => answer.header(name).is_some_and(|value| values.contains(&value)),
            Self::Is(_, is) => is(answer),
        }
    }
}

impl Means {
    fn verdict(self, answer: &Answer<'_>) -> Verdict {
        match self {
            Self::TheRequest | Self::TheService => Verdict::Nothing,
            Self::Limited => Verdict::RateLimited { wait: answer.wait() },
            Self::Exhausted => Verdict::Exhausted { wait: None },
            Self::ExhaustedUntil(reset) => Verdict::Exhausted { wait: (reset.wait)(answer) },
            Self::ScopeExhausted => Verdict::ScopeExhausted { wait: None },
            Self::ScopeExhaustedUntil(reset) => Verdict::ScopeExhausted { wait: (reset.wait)(answer) },
            Self::Revoked => Verdict::Revoked,
            Self::Refused => Verdict::Refused,
        }
    }
}
