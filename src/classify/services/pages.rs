//! Writes the tables of the services' documentation, and `docs/SERVICES.md`, from the rules. `SERVICES=write` writes
//! them, otherwise a test compares.

use std::{env, fmt::Write, fs, path::Path};

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

use super::{
    super::{
        answer::Answer,
        classifier::ResponseHead,
        rules::{COMMON, Means, Rule, Rules, When},
    },
    *,
};

/// The heading, the file's name, and the rules of each service.
const PAGES: [(&str, &str, &Rules); 20] = [
    ("Any service: `Generic`", "generic", generic::RULES),
    ("OpenAI: `OpenAi`", "openai", openai::RULES),
    ("Azure OpenAI: `AzureOpenAi`", "azure_openai", azure_openai::RULES),
    ("Anthropic: `Anthropic`", "anthropic", anthropic::RULES),
    ("Gemini: `Gemini`", "gemini", gemini::RULES),
    ("Mistral: `Mistral`", "mistral", mistral::RULES),
    ("Groq: `Groq`", "groq", groq::RULES),
    ("OpenRouter: `OpenRouter`", "openrouter", openrouter::RULES),
    ("xAI: `XAi`", "xai", xai::RULES),
    ("DeepSeek: `DeepSeek`", "deepseek", deepseek::RULES),
    ("Cohere: `Cohere`", "cohere", cohere::RULES),
    ("Hugging Face: `HuggingFace`", "hugging_face", hugging_face::RULES),
    ("LiteLLM: part of `LlmGateway`", "litellm", litellm::RULES),
    ("GitHub: `GitHub`", "github", github::RULES),
    ("Slack: `Slack`", "slack", slack::RULES),
    ("Discord: `Discord`", "discord", discord::RULES),
    ("Stripe: `Stripe`", "stripe", stripe::RULES),
    ("Shopify: `Shopify`", "shopify", shopify::RULES),
    ("Notion: `Notion`", "notion", notion::RULES),
    ("gRPC: `Grpc`", "grpc", grpc::RULES),
];

const HEAD: &str = "| status | error | verdict | source |\n|---|---|---|---|\n";

fn list(words: &[&str]) -> String {
    words.iter().map(|word| format!("`{}`", word.trim())).collect::<Vec<_>>().join(", ")
}

fn row(rule: &Rule) -> String {
    let statuses: Vec<_> = rule.statuses.iter().map(u16::to_string).collect();
    let when = match rule.when {
        When::Code(codes) => format!("code {}", list(codes)),
        When::Begins(with) => format!("message begins {}", list(with)),
        When::BeginsAndContains(with, words) => {
            format!("message begins {} and contains {}", list(&[with]), list(words))
        }
        When::CodeAndBegins(code, with) => format!("code {}, message begins {}", list(&[code]), list(with)),
        When::Header(name, values) => format!("header `{name}` is {}", list(values)),
        When::Is(words, _) => words.to_owned(),
    };
    let means = match rule.means {
        Means::TheRequest => "nothing: it is about the request".to_owned(),
        Means::TheService => "nothing: it is about the service".to_owned(),
        Means::Limited => "rate limited".to_owned(),
        Means::Exhausted => "exhausted".to_owned(),
        Means::ExhaustedUntil(reset) => format!("exhausted, until {}", reset.words),
        Means::ScopeExhausted => "exhausted in the scope".to_owned(),
        Means::ScopeExhaustedUntil(reset) => format!("exhausted in the scope, until {}", reset.words),
        Means::Revoked => "revoked".to_owned(),
        Means::Refused => "refused".to_owned(),
    };
    format!("| {} | {when} | {means} | [source]({}) |\n", statuses.join(", "), rule.source)
}

fn table(rules: &Rules) -> String {
    let common = COMMON.iter().map(row).collect::<String>();
    if rules.is_empty() {
        let source = "[source](https://datatracker.ietf.org/doc/html/rfc9110#section-10.2.3)";
        return format!(
            "{HEAD}| 401, 402, 403 | says how long to wait: `Retry-After`, a window with nothing remaining, `RetryInfo` \
             | rate limited | {source} |\n{common}| 401, 402, 403 | any other | refused | |\n| 429 | says no wait, and \
             its message has the word `banned`, `blocked`, `suspended` or `disabled` | refused | |\n| 429 | any other | \
             rate limited | {source} |\n"
        );
    }
    let rows = rules.iter().map(row).collect::<String>();
    format!("{HEAD}{rows}\nIt judges all other errors as [`Generic`](crate::classify::Generic) does.\n")
}

const INTRO: &str = "# What responses of services mean

Each service has a classifier in `tower_key_rotation::classify`; `LlmGateway` joins those of the LLM services. Each is a
table of rules, and the first rule that applies counts. This page is written from the tables: `SERVICES=write cargo test
--lib services`. Each row has a recorded response in `tests/corpus`.

| verdict | effect on the key |
|---|---|
| nothing | none; the response goes to the caller |
| rate limited | a cooldown: as long as the response says, within the pool's limits |
| exhausted | it rests until the quota is reset, or for 24 hours |
| exhausted in the scope | the same, for requests of the same scope only |
| refused | the service refuses the request or the key: another key's answer shows which |
| revoked | it rests until an operator resets it |

Codes and messages count in any case. A code is a string or a number in the members `code`, `type`, `status`, `reason`,
`error` or `error_code`, of the error object or of its details. A message is its `message`, `detail` or `error`, or the
whole of a body that is no JSON. Only the beginning of a message counts where the rest may quote the request.

A 401, 402 or 403 that says how long to wait is a rate limit, unless its words are about the request.

Bodies that are compressed with gzip, deflate, brotli or zstd are decoded before they are judged, up to 1 MiB. Those in
other formats count as unknown.
";

#[test]
fn documentation_of_services_matches_their_rules() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut page = INTRO.to_owned();
    let mut files = Vec::new();
    for (heading, name, rules) in PAGES {
        let table = table(rules);
        let plain = table.replace("[`Generic`](crate::classify::Generic)", "`Generic`");
        write!(page, "\n## {heading}\n\n{plain}").unwrap();
        files.push((root.join(format!("src/classify/services/{name}.md")), table));
    }
    files.push((root.join("docs/SERVICES.md"), page));
    for (file, text) in files {
        if env::var("SERVICES").is_ok_and(|is| is == "write") {
            fs::write(&file, &text).unwrap();
        }
        let written = fs::read_to_string(&file).unwrap_or_default();
        assert!(
            written == text,
            "{} is out of date: SERVICES=write cargo test --lib services",
            file.display()
        );
    }
}

/// The first rule that applies to a recorded response, by its number.
fn first_rule(rules: &'static Rules, file: &str) -> Option<usize> {
    let (head, body) = file.split_once("\n\n")?;
    let mut lines = head.lines().skip_while(|line| line.starts_with('#'));
    let status: StatusCode = lines.next()?.split(' ').nth(1)?.parse().ok()?;
    let headers: HeaderMap = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.parse::<HeaderName>().unwrap(), value.parse::<HeaderValue>().unwrap()))
        .collect();
    let head = ResponseHead::new(status, &headers).with_body(body.as_bytes());
    let answer = Answer::of(&head);
    let applies = |rule: &Rule| rule.statuses.contains(&status.as_u16()) && rule.when.applies(&answer);
    rules.iter().position(applies)
}

#[test]
fn each_rule_has_a_recorded_response() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
    let mut missing = String::new();
    for (_, name, rules) in PAGES {
        let rules = if rules.is_empty() { COMMON } else { rules };
        let files =
            fs::read_dir(corpus.join(name)).unwrap().map(|file| fs::read(file.unwrap().path()).unwrap());
        let applied: Vec<_> =
            files.filter_map(|file| first_rule(rules, &String::from_utf8_lossy(&file))).collect();
        for (number, rule) in rules.iter().enumerate().filter(|(number, _)| !applied.contains(number)) {
            write!(missing, "{name}, rule {number}: {}", row(rule)).unwrap();
        }
    }
    assert!(missing.is_empty(), "no response in tests/corpus shows these:\n{missing}");
}
