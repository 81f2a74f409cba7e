//! Keys from code, files and variables, and the errors of those that can't be used.

mod support;

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use http::{Request, Response};
use support::{Logs, all_that_it_says};
use tower::{Layer, ServiceExt, service_fn};
use tower_key_rotation::{
    Inject, KeyId, KeyPool, KeyPoolBuilder, KeyRotationLayer, KeySpec,
    store::{KeyStore, MemoryStore, Operation},
};

/// A file of that name and text, for one test.
fn file(name: &str, text: &str) -> PathBuf {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::write(&path, text).unwrap();
    path
}

fn ids(pool: &KeyPool) -> Vec<String> {
    pool.stats().keys.into_iter().map(|key| key.id.to_string()).collect()
}

fn rejected(pool: &KeyPool) -> Vec<String> {
    pool.rejected().iter().map(ToString::to_string).collect()
}

fn of_file(path: &Path) -> KeyPool {
    KeyPool::builder().keys_from_file(path).build().unwrap()
}

#[test]
fn bad_lines_are_rejected_by_number() {
    let path = file(
        "keys.txt",
        "# ours\nalpha|sk-1\n|canary-1\nbeta|canary-2 \r\n\nalpha|canary-3\nsk-4\ngamma|sk-1\n",
    );
    let pool = of_file(&path);
    assert_eq!(ids(&pool), ["alpha", "key-5"]);
    let path = path.display();
    assert_eq!(
        rejected(&pool),
        [
            format!("{path}, line 3: a key id has 1 to 256 bytes and no control characters"),
            format!("{path}, line 4: key beta: the secret begins or ends with a space"),
            format!("{path}, line 6: key alpha: another key has this id"),
            format!("{path}, line 8: key gamma: key alpha has the same secret"),
        ]
    );
    assert!(!format!("{:?}", pool.rejected()).contains("canary"));
}

#[test]
fn bad_entries_of_json_are_rejected_by_position() {
    let path =
        file("keys.json", r#"[{"id": "alpha", "secret": "sk-1"}, {"id": "beta", "secret": 7}, "sk-3"]"#);
    let pool = of_file(&path);
    assert_eq!(ids(&pool), ["alpha", "key-3"]);
    assert_eq!(rejected(&pool), [format!("{}, entry 2: key beta: `secret` is not text", path.display())]);
}

#[test]
fn bad_tables_of_toml_are_rejected_by_line() {
    let path = file(
        "keys.toml",
        "# ours\n[[key]]\nid = \"alpha\"\nsecret = \"sk-1\"\nnote = \"paid\"\n\n[[key]]\nsecret = \"sk-2\"\n\
         [[key]]\nid = \"gamma\"\nsecret = \"canary\"\ntire = 1\n[[key]]\nid = \"delta\"\n",
    );
    let pool = of_file(&path);
    assert_eq!(ids(&pool), ["alpha", "key-2"]);
    let path = path.display();
    assert_eq!(
        rejected(&pool),
        [
            format!(
                "{path}, line 9: key gamma: unknown field `tire`: a key has `id`, `secret`, `group`, `tier`, \
                 `weight`, `max_in_flight`, `endpoint` and `note`"
            ),
            format!("{path}, line 13: key delta: the key has no `secret`"),
        ]
    );
}

/// The fields that have no effect yet, each with a value.
const UNSUPPORTED: [(&str, &str); 1] = [("endpoint", "\"https://eu.example.com\"")];

#[tokio::test]
async fn a_field_without_effect_is_rejected_by_name() {
    for (field, value) in UNSUPPORTED {
        let json = format!(r#"[{{"id": "alpha", "secret": "sk-1", "{field}": {value}}}]"#);
        let toml = format!("[[key]]\nid = \"alpha\"\nsecret = \"sk-1\"\n{field} = {value}\n");
        let expected = format!("key alpha: `{field}` is not supported yet, remove it");
        for (name, text, place) in [("json", &json, "entry 1"), ("toml", &toml, "line 1")] {
            let path = file(&format!("unsupported-{field}.{name}"), text);
            let pool = of_file(&path);
            assert_eq!(ids(&pool), [""; 0]);
            assert_eq!(rejected(&pool), [format!("{}, {place}: {expected}", path.display())]);
        }

        let spec = KeySpec::parse_all("keys.json", &json).unwrap().remove(0).1.unwrap();
        assert_eq!(spec.unsupported(), Some(field));
        let pool = KeyPool::builder().key_spec(spec.clone()).build().unwrap();
        assert_eq!(rejected(&pool), [format!("key 1 in code: {expected}")]);
        let inserted = pool.insert_all([spec]).await;
        assert_eq!(inserted[0].as_ref().unwrap_err().to_string(), expected);
        assert_eq!(ids(&pool), [""; 0]);
    }
}

#[tokio::test]
async fn inserted_specs_have_outcomes_in_their_order() {
    let specs = KeySpec::parse_all("keys.txt", "alpha|sk-1\nbeta|sk-1\ngamma|sk-2").unwrap();
    let pool = KeyPool::builder().build().unwrap();
    let outcomes = pool.insert_all(specs.into_iter().map(|(_, spec)| spec.unwrap())).await;
    let said: Vec<_> =
        outcomes.iter().map(|outcome| outcome.as_ref().err().map(ToString::to_string)).collect();
    assert_eq!(said, [None, Some("key alpha has the same secret".to_owned()), None]);
    assert_eq!(ids(&pool), ["alpha", "gamma"]);
}

#[test]
fn broken_json_or_toml_names_only_the_line() {
    for (name, text, said) in [
        (
            "broken.json",
            "{\n  \"alpha\": \"canary\"\n  \"beta\": \"canary\"\n}",
            "broken.json, line 3, column 3: not valid JSON: expected `,` or `}`",
        ),
        (
            "broken.toml",
            "[[key]]\nid = \"alpha\"\nsecret = canary\n",
            "broken.toml, line 3, column 10: not valid TOML: string values must be quoted, expected literal string",
        ),
    ] {
        let error = KeyPool::builder().keys_from_file(file(name, text)).build().unwrap_err();
        assert!(error.to_string().ends_with(said), "{error}");
        assert!(!all_that_it_says(&error).contains("canary"), "{error:?}");
    }
}

#[test]
fn a_strict_builder_takes_all_or_nothing() {
    let path = file("strict.txt", "alpha|sk-1\nbeta|\n");
    let error = KeyPool::builder().keys_from_file(&path).strict().build().unwrap_err();
    let [rejected] = error.rejected() else { panic!("{error}") };
    assert_eq!(rejected.id().map(KeyId::as_str), Some("beta"));
    assert_eq!(rejected.reason().to_string(), "the secret is empty");
    assert!(error.to_string().contains("strict.txt, line 2: key beta: the secret is empty"), "{error}");
}

#[test]
fn a_strict_builder_lists_all_rejected_keys() {
    let error = KeyPool::builder().keys([("a", ""), ("", "sk"), ("b", "sk"), ("b", "sk-2")]).strict().build();
    let shown = error.unwrap_err().to_string();
    assert_eq!(
        shown.lines().skip(1).map(str::trim).collect::<Vec<_>>(),
        [
            "key 1 in code: key a: the secret is empty",
            "key 2 in code: a key id has 1 to 256 bytes and no control characters",
            "key 4 in code: key b: another key has this id",
        ]
    );
}

#[test]
fn an_unreadable_source_is_named_in_the_error() {
    let error = |builder: KeyPoolBuilder| builder.build().unwrap_err().to_string();
    assert_eq!(error(KeyPool::builder().keys_from_file("no/such/file")), "no/such/file could not be read");
    let unset = KeyPool::builder().keys_from_env("TOWER_KEY_ROTATION_UNSET");
    assert!(error(unset).contains("TOWER_KEY_ROTATION_UNSET is not set"));
    let header = KeyPool::builder().inject(Inject::header("no header"));
    assert_eq!(error(header), "\"no header\" is not a header name");
}

#[test]
fn ids_that_break_log_lines_are_refused() {
    for id in ["", "a\nb", "a\u{7f}b", &"x".repeat(257)] {
        assert!(KeyId::new(id).is_err(), "{id:?}");
    }
    assert_eq!(KeyId::new("ключ 1").unwrap().as_str(), "ключ 1");
}

#[test]
fn f30_refusals_say_what_is_wrong_with_a_secret() {
    for (secret, reason) in [
        ("", "the secret is empty"),
        ("a\nb", "the secret has a newline, a tab or another control character"),
        ("a\tb", "the secret has a newline, a tab or another control character"),
        ("a\u{7f}", "the secret has a newline, a tab or another control character"),
        (" a", "the secret begins or ends with a space"),
        ("a ", "the secret begins or ends with a space"),
        ("schlüssel", "the secret has a character that is not ASCII"),
        ("a\u{a0}", "the secret has a character that is not ASCII"),
    ] {
        let pool = KeyPool::builder().key("a", secret).build().unwrap();
        assert_eq!(rejected(&pool), [format!("key 1 in code: key a: {reason}")], "{secret:?}");
    }
}

#[test]
fn s05_an_encrypted_secret_is_never_sent() {
    let pool = KeyPool::builder().key("a", "encrypted.v1.2026a.eLH6eRw6wIzwAOCDf3w0DQ55l0Q").build().unwrap();
    let reason = "key 1 in code: key a: the secret is encrypted: it is what a store holds, not a key";
    assert_eq!(rejected(&pool), [reason]);
}

#[cfg(feature = "serde")]
#[test]
fn stats_serialize_with_units_and_without_a_secret() {
    let pool = KeyPool::builder().key("alpha", "sk-canary").build().unwrap();
    assert_eq!(
        serde_json::to_value(pool.stats()).unwrap(),
        serde_json::json!({
            "healthy": 1, "rate_limited": 0, "exhausted": 0, "revoked": 0,
            "suspected": 0, "disabled": 0,
            "marks_waiting": 0, "unreadable": 0, "unkeyed": 0,
            "waited": 0, "waited_for_seconds": 0.0, "limited_despite_pacing": 0,
            "keys": [{
                "id": "alpha", "status": "healthy", "cause": null, "time_left_seconds": null, "scopes": [],
                "requests": 0, "limited": 0, "recovered": 0, "tokens": 0, "last_reason": null,
            }],
        })
    );
}

#[test]
fn an_environment_variable_gives_its_keys() {
    // Cargo sets this variable; setting one here would not be safe beside other tests.
    let pool = KeyPool::builder().key("alpha", "sk-1").keys_from_env("CARGO_PKG_NAME").build().unwrap();
    assert_eq!(ids(&pool), ["alpha", "key-2"]);
}

/// Secrets that no request can carry. All but the empty one have a part that can be found in a text.
const UNUSABLE: [&str; 8] =
    ["canary\nkey", "canary\r\n", "canary\tkey", "canary\u{7f}", " canary", "canary ", "canäry-canary", ""];

/// TOML forbids some control characters that JSON allows.
fn toml_string(text: &str) -> String {
    serde_json::json!(text).to_string().replace('\u{7f}', "\\u007f")
}

fn ninety_nine() -> KeyPoolBuilder {
    KeyPool::builder().keys((0..99).map(|number| (format!("key-{number}"), format!("sk-{number}"))))
}

/// Asserts that requests use each of the 99 keys, and no other.
async fn the_others_serve(pool: &KeyPool) {
    let echo = service_fn(|request: Request<()>| async move {
        Ok::<_, io::Error>(Response::new(request.headers()["authorization"].clone()))
    });
    let client = KeyRotationLayer::new(pool).layer(echo);
    for number in 0..99 {
        let request = Request::get("https://api.example.com").body(()).unwrap();
        let sent = client.clone().oneshot(request).await.unwrap().into_body();
        assert_eq!(sent, format!("Bearer sk-{number}"));
    }
    assert_eq!(pool.stats().healthy, 99);
}

#[tokio::test]
async fn f30_an_unusable_key_is_refused_and_99_serve() {
    let (logs, _guard) = Logs::capture();
    let id = || KeyId::new("unusable").unwrap();
    for (number, secret) in (1..).zip(UNUSABLE) {
        let in_code = ninety_nine().key("unusable", secret).build().unwrap();
        let entry = serde_json::json!([{ "id": "unusable", "secret": secret }]);
        let in_json = file(&format!("unusable-{number}.json"), &entry.to_string());
        let in_json = ninety_nine().keys_from_file(in_json).build().unwrap();
        let table = format!("[[key]]\nid = \"unusable\"\nsecret = {}\n", toml_string(secret));
        let in_toml =
            ninety_nine().keys_from_file(file(&format!("unusable-{number}.toml"), &table)).build().unwrap();
        for pool in [&in_code, &in_json, &in_toml] {
            let [rejected] = pool.rejected() else { panic!("{:?}", pool.rejected()) };
            assert_eq!(rejected.id(), Some(&id()));
            assert!(!format!("{rejected} {rejected:?}").contains("canary"), "{rejected}");
            the_others_serve(pool).await;
        }

        let refused = in_code.insert("unusable", secret).await.unwrap_err();
        assert!(refused.to_string().starts_with("key unusable can't be used: "), "{refused}");
        assert!(!all_that_it_says(&refused).contains("canary"), "{refused}");
        the_others_serve(&in_code).await;

        let store = MemoryStore::new();
        let spec = KeySpec::new(id(), secret);
        store.operate(id(), Operation::Insert(spec)).await.unwrap().unwrap();
        let in_a_store = ninety_nine().open(store).await.unwrap();
        assert_eq!(in_a_store.stats().unreadable, 1);
        assert_eq!(logs.count("key=unusable"), number, "{:?}", logs.ours());
    }
    assert_eq!(logs.count("key unusable: the secret"), 3 * UNUSABLE.len());
    assert!(!logs.text().contains("canary"));
}
