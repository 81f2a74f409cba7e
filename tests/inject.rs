//! Where requests carry their key.

use std::{convert::Infallible, future::ready};

use futures_util::FutureExt;
use http::{HeaderName, HeaderValue, Request, Response, header::AUTHORIZATION, request::Parts};
use tower::{Layer, ServiceExt, service_fn};
use tower_key_rotation::{
    Inject, KeyId, KeyPool, KeyRotationLayer,
    store::{KeyStore, MemoryStore},
};

/// The heads of requests with each of these secrets in turn.
fn requests<const N: usize>(inject: &Inject, secrets: [&str; N]) -> [Parts; N] {
    let keys = secrets.map(|secret| (format!("of {secret}"), secret));
    let pool = KeyPool::builder().keys(keys).inject(inject.clone()).build().unwrap();
    let client = KeyRotationLayer::new(&pool).layer(service_fn(|request: Request<()>| {
        ready(Ok::<_, Infallible>(Response::new(request.into_parts().0)))
    }));
    secrets.map(|_| {
        let request = Request::get("https://api.example.com/v1").body(()).unwrap();
        client.clone().oneshot(request).now_or_never().unwrap().unwrap().into_body()
    })
}

/// Puts the secret into a header backwards.
fn reversed() -> Inject {
    Inject::custom(|secret, credentials| {
        let reversed: String = secret.chars().rev().collect();
        credentials.header(AUTHORIZATION, &reversed)
    })
}

fn around() -> Inject {
    Inject::custom(|secret, credentials| {
        credentials.header(AUTHORIZATION, &format!("Token token=\"{secret}\", v=1"))
    })
}

#[test]
fn all_places_are_filled_with_sensitive_headers() {
    let inject = Inject::bearer().and(Inject::header("x-api-key")).and(Inject::query("key"));
    let [head] = requests(&inject, ["a+b"]);
    assert_eq!(head.headers[AUTHORIZATION], "Bearer a+b");
    assert_eq!(head.headers["x-api-key"], "a+b");
    assert!(head.headers.values().all(HeaderValue::is_sensitive));
    assert_eq!(head.uri, "https://api.example.com/v1?key=a%2Bb");
}

#[test]
fn each_key_may_have_a_header_of_its_own() {
    let inject = Inject::custom(|secret, credentials| {
        let name = if secret.len() > 4 { "x-long" } else { "x-short" };
        credentials.header(HeaderName::from_static(name), secret)
    });
    let [one, two, other] = requests(&inject, ["sk-1", "sk-2", "sk-long"]);
    for (head, name, value) in
        [(one, "x-short", "sk-1"), (two, "x-short", "sk-2"), (other, "x-long", "sk-long")]
    {
        assert_eq!(head.headers[name], value);
    }
}

/// The pool keeps a secret only in what requests carry.
#[test]
fn secrets_are_told_from_what_requests_carry() {
    let nothing = Inject::custom(|_, _| Ok(()));
    for inject in [Inject::bearer(), Inject::header("x-k"), Inject::query("k"), reversed(), around(), nothing]
    {
        let secrets = ["sk-1", "sk-2", "Bearer sk-1", "1-ks", "a%b"];
        let store = MemoryStore::new();
        let keys = secrets.map(|secret| (format!("of {secret}"), secret));
        let pool = KeyPool::builder().keys(keys).inject(inject).open(store.clone());
        let pool = pool.now_or_never().unwrap().unwrap();
        let records = store.load(None).now_or_never().unwrap().unwrap().records;
        assert_eq!(records.len(), secrets.len());
        for spec in records.into_iter().map(|record| record.spec) {
            assert_eq!(spec.id.as_str(), format!("of {}", spec.secret.expose()));
        }
        // A key that the store repeats is the same key, with its counts.
        let first = KeyId::new("of sk-1").unwrap();
        pool.record_usage(&first, 7);
        pool.reload().now_or_never().unwrap().unwrap();
        assert_eq!(pool.stats().keys.iter().find(|key| key.id == first).unwrap().tokens, 7);
        assert!(pool.insert("another", "sk-2").now_or_never().unwrap().is_err());
        pool.insert("another", "sk-").now_or_never().unwrap().unwrap();
    }
}

#[test]
fn masks_show_a_quarter_or_4_characters() {
    for inject in [Inject::bearer(), Inject::header("x-api-key"), Inject::query("key"), reversed()] {
        for (secret, shown) in [
            ("abc", "…"),
            ("abcd", "…d"),
            ("abcdefg", "…g"),
            ("abcdefgh", "…gh"),
            ("abcdefghijklmno", "…mno"),
            ("abcdefghijklmnop", "…mnop"),
            ("abcdefghijklmnopqrstuvwxyz", "…wxyz"),
        ] {
            let pool = KeyPool::builder().key("alpha", secret).inject(inject.clone()).build().unwrap();
            assert_eq!(pool.masked_secret("alpha").as_deref(), Some(shown));
            assert_eq!(pool.masked_secret("beta"), None);
        }
    }
}
