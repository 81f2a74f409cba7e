//! What each format gives, and what no format ever shows.

use std::num::NonZeroU32;

use proptest::{collection::vec, option, prelude::*};
use serde_json::json;

use super::*;
use crate::key::KeyId;

type Row = (usize, Option<(String, String)>);

fn row(number: usize, id: &str, secret: &str) -> Row {
    (number, Some((id.to_owned(), secret.to_owned())))
}

fn shown(keys: &[ParsedKey]) -> Vec<Row> {
    let key = |spec: &KeySpec| (spec.id.to_string(), spec.secret.expose().to_owned());
    keys.iter().map(|parsed| (parsed.place.number(), parsed.key.as_ref().ok().map(key))).collect()
}

fn errors(keys: &[ParsedKey]) -> Vec<String> {
    keys.iter().filter_map(|parsed| parsed.key.as_ref().err()).map(ToString::to_string).collect()
}

fn parsed(name: &str, text: impl AsRef<[u8]>) -> Vec<ParsedKey> {
    parse(name, text.as_ref(), Unnamed::Numbered { before: 0 }).unwrap()
}

fn variable_keys(text: &str) -> Vec<ParsedKey> {
    variable("KEYS", text, Unnamed::Numbered { before: 0 }).unwrap()
}

#[test]
fn a_variable_has_named_and_bare_keys() {
    assert_eq!(
        shown(&variable_keys(
            "alpha=sk-1, beta=sk=2,,sk-3,c2VjcmV0c2VjcmV=,c2VjcmV0c2Vjcg==,gamma=,sk-c2VjcmV0c2VjcmU=,"
        )),
        [
            row(1, "alpha", "sk-1"),
            row(2, "beta", "sk=2"),
            row(4, "key-3", "sk-3"),
            row(5, "key-4", "c2VjcmV0c2VjcmV="),
            row(6, "key-5", "c2VjcmV0c2Vjcg=="),
            row(7, "gamma", ""),
            row(8, "key-7", "sk-c2VjcmV0c2VjcmU="),
        ]
    );
}

#[test]
fn short_names_without_secret_are_no_secrets() {
    assert_eq!(
        shown(&variable_keys("one=,of-accounting=,the-key-of-accounting=,alpha=sk-1234567")),
        [
            row(1, "one", ""),
            row(2, "of-accounting", ""),
            // Errors would show it as an id, and it may be a secret.
            row(3, "key-3", "the-key-of-accounting="),
            row(4, "alpha", "sk-1234567"),
        ]
    );
}

#[test]
fn files_have_one_key_per_line_and_comments() {
    assert_eq!(
        shown(&parsed("keys.txt", "# ours\r\nalpha|sk-1\r\n\r\n  # theirs\nbeta |sk|2 \nsk-3".as_bytes())),
        [row(2, "alpha", "sk-1"), row(5, "beta", "sk|2 "), row(6, "key-3", "sk-3")]
    );
}

#[test]
fn f30_lines_not_utf8_are_rejected_alone() {
    let keys = parsed("keys.txt", b"alpha|sk-\xff\n\xff|sk-2\n\xff\nbeta|sk-3");
    let rejected: Vec<_> = keys.iter().filter_map(|key| key.key.as_ref().err()).collect();
    let rejected: Vec<_> = rejected.iter().map(ToString::to_string).collect();
    assert_eq!(
        rejected,
        [
            "keys.txt, line 1: key alpha: not UTF-8",
            "keys.txt, line 2: key key-2: not UTF-8",
            "keys.txt, line 3: key key-3: not UTF-8",
        ]
    );
    assert_eq!(shown(&keys)[3], row(4, "beta", "sk-3"));
}

#[test]
fn json_secrets_and_objects_are_keys() {
    let read = |text| shown(&parsed("k.json", text));
    assert_eq!(read(r#"["sk-1"]"#), [row(1, "key-1", "sk-1")]);
    assert_eq!(
        read(r#"[{"id":"a","secret":"sk-1"},{"secret":"sk-2","note":"ours"}]"#),
        [row(1, "a", "sk-1"), row(2, "key-2", "sk-2")]
    );
    assert_eq!(read(r#"{"b":"sk-1","a":"sk-2"}"#), [row(1, "b", "sk-1"), row(2, "a", "sk-2")]);
    assert_eq!(read(r#"{"id":"a","secret":"sk-1"}"#), [row(1, "a", "sk-1")]);
    assert_eq!(read("\"sk-1\""), [row(1, "key-1", "sk-1")]);
}

#[test]
fn keys_may_be_called_id_or_secret() {
    for [one, other] in [["a", "b"], ["id", "other"], ["other", "secret"]] {
        let keys = parsed("k.json", format!(r#"{{"{one}":"sk-1","{other}":"sk-2"}}"#));
        assert_eq!(shown(&keys), [row(1, one, "sk-1"), row(2, other, "sk-2")]);
    }
}

#[test]
fn mistyped_fields_never_make_an_id_secret() {
    assert_eq!(
        errors(&parsed("k.json", r#"{"id":"alpha","secret":"sk-1","tire":"1"}"#)),
        ["k.json, entry 1: key alpha: unknown field `tire`: a key has `id`, `secret`, `group`, `tier`, \
          `weight`, `max_in_flight`, `endpoint` and `note`"]
    );
}

#[test]
fn a_name_that_stands_twice_is_not_dropped() {
    assert_eq!(
        errors(&parsed("k.json", r#"[{"id":"a","secret":"sk-1","secret":"sk-2"}]"#)),
        ["k.json, entry 1: key a: `secret` is given twice"]
    );
    assert_eq!(parsed("k.json", r#"{"a":"sk-1","a":"sk-2"}"#).len(), 2);
}

#[test]
fn an_entry_of_another_form_is_rejected_alone() {
    let keys = parsed("k.json", r#"[1, {"id": 2, "secret": "x"}, "sk-3", [], null, "\ud800", {}]"#);
    assert_eq!(
        errors(&keys),
        [
            "k.json, entry 1: key key-1: neither a string nor an object with a `secret`",
            "k.json, entry 2: key key-2: `id` is not text",
            "k.json, entry 4: key key-4: neither a string nor an object with a `secret`",
            "k.json, entry 5: key key-5: neither a string nor an object with a `secret`",
            "k.json, entry 6: key key-6: neither a string nor an object with a `secret`",
            "k.json, entry 7: key key-7: the key has no `secret`",
        ]
    );
    assert_eq!(shown(&keys)[2], row(3, "key-3", "sk-3"));
}

#[cfg(feature = "toml")]
#[test]
fn each_key_table_yields_a_key_with_fields() {
    let text = "# ours\n[[key]]\nid = \"alpha\"\nsecret = \"sk-1\"\ngroup = \"org-1\"\ntier = 0x1_0\n\n\
                weight = 3\nmax_in_flight = 8\nendpoint = \"https://eu.example.com\"\nnote = \"paid\"\n\
                [[key]]\nsecret = '''sk\n2'''\n";
    let keys = parsed("k.toml", text);
    assert_eq!(shown(&keys), [row(2, "alpha", "sk-1"), row(12, "key-2", "sk\n2")]);
    let alpha = keys[0].key.as_ref().unwrap();
    assert_eq!((alpha.group.as_deref(), alpha.tier), (Some("org-1"), Some(16)));
    assert_eq!(alpha.weight.map(u32::from), Some(3));
    assert_eq!(alpha.max_in_flight.map(u32::from), Some(8));
    assert_eq!(alpha.endpoint.as_deref(), Some("https://eu.example.com"));
}

#[cfg(feature = "toml")]
#[test]
fn wrong_tables_are_rejected_with_line_and_field() {
    let text = "title = 1\n[[key]]\nid = \"a\"\nsecret = 1\n[[keys]]\nid = \"b\"\n[[key]]\nid = \"c\"\n\
                secret = \"sk-c\"\ntier = 256\n[[key]]\nid = \"d\"\nsecret = \"sk-d\"\n[[key]]\nid = \"e\"\n\
                secret = \"sk-e\"\nweight = -1\n";
    let keys = parsed("k.toml", text);
    assert_eq!(
        errors(&keys),
        [
            "k.toml, line 1: key key-1: not a [[key]] table",
            "k.toml, line 2: key a: `secret` is not text",
            "k.toml, line 5: key key-3: not a [[key]] table",
            "k.toml, line 7: key c: `tier` is not a whole number from 0 to 255",
            "k.toml, line 14: key e: `weight` is not a whole number from 1 to 4294967295",
        ]
    );
    assert_eq!(shown(&keys)[4], row(11, "d", "sk-d"));
}

#[cfg(feature = "toml")]
#[test]
fn syntax_errors_name_line_and_column() {
    let error = |text: &[u8]| KeySpec::parse_all("k.toml", text).unwrap_err().to_string();
    assert_eq!(
        error(b"[[key]]\nid = \"a\"\nsecret = sk-canary\n"),
        "k.toml, line 3, column 10: not valid TOML: string values must be quoted, expected literal string"
    );
    assert_eq!(error(b"[[key]]\nid = '\xff'"), "k.toml, line 2, column 7: not valid TOML: not UTF-8");
}

#[test]
fn the_name_or_the_text_decides_the_format() {
    let first = |name, text| errors(&parsed(name, text)).into_iter().next();
    assert_eq!(first("keys.JSON", "[\"sk\"]"), None);
    assert!(first("keys", " [1]").unwrap().starts_with("keys, entry 1: "));
    assert_eq!(shown(&parsed("keys.txt", "a|[[key]]\n")), [row(1, "a", "[[key]]")]);
}

#[cfg(feature = "toml")]
#[test]
fn misnamed_toml_is_never_read_as_lines() {
    let keys = parsed("keys.txt", "# ours\n[[key]]\r\nid = \"a\"\nsecret = \"sk-1\"\n");
    assert_eq!(shown(&keys), [row(2, "a", "sk-1")]);
}

#[cfg(not(feature = "toml"))]
#[test]
fn toml_without_its_feature_is_an_error() {
    let error = KeySpec::parse_all("k.toml", "[[key]]").unwrap_err();
    assert_eq!(error.to_string(), "k.toml: TOML needs the crate's feature `toml`");
}

#[test]
fn oversized_texts_are_errors() {
    let error = |text: &[u8]| KeySpec::parse_all("k.txt", text).unwrap_err().to_string();
    assert_eq!(error(&vec![b'\n'; MOST_BYTES + 1]), "k.txt: larger than 32 MiB");
    assert_eq!(error(&b"a\n".repeat(1_000_001)), "k.txt: more than 1000000 keys");
}

#[test]
fn one_json_object_is_a_spec() {
    let spec = KeySpec::from_json(r#"{"id": "alpha", "secret": "sk-1", "weight": 2}"#).unwrap();
    assert_eq!((spec.id.as_str(), spec.weight), ("alpha", NonZeroU32::new(2)));
    let error = |text: &str| KeySpec::from_json(text).unwrap_err().to_string();
    assert_eq!(error(r#"{"beta": "sk-1"}"#).split(": a key").next(), Some("JSON: unknown field `beta`"));
    assert_eq!(error(r#"{"secret": "sk-1"}"#), "JSON: the key has no id");
    assert_eq!(error(r#"{"id": "beta"}"#), "JSON: key beta: the key has no `secret`");
    assert!(error("\"sk-1\"").contains("neither a string"));
    assert!(error("{\"id\": ").starts_with("JSON, line 1, column 7: not valid JSON: EOF"));
}

fn text() -> impl Strategy<Value = String> {
    "[ -~é\n\t]{0,20}"
}

prop_compose! {
    fn spec()(
        id in "[ -~]{1,20}",
        secret in text(),
        group in option::of(text()),
        tier in option::of(any::<u8>()),
        weight in option::of(any::<NonZeroU32>()),
        max_in_flight in option::of(any::<NonZeroU32>()),
        endpoint in option::of(text()),
    ) -> KeySpec {
        KeySpec { group, tier, weight, max_in_flight, endpoint, ..KeySpec::new(KeyId::new(id).unwrap(), secret) }
    }
}

/// The fields of a spec, each with its value in JSON, which is also TOML.
fn written(spec: &KeySpec) -> Vec<(&'static str, String)> {
    let text = |text: &String| json!(text).to_string();
    let fields = [
        ("id", Some(json!(spec.id.as_str()).to_string())),
        ("secret", Some(json!(spec.secret.expose()).to_string())),
        ("group", spec.group.as_ref().map(text)),
        ("tier", spec.tier.map(|tier| tier.to_string())),
        ("weight", spec.weight.map(|weight| weight.to_string())),
        ("max_in_flight", spec.max_in_flight.map(|requests| requests.to_string())),
        ("endpoint", spec.endpoint.as_ref().map(text)),
    ];
    fields.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
}

fn object(fields: &[(impl AsRef<str>, String)]) -> String {
    let members: Vec<_> =
        fields.iter().map(|(name, value)| format!("{}:{value}", json!(name.as_ref()))).collect();
    format!("{{{}}}", members.join(","))
}

fn table(fields: &[(impl AsRef<str>, String)]) -> String {
    let lines: Vec<_> =
        fields.iter().map(|(name, value)| format!("{} = {value}\n", json!(name.as_ref()))).collect();
    format!("[[key]]\n{}", lines.concat())
}

fn specs_of(name: &str, text: &str) -> Vec<KeySpec> {
    KeySpec::parse_all(name, text).unwrap().into_iter().map(|(_, key)| key.unwrap()).collect()
}

const CANARY: &str = "sk-CANARY";

/// A key's fields, most of which hold a secret where none belongs.
fn strange_fields() -> impl Strategy<Value = Vec<(String, String)>> {
    let name =
        prop::sample::select(vec!["secret", "secret", "group", "tier", "weight", "endpoint", "note", CANARY]);
    let value = prop::sample::select(vec![
        json!(CANARY).to_string(),
        format!("[\"{CANARY}\"]"),
        format!("\"{CANARY}\\uD800\""),
        CANARY.to_owned(),
        "-1".to_owned(),
        "1e999".to_owned(),
        "\"".to_owned(),
    ]);
    vec((name.prop_map(str::to_owned), value), 0..4)
}

fn said<T: std::fmt::Debug>(outcome: &Result<T, Rejected>) -> String {
    let error = outcome.as_ref().err().map_or_else(String::new, ToString::to_string);
    format!("{outcome:?} {error}")
}

proptest! {
    #[test]
    fn specs_survive_a_round_trip(specs in vec(spec(), 0..4)) {
        let fields: Vec<_> = specs.iter().map(written).collect();
        let objects: Vec<_> = fields.iter().map(|fields| object(fields)).collect();
        prop_assert_eq!(&specs_of("k.json", &format!("[{}]", objects.join(","))), &specs);
        if let [single] = &specs[..] {
            prop_assert_eq!(&KeySpec::from_json(&objects[0]).unwrap(), single);
        }
        #[cfg(feature = "toml")]
        {
            let tables: Vec<_> = fields.iter().map(|fields| table(fields)).collect();
            prop_assert_eq!(&specs_of("k.toml", &tables.concat()), &specs);
        }
    }

    #[test]
    fn rejected_lines_have_their_numbers(lines in vec(prop::sample::select(vec!["", "# a", "a|sk", "sk", "|sk"]), 0..9)) {
        let text = lines.join("\n");
        let found = KeySpec::parse_all("k.txt", &text).unwrap();
        let expected: Vec<_> =
            (1..).zip(&lines).filter(|(_, line)| line.contains("sk")).map(|(number, line)| (number, *line == "a|sk")).collect();
        prop_assert_eq!(found.iter().map(|(number, key)| (*number, key.is_ok())).collect::<Vec<_>>(), expected);
        for rejected in found.iter().filter_map(|(_, key)| key.as_ref().err()) {
            prop_assert!(rejected.to_string().starts_with("k.txt, line "));
        }
    }

    #[test]
    fn no_error_shows_a_secret(keys in vec(strange_fields(), 1..3), cut in any::<prop::sample::Index>(), put in "[^|{]?") {
        let objects: Vec<_> = keys.iter().map(|fields| object(fields)).collect();
        let tables: Vec<_> = keys.iter().map(|fields| table(fields)).collect();
        let list = format!("[{}]", objects.join(","));
        for text in [list, tables.concat(), CANARY.to_owned(), objects[0].clone()] {
            let mut broken = text.clone();
            broken.insert_str(cut.index(text.len() + 1), &put);
            for text in [text, broken] {
                let one = KeySpec::from_json(&text);
                prop_assert!(!said(&one).contains("CANARY"), "{text}: {one:?}");
                // A member of an object may be an id and its secret, and an id is public.
                if text.trim_start_matches('\u{feff}').trim_start().starts_with('{') {
                    continue;
                }
                for name in ["k.json", "k.toml", "k.txt"] {
                    let all = KeySpec::parse_all(name, &text);
                    prop_assert!(!said(&all).contains("CANARY"), "{text}: {all:?}");
                    for key in all.iter().flatten() {
                        prop_assert!(!said(&key.1).contains("CANARY"), "{text}: {key:?}");
                    }
                }
            }
        }
    }
}
