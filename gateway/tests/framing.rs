//! Requests and responses with ambiguous framing or addresses.

mod support;

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
};

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use support::{
    gateway::{Gateway, command, refusal},
    raw::{exchange, raw_upstream},
    *,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// Sends a raw request on its own connection and returns the response's status.
async fn status_of(gateway: &Gateway, request: &str) -> u16 {
    let answer = exchange(gateway.address(), request).await;
    let status = answer.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3));
    status.unwrap_or_else(|| panic!("{request:?}: {answer:?}")).parse().unwrap()
}

#[tokio::test]
async fn a_request_without_one_valid_host_is_400() {
    let upstream = Server::answering(|| answer(200, "fine")).await;
    for arguments in [&[][..], &["--client-token", "the-token"]] {
        let (keys, url) = (keys_file("a|sk-a"), format!("http://{}", upstream.address()));
        let all = ["--upstream", &url, "--keys", keys.path()].into_iter().chain(arguments.iter().copied());
        let gateway = Gateway::start(command(all)).await;
        let close = "x-api-key: the-token\r\nConnection: close\r\n";
        for host in [
            "",
            "Host:\r\n",
            "Host: two words\r\n",
            "Host: me@localhost\r\n",
            "Host: [::1].evil.test\r\n",
            "Host: localhost\r\nHost: localhost\r\n",
        ] {
            let request = format!("GET / HTTP/1.1\r\n{host}{close}\r\n");
            assert_eq!(status_of(&gateway, &request).await, 400, "{host:?}");
        }
        assert_eq!(
            status_of(&gateway, &format!("GET / HTTP/1.1\r\nHost: localhost\r\n{close}\r\n")).await,
            200
        );
    }
    assert_eq!(upstream.count(), 2);
}

#[tokio::test]
async fn no_path_spelling_escapes_the_upstreams_base_path() {
    let upstream = Server::start(async |request| answer(200, request.uri().to_string())).await;
    let (keys, url) = (keys_file("a|sk-a"), format!("http://{}/tenant", upstream.address()));
    let gateway = Gateway::start(command(["--upstream", &url, "--keys", keys.path()])).await;
    let get = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    for path in [
        "/..;/other",
        "/..;a=b/other",
        "/%252e%252e/other",
        "/%25252e%25252e%25252fother",
        "/..%00/other",
        "/..%2500/other",
        "/%2e%2e%3b/other",
        "/%FF/%252e%252e/other",
    ] {
        assert_eq!(status_of(&gateway, &get(path)).await, 400, "{path}");
    }
    assert_eq!(upstream.count(), 0);
    for path in ["/a..b/...;x/%25/%2525", "/v1/models/..a", "/%FF"] {
        let answer = exchange(gateway.address(), &get(path)).await;
        assert!(answer.ends_with(&format!("/tenant{path}")), "{path}: {answer}");
    }
}

#[tokio::test]
async fn s10_two_content_lengths_in_http_2_are_400() {
    let upstream = Server::answering(|| answer(200, "fine")).await;
    let gateway = Gateway::before(upstream.address(), &["a"], []).await;
    let connection = TcpStream::connect(gateway.address()).await.unwrap();
    let (client, connection) = h2::client::handshake(connection).await.unwrap();
    tokio::spawn(connection);
    let request = |lengths: usize| {
        let request = Request::post(gateway.url("/"));
        (0..lengths).fold(request, |request, _| request.header("content-length", "2")).body(()).unwrap()
    };
    for (lengths, status) in [(1, 200), (2, 400)] {
        let mut client = client.clone().ready().await.unwrap();
        let (response, mut body) = client.send_request(request(lengths), false).unwrap();
        body.send_data(Bytes::from_static(b"hi"), true).unwrap();
        assert_eq!(in_time(response).await.unwrap().status().as_u16(), status, "{lengths}");
    }
    assert_eq!(upstream.count(), 1);
}

#[tokio::test]
async fn track_is_refused_like_trace() {
    let upstream = Server::answering(|| answer(200, "fine")).await;
    let gateway = Gateway::before(upstream.address(), &["a"], []).await;
    for method in ["TRACK", "track", "TRACE"] {
        let request = format!("{method} / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        assert_eq!(status_of(&gateway, &request).await, 501, "{method}");
    }
    assert_eq!(upstream.count(), 0);
}

#[tokio::test]
async fn a_101_that_nobody_asked_for_is_502() {
    let switches = "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n";
    let (upstream, _) = raw_upstream(switches).await;
    let gateway = Gateway::before(upstream, &["a"], []).await;
    let request = "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    assert_eq!(status_of(&gateway, request).await, 502);
}

#[tokio::test]
async fn a_get_keeps_its_chunked_body() {
    let upstream = Server::start(async |request| answer(200, request.into_body())).await;
    let gateway = Gateway::before(upstream.address(), &["a"], []).await;
    let request = "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n\
                   4\r\nbody\r\n0\r\n\r\n";
    let answer = exchange(gateway.address(), request).await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("\r\n\r\nbody"), "{answer}");
}

#[tokio::test]
async fn the_upstream_learns_nothing_of_where_a_caller_is() {
    let upstream = Server::answering(|| answer(200, "fine")).await;
    let gateway = Gateway::before(upstream.address(), &["a"], ["--client-token", "the-token"]).await;
    let names = [
        "forwarded",
        "origin",
        "referer",
        "via",
        "x-forwarded-for",
        "x-forwarded-host",
        "x-forwarded-whatever",
        "x-real-ip",
    ];
    let request = http().get(gateway.url("/")).header("x-api-key", "the-token").header("x-kept", "1");
    let request = names.iter().fold(request, |request, name| request.header(*name, "10.1.2.3"));
    assert_eq!(request.send().await.unwrap().status(), 200);
    let arrived = &upstream.requests()[0];
    assert!(arrived.headers().contains_key("x-kept"));
    assert_eq!(names.iter().find(|name| arrived.headers().contains_key(**name)), None);
}

#[tokio::test]
async fn s10_no_key_comes_back_in_a_trailer() {
    let (upstream, seen) = raw_upstream(
        "HTTP/1.1 200 OK\r\nTrailer: x-link\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nfine\r\n0\r\n\
         x-link: http://localhost/?key=sk-a\r\n\r\n",
    )
    .await;
    let gateway = Gateway::before(upstream, &["a"], ["--inject", "query:key"]).await;
    let (mut client, connection) = {
        let connection = TcpStream::connect(gateway.address()).await.unwrap();
        http2::handshake(TokioExecutor::new(), TokioIo::new(connection)).await.unwrap()
    };
    tokio::spawn(connection);
    let request =
        Request::get(gateway.url("/")).header("te", "trailers").body(Empty::<Bytes>::new()).unwrap();
    let response = in_time(client.send_request(request)).await.unwrap();
    assert!(!response.headers().contains_key("trailer"));
    let body = in_time(response.into_body().collect()).await.unwrap();
    assert!(seen.lock().unwrap()[0].contains("key=sk-a"));
    assert_eq!(body.trailers(), None);
    assert_eq!(body.to_bytes(), "fine");
}

#[tokio::test]
async fn half_of_a_head_holds_up_no_stop() {
    let upstream = Server::answering(|| answer(200, "fine")).await;
    let mut gateway = Gateway::before(upstream.address(), &["a"], ["--shutdown-limit", "60"]).await;
    let mut connections = Vec::new();
    for said in ["GET / HTTP/1.1\r\nHost: local", "GET / HTTP/1.1\r\nHost: localhost\r\n\r\nGET / HTT"] {
        let mut connection = TcpStream::connect(gateway.address()).await.unwrap();
        connection.write_all(said.as_bytes()).await.unwrap();
        connections.push(connection);
    }
    let mut answer = Vec::new();
    while !answer.ends_with(b"fine") {
        in_time(connections[1].read_buf(&mut answer)).await.unwrap();
    }
    // `ended` times out before the shutdown limit.
    gateway.terminate().await;
    assert_eq!(gateway.ended().await.code(), Some(0));
}

#[tokio::test]
async fn loose_files_short_tokens_and_unknown_variables_are_noticed() {
    let upstream = Server::answering(|| answer(200, "fine")).await;
    let (keys, url) = (keys_file("a|sk-a"), format!("http://{}", upstream.address()));
    let arguments = ["--upstream", &url, "--keys", keys.path()];
    for token in ["--client-token", "--admin-token"] {
        let output = refusal(arguments.iter().chain(&[token, "seven77"])).await;
        assert_eq!(output.status.code(), Some(2));
        assert!(String::from_utf8(output.stderr).unwrap().contains("a token is at least 8 "));
    }
    let gateway = Gateway::start(command(arguments)).await;
    assert!(
        !gateway.log().contains("chmod") && !gateway.log().contains("no such setting"),
        "{}",
        gateway.log()
    );
    fs::set_permissions(keys.path(), Permissions::from_mode(0o640)).unwrap();
    let mut loose = command(arguments);
    loose.env("GATEWAY_CLIENT_TOKNE", "the-canary");
    let gateway = Gateway::start(loose).await;
    assert!(gateway.log().contains(&format!("{}: other users", keys.path())), "{}", gateway.log());
    assert!(gateway.log().contains("GATEWAY_CLIENT_TOKNE: there is no such setting"), "{}", gateway.log());
    assert!(!gateway.log().contains("canary"));
}

#[tokio::test]
async fn s10_a_body_failing_at_once_follows_its_head() {
    let (upstream, _) =
        raw_upstream("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzzz\r\nfine").await;
    let gateway = Gateway::before(upstream, &["a"], []).await;
    let request = "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    let answer = exchange(gateway.address(), request).await.to_lowercase();
    assert!(answer.contains("transfer-encoding: chunked"), "{answer:?}");
    assert!(answer.ends_with("\r\n\r\n"), "the response must not look complete: {answer:?}");
}
