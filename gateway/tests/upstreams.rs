//! Several upstreams in one gateway, from its configuration file.

mod support;

use bytes::Bytes;
use http::Request;
use serde_json::{Value, json};
use support::{
    gateway::{Gateway, command, refusal},
    *,
};

/// A server that answers with its name, and the path and credentials that it got.
async fn api(name: &'static str) -> Server {
    Server::start(move |request: Request<Bytes>| {
        let header = |name: &str| request.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
        let key = header("authorization").or(header("x-api-key")).or(header("x-goog-api-key"));
        let path = request.uri().path_and_query().unwrap().to_string();
        let body = json!({ "api": name, "path": path, "key": key, "usage": { "total_tokens": 5 } });
        let answer = answer_with(200, [("content-type", "application/json")], body.to_string());
        std::future::ready(answer)
    })
    .await
}

/// The three APIs, and a gateway for them.
struct Three {
    gateway: Gateway,
    _files: [TestFile; 3],
}

impl Three {
    async fn start() -> Self {
        let (openai, anthropic, gemini) = (api("openai").await, api("anthropic").await, api("gemini").await);
        let (one, two) = (keys_file("alpha|sk-openai"), keys_file("alpha|sk-anthropic"));
        let config = file(
            "toml",
            &format!(
                r#"
                wait = 5
                [[upstream]]
                name = "openai"
                path = "/openai"
                url = "http://{}"
                keys = {:?}

                [[upstream]]
                name = "anthropic"
                path = ["/v1/messages", "/v1/complete"]
                strip-path = false
                url = "http://{}"
                keys = {:?}
                inject = "header:x-api-key"
                pace = false

                [[upstream]]
                name = "gemini"
                url = "http://{}/base"
                keys-variable = "GEMINI_KEYS"
                inject = "header:x-goog-api-key"
                quotas = [{{ requests = 2, per = "day", window = true }}]
                wait = 0
                "#,
                openai.address(),
                one.path(),
                anthropic.address(),
                two.path(),
                gemini.address(),
            ),
        );
        let mut start = command(["--config", config.path()]);
        start.env("GEMINI_KEYS", "alpha=sk-gemini");
        Self { gateway: Gateway::start(start).await, _files: [one, two, config] }
    }

    async fn post(&self, path: &str) -> (u16, Value) {
        let body = json!({ "model": "m" });
        let response = http().post(self.gateway.url(path)).json(&body).send().await.unwrap();
        (response.status().as_u16(), response.json().await.unwrap())
    }

    async fn admin(&self, path: &str) -> Value {
        http().get(self.gateway.admin_url("/admin/api") + path).send().await.unwrap().json().await.unwrap()
    }
}

#[tokio::test]
async fn one_gateway_serves_three_apis() {
    let three = Three::start().await;
    for (path, api, expected, key) in [
        ("/openai/v1/chat?a=b", "openai", "/v1/chat?a=b", "Bearer sk-openai"),
        ("/openai", "openai", "/", "Bearer sk-openai"),
        ("/v1/messages?beta=true", "anthropic", "/v1/messages?beta=true", "sk-anthropic"),
        ("/v1beta/models/g:generateContent", "gemini", "/base/v1beta/models/g:generateContent", "sk-gemini"),
        ("/openai2/v1", "gemini", "/base/openai2/v1", "sk-gemini"),
    ] {
        let (status, answer) = three.post(path).await;
        assert_eq!(status, 200, "{path}: {answer}");
        assert_eq!((&answer["api"], &answer["path"]), (&json!(api), &json!(expected)), "{path}");
        assert_eq!(answer["key"], key, "{path}");
    }
    assert_eq!(three.post("/openai/..%2fv1").await.0, 400);
}

#[tokio::test]
async fn each_upstream_has_its_own_keys_and_quotas() {
    let three = Three::start().await;
    let paths = ["/v1beta/g", "/v1beta/g", "/v1beta/g", "/openai/v1/chat", "/v1/messages"];
    let mut statuses = Vec::new();
    for path in paths {
        statuses.push(three.post(path).await.0);
    }
    assert_eq!(statuses, [200, 200, 429, 200, 200]);

    let upstreams = three.admin("/upstreams").await;
    let seen: Vec<_> = upstreams.as_array().unwrap().iter().map(|u| (&u["name"], &u["route"])).collect();
    let expected = [
        (&json!("openai"), &json!("/openai")),
        (&json!("anthropic"), &json!("/v1/messages, /v1/complete")),
        (&json!("gemini"), &json!("/")),
    ];
    assert_eq!(seen, expected);
    assert_eq!(upstreams[1]["tokens"], 5);
    let keys = three.admin("/keys").await;
    let owners: Vec<_> = keys["keys"].as_array().unwrap().iter().map(|key| &key["upstream"]).collect();
    assert_eq!(owners, ["openai", "anthropic", "gemini"]);
    assert_eq!(three.admin("/keys?upstream=gemini").await["keys"].as_array().unwrap().len(), 1);

    let metrics = http().get(three.gateway.admin_url("/metrics")).send().await.unwrap().text().await.unwrap();
    for line in [
        r#"key_rotation_keys{pool="gemini",status="healthy"} 1"#,
        r#"gateway_request_seconds_count{pool="gemini",status="429"} 1"#,
        r#"gateway_request_seconds_count{pool="anthropic",status="200"} 1"#,
    ] {
        assert!(metrics.lines().any(|found| found == line), "{line} is not in {metrics}");
    }
}

#[tokio::test]
async fn an_operator_names_the_upstream_of_a_change() {
    let three = Three::start().await;
    let change = async |path: &str| {
        let request =
            http().post(three.gateway.admin_url("/admin/api") + path).header("x-gateway-admin", "1");
        request.send().await.unwrap().status().as_u16()
    };
    assert_eq!(change("/keys/alpha/disable").await, 400);
    assert_eq!(change("/keys/alpha/disable?upstream=openal").await, 404);
    assert_eq!(change("/keys/alpha/disable?upstream=openai").await, 200);
    assert_eq!(three.post("/openai/v1").await.0, 503);
    assert_eq!(three.post("/v1/messages").await.0, 200);
    let log = r#"key disabled by the admin key="alpha" upstream="openai""#;
    eventually("it is logged", || three.gateway.log().contains(log)).await;

    let ready = http().get(three.gateway.url("/readyz")).send().await.unwrap();
    assert_eq!(ready.status(), 200, "the other upstreams serve");
    assert!(ready.text().await.unwrap().starts_with("ready, but openai: no key is available"));
}

#[tokio::test]
async fn a_host_chooses_its_upstream() {
    let (one, two) = (api("one").await, api("two").await);
    let keys = keys_file("a|sk-a");
    let of = |name: &str, route: &str, server: &Server| {
        let (address, keys) = (server.address(), keys.path());
        format!("[[upstream]]\nname = {name:?}\n{route}\nurl = \"http://{address}\"\nkeys = {keys:?}\n")
    };
    let config = file(
        "toml",
        &format!(
            "client-token = \"the-token\"\n{}{}",
            of("one", "host = \"one.example.com\"", &one),
            of("two", "path = \"/two\"", &two)
        ),
    );
    let gateway = Gateway::start(command(["--config", config.path()])).await;
    let get = async |host: &str, path: &str| {
        let request = http().get(gateway.url(path)).bearer_auth("the-token").header("host", host);
        let response = request.send().await.unwrap();
        let status = response.status().as_u16();
        (status, response.json::<Value>().await.unwrap()["api"].clone())
    };
    assert_eq!(get("One.Example.Com:8080", "/two/x").await, (200, json!("one")));
    assert_eq!(get("gateway.example.com", "/two/x").await, (200, json!("two")));
    assert_eq!(get("gateway.example.com", "/x").await, (404, Value::Null));
}

#[tokio::test]
async fn redirects_below_a_prefix_keep_it() {
    let upstream = Server::answering(|| answer_with(302, [("location", "/v1/files/1?a")], "")).await;
    let keys = keys_file("a|sk-a");
    let text = format!(
        "[[upstream]]\nname = \"one\"\npath = \"/one\"\nurl = \"http://{}\"\nkeys = {:?}",
        upstream.address(),
        keys.path()
    );
    let config = file("toml", &text);
    let gateway = Gateway::start(command(["--config", config.path()])).await;
    let client = reqwest::Client::builder().redirect(reqwest::redirect::Policy::none()).build().unwrap();
    let response = client.get(gateway.url("/one/v1/files")).send().await.unwrap();
    assert_eq!(response.headers()["location"], "/one/v1/files/1?a");
}

#[tokio::test]
async fn an_invalid_file_names_the_line() {
    let keys = keys_file("a|sk-a");
    let upstream = |more: &str| {
        let keys = keys.path();
        format!("[[upstream]]\nname = \"one\"\nurl = \"https://example.com\"\nkeys = {keys:?}\n{more}")
    };
    let two = |first: &str, second: &str| {
        format!("{}\n{}", upstream(first), upstream(second).replacen("one", "two", 1))
    };
    for (text, expected) in [
        (upstream("injct = \"bearer\""), r#"line 5: upstream "one": there is no field injct"#),
        (upstream("inject = \"canary\""), r#"line 5: upstream "one": inject: it is bearer"#),
        (upstream("path = \"openai\""), r#"line 5: upstream "one": path: it must be a path"#),
        (upstream("host = \"a\"\npath = \"/a\""), r#"line 5: upstream "one": host: set either"#),
        (upstream("wait = \"soon\""), r#"line 5: upstream "one": wait: not a number of seconds"#),
        (upstream("idle-timeout = 0"), r#"line 5: upstream "one": idle-timeout: it must be more"#),
        (upstream("quotas = [{ requests = 5 }]"), r#"line 5: upstream "one": quotas: per must be"#),
        (
            upstream("quotas = [{ requests = 5, per = \"day\", resets-at = \"0:0\", zone = \"Nowhere\" }]"),
            r#"line 5: upstream "one": quotas: a quota resets"#,
        ),
        (upstream("pace = 1"), r#"line 5: upstream "one": pace: it must be true or false"#),
        (
            upstream("classifier = \"gpt\""),
            r#"line 5: upstream "one": classifier: it is one of llm, 429, anthropic"#,
        ),
        (two("", "").replace("two", "one"), r#"line 6: upstream "one": another upstream has this name"#),
        (two("", ""), r#"line 6: upstream "two": upstream "one" gets all requests"#),
        (two("path = \"/a\"", "path = \"/a/b\""), r#"line 6: upstream "two": upstream "one" gets /a/b, too"#),
        ("[[upstream]]\nname = \"one\"\nurl = \"https://example.com\"".to_owned(), "it has no keys"),
        (
            upstream("").replace("https", "http"),
            r#"line 3: upstream "one": url: keys would travel in cleartext"#,
        ),
        (upstream("").replace("\"one\"", "\"a b\""), "line 2: [[upstream]]: name: it must be 1 to 64"),
        (format!("keys = \"k.txt\"\n{}", upstream("")), "line 1: --keys: with [[upstream]] it belongs in"),
        ("upstream = 5".to_owned(), "line 1: --upstream <URL>"),
        ("pace = \"canary\"\nwait = \"canary\"".to_owned(), "line 1: --pace"),
    ] {
        let file = file("toml", &text);
        let output = refusal(["--config", file.path()]).await;
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), said.lines().count()), (Some(2), 1), "{text}: {said}");
        assert!(said.contains(&format!("{}: ", file.path())) && said.contains(expected), "{text}: {said}");
        assert!(!said.contains("canary"), "{said}");
    }
    let file = file("toml", &upstream(""));
    let output = refusal(["--config", file.path(), "--upstream", "https://example.com"]).await;
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("--upstream: with [[upstream]] it belongs in these tables"), "{said}");
}
