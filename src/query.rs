//! Query strings, as far as a key in one goes.

use std::borrow::Cow;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

/// All but RFC 3986's unreserved characters.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

#[derive(Clone)]
pub struct Parameter {
    name: Box<str>,
    encoded: Box<str>,
}

impl Parameter {
    pub(crate) fn new(name: &str, value: &str) -> Self {
        let encoded =
            format!("{}={}", utf8_percent_encode(name, ENCODED), utf8_percent_encode(value, ENCODED));
        Self { name: name.into(), encoded: encoded.into() }
    }

    /// `name=value`, ready for a URL.
    pub(crate) fn encoded(&self) -> &str {
        &self.encoded
    }
}

/// The query with these parameters in place of any of the same names.
pub(crate) fn with(query: Option<&str>, parameters: &[Parameter]) -> String {
    let own = parameters.iter().map(Parameter::encoded);
    others(query, parameters).chain(own).collect::<Vec<_>>().join("&")
}

/// The query without the parameters of these names; `None` where nothing is left.
#[cfg(feature = "reqwest")]
pub(crate) fn without(query: Option<&str>, parameters: &[Parameter]) -> Option<String> {
    let left = others(query, parameters).collect::<Vec<_>>();
    (!left.is_empty()).then(|| left.join("&"))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parameter_is_added_to_what_is_there() {
        let key = [Parameter::new("key", "s&cret")];
        assert_eq!(with(None, &key), "key=s%26cret");
        assert_eq!(with(Some("a=1&b"), &key), "a=1&b&key=s%26cret");
    }

    #[test]
    fn every_parameter_of_its_name_is_replaced_however_it_is_written() {
        let key = [Parameter::new("key", "new")];
        assert_eq!(with(Some("key=a&x=1&k%65y=b&key"), &key), "x=1&key=new");
    }

    #[cfg(feature = "reqwest")]
    #[test]
    fn it_can_be_taken_out_again() {
        let key = [Parameter::new("key", "new")];
        assert_eq!(without(Some("key=new&x=1"), &key), Some("x=1".into()));
        assert_eq!(without(Some("key=new"), &key), None);
    }
}
