//! Divides a stream of server-sent events into its events: html.spec.whatwg.org/multipage/server-sent-events.html.

use std::mem;

use memchr::memchr2;

/// One event, as far as its meaning depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Event<'a> {
    pub(super) name: &'a [u8],
    /// `None` if it is too long to be kept.
    pub(super) data: Option<&'a [u8]>,
}

/// Reads events out of pieces of a stream, wherever these are divided.
///
/// Beyond the standard, it takes lines that begin as JSON does for data: Gemini writes an error so into a stream of events.
/// What the stream ends with is an event, also without an empty line.
#[derive(Debug)]
pub(crate) struct Events {
    /// The most bytes of an event that are kept.
    most: usize,
    line: Vec<u8>,
    has_line: bool,
    name: Vec<u8>,
    data: Vec<u8>,
    stage: Stage,
    is_first_line: bool,
    is_too_long: bool,
    after_cr: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// No line yet of the next event.
    Between,
    /// Lines with the names of fields.
    Fields,
    /// Lines of JSON without the names of fields.
    Json,
}

impl Events {
    /// Keeps that many bytes of an event at most.
    pub(crate) fn new(most: usize) -> Self {
        Self {
            most,
            line: Vec::new(),
            has_line: false,
            name: Vec::new(),
            data: Vec::new(),
            stage: Stage::Between,
            is_first_line: true,
            is_too_long: false,
            after_cr: false,
        }
    }

    /// Reads the next bytes. `found` gets each event that they complete, and says whether to go on.
    pub(crate) fn read(&mut self, mut bytes: &[u8], mut found: impl FnMut(Event<'_>) -> bool) {
        if self.after_cr && !bytes.is_empty() {
            self.after_cr = false;
            bytes = bytes.strip_prefix(b"\n").unwrap_or(bytes);
        }
        while let Some(at) = memchr2(b'\r', b'\n', bytes) {
            self.add(&bytes[..at]);
            if bytes[at..] == *b"\r" {
                self.after_cr = true;
            }
            let end = if bytes[at..].starts_with(b"\r\n") { 2 } else { 1 };
            bytes = &bytes[at + end..];
            if self.end_line() && !self.end_event(&mut found) {
                return;
            }
        }
        self.add(bytes);
    }

    /// The stream has ended.
    pub(crate) fn end(&mut self, mut found: impl FnMut(Event<'_>) -> bool) {
        if self.has_line {
            self.end_line();
        }
        self.end_event(&mut found);
    }

    fn add(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        self.has_line = true;
        if self.line.len() + self.data.len() + bytes.len() > self.most {
            self.is_too_long = true;
        }
        if self.is_too_long {
            (self.line, self.data) = (Vec::new(), Vec::new());
        } else {
            self.line.extend_from_slice(bytes);
        }
    }

    /// Returns whether the line is empty: that ends an event.
    fn end_line(&mut self) -> bool {
        let bom: &[u8] = if mem::take(&mut self.is_first_line) { b"\xEF\xBB\xBF" } else { b"" };
        if !mem::take(&mut self.has_line) {
            return true;
        }
        if self.is_too_long {
            return false;
        }
        let line = mem::take(&mut self.line);
        let text = line.strip_prefix(bom).unwrap_or(&line);
        self.read_line(text);
        let is_empty = text.is_empty();
        // Its memory serves the next line.
        self.line = line;
        self.line.clear();
        is_empty
    }

    fn read_line(&mut self, text: &[u8]) {
        match (self.stage, text) {
            (_, []) | (Stage::Between | Stage::Fields, [b':', ..]) => {}
            (Stage::Json, _) | (Stage::Between, [b'{' | b'[', ..]) => {
                self.stage = Stage::Json;
                self.add_data(text);
            }
            _ => {
                self.stage = Stage::Fields;
                let mut parts = text.splitn(2, |byte| *byte == b':');
                let field = parts.next().unwrap_or_default();
                let value = parts.next().unwrap_or_default();
                let value = value.strip_prefix(b" ").unwrap_or(value);
                match field {
                    b"data" => self.add_data(value),
                    b"event" => self.name = value.to_vec(),
                    _ => {}
                }
            }
        }
    }

    fn add_data(&mut self, line: &[u8]) {
        self.data.extend_from_slice(line);
        self.data.push(b'\n');
    }

    fn end_event(&mut self, found: &mut impl FnMut(Event<'_>) -> bool) -> bool {
        self.stage = Stage::Between;
        let is_too_long = mem::take(&mut self.is_too_long);
        let data = self.data.strip_suffix(b"\n").unwrap_or(&self.data);
        let goes_on = match (is_too_long, self.data.is_empty()) {
            (true, _) => found(Event { name: &self.name, data: None }),
            (false, false) => found(Event { name: &self.name, data: Some(data) }),
            // Nothing but comments, or a name.
            (false, true) => true,
        };
        self.name.clear();
        self.data.clear();
        goes_on
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*, sample::select};

    use super::*;

    type Owned = (String, Option<String>);

    fn owned(event: Event<'_>) -> Owned {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (text(event.name), event.data.map(text))
    }

    fn events_of(pieces: &[&[u8]], most: usize) -> Vec<Owned> {
        let (mut events, mut found) = (Events::new(most), Vec::new());
        let mut add = |event: Event<'_>| {
            found.push(owned(event));
            true
        };
        for piece in pieces {
            events.read(piece, &mut add);
        }
        events.end(&mut add);
        found
    }

    fn events(text: &str) -> Vec<Owned> {
        events_of(&[text.as_bytes()], usize::MAX)
    }

    fn event(name: &str, data: &str) -> Owned {
        (name.to_owned(), Some(data.to_owned()))
    }

    #[test]
    fn all_three_line_ends_divide_lines() {
        for end in ["\n", "\r\n", "\r"] {
            let text = ["event: a", "data: 1", "", "data:2", "data: ", "data:  3", "", ""].join(end);
            assert_eq!(events(&text), [event("a", "1"), event("", "2\n\n 3")], "{end:?}");
        }
    }

    #[test]
    fn comments_and_other_fields_are_no_data() {
        let text = "\u{feff}: hello\n\n:\n\nid: 1\nretry: 5\ndata\nevent: a\n\nevent: b\n\ndata: 1\n\n";
        assert_eq!(events(text), [event("a", ""), event("", "1")]);
        assert_eq!(events("\u{feff}data: 1\n\n"), [event("", "1")]);
        assert_eq!(events("\u{feff}\n\ndata: 1\n\n"), [event("", "1")]);
    }

    #[test]
    fn json_outside_of_fields_is_an_event() {
        let text = "data: 1\n\n{\n  \"error\": {\n    \"code\": 503\n  }\n}\n";
        let json = "{\n  \"error\": {\n    \"code\": 503\n  }\n}";
        assert_eq!(events(text), [event("", "1"), event("", json)]);
        assert_eq!(events("[{}\n,\n{}]\n\ndata: 1\n\n"), [event("", "[{}\n,\n{}]"), event("", "1")]);
    }

    #[test]
    fn the_last_event_needs_no_end() {
        for text in ["data: 1", "data: 1\n", "data: 1\r", "data: 1\n\n"] {
            assert_eq!(events(text), [event("", "1")], "{text:?}");
        }
    }

    #[test]
    fn a_long_event_is_not_kept() {
        let text = format!("data: 1\n\nevent: a\ndata: {}\ndata: 2\n\ndata: 3\n\n", "x".repeat(100));
        let found = [event("", "1"), ("a".to_owned(), None), event("", "3")];
        assert_eq!(events_of(&[text.as_bytes()], 50), found);
        let bytes: Vec<_> = text.as_bytes().chunks(1).collect();
        assert_eq!(events_of(&bytes, 50), found);
    }

    #[test]
    fn nothing_is_read_behind_the_last_event_wanted() {
        let mut count = 0;
        Events::new(100).read(b"data: 1\n\ndata: 2\n\ndata: 3\n\n", |_| {
            count += 1;
            count < 2
        });
        assert_eq!(count, 2);
    }

    proptest! {
        #[test]
        fn f28_no_stream_panics_or_depends_on_its_pieces(
            text in vec(select(vec!["\r", "\n", "\r\n", "data:", "event: a", ": x", "{", "\u{feff}", "x", " "]), 0..40),
            lengths in vec(1..9_usize, 0..40),
            most in select(vec![8, 20, usize::MAX]),
        ) {
            let text = text.concat();
            let (mut rest, mut pieces) = (text.as_bytes(), Vec::new());
            for length in lengths {
                let (piece, after) = rest.split_at(length.min(rest.len()));
                pieces.push(piece);
                rest = after;
            }
            pieces.push(rest);
            let whole = events_of(&[text.as_bytes()], most);
            let bytes: Vec<_> = text.as_bytes().chunks(1).collect();
            // How long a line is shows earlier in short pieces, so only what is kept is compared.
            if most == usize::MAX {
                prop_assert_eq!(events_of(&pieces, most), whole.clone());
                prop_assert_eq!(events_of(&bytes, most), whole);
            } else {
                events_of(&pieces, most);
                events_of(&bytes, most);
            }
        }
    }
}
