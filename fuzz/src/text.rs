//! Parser for text inputs, which are easy to write as seeds and to read as findings.

use http::{HeaderMap, HeaderName, HeaderValue};

/// Splits an input at its first empty line.
pub(crate) fn divided(input: &[u8]) -> (&[u8], &[u8]) {
    match input.windows(2).position(|ends| ends == b"\n\n") {
        Some(end) => (&input[..end], &input[end + 2..]),
        None => (input, &[]),
    }
}

pub(crate) fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(|byte| *byte == b'\n')
}

/// Reads lines of the form `name: value`, and skips those that are not valid headers.
pub(crate) fn headers<'a>(lines: impl Iterator<Item = &'a [u8]>) -> HeaderMap {
    lines.filter_map(header).collect()
}

fn header(line: &[u8]) -> Option<(HeaderName, HeaderValue)> {
    let colon = line.iter().position(|byte| *byte == b':')?;
    let (name, value) = line.split_at(colon);
    let value = HeaderValue::from_bytes(value[1..].trim_ascii_start());
    HeaderName::from_bytes(name).ok().zip(value.ok())
}
