//! Keys as people write them down, and what they are told of those that can't be used.

mod support;

use std::{fs, io, path::PathBuf};

use http::{Request, Response};
use support::{Logs, all_that_it_says};
use tower::{Layer, ServiceExt, service_fn};
use tower_key_rotation::{
    BuildError, KeyId, KeyPool, KeyPoolBuilder, KeyRotationLayer, OperateError,
    store::{KeyStore, MemoryStore},
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

#[test]
fn a_file_of_lines_gives_its_good_keys_and_names_the_lines_of_the_others() {
    let path = file(
        "keys.txt",
        "# ours\nalpha|sk-1\n|canary-1\nbeta|canary-2 \r\n\nalpha|canary-3\nsk-4\ngamma|sk-1\n",
    );
    let pool = KeyPool::builder().keys_from_file(&path).build().unwrap();
    assert_eq!(ids(&pool), ["alpha", "key-5"]);

    let rejected: Vec<_> = pool.rejected().iter().map(ToString::to_string).collect();
    let path = path.display();
    assert_eq!(
        rejected,
        [
            format!("{path}, line 3: a key id has 1 to 256 bytes and no control characters"),
            format!("{path}, line 4: key beta: the secret begins or ends with a space"),
            format!("{path}, line 6: key alpha: another key has this id"),
            format!("{path}, line 8: key gamma: key alpha has the same secret"),
        ]
    );
    assert!(!format!("{rejected:?} {:?}", pool.rejected()).contains("canary"));
}

#[test]
fn a_file_of_json_gives_its_good_keys_and_names_the_entries_of_the_others() {
    let path =
        file("keys.json", r#"[{"id": "alpha", "secret": "sk-1"}, {"id": "beta", "secret": 7}, "sk-3"]"#);
    let pool = KeyPool::builder().keys_from_file(&path).build().unwrap();
    assert_eq!(ids(&pool), ["alpha", "key-3"]);
    assert!(pool.rejected()[0].to_string().contains("keys.json, entry 2: "), "{:?}", pool.rejected());
}

#[test]
fn json_that_is_none_is_an_error_which_names_the_line_and_not_what_stands_there() {
    let path = file("broken.json", "{\n  \"alpha\": \"canary\"\n  \"beta\": \"canary\"\n}");
    let error = KeyPool::builder().keys_from_file(path).build().unwrap_err();
    assert!(error.to_string().ends_with("broken.json, line 3: not valid JSON"), "{error}");
    let source = std::error::Error::source(&error).unwrap();
    assert!(!format!("{error:?} {source}").contains("canary"));
}

#[test]
fn a_strict_builder_takes_all_or_nothing() {
    let path = file("strict.txt", "alpha|sk-1\nbeta|\n");
    let error = KeyPool::builder().keys_from_file(&path).strict().build().unwrap_err();
    let BuildError::Rejected(rejected) = &error else { panic!("{error}") };
    assert_eq!(rejected.len(), 1);
    assert!(error.to_string().contains("strict.txt, line 2: key beta: the secret is empty"), "{error}");
}

#[test]
fn an_environment_variable_gives_its_keys() {
    // Cargo sets this one; to set one of its own would not be safe beside other tests.
    let pool = KeyPool::builder().key("alpha", "sk-1").keys_from_env("CARGO_PKG_NAME").build().unwrap();
    assert_eq!(ids(&pool), ["alpha", "key-2"]);
}

/// Secrets that no request should carry. Each but the empty one has a part that shows where it is echoed.
const UNUSABLE: [&str; 8] =
    ["canary\nkey", "canary\r\n", "canary\tkey", "canary\u{7f}", " canary", "canary ", "canäry-canary", ""];

fn ninety_nine() -> KeyPoolBuilder {
    KeyPool::builder().keys((0..99).map(|number| (format!("key-{number}"), format!("sk-{number}"))))
}

/// That each of the 99 is sent with a request, and nothing else is.
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

/// Broken once: without the check of secrets, and without each part of it, it failed.
#[tokio::test]
async fn f30_a_key_that_no_request_can_carry_is_refused_by_id_and_the_other_99_serve() {
    let (logs, _guard) = Logs::capture();
    let id = || KeyId::new("unusable").unwrap();
    for (number, secret) in (1..).zip(UNUSABLE) {
        let in_code = ninety_nine().key("unusable", secret).build().unwrap();
        let entry = serde_json::json!([{ "id": "unusable", "secret": secret }]);
        let path = file(&format!("unusable-{number}.json"), &entry.to_string());
        let in_a_file = ninety_nine().keys_from_file(path).build().unwrap();
        for pool in [&in_code, &in_a_file] {
            let [rejected] = pool.rejected() else { panic!("{:?}", pool.rejected()) };
            assert_eq!(rejected.id, Some(id()));
            assert!(!format!("{rejected} {rejected:?}").contains("canary"), "{rejected}");
            the_others_serve(pool).await;
        }

        let refused = in_code.insert("unusable", secret).await.unwrap_err();
        assert!(matches!(&refused, OperateError::UnusableSecret { id: refused, .. } if *refused == id()));
        assert!(!all_that_it_says(&refused).contains("canary"), "{refused}");
        the_others_serve(&in_code).await;

        let store = MemoryStore::new();
        assert!(store.insert(id(), secret.into()).await.unwrap());
        let in_a_store = ninety_nine().open(store).await.unwrap();
        assert_eq!(in_a_store.stats().unreadable, 1);
        assert_eq!(logs.count("key=unusable"), number, "{:?}", logs.ours());
    }
    assert_eq!(logs.count("key unusable: the secret"), 2 * UNUSABLE.len());
    assert!(!logs.text().contains("canary"));
}
