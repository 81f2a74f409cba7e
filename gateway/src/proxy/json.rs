//! Finds fields of a JSON object without parsing all of it: a response may be long, and only its usage matters.

/// Iterates over the fields of an object: each name as it is written, and the text from its value on.
///
/// It ends where the text is no JSON, or breaks off. Values are skipped rather than checked.
pub(super) struct Fields<'j> {
    /// From the last value on.
    rest: &'j [u8],
    is_at_value: bool,
}

impl<'j> Fields<'j> {
    /// The fields of the object that the text begins with; none if it is something else.
    pub(super) fn of(json: &'j [u8]) -> Self {
        Self { rest: json.trim_ascii_start().strip_prefix(b"{").unwrap_or_default(), is_at_value: false }
    }
}

impl<'j> Iterator for Fields<'j> {
    type Item = (&'j [u8], &'j [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let mut rest = self.rest;
        if self.is_at_value {
            rest = rest[end_of_value(rest)?..].trim_ascii_start().strip_prefix(b",")?;
        }
        let rest = rest.trim_ascii_start();
        let (name, rest) = rest.split_at(end_of_string(rest)?);
        self.rest = rest.trim_ascii_start().strip_prefix(b":")?.trim_ascii_start();
        self.is_at_value = true;
        Some((&name[1..name.len() - 1], self.rest))
    }
}

/// Returns the number that the text begins with, if it is whole and no number goes on after the text.
pub(super) fn number(text: &[u8]) -> Option<u64> {
    let number = &text[..end_of_scalar(text)?];
    str::from_utf8(number).ok()?.parse().ok()
}

fn end_of_value(text: &[u8]) -> Option<usize> {
    match text.first()? {
        b'"' => end_of_string(text),
        b'{' | b'[' => end_of_container(text),
        _ => end_of_scalar(text),
    }
}

fn end_of_scalar(text: &[u8]) -> Option<usize> {
    text.iter().position(|byte| matches!(byte, b',' | b'}' | b']' | b' ' | b'\t' | b'\r' | b'\n'))
}

fn end_of_container(text: &[u8]) -> Option<usize> {
    let (mut depth, mut at) = (0_usize, 0);
    loop {
        let byte = *text.get(at)?;
        // The others are most, and end nothing. Of two cases that differ in one bit, one comparison finds both.
        if byte == b'"' {
            at += end_of_string(&text[at..])?;
            continue;
        }
        match byte | 0x20 {
            b'{' => depth += 1,
            b'}' if depth == 1 => return Some(at + 1),
            b'}' => depth -= 1,
            _ => {}
        }
        at += 1;
    }
}

/// The text must begin with the string's quote.
fn end_of_string(text: &[u8]) -> Option<usize> {
    if text.first() != Some(&b'"') {
        return None;
    }
    let mut at = 1;
    loop {
        // Eight bytes at once, since strings are most of the text.
        while let Some(word) = text.get(at..).and_then(<[u8]>::first_chunk) {
            let word = u64::from_le_bytes(*word);
            let found = zeros(word ^ QUOTES) | zeros(word ^ BACKSLASHES);
            if found != 0 {
                at += (found.trailing_zeros() / 8) as usize;
                break;
            }
            at += 8;
        }
        match text.get(at)? {
            b'"' => return Some(at + 1),
            // Whatever is escaped ends no string.
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
}

const QUOTES: u64 = u64::from_ne_bytes([b'"'; 8]);

const BACKSLASHES: u64 = u64::from_ne_bytes([b'\\'; 8]);

/// Sets the highest bit of the first byte that is zero, and none if there is no zero. Bits above the first one may be
/// wrong.
fn zeros(word: u64) -> u64 {
    word.wrapping_sub(u64::from_ne_bytes([1; 8])) & !word & u64::from_ne_bytes([0x80; 8])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(json: &str) -> Vec<(&str, &str)> {
        let text = |bytes| std::str::from_utf8(bytes).unwrap();
        let whole = |value| end_of_value(value).map(|end| text(&value[..end]));
        Fields::of(json.as_bytes()).map_while(|(name, value)| Some((text(name), whole(value)?))).collect()
    }

    #[test]
    fn values_of_every_kind_are_found() {
        let json = r#" { "a" : 1 ,"b":"x\"}\\","c":{"d":[{},"]"]}, "e":[1,[2]],"f":null,"g":-1.5e3 } "#;
        let expected = [
            ("a", "1"),
            ("b", r#""x\"}\\""#),
            ("c", r#"{"d":[{},"]"]}"#),
            ("e", "[1,[2]]"),
            ("f", "null"),
            ("g", "-1.5e3"),
        ];
        assert_eq!(fields(json), expected);
    }

    #[test]
    fn what_breaks_off_is_read_so_far() {
        let json = r#"{"a":1,"b":{"c":"d"},"e":"\"f"}"#;
        for end in 0..json.len() {
            let all = [("a", "1"), ("b", r#"{"c":"d"}"#), ("e", r#""\"f""#)];
            let read = fields(&json[..end]);
            assert_eq!(read, all[..read.len()], "{end}");
        }
    }

    #[test]
    fn anything_else_has_no_fields() {
        for json in
            ["", "[]", "null", "{}", "{1:2}", "{\"a\"}", "\"a\"", "{\"a\":", "{\"", "{\"\\", "{,\"a\":1}"]
        {
            assert_eq!(fields(json), [], "{json}");
        }
        assert_eq!(Fields::of(&[b'{', b'"', 0xff, b'"', b':', 0xff, b'}']).count(), 1);
    }

    #[test]
    fn strings_of_any_length_end() {
        for length in 0..100 {
            for end in ["", "\\\"", "\\\\", "\\\"\\\\\\\""] {
                let value = format!("\"{}{end}\"", "x".repeat(length));
                assert_eq!(fields(&format!("{{\"a\":{value},\"b\":1}}")), [("a", &*value), ("b", "1")]);
            }
        }
    }

    #[test]
    fn only_whole_numbers_count() {
        assert_eq!(number(b"12,"), Some(12));
        for text in ["12", "", "-1,", "1.5}", "null,", "\"1\",", "99999999999999999999}"] {
            assert_eq!(number(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn deep_values_need_no_stack() {
        let json = format!("{{\"a\":{}{},\"b\":1}}", "[".repeat(1_000_000), "]".repeat(1_000_000));
        assert_eq!(Fields::of(json.as_bytes()).count(), 2);
    }
}
