//! Keys in query strings: adding, finding and removing them.

use std::borrow::Cow;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

/// All characters but the unreserved ones of RFC 3986.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

#[derive(Clone)]
pub struct Parameter {
    name: Box<str>,
    encoded: Box<str>,
    /// `name=value`, not encoded.
    plain: Box<str>,
}

impl Parameter {
    pub(crate) fn new(name: &str, value: &str) -> Self {
        let encoded =
            format!("{}={}", utf8_percent_encode(name, ENCODED), utf8_percent_encode(value, ENCODED));
        let plain = format!("{name}={value}");
        Self { name: name.into(), encoded: encoded.into(), plain: plain.into() }
    }

    /// `name=value`, ready for a URL.
    pub(crate) fn encoded(&self) -> &str {
        &self.encoded
    }

    /// Whether the text contains the parameter: as it is, encoded, or encoded again as part of a URL in a URL.
    pub(crate) fn is_in(&self, text: &str) -> bool {
        const DEEPEST: usize = 3;
        let decoded = |text: &str| {
            text.contains('%').then(|| percent_decode_str(text).decode_utf8_lossy().into_owned())
        };
        let inner = std::iter::successors(decoded(text), |text| decoded(text));
        text.contains(&*self.plain) || inner.take(DEEPEST).any(|text| text.contains(&*self.plain))
    }
}

/// Whether the text contains one of the parameters.
pub(crate) fn holds_one(parameters: &[Parameter], text: &str) -> bool {
    parameters.iter().any(|own| own.is_in(text))
}

/// Adds parameters to a query, and removes others of the same names.
pub(crate) fn with(query: Option<&str>, parameters: &[Parameter]) -> String {
    let own = parameters.iter().map(Parameter::encoded);
    others(query, parameters).chain(own).collect::<Vec<_>>().join("&")
}

/// Removes the parameters of these names from a query. Returns `None` if the query is empty then.
#[cfg(feature = "reqwest")]
pub(crate) fn without(query: Option<&str>, parameters: &[Parameter]) -> Option<String> {
    let left = others(query, parameters).collect::<Vec<_>>();
    (!left.is_empty()).then(|| left.join("&"))
}

/// Removes every part of an absolute or relative URL that contains one of these parameters. Returns `None` if no part
/// does, and an empty URL if the path does.
///
/// A parameter of the same name with another value stays: another host may give it another meaning.
pub(crate) fn url_without(url: &str, parameters: &[Parameter]) -> Option<String> {
    let holds_one = |text: &str| holds_one(parameters, text);
    if !holds_one(url) {
        return None;
    }
    let (rest, fragment) = url.split_at(url.find('#').unwrap_or(url.len()));
    let fragment = if holds_one(fragment) { "" } else { fragment };
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let left = query.split('&').filter(|pair| !holds_one(pair)).collect::<Vec<_>>().join("&");
    let mark = if left.is_empty() { "" } else { "?" };
    let without = format!("{path}{mark}{left}{fragment}");
    // The parameter may be in the path, or span several parts.
    Some(if holds_one(&without) { String::new() } else { without })
}

/// Removes the parameters from the URLs of RFC 8288's links, `<URL>; rel="next", …`. Returns no links at all if one of
/// them would become empty, since an empty URL refers to the request's own.
pub(crate) fn links_without(links: &str, parameters: &[Parameter]) -> String {
    let mut without = String::new();
    let mut rest = links;
    while let Some((before, (url, after))) =
        rest.split_once('<').and_then(|(before, rest)| Some((before, rest.split_once('>')?)))
    {
        let url = url_without(url, parameters).map_or(url.into(), Cow::Owned);
        without.extend([before, "<", &*url, ">"]);
        rest = after;
    }
    without.push_str(rest);
    if without.contains("<>") || holds_one(parameters, &without) { String::new() } else { without }
}

fn others<'q>(query: Option<&'q str>, parameters: &[Parameter]) -> impl Iterator<Item = &'q str> {
    query.unwrap_or_default().split('&').filter(|pair| !pair.is_empty()).filter(|pair| {
        let name = decoded_name(pair);
        !parameters.iter().any(|own| *own.name == *name)
    })
}

fn decoded_name(pair: &str) -> Cow<'_, str> {
    let name = pair.split('=').next().unwrap_or_default();
    percent_decode_str(name).decode_utf8_lossy()
}
