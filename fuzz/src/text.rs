//! Inputs are text where they can be: a seed is written by hand, and a find can be read.

use http::{HeaderMap, HeaderName, HeaderValue};

/// All before the first empty line, and all behind it.
pub(crate) fn divided(input: &[u8]) -> (&[u8], &[u8]) {
    match input.windows(2).position(|ends| ends == b"\n\n") {
        Some(end) => (&input[..end], &input[end + 2..]),
        None => (input, &[]),
    }
}

pub(crate) fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(|byte| *byte == b'\n')
}

/// Of the lines `name: value`, those that can be headers.
pub(crate) fn headers<'a>(lines: impl Iterator<Item = &'a [u8]>) -> HeaderMap {
    lines.filter_map(header).collect()
}

fn header(line: &[u8]) -> Option<(HeaderName, HeaderValue)> {
    let colon = line.iter().position(|byte| *byte == b':')?;
    let (name, value) = line.split_at(colon);
    let value = HeaderValue::from_bytes(value[1..].trim_ascii_start());
    HeaderName::from_bytes(name).ok().zip(value.ok())
}
