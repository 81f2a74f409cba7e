//! Callers with tokens, limits and permissions of their own.

mod support;

use serde_json::{Value, json};
use support::{
    gateway::{Gateway, command, refusal},
    *,
};

/// A gateway with these `[[caller]]` tables, in front of a server that reports 40 tokens for each request.
struct Door {
    gateway: Gateway,
    upstream: Server,
    _files: [TestFile; 2],
}

impl Door {
    async fn with(callers: &str) -> Self {
        let json = ("content-type", "application/json");
        let upstream =
            Server::answering(move || answer_with(200, [json], r#"{"usage":{"total_tokens":40}}"#)).await;
        let keys = keys_file("alpha|sk-alpha");
        let config = file(
            "toml",
            &format!(
                r#"
                admin-token = "the-admin-s-token"
                [[upstream]]
                name = "openai"
                path = "/openai"
                url = "http://{address}"
                keys = {keys:?}
                [[upstream]]
                name = "rest"
                url = "http://{address}"
                keys = {keys:?}
                {callers}
                "#,
                address = upstream.address(),
                keys = keys.path(),
            ),
        );
        let mut start = command(["--config", config.path()]);
        start.env("BATCH_TOKEN", "token-of-batch");
        Self { gateway: Gateway::start(start).await, upstream, _files: [keys, config] }
    }

    async fn send(&self, token: &str, path: &str, body: Value) -> reqwest::Response {
        http().post(self.gateway.url(path)).header("x-api-key", token).json(&body).send().await.unwrap()
    }

    async fn status(&self, token: &str, path: &str, model: &str) -> u16 {
        self.send(token, path, json!({ "model": model })).await.status().as_u16()
    }

    async fn callers(&self) -> Value {
        let request = http().get(self.gateway.admin_url("/admin/api/callers"));
        request.bearer_auth("the-admin-s-token").send().await.unwrap().json().await.unwrap()
    }
}

#[tokio::test]
async fn a_caller_over_its_limit_gets_429_alone() {
    let door = Door::with(
        r#"
        [[caller]]
        name = "website"
        token = "token-of-website"
        requests-per-minute = 2
        [[caller]]
        name = "batch"
        token-variable = "BATCH_TOKEN"
        "#,
    )
    .await;
    for _ in 0..2 {
        assert_eq!(door.status("token-of-website", "/v1", "m").await, 200);
    }
    let response = door.send("token-of-website", "/v1", json!({})).await;
    assert_eq!(response.status(), 429);
    let wait: u64 = response.headers()["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=30).contains(&wait), "{wait}");
    let error = response.json::<Value>().await.unwrap();
    assert_eq!(error["error"]["code"], "rate_limit_exceeded");
    assert!(error["error"]["message"].as_str().unwrap().contains("limit of requests per minute"), "{error}");
    for _ in 0..3 {
        assert_eq!(door.status("token-of-batch", "/v1", "m").await, 200);
    }
    assert_eq!(door.status("token-of-nobody", "/v1", "m").await, 401);
    assert_eq!(door.upstream.count(), 5);
}

#[tokio::test]
async fn tokens_a_minute_are_corrected_by_responses() {
    let door = Door::with(
        "[[caller]]\nname = \"website\"\ntoken = \"token-of-website\"\ntokens-per-minute = 1000\n",
    )
    .await;
    // Each reserves more than half, and uses 40.
    let chat = json!({ "model": "m", "max_tokens": 600 });
    for _ in 0..5 {
        assert_eq!(door.send("token-of-website", "/v1", chat.clone()).await.text().await.unwrap().len(), 29);
    }
    let large = door.send("token-of-website", "/v1", json!({ "model": "m", "max_tokens": 950 })).await;
    assert_eq!(large.status(), 429);
    let callers = door.callers().await;
    let website = &callers[0];
    assert_eq!((&website["name"], &website["tokens"]), (&json!("website"), &json!(200)), "{website}");
    assert_eq!((&website["requests"], &website["over_limit"]), (&json!(6), &json!(1)), "{website}");
    let left = website["tokens_left"].as_u64().unwrap();
    assert!((800..=1_000).contains(&left), "{website}");

    let metrics = http().get(door.gateway.admin_url("/metrics")).bearer_auth("the-admin-s-token");
    let metrics = metrics.send().await.unwrap().text().await.unwrap();
    for line in [
        r#"gateway_caller_requests_total{caller="website"} 6"#,
        r#"gateway_caller_tokens_total{caller="website"} 200"#,
        r#"gateway_caller_over_limit_total{caller="website"} 1"#,
    ] {
        assert!(metrics.lines().any(|found| found == line), "{line} is not in {metrics}");
    }
}

#[tokio::test]
async fn a_caller_uses_only_what_is_allowed() {
    let door = Door::with(
        r#"
        [[caller]]
        name = "website"
        token = "token-of-website"
        upstreams = ["openai"]
        paths = ["/openai/v1/chat", "/openai/v1/models"]
        models = ["gpt-5-mini", "gpt-4*"]
        "#,
    )
    .await;
    for (path, model, expected) in [
        ("/openai/v1/chat/completions", "gpt-5-mini", 200),
        ("/openai/v1/chat/completions", "gpt-4o", 200),
        ("/openai/v1/chat/completions", "gpt-5", 403),
        ("/openai/v1/embeddings", "gpt-5-mini", 403),
        ("/v1/chat/completions", "gpt-5-mini", 403),
    ] {
        assert_eq!(door.status("token-of-website", path, model).await, expected, "{path} {model}");
    }
    let twice = http()
        .post(door.gateway.url("/openai/v1/chat/completions"))
        .header("x-api-key", "token-of-website")
        .header("content-type", "application/json")
        .body(r#"{"model":"gpt-5","model":"gpt-4"}"#);
    assert_eq!(twice.send().await.unwrap().status(), 403);
    let models = http().get(door.gateway.url("/openai/v1/models")).header("x-api-key", "token-of-website");
    assert_eq!(models.send().await.unwrap().status(), 200);
    assert_eq!(door.upstream.count(), 3);
}

#[tokio::test]
async fn requests_in_flight_count_until_the_response_ends() {
    let (chunks, body) = stream();
    let body = std::sync::Arc::new(std::sync::Mutex::new(Some(body)));
    let upstream = Server::answering(move || match body.lock().unwrap().take() {
        Some(body) => answer(200, body),
        None => answer(200, "fine"),
    })
    .await;
    let keys = keys_file("alpha|sk-alpha");
    let config = file(
        "toml",
        &format!(
            "upstream = \"http://{}\"\nkeys = {:?}\n[[caller]]\nname = \"one\"\ntoken = \"token-of-one\"\nmax-in-flight = 1\n",
            upstream.address(),
            keys.path()
        ),
    );
    let gateway = Gateway::start(command(["--config", config.path()])).await;
    let get = || http().get(gateway.url("/")).bearer_auth("token-of-one").send();
    let first = get().await.unwrap();
    let second = get().await.unwrap();
    assert_eq!((second.status().as_u16(), &second.headers()["retry-after"]), (429, &"1".parse().unwrap()));
    drop(chunks);
    first.bytes().await.unwrap();
    let mut third = get().await.unwrap().status();
    for _ in 0..1_000 {
        if third == 200 {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        third = get().await.unwrap().status();
    }
    panic!("the first request is over: {third}");
}

#[tokio::test]
async fn invalid_callers_are_named_by_line() {
    let keys = keys_file("a|sk-a");
    let base = format!("upstream = \"https://example.com\"\nkeys = {:?}\n", keys.path());
    let caller = |name: &str, token: &str, more: &str| {
        format!("[[caller]]\nname = {name:?}\ntoken = {token:?}\n{more}\n")
    };
    for (text, expected) in [
        (caller("a", "canary1", ""), r#"line 5: caller "a": token: a token is at least 8"#),
        (caller("a", "canary-1", "paths = []"), r#"line 6: caller "a": paths: it is an empty list"#),
        (
            caller("a", "canary-1", "upstreams = [\"x\"]"),
            r#"line 3: caller "a": upstreams: there is no upstream "x""#,
        ),
        (caller("a", "canary-1", "requests-per-minute = 0"), r#"line 6: caller "a": requests-per-minute"#),
        (
            caller("a", "canary-1", "") + &caller("a", "canary-2", ""),
            r#"line 7: caller "a": another caller has this name"#,
        ),
        (
            caller("a", "canary-1", "") + &caller("b", "canary-1", ""),
            r#"line 7: caller "b": caller "a" has the same token"#,
        ),
        ("[[caller]]\nname = \"a\"\ntoken-variable = \"NO_SUCH\"".to_owned(), "variable NO_SUCH is not set"),
    ] {
        let file = file("toml", &(base.clone() + &text));
        let output = refusal(["--config", file.path()]).await;
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains(expected), "{text}: {said}");
        assert!(!said.contains("canary"), "{said}");
    }
}

#[tokio::test]
async fn callers_that_wait_are_served_in_rotation() {
    let upstream = Server::limiting([]).await;
    let keys = keys_file("alpha|sk-alpha");
    let callers = ["batch", "website"]
        .map(|name| format!("[[caller]]\nname = {name:?}\ntoken = \"token-of-{name}\"\n"))
        .concat();
    let upstream_of = format!(
        "[[upstream]]\nname = \"one\"\nurl = \"http://{}\"\nkeys = {:?}\nwait = 300\n\
         quotas = [{{ requests = 120, per = \"minute\", burst = 1 }}]\n",
        upstream.address(),
        keys.path(),
    );
    let config = file("toml", &format!("admin-token = \"the-admin-s-token\"\n{upstream_of}{callers}"));
    let gateway = Gateway::start(command(["--config", config.path()])).await;
    let send = |caller: &'static str| {
        let request = http().post(gateway.url("/v1")).bearer_auth(format!("token-of-{caller}"));
        let request = request.json(&json!({ "model": "m", "caller": caller }));
        tokio::spawn(async move { request.send().await.unwrap().status().as_u16() })
    };
    let in_flight = async || -> u64 {
        let callers = http().get(gateway.admin_url("/admin/api/callers")).bearer_auth("the-admin-s-token");
        let callers: Value = callers.send().await.unwrap().json().await.unwrap();
        callers.as_array().unwrap().iter().map(|caller| caller["in_flight"].as_u64().unwrap()).sum()
    };
    let mut requests: Vec<_> = (0..14).map(|_| send("batch")).collect();
    while in_flight().await + (upstream.count() as u64) < 14 {
        tokio::time::sleep(INSTANT).await;
    }
    requests.extend([send("website"), send("website")]);
    for request in requests {
        assert_eq!(request.await.unwrap(), 200);
    }
    let body =
        |request: &http::Request<bytes::Bytes>| -> Value { serde_json::from_slice(request.body()).unwrap() };
    let order: Vec<_> =
        upstream.requests().iter().map(|request| body(request)["caller"] == "website").collect();
    let last = order.iter().rposition(|is_website| *is_website).unwrap();
    assert!(order.len() - last > 4, "{order:?}");
}
