//! Secrets that are recognized in any encoding, and everything that a process logs or panics with.

use std::{
    collections::{BTreeMap, HashMap},
    hash::{DefaultHasher, Hash, Hasher},
    panic,
    sync::{LazyLock, Mutex},
};

use base64::{
    Engine,
    prelude::{BASE64_STANDARD_NO_PAD, BASE64_URL_SAFE_NO_PAD},
};
use percent_encoding::{AsciiSet, CONTROLS, NON_ALPHANUMERIC, utf8_percent_encode};
use tracing_subscriber::{fmt::format::FmtSpan, util::SubscriberInitExt};

use super::Logs;

/// This many consecutive characters of a secret are a leak.
pub const PIECE: usize = 12;

/// The special characters of a secret: some form escapes each of them, and `>>>>>` differs between the two alphabets of
/// base64. There is no comma, which would separate keys in an environment variable.
const SPECIAL: [&str; 14] = ["\"", "\\", "+", "/", "%", "&", "=", " ", "?", ">>>>>", "<", "~", "'", ";"];

const UNRESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
const FORM: &AsciiSet = &NON_ALPHANUMERIC.remove(b'*').remove(b'-').remove(b'.').remove(b'_');
const QUERY: &AsciiSet = &CONTROLS.add(b' ').add(b'"').add(b'#').add(b'<').add(b'>').add(b'\'');
const USERINFO: &AsciiSet = &QUERY
    .add(b'?')
    .add(b'`')
    .add(b'{')
    .add(b'}')
    .add(b'/')
    .add(b':')
    .add(b';')
    .add(b'=')
    .add(b'@')
    .add(b'\\');

type Form = (&'static str, fn(&str) -> String);

/// The encodings that work character by character.
const FORMS: [Form; 18] = [
    ("as it is", str::to_owned),
    ("percent-encoded", |text| percent(text, UNRESERVED)),
    ("percent-encoded in lower case", |text| in_lower_case(&percent(text, UNRESERVED))),
    ("as a form", form),
    ("as a form in lower case", |text| in_lower_case(&form(text))),
    ("as a URL's query", |text| percent(text, QUERY)),
    ("as a URL's password", |text| percent(text, USERINFO)),
    ("as JSON", json),
    ("as JSON with \\/", |text| json(text).replace('/', r"\/")),
    ("as JSON for HTML", |text| {
        json(text).replace('&', r"\u0026").replace('<', r"\u003c").replace('>', r"\u003e")
    }),
    ("as Debug of text", |text| within_quotes(&format!("{text:?}"))),
    ("as Debug of bytes", |text| text.as_bytes().escape_ascii().to_string()),
    ("as Debug of a header", |text| text.replace('"', "\\\"")),
    ("as Unicode escapes", |text| text.escape_unicode().to_string()),
    ("as a list of bytes", |text| of_bytes(text, |byte| format!("{byte}, "))),
    ("in hex", |text| of_bytes(text, |byte| format!("{byte:02x}"))),
    ("in upper-case hex", |text| of_bytes(text, |byte| format!("{byte:02X}"))),
    ("as HTML", |text| {
        text.replace('&', "&amp;").replace('"', "&quot;").replace('<', "&lt;").replace('>', "&gt;")
    }),
];

fn percent(text: &str, set: &'static AsciiSet) -> String {
    utf8_percent_encode(text, set).to_string()
}

fn form(text: &str) -> String {
    percent(text, FORM).replace("%20", "+")
}

fn in_lower_case(percent_encoded: &str) -> String {
    let mut parts = percent_encoded.split('%');
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |text, part| text + "%" + part[..2].to_lowercase().as_str() + &part[2..])
}

fn json(text: &str) -> String {
    within_quotes(&serde_json::to_string(text).unwrap())
}

fn within_quotes(quoted: &str) -> String {
    quoted[1..quoted.len() - 1].to_owned()
}

fn of_bytes(text: &str, each: impl Fn(u8) -> String) -> String {
    text.bytes().map(each).collect()
}

/// The part of a text's base64 that does not depend on its neighbours, for each offset within a group of three bytes.
/// It has no padding.
pub fn base64(text: &str, engine: &impl Engine, offset: usize) -> String {
    let encoded = engine.encode("...".chars().take(offset).collect::<String>() + text);
    let before = (offset * 4).div_ceil(3);
    let whole = (offset + text.len()) * 4 / 3;
    encoded[before..whole].to_owned()
}

/// All encodings of a text, by their names.
pub fn forms(text: &str) -> Vec<(String, String)> {
    let mut forms: Vec<_> = FORMS.iter().map(|(name, form)| ((*name).to_owned(), form(text))).collect();
    for offset in 0..3 {
        forms.push((format!("in base64 from {offset}"), base64(text, &BASE64_STANDARD_NO_PAD, offset)));
        forms.push((format!("in URLs' base64 from {offset}"), base64(text, &BASE64_URL_SAFE_NO_PAD, offset)));
    }
    forms
}

/// The secrets of a test, by their names.
#[derive(Default)]
pub struct Canaries {
    secrets: BTreeMap<&'static str, String>,
    /// The pieces that show a leak, by their first bytes.
    signs: HashMap<[u8; PIECE], Vec<Sign>>,
    /// Whether a sign begins with these three bytes, to skip most of a text quickly.
    begins: Vec<bool>,
}

struct Sign {
    text: String,
    of: String,
}

impl Canaries {
    pub fn of(names: &[&'static str]) -> Self {
        let mut canaries = Self { begins: vec![false; 1 << 24], ..Self::default() };
        for name in names {
            canaries.add(name, secret(name));
        }
        canaries
    }

    fn add(&mut self, name: &'static str, secret: String) {
        for at in 0..=secret.len() - PIECE {
            for (form, text) in forms(&secret[at..at + PIECE]) {
                let Some((head, _)) = text.as_bytes().split_first_chunk::<PIECE>() else { continue };
                self.begins[three(head)] = true;
                let signs = self.signs.entry(*head).or_default();
                if !signs.iter().any(|sign| sign.text == text) {
                    signs.push(Sign { of: format!("{name}, {form}"), text });
                }
            }
        }
        self.secrets.insert(name, secret);
    }

    pub fn secret(&self, name: &str) -> &str {
        self.secrets.get(name).unwrap_or_else(|| panic!("no secret is called {name}"))
    }

    /// Finds a secret in a text: its name, its encoding, and the text around it.
    pub fn find(&self, text: &str) -> Option<String> {
        let bytes = text.as_bytes();
        for (at, head) in bytes.windows(PIECE).enumerate() {
            if !self.begins[three(head)] {
                continue;
            }
            let signs = self.signs.get(head).into_iter().flatten();
            if let Some(sign) = signs.into_iter().find(|sign| bytes[at..].starts_with(sign.text.as_bytes())) {
                let around = &bytes[at.saturating_sub(300)..bytes.len().min(at + 300)];
                return Some(format!("{}: …{}…", sign.of, String::from_utf8_lossy(around)));
            }
        }
        None
    }

    #[track_caller]
    pub fn assert_absent(&self, text: &str) {
        if let Some(leak) = self.find(text) {
            panic!("{A_LEAK}: {leak}");
        }
    }
}

fn three(head: &[u8]) -> usize {
    usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2])
}

/// Deterministic, so that a failure can be reproduced.
fn secret(name: &str) -> String {
    const LETTERS: &[u8; 62] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
    let letter = |place: usize| {
        let mut hasher = DefaultHasher::new();
        (name, place).hash(&mut hasher);
        char::from(LETTERS[(hasher.finish() % 62) as usize])
    };
    let mut secret = "sk-".to_owned();
    // Longer than a piece, and so found in any form that leaves letters as they are.
    secret.extend((0..16).map(letter));
    for (special, place) in SPECIAL.into_iter().zip((16..).step_by(4)) {
        secret.push_str(special);
        secret.extend((place..place + 4).map(letter));
    }
    secret
}

/// The messages of panics.
static PANICS: Mutex<String> = Mutex::new(String::new());

/// The first words of a panic that a test causes on purpose. It may hold a secret, as may the panic about a leak.
pub const ON_PURPOSE: &str = "as the test has it";
const A_LEAK: &str = "a secret is said";

static SAID: LazyLock<Logs> = LazyLock::new(|| {
    let before = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        let payload = info.payload();
        let text = payload.downcast_ref::<String>().map(String::as_str);
        let said = text.or(payload.downcast_ref().copied()).unwrap_or_default();
        if !said.starts_with(ON_PURPOSE) {
            before(info);
        }
        if !said.starts_with(ON_PURPOSE) && !said.starts_with(A_LEAK) {
            PANICS.lock().unwrap().push_str(said);
        }
    }));
    let logs = Logs::default();
    let writer = logs.clone();
    // It also captures spans and the records of `log`. It ignores the MongoDB driver, which logs commands, keys included,
    // but only with the driver's feature `tracing-unstable`.
    tracing_subscriber::fmt()
        .with_env_filter("trace,mongodb=off")
        .with_span_events(FmtSpan::FULL)
        .with_ansi(false)
        .without_time()
        .with_writer(move || writer.clone())
        .finish()
        .init();
    logs
});

/// Captures the log of this process from now on, on every thread, at every level, of every crate.
pub fn listen() -> &'static Logs {
    &SAID
}

/// The captured log and the messages of panics.
pub fn said() -> String {
    SAID.text() + PANICS.lock().unwrap().as_str()
}
