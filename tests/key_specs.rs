//! The formats in which keys are written down: what each one yields, and what no error ever shows.

use std::{
    collections::BTreeMap,
    env, fmt, fs,
    num::NonZeroU32,
    path::{Path, PathBuf},
    process::Command,
};

use futures_util::FutureExt;
use proptest::{collection::vec, option, prelude::*};
use serde_json::json;
use tower_key_rotation::{
    KeyId, KeyPool, KeyPoolBuilder, KeySpec, Rejected,
    store::{KeyStore, MemoryStore},
};

/// A file of that name and text; each test has names of its own.
fn file(name: &str, text: impl AsRef<[u8]>) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("key-specs-{name}"));
    fs::write(&path, text).unwrap();
    path
}

/// Secrets by their ids.
type Keys = BTreeMap<String, String>;

fn keys<const N: usize>(keys: [(&str, &str); N]) -> Keys {
    keys.map(|(id, secret)| (id.to_owned(), secret.to_owned())).into()
}

/// Returns the keys that a builder accepts, with their secrets, and the errors of the others.
fn accepted(builder: KeyPoolBuilder) -> (Keys, Vec<String>) {
    let store = MemoryStore::new();
    let pool = builder.open(store.clone()).now_or_never().unwrap().unwrap();
    let stored = store.load(None).now_or_never().unwrap().unwrap().records;
    let secret_of = |id: &KeyId| {
        let record = stored.iter().find(|record| record.spec.id == *id).unwrap();
        record.spec.secret.expose().to_owned()
    };
    let keys = pool.stats().keys.iter().map(|key| (key.id.to_string(), secret_of(&key.id))).collect();
    (keys, pool.rejected().iter().map(ToString::to_string).collect())
}

/// Asserts that a file has these keys and no others.
fn assert_keys<const N: usize>(name: &str, text: &str, expected: [(&str, &str); N]) {
    let builder = KeyPool::builder().keys_from_file(file(name, text));
    assert_eq!(accepted(builder), (keys(expected), Vec::new()), "{text}");
}

/// A key and the number of its line or entry.
type Parsed = (usize, Result<KeySpec, Rejected>);

fn errors(keys: &[Parsed]) -> Vec<String> {
    keys.iter().filter_map(|(_, key)| key.as_ref().err()).map(ToString::to_string).collect()
}

fn parsed(name: &str, text: impl AsRef<[u8]>) -> Vec<Parsed> {
    KeySpec::parse_all(name, text).unwrap()
}

/// Runs in a process of its own: it would not be safe to set variables beside other tests.
#[test]
fn a_variable_has_named_and_bare_keys() {
    const NAMED_AND_BARE: &str = "KEY_SPECS_NAMED_AND_BARE";
    const SHORT: &str = "KEY_SPECS_SHORT";
    if env::var_os(SHORT).is_none() {
        let child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "a_variable_has_named_and_bare_keys"])
            .env(
                NAMED_AND_BARE,
                "alpha=sk-1, beta=sk=2,,sk-3,c2VjcmV0c2VjcmV=,c2VjcmV0c2Vjcg==,gamma=,sk-c2VjcmV0c2VjcmU=,",
            )
            .env(SHORT, "one=,of-accounting=,the-key-of-accounting=,alpha=sk-1234567")
            .output()
            .unwrap();
        let written = String::from_utf8_lossy(&child.stdout);
        return assert!(child.status.success() && written.contains("1 passed"), "{written}");
    }
    let of_variable = |name: &str| accepted(KeyPool::builder().keys_from_env(name));
    assert_eq!(
        of_variable(NAMED_AND_BARE),
        (
            keys([
                ("alpha", "sk-1"),
                ("beta", "sk=2"),
                ("key-3", "sk-3"),
                ("key-4", "c2VjcmV0c2VjcmV="),
                ("key-5", "c2VjcmV0c2Vjcg=="),
                ("key-7", "sk-c2VjcmV0c2VjcmU="),
            ]),
            vec![format!("{NAMED_AND_BARE}, entry 7: key gamma: the secret is empty")],
        )
    );
    // A short name without a secret is no secret. A long one may be: errors would show it as an id.
    let (keys_of_short, errors) = of_variable(SHORT);
    assert_eq!(keys_of_short, keys([("key-3", "the-key-of-accounting="), ("alpha", "sk-1234567")]));
    assert_eq!(
        errors,
        ["one", "of-accounting"]
            .iter()
            .zip(1..)
            .map(|(id, entry)| format!("{SHORT}, entry {entry}: key {id}: the secret is empty"))
            .collect::<Vec<_>>()
    );
}

#[test]
fn files_have_one_key_per_line_and_comments() {
    assert_keys(
        "lines.txt",
        "# ours\r\nalpha|sk-1\r\n\r\n  # theirs\nbeta |sk|2\nsk-3",
        [("alpha", "sk-1"), ("beta", "sk|2"), ("key-3", "sk-3")],
    );
}

#[test]
fn f30_lines_not_utf8_are_rejected_alone() {
    let path = file("binary.txt", b"alpha|sk-\xff\n\xff|sk-2\n\xff\nbeta|sk-3");
    let (accepted, rejected) = accepted(KeyPool::builder().keys_from_file(&path));
    assert_eq!(accepted, keys([("beta", "sk-3")]));
    let path = path.display();
    assert_eq!(
        rejected,
        [
            format!("{path}, line 1: key alpha: not UTF-8"),
            format!("{path}, line 2: key key-2: not UTF-8"),
            format!("{path}, line 3: key key-3: not UTF-8"),
        ]
    );
}

#[test]
fn json_secrets_and_objects_are_keys() {
    assert_keys("a.json", r#"["sk-1"]"#, [("key-1", "sk-1")]);
    assert_keys(
        "b.json",
        r#"[{"id":"a","secret":"sk-1"},{"secret":"sk-2","note":"ours"}]"#,
        [("a", "sk-1"), ("key-2", "sk-2")],
    );
    assert_keys("c.json", r#"{"b":"sk-1","a":"sk-2"}"#, [("b", "sk-1"), ("a", "sk-2")]);
    assert_keys("d.json", r#"{"id":"a","secret":"sk-1"}"#, [("a", "sk-1")]);
    assert_keys("e.json", "\"sk-1\"", [("key-1", "sk-1")]);
}

#[test]
fn keys_may_be_called_id_or_secret() {
    for [one, other] in [["a", "b"], ["id", "other"], ["other", "secret"]] {
        let text = format!(r#"{{"{one}":"sk-1","{other}":"sk-2"}}"#);
        assert_keys("called.json", &text, [(one, "sk-1"), (other, "sk-2")]);
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
fn unknown_fields_are_named_unless_possibly_secret() {
    for secret in ["sk-1", "A1b2", "abcdefghijklmnopqrstu", "c2VjcmV0"] {
        let error = KeySpec::from_json(format!(r#"{{"{secret}":"alpha"}}"#)).unwrap_err().to_string();
        assert!(error.contains("unknown field") && !error.contains(secret), "{error}");
    }
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
    let path = file("forms.json", r#"[1, {"id": 2, "secret": "x"}, "sk-3", [], null, "\ud800", {}]"#);
    let (accepted, rejected) = accepted(KeyPool::builder().keys_from_file(&path));
    assert_eq!(accepted, keys([("key-3", "sk-3")]));
    let no_key = "neither a string nor an object with a `secret`";
    let expected = [
        (1, no_key),
        (2, "`id` is not text"),
        (4, no_key),
        (5, no_key),
        (6, no_key),
        (7, "the key has no `secret`"),
    ];
    let path = path.display();
    assert_eq!(
        rejected,
        expected.map(|(entry, reason)| format!("{path}, entry {entry}: key key-{entry}: {reason}"))
    );
}

#[cfg(feature = "toml")]
#[test]
fn each_key_table_yields_a_key_with_fields() {
    let text = "# ours\n[[key]]\nid = \"alpha\"\nsecret = \"sk-1\"\ngroup = \"org-1\"\ntier = 0x1_0\n\n\
                weight = 3\nmax_in_flight = 8\nendpoint = \"https://eu.example.com\"\nnote = \"paid\"\n\
                [[key]]\nid = \"beta\"\nsecret = '''sk\n2'''\n";
    let keys = parsed("k.toml", text);
    let [alpha, beta] = &keys[..] else { panic!("{keys:?}") };
    assert_eq!((alpha.0, beta.0), (2, 12));
    let (alpha, beta) = (alpha.1.as_ref().unwrap(), beta.1.as_ref().unwrap());
    assert_eq!((alpha.secret.expose(), beta.secret.expose()), ("sk-1", "sk\n2"));
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
            "k.toml, line 1: not a [[key]] table",
            "k.toml, line 2: key a: `secret` is not text",
            "k.toml, line 5: not a [[key]] table",
            "k.toml, line 7: key c: `tier` is not a whole number from 0 to 255",
            "k.toml, line 14: key e: `weight` is not a whole number from 1 to 4294967295",
        ]
    );
    assert_eq!(keys[4].1.as_ref().unwrap().id.as_str(), "d");
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
    assert_keys("keys.JSON", "[\"sk\"]", [("key-1", "sk")]);
    assert!(errors(&parsed("keys", " [1]"))[0].starts_with("keys, entry 1: "));
    assert_keys("no-toml.txt", "a|[[key]]\n", [("a", "[[key]]")]);
}

#[cfg(feature = "toml")]
#[test]
fn misnamed_toml_is_never_read_as_lines() {
    assert_keys("toml.txt", "# ours\n[[key]]\r\nid = \"a\"\nsecret = \"sk-1\"\n", [("a", "sk-1")]);
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
    assert_eq!(error(&vec![b'\n'; (32 << 20) + 1]), "k.txt: larger than 32 MiB");
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
        let mut spec = KeySpec::new(KeyId::new(id).unwrap(), secret);
        spec.group = group;
        spec.tier = tier;
        spec.weight = weight;
        spec.max_in_flight = max_in_flight;
        spec.endpoint = endpoint;
        spec
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

fn said<T: fmt::Debug>(outcome: &Result<T, Rejected>) -> String {
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
