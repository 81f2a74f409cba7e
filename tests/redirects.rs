//! Where keys go when a service redirects: two servers, of which only the first may get one.

mod support;

use std::future::ready;

use bytes::Bytes;
use futures_util::FutureExt;
use http::{
    HeaderName, HeaderValue, Method, Request, Response, StatusCode,
    header::{LINK, LOCATION},
};
use http_body_util::Full;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use support::{Server, answer, answer_with, http};
use tower::{Layer, ServiceExt, service_fn};
use tower_http::follow_redirect::{FollowRedirectLayer, policy::SameOrigin};
use tower_key_rotation::{Inject, KeyPool, KeyPoolBuilder, KeyRotationLayer, same_origin_redirects};

const SECRET: &str = "sk-canary/1+2";
const PERCENT_ENCODED: &str = "sk-canary%2F1%2B2";
const STATUSES: [u16; 5] = [301, 302, 303, 307, 308];

/// One that redirects whatever it is asked to another one, path and query and all.
async fn redirecting(status: u16) -> (Server, Server) {
    let second = Server::answering(|| answer(200, "here you are")).await;
    let address = second.address();
    let first = Server::start(move |request| {
        let location = format!("http://{address}{}", request.uri());
        std::future::ready(answer_with(status, [("location", &location)], ""))
    });
    (first.await, second)
}

fn places() -> [(&'static str, Inject); 3] {
    [("bearer", Inject::bearer()), ("header", Inject::header("x-api-key")), ("query", Inject::query("key"))]
}

fn pool(inject: &Inject) -> KeyPoolBuilder {
    KeyPool::builder().key("alpha", SECRET).inject(inject.clone())
}

fn holds_the_key(text: impl AsRef<[u8]>) -> bool {
    let text = String::from_utf8_lossy(text.as_ref()).into_owned();
    text.contains(SECRET) || text.contains(PERCENT_ENCODED)
}

fn got_the_key(request: &Request<Bytes>) -> bool {
    let mut headers = request.headers().values();
    holds_the_key(request.uri().to_string()) || headers.any(holds_the_key) || holds_the_key(request.body())
}

/// Every kind of redirect, of every method that matters, with a key in every place.
macro_rules! for_every_redirect {
    (|$first:ident, $second:ident, $inject:ident, $method:ident, $case:ident| $body:block) => {
        for status in STATUSES {
            for (place, $inject) in &places() {
                for $method in [Method::GET, Method::POST] {
                    let ($first, $second) = redirecting(status).await;
                    let $case = format!("{status} {place} {}", $method);
                    $body
                    assert!(got_the_key(&$first.requests()[0]), "{}: the first server gets the key", $case);
                }
            }
        }
    };
}

fn url(server: &Server) -> String {
    format!("{}?a=1", server.url())
}

/// What a caller gets who is not taken to another origin: the redirect itself, without the key.
fn is_the_redirect(response: &reqwest::Response, second: &Server, case: &str) {
    let location = response.headers()[LOCATION].to_str().unwrap();
    assert!(response.status().is_redirection(), "{case}");
    assert_eq!(location, format!("{}?a=1", second.url()), "{case}");
    assert!(!holds_the_key(response.url().as_str()), "{case}");
    assert_eq!(second.count(), 0, "{case}");
}

#[tokio::test]
async fn s02_a_reqwest_client_sends_other_origins_no_key() {
    for_every_redirect!(|first, second, inject, method, case| {
        let pool = pool(inject).build().unwrap();
        let client = same_origin_redirects(reqwest::Client::builder().no_proxy()).build().unwrap();
        let client = KeyRotationLayer::new(&pool).layer(client);
        let request = reqwest::Request::new(method, url(&first).parse().unwrap());
        let response = client.oneshot(request).await.unwrap();
        is_the_redirect(&response, &second, &case);
    });
}

#[tokio::test]
async fn s02_reqwest_middleware_sends_other_origins_no_key() {
    for_every_redirect!(|first, second, inject, method, case| {
        let pool = pool(inject).build().unwrap();
        let client = same_origin_redirects(reqwest::Client::builder().no_proxy()).build().unwrap();
        let client =
            reqwest_middleware::ClientBuilder::new(client).with(KeyRotationLayer::new(&pool)).build();
        let response = client.request(method, url(&first)).send().await.unwrap();
        is_the_redirect(&response, &second, &case);
    });
}

type HttpClient = Client<hyper_util::client::legacy::connect::HttpConnector, Full<Bytes>>;

fn hyper() -> HttpClient {
    Client::builder(TokioExecutor::new()).build_http()
}

fn request(method: Method, server: &Server) -> Request<Full<Bytes>> {
    Request::builder().method(method).uri(url(server)).body(Full::default()).unwrap()
}

#[tokio::test]
async fn s02_non_ascii_or_encoded_locations_carry_no_key() {
    for path in ["/café?key=", "/#key=", "/back/%3Fkey%3D", "/?to=%2Fcaf\u{e9}%3Fkey%3D"] {
        let second = Server::answering(|| answer(200, "here you are")).await;
        let location = format!("http://{}{path}{PERCENT_ENCODED}", second.address());
        let first = Server::answering(move || {
            let mut redirect = answer(302, "");
            redirect.headers_mut().insert(LOCATION, HeaderValue::from_bytes(location.as_bytes()).unwrap());
            redirect
        })
        .await;
        let hosts = [first.address().to_string()];
        let pool = pool(&Inject::query("key")).allowed_hosts(hosts).build().unwrap();
        let client = FollowRedirectLayer::new().layer(KeyRotationLayer::new(&pool).layer(hyper()));
        let response = client.oneshot(request(Method::GET, &first)).await.unwrap();
        assert!(!response.headers().values().any(holds_the_key), "{path}: {:?}", response.headers());
        assert!(!second.requests().iter().any(got_the_key), "{path}");
        // Where there is nowhere left to go, it is not asked again and again.
        assert_eq!(first.count(), 1, "{path}");
    }
}

#[tokio::test]
async fn s02_response_headers_never_repeat_the_query_key() {
    let server = Server::answering(|| {
        let own = format!("/v1?page=2&key={PERCENT_ENCODED}");
        let mut response = answer(200, "{}");
        for (name, value) in [
            ("link", format!("<{own}>; rel=next")),
            ("link", "</v1?page=1>; rel=prev".to_owned()),
            ("content-location", own.clone()),
            ("refresh", format!("5; url={own}")),
            ("x-page", "2".to_owned()),
        ] {
            response.headers_mut().append(name, value.parse().unwrap());
        }
        response
    })
    .await;
    let pool = pool(&Inject::query("key")).build().unwrap();
    let client = KeyRotationLayer::new(&pool).layer(hyper());
    let response = client.oneshot(request(Method::GET, &server)).await.unwrap();
    let headers = response.headers();
    assert!(!headers.values().any(holds_the_key), "{headers:?}");
    let links: Vec<_> = headers.get_all("link").iter().collect();
    assert_eq!(links, ["</v1?page=2>; rel=next", "</v1?page=1>; rel=prev"]);
    assert_eq!(
        (&headers["content-location"], &headers["x-page"]),
        (&"/v1?page=2".parse().unwrap(), &"2".parse().unwrap())
    );
    assert!(!headers.contains_key("refresh"));
}

/// What is left of a response's header after a request with the key `s&cret/1` in its query; `None` without the header.
fn left_of(name: HeaderName, value: &str) -> Option<String> {
    let pool = KeyPool::builder().key("alpha", "s&cret/1").inject(Inject::query("key")).build().unwrap();
    let answer = |_: Request<()>| {
        let value = HeaderValue::from_bytes(value.as_bytes()).unwrap();
        ready(Response::builder().header(&name, value).body(()))
    };
    let request = Request::get("https://api.example.com/v1").body(()).unwrap();
    let sent = KeyRotationLayer::new(&pool).layer(service_fn(answer)).oneshot(request);
    let response = sent.now_or_never().unwrap().unwrap();
    response.headers().get(&name).map(|value| String::from_utf8(value.as_bytes().into()).unwrap())
}

#[test]
fn s02_urls_lose_the_key_in_any_encoding() {
    for (url, left) in [
        ("https://other.test/v1?key=s%26cret%2F1", Some("https://other.test/v1")),
        ("/v1?a=1&key=s%26cret/1&b#top", Some("/v1?a=1&b#top")),
        ("/login?to=https%3A%2F%2Fa.test%2F%3Fkey%3Ds%2526cret%252F1&x=", Some("/login?x=")),
        ("?k%65y=s%26cret%2f1", None),
        ("https://other.test/café?key=s%26cret%2F1", Some("https://other.test/café")),
        ("/v1?a=1#/cb?key=s%26cret%2F1", Some("/v1?a=1")),
        ("/login/https%3A%2F%2Fa.test%2F%3Fkey%3Ds%2526cret%252F1", None),
        ("https://other.test/v1?key=somebody-elses", Some("https://other.test/v1?key=somebody-elses")),
        ("https://other.test/v1", Some("https://other.test/v1")),
        ("/v1?", Some("/v1?")),
    ] {
        assert_eq!(left_of(LOCATION, url).as_deref(), left, "{url}");
    }
}

#[test]
fn s02_a_key_is_removed_from_links() {
    for (links, left) in [
        (
            r#"</v1?page=2&key=s%26cret%2F1>; rel="next", </v1?key=s%26cret/1&page=9>; rel=last"#,
            Some(r#"</v1?page=2>; rel="next", </v1?page=9>; rel=last"#),
        ),
        ("</v1?page=2>; rel=next, <?key=s%26cret%2F1>; rel=self", None),
        (r#"</v1>; title="key=s&cret/1""#, None),
        ("</v1?key=s%26cret%2F1", None),
    ] {
        assert_eq!(left_of(LINK, links).as_deref(), left, "{links}");
    }
}

#[tokio::test]
async fn s02_outer_redirects_send_keys_only_to_allowed_hosts() {
    for_every_redirect!(|first, second, inject, method, case| {
        let pool = pool(inject).allowed_hosts([first.address().to_string()]).build().unwrap();
        let client = FollowRedirectLayer::new().layer(KeyRotationLayer::new(&pool).layer(hyper()));
        let response = client.oneshot(request(method, &first)).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK, "{case}");
        let followed = &second.requests()[0];
        assert!(!got_the_key(followed), "{case}: {followed:?}");
        assert_eq!(followed.uri(), "/v1?a=1", "{case}");
    });
}

#[tokio::test]
async fn s02_inner_same_origin_redirects_leak_no_key() {
    for_every_redirect!(|first, second, inject, method, case| {
        let pool = pool(inject).build().unwrap();
        let within = FollowRedirectLayer::with_policy(SameOrigin::new());
        let client = KeyRotationLayer::new(&pool).layer(within.layer(hyper()));
        let response = client.oneshot(request(method, &first)).await.unwrap();
        assert!(response.status().is_redirection(), "{case}");
        assert!(!holds_the_key(&response.headers()[LOCATION]), "{case}");
        assert_eq!(second.count(), 0, "{case}");
    });
}

/// One that redirects to another of its paths.
async fn redirecting_within() -> Server {
    Server::start(|request| {
        let moved = request.uri().path() == "/v1";
        let location = format!("/v2?{}", request.uri().query().unwrap_or_default());
        std::future::ready(if moved {
            answer_with(307, [("location", &location)], "")
        } else {
            answer(200, "")
        })
    })
    .await
}

#[tokio::test]
async fn same_origin_redirects_keep_the_key() {
    for (place, inject) in &places() {
        let server = redirecting_within().await;
        let pool = pool(inject).build().unwrap();
        let client = same_origin_redirects(reqwest::Client::builder().no_proxy()).build().unwrap();
        let client = KeyRotationLayer::new(&pool).layer(client);
        assert_eq!(support::status(&client, &url(&server)).await, 200, "{place}");

        let around = FollowRedirectLayer::new().layer(KeyRotationLayer::new(&pool).layer(hyper()));
        let response = around.oneshot(request(Method::GET, &server)).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK, "{place}");

        let requests = server.requests();
        assert_eq!(requests.len(), 4, "{place}");
        assert!(requests.iter().all(got_the_key), "{place}: {requests:?}");
        assert!(requests.iter().all(|request| !request.headers().contains_key("referer")), "{place}");
    }
}

#[tokio::test]
async fn redirects_in_a_circle_end() {
    let server = Server::answering(|| answer_with(302, [("location", "/v1")], "")).await;
    let client = same_origin_redirects(reqwest::Client::builder().no_proxy()).build().unwrap();
    let error = support::get(&client, &server.url()).await.unwrap_err();
    assert!(error.is_redirect(), "{error}");
    assert_eq!(server.count(), 11);
}

/// Why `same_origin_redirects` is there; and that these tests would see a key that reaches the second server.
#[tokio::test]
async fn a_default_reqwest_client_leaks_keys_on_redirect() {
    for (place, inject) in &places() {
        let (first, second) = redirecting(302).await;
        let pool = pool(inject).build().unwrap();
        let client = KeyRotationLayer::new(&pool).layer(http());
        assert_eq!(support::status(&client, &url(&first)).await, 200);
        let followed = &second.requests()[0];
        assert_eq!(got_the_key(followed), *place != "bearer", "{place}: {followed:?}");
        let referer = followed.headers().get("referer");
        assert_eq!(referer.is_some_and(holds_the_key), *place == "query");
    }
}
