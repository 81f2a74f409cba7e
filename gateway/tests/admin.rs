//! The admin API, checked against its OpenAPI description, and its access control.

mod support;

use std::{
    collections::{BTreeSet, HashSet},
    time::Duration,
};

use futures_util::{Stream, StreamExt, stream};
use http::Request;
use http_body_util::BodyExt;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use jsonschema::Validator;
use reqwest::{
    Method, RequestBuilder, StatusCode,
    header::{AUTHORIZATION, CONTENT_TYPE},
};
use serde_json::{Value, json};
use support::{canary::Canaries, gateway::*, *};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::Instant,
};

const TOKEN: &str = "the-admin-s-token";

const CHANGE: (&str, &str) = ("x-gateway-admin", "1");

fn description() -> Value {
    serde_json::from_str(include_str!("../src/admin/openapi.json")).unwrap()
}

/// Returns a validator for a schema that may refer to the schemas of the description.
fn validator(schema: &Value) -> Validator {
    let mut schema = schema.clone();
    schema["components"] = description()["components"].clone();
    jsonschema::draft202012::new(&schema).unwrap()
}

fn named(schema: &str) -> Validator {
    validator(&json!({ "$ref": format!("#/components/schemas/{schema}") }))
}

#[track_caller]
fn assert_valid(validator: &Validator, value: &Value) {
    let errors: Vec<_> =
        validator.iter_errors(value).map(|error| format!("{}: {error}", error.instance_path())).collect();
    assert!(errors.is_empty(), "{errors:#?} in {value:#}");
}

/// A gateway with an admin token, in front of a service that limits selected keys.
struct Admin {
    gateway: Gateway,
    service: Server,
    http: reqwest::Client,
}

impl Admin {
    async fn with(keys: &[&str]) -> Self {
        let service = Server::limiting([]).await;
        let gateway = Gateway::before(
            service.address(),
            keys,
            ["--admin-token", TOKEN, "--pace=false", "--wait", "0", "--cooldown", "600"],
        )
        .await;
        Self { gateway, service, http: http() }
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, self.gateway.admin_url("/admin/api") + path).bearer_auth(TOKEN)
    }

    /// Sends a request, and checks the response against the description of `operation`, one of its paths.
    async fn answer(&self, request: RequestBuilder, operation: &str) -> (u16, Value) {
        let request = request.build().unwrap();
        let method = request.method().as_str().to_lowercase();
        let response = self.http.execute(request).await.unwrap();
        let status = response.status().as_u16();
        let description = description();
        let answers = &description["paths"][operation][&method]["responses"];
        let documented = &answers[status.to_string()];
        let documented = match documented["$ref"].as_str() {
            Some(named) => description.pointer(named.trim_start_matches('#')).unwrap(),
            None => documented,
        };
        let body = response.bytes().await.unwrap();
        assert!(documented.is_object(), "{method} {operation}: {status} is not documented: {body:?}");
        match &documented["content"]["application/json"]["schema"] {
            Value::Null => {
                assert!(body.is_empty(), "{method} {operation}: {body:?}");
                (status, Value::Null)
            }
            schema => {
                let body = serde_json::from_slice(&body).unwrap();
                assert_valid(&validator(schema), &body);
                (status, body)
            }
        }
    }

    async fn get(&self, path: &str) -> (u16, Value) {
        let operation = path.split('?').next().unwrap();
        self.answer(self.request(Method::GET, path), operation).await
    }

    /// Sends a change with its required header. `operation` is its path in the description.
    async fn change(&self, method: Method, path: &str, operation: &str, body: Value) -> (u16, Value) {
        let request = self.request(method, path).header(CHANGE.0, CHANGE.1);
        let request = if body.is_null() { request } else { request.json(&body) };
        self.answer(request, operation).await
    }

    async fn add(&self, id: &str, secret: &str) -> (u16, Value) {
        self.change(Method::POST, "/keys", "/keys", json!({ "id": id, "secret": secret })).await
    }

    async fn act(&self, id: &str, action: &str) -> (u16, Value) {
        let (path, operation) = (format!("/keys/{id}/{action}"), format!("/keys/{{id}}/{action}"));
        self.change(Method::POST, &path, &operation, Value::Null).await
    }

    async fn remove(&self, id: &str) -> u16 {
        self.change(Method::DELETE, &format!("/keys/{id}"), "/keys/{id}", Value::Null).await.0
    }

    async fn import(&self, media_type: &str, body: impl Into<reqwest::Body>) -> (u16, Value) {
        let request = self.request(Method::POST, "/keys:import").header(CHANGE.0, CHANGE.1);
        self.answer(request.header(CONTENT_TYPE, media_type).body(body), "/keys:import").await
    }

    /// Makes the service limit these keys, and sends enough requests for each to get its 429.
    async fn limit(&self, keys: &[&str]) {
        for key in keys {
            self.service.limit(key);
        }
        for _ in 0..=keys.len() {
            self.http.get(self.gateway.url("/v1/models")).send().await.unwrap();
        }
    }

    async fn ids(&self, query: &str) -> Vec<String> {
        let (status, page) = self.get(&format!("/keys{query}")).await;
        assert_eq!(status, 200, "{page}");
        let keys = page["keys"].as_array().unwrap();
        keys.iter().map(|key| key["id"].as_str().unwrap().to_owned()).collect()
    }

    async fn events(&self) -> impl Stream<Item = (String, Value)> + Unpin + use<> {
        events(self.request(Method::GET, "/events")).await
    }
}

/// Streams the name and data of each event, checked against the description.
async fn events(request: RequestBuilder) -> impl Stream<Item = (String, Value)> + Unpin {
    let response = request.send().await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(response.headers()[CONTENT_TYPE], "text/event-stream");
    let schemas = [("snapshot", named("Snapshot")), ("changes", named("Changes"))];
    let pieces = (response.bytes_stream(), String::new(), schemas);
    Box::pin(stream::unfold(pieces, async |(mut bytes, mut text, schemas)| {
        loop {
            if let Some((event, rest)) = text.split_once("\n\n") {
                let field = |name: &str| event.lines().find_map(|line| line.strip_prefix(name));
                let found = field("event: ").map(|name| {
                    let data = serde_json::from_str(field("data: ").unwrap()).unwrap();
                    let (_, schema) = schemas.iter().find(|(schema, _)| *schema == name).unwrap();
                    assert_valid(schema, &data);
                    (name.to_owned(), data)
                });
                text = rest.to_owned();
                match found {
                    Some(event) => return Some((event, (bytes, text, schemas))),
                    None => continue,
                }
            }
            text += std::str::from_utf8(&bytes.next().await?.ok()?).unwrap();
        }
    }))
}

/// Waits for the first change of this key.
async fn change_of(key: &str, events: &mut (impl Stream<Item = (String, Value)> + Unpin)) -> Value {
    in_time(async {
        loop {
            let (name, data) = events.next().await.unwrap();
            assert_eq!(name, "changes");
            if let Some(change) = data["keys"].as_array().unwrap().iter().find(|change| change["id"] == key) {
                return change.clone();
            }
        }
    })
    .await
}

#[tokio::test]
async fn the_openapi_description_lists_exactly_the_routes() {
    let admin = Admin::with(&["alpha"]).await;
    let mut described = BTreeSet::new();
    for (path, operations) in description()["paths"].as_object().unwrap() {
        for method in operations.as_object().unwrap().keys() {
            described.insert(format!("{} {path}", method.to_uppercase()));
            let method = Method::from_bytes(method.to_uppercase().as_bytes()).unwrap();
            // With the token but without the change header: without the token, unknown routes are refused as well.
            let request = admin.request(method.clone(), &path.replace("{id}", "alpha"));
            let status = request.send().await.unwrap().status();
            let expected = if method == Method::GET { StatusCode::OK } else { StatusCode::FORBIDDEN };
            assert_eq!(status, expected, "{method} {path}");
        }
    }
    let source = include_str!("../src/admin/api.rs");
    let mut there = BTreeSet::new();
    for line in source.lines().filter_map(|line| line.trim().strip_prefix(".route(\"")) {
        let (path, handlers) = line.split_once('"').unwrap();
        for method in ["get", "post", "put", "patch", "delete"] {
            if handlers.contains(&format!("{method}(")) {
                there.insert(format!("{} {path}", method.to_uppercase()));
            }
        }
    }
    assert_eq!(there, described);
    assert!(there.len() > 9, "{there:?}");
    assert_eq!(admin.get("/openapi.json").await, (200, description()));
}

#[tokio::test]
async fn unknown_admin_paths_never_reach_the_upstream() {
    let admin = Admin::with(&["alpha"]).await;
    for path in
        ["/admin/nothing", "/admin/api/nothing", "/admin/api", "/admin/api/", "/admin/api/keys/alpha/nothing"]
    {
        let response = admin.http.get(admin.gateway.admin_url(path)).bearer_auth(TOKEN).send().await.unwrap();
        assert_eq!(response.status(), StatusCode::NOT_FOUND, "{path}");
        assert_valid(&named("Error"), &response.json().await.unwrap());
    }
    let response = admin.request(Method::PUT, "/keys").header(CHANGE.0, CHANGE.1).send().await.unwrap();
    assert_eq!(response.status(), StatusCode::METHOD_NOT_ALLOWED);
    for path in ["/admin", "/admin/", "/admin/admin.js", "/admin/admin.css"] {
        let response = admin.http.get(admin.gateway.admin_url(path)).send().await.unwrap();
        assert_eq!(response.status(), StatusCode::OK, "{path}");
    }
    assert_eq!(admin.service.count(), 0);
}

#[tokio::test]
async fn s07_the_proxy_address_serves_no_admin() {
    let admin = Admin::with(&["alpha"]).await;
    for path in ["/admin", "/admin/", "/admin/admin.js", "/admin/api/keys", "/metrics"] {
        let request = admin.http.get(admin.gateway.url(path)).bearer_auth(TOKEN);
        assert_eq!(
            request.send().await.unwrap().text().await.unwrap(),
            "fine",
            "{path} must reach the upstream"
        );
    }
    let disable = admin.http.post(admin.gateway.url("/admin/api/keys/alpha/disable")).bearer_auth(TOKEN);
    disable.header(CHANGE.0, CHANGE.1).send().await.unwrap();
    assert_eq!(admin.ids("?status=healthy").await, ["alpha"]);
    let count = admin.service.count();
    let response = admin.http.get(admin.gateway.admin_url("/v1/models")).bearer_auth(TOKEN).send().await;
    assert_eq!(response.unwrap().status(), StatusCode::NOT_FOUND);
    assert_eq!(admin.service.count(), count, "the admin's address must not proxy");
}

#[tokio::test]
async fn s07_a_document_of_the_upstream_is_sandboxed() {
    let policy = "default-src 'self'";
    let headers = [("content-type", "text/html"), ("content-security-policy", policy)];
    let service = Server::answering(move || answer_with(200, headers, "<script></script>")).await;
    let gateway = Gateway::before(service.address(), &["alpha"], []).await;
    let request = |mode: &'static str| http().get(gateway.url("/")).header("sec-fetch-mode", mode).send();
    let navigation = request("navigate").await.unwrap();
    let policies: Vec<_> = navigation.headers().get_all("content-security-policy").iter().collect();
    assert_eq!(policies, [policy, "sandbox"]);
    assert_eq!(navigation.headers()["x-content-type-options"], "nosniff");
    let other = request("cors").await.unwrap();
    assert_eq!(other.headers()["content-security-policy"], policy);
    assert!(!other.headers().contains_key("x-content-type-options"));
}

#[tokio::test]
async fn a_missing_or_wrong_token_permits_nothing() {
    let admin = Admin::with(&["alpha"]).await;
    // An address that has sent the right token once is not locked out by wrong ones.
    assert_eq!(admin.ids("").await, ["alpha"]);
    let wrong = [
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        "Bearer the-admin-s-toke",
        "Basic the-admin-s-token",
        TOKEN,
    ];
    for (path, operations) in description()["paths"].as_object().unwrap() {
        for method in operations.as_object().unwrap().keys() {
            let method = Method::from_bytes(method.to_uppercase().as_bytes()).unwrap();
            let url = admin.gateway.admin_url("/admin/api") + &path.replace("{id}", "alpha");
            let request = || admin.http.request(method.clone(), &url).header(CHANGE.0, CHANGE.1);
            for authorization in wrong {
                let (status, error) =
                    admin.answer(request().header(AUTHORIZATION, authorization), path).await;
                assert_eq!(status, 401, "{method} {path} {authorization:?} {error}");
            }
            let response = request().send().await.unwrap();
            assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
            assert_eq!(response.headers()["www-authenticate"], "Bearer");
        }
    }
    assert_eq!(admin.ids("").await, ["alpha"]);
}

#[tokio::test]
async fn without_token_only_local_host_names_are_served() {
    let service = Server::limiting([]).await;
    let gateway = Gateway::before(service.address(), &["alpha"], []).await;
    let http = http();
    let port = gateway.admin_address().port();
    let ask = async |path: &str, name: &str, value: &str| {
        let request = http.get(gateway.admin_url(path)).header(name, value);
        request.send().await.unwrap().status().as_u16()
    };
    for path in ["/admin", "/admin/admin.js", "/admin/api/keys", "/admin/api/openapi.json"] {
        for host in ["localhost", "127.0.0.1", "[::1]"] {
            assert_eq!(ask(path, "host", &format!("{host}:{port}")).await, 200, "{path} {host}");
        }
        for host in ["gateway.example.com", "localhost.example.com:80", "192.168.0.1", "0.0.0.0"] {
            assert_eq!(ask(path, "host", host).await, 403, "{path} {host}");
        }
        for header in ["x-forwarded-for", "x-real-ip", "via"] {
            assert_eq!(ask(path, header, "10.1.2.3").await, 403, "{path} {header}");
        }
    }
    let change = |name: &'static str, value: &'static str| {
        let request = http.post(gateway.admin_url("/admin/api/keys/alpha/disable")).header(name, value);
        async { request.send().await.unwrap().status().as_u16() }
    };
    assert_eq!(change("x-other", "1").await, 403);
    assert_eq!(change(CHANGE.0, CHANGE.1).await, 200);
}

/// Callers may come through a proxy on this machine, which makes them look local.
#[tokio::test]
async fn client_tokens_require_a_separate_admin_token() {
    let service = Server::limiting([]).await;
    let gateway = Gateway::before(service.address(), &["alpha"], ["--client-token", "token-one"]).await;
    for path in ["/admin", "/admin/admin.js", "/admin/api/keys", "/admin/api/events", "/metrics"] {
        let response = http().get(gateway.admin_url(path)).bearer_auth("token-one").send().await.unwrap();
        assert_eq!(response.status(), StatusCode::FORBIDDEN, "{path}");
        let said = response.text().await.unwrap();
        assert!(said.contains("set --admin-token"), "{path}: {said}");
    }
    let both = ["--client-token", "token-one", "--admin-token", TOKEN];
    let gateway = Gateway::before(service.address(), &["alpha"], both).await;
    for (path, token, status) in [
        ("/admin", "", 200),
        ("/admin/api/keys", "token-one", 401),
        ("/admin/api/keys", TOKEN, 200),
        ("/metrics", TOKEN, 200),
    ] {
        let response = http().get(gateway.admin_url(path)).bearer_auth(token).send().await.unwrap();
        assert_eq!(response.status(), status, "{path} {token}");
    }
    assert_eq!(service.count(), 0);
}

/// Users may follow a link to the page from any site.
#[tokio::test]
async fn without_token_other_sites_open_only_the_page() {
    let service = Server::limiting([]).await;
    let gateway = Gateway::before(service.address(), &["alpha"], []).await;
    let ask = async |path: &str, name: &str, value: &str| {
        let request = http().get(gateway.admin_url(path)).header(name, value);
        request.send().await.unwrap().status().as_u16()
    };
    for (name, value) in [("sec-fetch-site", "same-site"), ("origin", "http://localhost:3000")] {
        assert_eq!(ask("/admin", name, value).await, 200, "{name}");
        for path in ["/admin/api/keys", "/admin/api/events", "/metrics"] {
            assert_eq!(ask(path, name, value).await, 403, "{path} {name}");
        }
    }
    for (name, value) in [("sec-fetch-site", "same-origin"), ("origin", &gateway.admin_url(""))] {
        assert_eq!(ask("/admin/api/keys", name, value).await, 200, "{name}");
    }
}

#[tokio::test]
async fn cross_site_changes_are_refused_despite_the_token() {
    let admin = Admin::with(&["alpha"]).await;
    let paths = [
        (Method::POST, "/keys"),
        (Method::POST, "/keys:import"),
        (Method::POST, "/keys:reset"),
        (Method::DELETE, "/keys/alpha"),
        (Method::POST, "/keys/alpha/reset"),
        (Method::POST, "/keys/alpha/disable"),
        (Method::POST, "/keys/alpha/enable"),
    ];
    for (method, path) in paths {
        let operation = path.replace("alpha", "{id}");
        let request = || admin.request(method.clone(), path);
        let (status, _) = admin.answer(request(), &operation).await;
        assert_eq!(status, 403, "{path} without the header");
        for site in ["cross-site", "same-site", "nonsense"] {
            let request = request().header(CHANGE.0, CHANGE.1).header("sec-fetch-site", site);
            let (status, _) = admin.answer(request, &operation).await;
            assert_eq!(status, 403, "{path} from {site}");
        }
    }
    assert_eq!(admin.ids("?status=healthy").await, ["alpha"]);
    for site in ["same-origin", "none"] {
        let request = admin.request(Method::POST, "/keys/alpha/disable").header(CHANGE.0, CHANGE.1);
        let (status, _) = admin.answer(request.header("sec-fetch-site", site), "/keys/{id}/disable").await;
        assert_eq!(status, 200, "{site}");
    }
}

#[tokio::test]
async fn every_answer_has_the_strict_headers() {
    let admin = Admin::with(&["alpha"]).await;
    for (path, status) in
        [("/admin", 200), ("/admin/admin.js", 200), ("/admin/api/keys", 401), ("/admin/no", 404)]
    {
        let response = admin.http.get(admin.gateway.admin_url(path)).send().await.unwrap();
        assert_eq!(response.status(), status, "{path}");
        let headers = response.headers();
        let policy = headers["content-security-policy"].to_str().unwrap();
        for part in
            ["default-src 'none'", "script-src 'self'", "frame-ancestors 'none'", "form-action 'none'"]
        {
            assert!(policy.contains(part), "{path}: {policy}");
        }
        assert!(!policy.contains("unsafe"), "{policy}");
        assert_eq!(headers["x-content-type-options"], "nosniff");
        assert_eq!(headers["referrer-policy"], "no-referrer");
        assert_eq!(headers["cache-control"], "no-store");
    }
}

#[tokio::test]
async fn key_changes_are_applied_and_logged_by_id() {
    let admin = Admin::with(&["alpha"]).await;
    let (status, key) = admin.add("beta", "sk-beta-0123456789abcdef").await;
    assert_eq!(status, 201);
    assert_eq!(
        (&key["id"], &key["masked_secret"], &key["status"]),
        (&json!("beta"), &json!("…cdef"), &json!("healthy"))
    );
    let (_, key) = admin.act("beta", "disable").await;
    assert_eq!(key["status"], "disabled");
    let (_, key) = admin.act("beta", "enable").await;
    assert_eq!(key["status"], "healthy");
    assert_eq!(admin.remove("beta").await, 204);
    assert_eq!(admin.ids("").await, ["alpha"]);
    let log = async |text: &str| {
        let said = || admin.gateway.log().contains(text);
        eventually(text, said).await;
    };
    for what in ["added", "disabled", "enabled", "removed"] {
        log(&format!("key {what} by the admin key=\"beta\"")).await;
    }
}

#[tokio::test]
async fn failed_requests_return_the_documented_status() {
    let admin = Admin::with(&["alpha"]).await;
    for (id, secret, status) in [
        ("alpha", "sk-other", 409),
        ("", "sk-1", 400),
        ("two\nlines", "sk-1", 400),
        ("beta", "", 400),
        ("beta", "sk with a tab\t", 400),
        ("beta", "schlüssel", 400),
    ] {
        assert_eq!(admin.add(id, secret).await.0, status, "{id:?} {secret:?}");
    }
    for body in [
        json!({ "id": "beta" }),
        json!({ "id": 1, "secret": "sk" }),
        json!("sk"),
        json!({ "id": "a", "secret": "b", "c": 1 }),
    ] {
        let (status, _) = admin.change(Method::POST, "/keys", "/keys", body.clone()).await;
        assert_eq!(status, 400, "{body}");
    }
    for action in ["reset", "disable", "enable"] {
        assert_eq!(admin.act("nobody", action).await.0, 404, "{action}");
    }
    assert_eq!(admin.remove("nobody").await, 404);
    for query in ["?page=0", "?page=x", "?per_page=501", "?status=tired", "?colour=red"] {
        assert_eq!(admin.get(&format!("/keys{query}")).await.0, 400, "{query}");
    }
    assert_eq!(admin.import("text/html", "a|b").await.0, 415);
    assert_eq!(admin.import("application/json", "[").await.0, 400);
    assert_eq!(admin.import("text/plain", "x".repeat(3 << 20)).await.0, 413);
    assert_eq!(admin.ids("").await, ["alpha"]);
}

/// Keys from a file, with a store that is down.
#[tokio::test]
async fn store_failures_report_the_outcome_and_are_logged() {
    let service = Server::limiting([]).await;
    let mongo = "mongodb://127.0.0.1:1/gateway?serverSelectionTimeoutMS=200";
    let arguments = ["--admin-token", TOKEN, "--mongodb", mongo];
    let gateway = Gateway::before(service.address(), &["alpha"], arguments).await;
    let admin = Admin { gateway, service, http: http() };
    let here =
        |done| format!("the key store failed, so it is {done} in this gateway only, until the next reload");
    for (action, done) in [("disable", "disabled"), ("enable", "enabled"), ("reset", "reset")] {
        let (status, said) = admin.act("alpha", action).await;
        assert_eq!((status, said), (503, json!({ "error": here(done) })));
    }
    let (status, said) = admin.add("beta", "sk-beta").await;
    assert_eq!((status, &said["error"]), (503, &json!("the key store failed, so it was not added")));
    assert_eq!(admin.remove("alpha").await, 503);
    assert_eq!(admin.ids("?status=healthy").await, ["alpha"]);

    eventually("the removal is logged", || admin.gateway.log().contains("key not removed")).await;
    let log = admin.gateway.log();
    for (done, key) in [
        ("disabled", "alpha"),
        ("enabled", "alpha"),
        ("reset", "alpha"),
        ("added", "beta"),
        ("removed", "alpha"),
    ] {
        let line = log.lines().find(|line| line.contains(&format!("key not {done} "))).unwrap();
        assert!(line.contains(&format!("key=\"{key}\"")), "{line}");
        assert!(line.contains("the key store failed: ") && line.contains("127.0.0.1:1"), "{line}");
    }
}

#[tokio::test]
async fn a_fully_sent_oversized_import_still_gets_413() {
    let admin = Admin::with(&["alpha"]).await;
    let body = "x".repeat(16 << 20);
    let head = format!(
        "POST /admin/api/keys:import HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: Bearer {TOKEN}\r\n\
         {}: {}\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n\r\n",
        CHANGE.0,
        CHANGE.1,
        body.len(),
    );
    let mut connection = TcpStream::connect(admin.gateway.admin_address()).await.unwrap();
    connection.write_all(head.as_bytes()).await.unwrap();
    connection.write_all(body.as_bytes()).await.unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
}

#[tokio::test]
async fn ids_in_paths_may_contain_any_character() {
    let admin = Admin::with(&["omega"]).await;
    for (id, path) in [
        ("a/b?c#d%", "a%2Fb%3Fc%23d%25"),
        ("ключ 1", "%D0%BA%D0%BB%D1%8E%D1%87%201"),
        ("import", "import"),
        ("reset", "reset"),
    ] {
        assert_eq!(admin.add(id, &format!("sk-of-{}", path.len())).await.0, 201);
        assert_eq!(admin.act(path, "disable").await.1["id"], id);
        assert_eq!(admin.remove(path).await, 204, "{id}");
    }
    // An id that is not UTF-8 is invalid.
    for (method, action) in [("DELETE", ""), ("POST", "/reset"), ("POST", "/disable"), ("POST", "/enable")] {
        let (path, operation) = (format!("/keys/%FF{action}"), format!("/keys/{{id}}{action}"));
        let (status, _) = admin.change(method.parse().unwrap(), &path, &operation, Value::Null).await;
        assert_eq!(status, 400, "{method} {path}");
    }
}

/// A key file may contain such an id.
#[tokio::test]
async fn adding_a_dot_segment_id_is_refused() {
    let admin = Admin::with(&["."]).await;
    for id in [".", ".."] {
        let (status, said) = admin.add(id, "sk-dots").await;
        assert_eq!(status, 400, "{id}");
        assert!(said["error"].as_str().unwrap().contains("give it another id"), "{said}");
    }
    let (_, report) = admin.import("text/plain", "..|sk-dots\n...|sk-more").await;
    assert_eq!((&report["added"], &report["lines"][0]["id"]), (&json!(1), &json!("..")));
    assert!(report["lines"][0]["error"].as_str().unwrap().contains("give it another id"), "{report}");
    assert_eq!(admin.ids("").await, [".", "..."]);

    // A client that normalizes the dot segment away must not hit the route that resets all keys.
    let request = admin.request(Method::POST, "/keys/./reset").header(CHANGE.0, CHANGE.1);
    assert_eq!(request.send().await.unwrap().status(), StatusCode::METHOD_NOT_ALLOWED);
}

#[tokio::test]
async fn key_search_covers_id_masked_secret_and_status() {
    let admin = Admin::with(&["alpha-1", "alpha-2", "beta-1", "beta-2", "gamma"]).await;
    assert_eq!(admin.ids("?search=ALPHA").await, ["alpha-1", "alpha-2"]);
    // Of the 8 characters of sk-gamma, two are shown.
    assert_eq!(admin.ids("?search=%E2%80%A6ma").await, ["gamma"]);
    assert_eq!(admin.ids("?per_page=2&page=2").await, ["beta-1", "beta-2"]);
    assert_eq!(admin.ids("?per_page=2&page=4").await, [""; 0]);
    admin.act("beta-1", "disable").await;
    admin.limit(&["alpha-2"]).await;
    eventually_async("alpha-2 rests", async || admin.ids("?status=resting").await == ["alpha-2"]).await;
    assert_eq!(admin.ids("?status=rate_limited").await, ["alpha-2"]);
    assert_eq!(admin.ids("?status=out_of_service").await, ["beta-1"]);
    assert_eq!(admin.ids("?status=healthy&search=beta").await, ["beta-2"]);
    let (_, page) = admin.get("/keys?per_page=2&status=healthy").await;
    assert_eq!((&page["matches"], &page["pages"]), (&json!(3), &json!(2)));
    assert_eq!(page["totals"], json!({ "total": 5, "healthy": 3, "resting": 1, "out_of_service": 1 }));
}

async fn eventually_async(what: &str, holds: impl AsyncFn() -> bool) {
    for _ in 0..500 {
        if holds().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("this did not come about: {what}");
}

#[tokio::test]
async fn the_choice_of_the_next_key_is_explained() {
    let admin = Admin::with(&["alpha", "beta", "gamma"]).await;
    admin.limit(&["alpha"]).await;
    admin.act("beta", "disable").await;
    let (status, explanation) = admin.get("/explain").await;
    assert_eq!((status, &explanation["next"]), (200, &json!("gamma")));
    let of = |id: &str| {
        let keys = explanation["keys"].as_array().unwrap();
        keys.iter().find(|key| key["id"] == id).unwrap()["passed_over"].clone()
    };
    assert_eq!(of("alpha"), json!({ "why": "resting", "status": "rate_limited", "cause": "guessed" }));
    assert_eq!((of("beta"), of("gamma")), (json!({ "why": "disabled" }), Value::Null));
    let (status, explanation) = admin.get("/explain?scope=gpt-5-mini&session=7&tokens=100").await;
    assert_eq!((status, &explanation["scope"]), (200, &json!("gpt-5-mini")));
    assert_eq!(admin.get("/explain?tokens=many").await.0, 400);
}

#[tokio::test]
async fn an_operator_resets_one_or_all_resting_keys() {
    let admin = Admin::with(&["alpha", "beta", "gamma", "delta"]).await;
    admin.act("delta", "disable").await;
    admin.limit(&["alpha", "beta", "gamma"]).await;
    eventually_async("all rest", async || admin.ids("?status=rate_limited").await.len() == 3).await;
    let (_, key) = admin.act("alpha", "reset").await;
    assert_eq!(
        (&key["status"], &key["time_left_ms"], &key["last_reason"]),
        (&json!("healthy"), &Value::Null, &json!(429))
    );
    let (status, resets) = admin.change(Method::POST, "/keys:reset", "/keys:reset", Value::Null).await;
    assert_eq!((status, resets), (200, json!({ "reset": ["beta", "gamma"], "failed": [] })));
    assert_eq!(admin.ids("?status=healthy").await, ["alpha", "beta", "gamma"]);
    assert_eq!(admin.ids("?status=disabled").await, ["delta"]);
}

#[tokio::test]
async fn imported_lines_are_added_or_refused_individually() {
    let admin = Admin::with(&["alpha"]).await;
    let lines = "# ours\r\nbeta|sk-beta\r\n\r\nsk-no-id\nalpha|sk-again\n gamma |sk|gamma\n|sk-empty\ndelta|\nbeta|sk-2\n";
    let (status, report) = admin.import("text/plain; charset=utf-8", lines).await;
    assert_eq!((status, &report["added"], &report["refused"]), (200, &json!(2), &json!(5)));
    let shown: Vec<_> = report["lines"]
        .as_array()
        .unwrap()
        .iter()
        .map(|line| {
            (line["line"].as_u64().unwrap(), line["id"].as_str(), line["error"].as_str().unwrap_or("-"))
        })
        .collect();
    assert_eq!(
        shown,
        [
            (2, Some("beta"), "-"),
            (4, None, "the key has no id"),
            (5, Some("alpha"), "there is a key alpha already"),
            (6, Some("gamma"), "-"),
            (7, None, "a key id has 1 to 256 bytes and no control characters"),
            (8, Some("delta"), "key delta can't be used: the secret is empty"),
            (9, Some("beta"), "there is a key beta already"),
        ]
    );
    assert_eq!(admin.ids("").await, ["alpha", "beta", "gamma"]);
}

#[tokio::test]
async fn json_entries_are_added_or_refused_individually() {
    let admin = Admin::with(&["omega"]).await;
    let list = json!([{ "id": "alpha", "secret": "sk-1" }, "sk-2", { "id": "beta", "secret": 3 }]);
    let (_, report) = admin.import("application/json", list.to_string()).await;
    assert_eq!((&report["added"], &report["refused"]), (&json!(1), &json!(2)));
    let (_, report) =
        admin.import("application/json", json!({ "gamma": "sk-3", "alpha": "sk-4" }).to_string()).await;
    assert_eq!((&report["added"], &report["refused"]), (&json!(1), &json!(1)));
    assert_eq!(admin.ids("").await, ["omega", "alpha", "gamma"]);
}

#[tokio::test]
async fn toml_key_tables_are_imported_by_line() {
    let admin = Admin::with(&["omega"]).await;
    let text = "# ours\n[[key]]\nid = \"alpha\"\nsecret = \"sk-1\"\nnote = \"paid\"\n[[key]]\nid = \"beta\"\n\
                secret = \"sk-2\"\nendpoint = \"https://eu.example.com\"\n[[key]]\nid = \"gamma\"\nsecret = \"sk-3\"\ntire = 1\n";
    for (media_type, added) in [("application/toml", 1), ("text/plain", 0)] {
        let (status, report) = admin.import(media_type, text).await;
        assert_eq!((status, &report["added"]), (200, &json!(added)), "{report}");
        let lines = report["lines"].as_array().unwrap();
        let line =
            |at: usize| (lines[at]["line"].as_u64().unwrap(), lines[at]["error"].as_str().unwrap_or("-"));
        assert_eq!(lines[0]["id"], "alpha");
        assert_eq!(line(1), (6, "key beta: `endpoint` is not supported yet, remove it"));
        assert!(line(2).0 == 10 && line(2).1.starts_with("unknown field `tire`: "), "{report}");
    }
    let (status, said) = admin.import("application/toml", "[[key]]\nid = canary\n").await;
    assert_eq!(status, 400);
    assert!(
        said["error"].as_str().unwrap().starts_with("import.toml, line 2, column 6: not valid TOML"),
        "{said}"
    );
    assert!(!said.to_string().contains("canary"), "{said}");
    assert_eq!(admin.ids("").await, ["omega", "alpha"]);
}

#[tokio::test]
async fn a_field_without_effect_is_refused_by_name() {
    let admin = Admin::with(&["omega"]).await;
    let key = json!({ "id": "alpha", "secret": "sk-1", "endpoint": "https://eu.example.com" });
    assert_valid(&named("NewKey"), &key);
    let (status, said) = admin.change(Method::POST, "/keys", "/keys", key.clone()).await;
    let expected = json!("key alpha: `endpoint` is not supported yet, remove it");
    assert_eq!((status, &said["error"]), (400, &expected));
    let (status, report) = admin.import("application/json", json!([key]).to_string()).await;
    assert_eq!((status, &report["lines"][0]["error"]), (200, &expected));
    for (field, value) in
        [("tier", json!(256)), ("weight", json!(0)), ("note", json!(1)), ("group", Value::Null)]
    {
        let key = json!({ "id": "alpha", "secret": "sk-1", field: value });
        assert!(!named("NewKey").is_valid(&key), "{key}");
        let (status, said) = admin.change(Method::POST, "/keys", "/keys", key).await;
        assert_eq!(status, 400);
        assert!(
            said["error"].as_str().unwrap().starts_with(&format!("JSON: key alpha: `{field}` is not ")),
            "{said}"
        );
    }
    let key = json!({ "id": "alpha", "secret": "sk-1", "note": "paid", "weight": 3, "max_in_flight": 8 });
    assert_valid(&named("NewKey"), &key);
    assert_eq!(admin.change(Method::POST, "/keys", "/keys", key).await.0, 201);
}

/// Checks that no significant part of a secret appears in any response, event or log line.
#[tokio::test]
async fn a_submitted_secret_is_never_revealed_again() {
    let canaries = Canaries::of(&[
        "alpha",
        "as-a-name",
        "bare",
        "beta",
        "broken",
        "entry",
        "gamma",
        "in-an-id",
        "line",
        "list",
        "long",
    ]);
    let secret = |name| canaries.secret(name).to_owned();
    let service = Server::limiting([]).await;
    let keys = keys_file(&format!("alpha|{}\n", secret("alpha")));
    let upstream = format!("http://{}", service.address());
    let arguments =
        ["--upstream", &upstream, "--keys", keys.path(), "--admin-token", TOKEN, "--log", "trace"];
    let admin = Admin { gateway: Gateway::start(command(arguments)).await, service, http: http() };
    let mut events = admin.events().await;
    let mut said = events.next().await.unwrap().1.to_string();

    let mut say = |(_, answer): (u16, Value)| said += &answer.to_string();
    say(admin.add("beta", &secret("beta")).await);
    say(admin.add("beta", &secret("beta")).await);
    say(admin.add("gamma", &format!("{}\n", secret("gamma"))).await);
    say(admin.add(&format!("{}\n", secret("in-an-id")), "sk").await);
    let as_body = |body: String| {
        let request = admin.request(Method::POST, "/keys").header(CHANGE.0, CHANGE.1).body(body);
        admin.answer(request, "/keys")
    };
    say(as_body(secret("bare")).await);
    say(as_body(json!({ "id": "x", "secret": [secret("list")] }).to_string()).await);
    say(as_body(json!({ secret("as-a-name"): 1 }).to_string()).await);
    let lines = ["delta|{}", "{}", "delta|{}", "eps|{}\t", "|{}", "# {}"]
        .map(|line| line.replace("{}", &secret("line")));
    say(admin.import("text/plain", lines.join("\n")).await);
    say(admin.import("text/plain", format!("{}|sk", secret("long").repeat(20))).await);
    say(admin
        .import(
            "application/json",
            json!([secret("entry"), { "id": secret("entry").repeat(20), "secret": "x" }]).to_string(),
        )
        .await);
    say(admin.import("application/json", format!("{{\"a\": {}", secret("broken"))).await);
    say(admin.act("beta", "disable").await);
    say(admin.get("/keys").await);
    said += &change_of("delta", &mut events).await.to_string();
    assert!(said.contains(&format!("…{}", &secret("beta")[secret("beta").len() - 4..])), "{said}");

    eventually("the last change is logged", || admin.gateway.log().contains("key disabled")).await;
    said += &admin.gateway.log();
    canaries.assert_absent(&said);
}

#[tokio::test]
async fn the_event_stream_sends_a_snapshot_then_changes() {
    let admin = Admin::with(&["alpha", "beta"]).await;
    let mut events = admin.events().await;
    let (name, snapshot) = in_time(events.next()).await.unwrap();
    assert_eq!((name.as_str(), &snapshot["history_ms"]), ("snapshot", &json!(900_000)));
    let ids: Vec<_> = snapshot["keys"].as_array().unwrap().iter().map(|key| &key["id"]).collect();
    assert_eq!(ids, ["alpha", "beta"]);

    admin.limit(&["alpha"]).await;
    let change = change_of("alpha", &mut events).await;
    assert_eq!((&change["status"], &change["last_reason"]), (&json!("rate_limited"), &json!(429)));
    let left = change["time_left_ms"].as_u64().unwrap();
    assert!((595_000..=600_000).contains(&left), "{left}");
    assert!(change["requests"].as_u64() >= Some(1), "{change}");

    admin.act("alpha", "reset").await;
    assert_eq!(change_of("alpha", &mut events).await["status"], "healthy");
    admin.add("gamma", "sk-gamma").await;
    assert_eq!(change_of("gamma", &mut events).await["history"][0]["status"], "healthy");
    admin.remove("gamma").await;
    let (_, changes) = in_time(events.next()).await.unwrap();
    assert_eq!(changes["removed"], json!([{ "upstream": "default", "id": "gamma" }]));

    let mut later = admin.events().await;
    let (_, snapshot) = in_time(later.next()).await.unwrap();
    let history: Vec<_> =
        snapshot["keys"][0]["history"].as_array().unwrap().iter().map(|since| &since["status"]).collect();
    assert_eq!(history, ["healthy", "rate_limited", "healthy"]);
}

#[tokio::test]
async fn counters_are_told_at_most_once_a_second() {
    let admin = Admin::with(&["alpha"]).await;
    let mut events = admin.events().await;
    events.next().await.unwrap();
    let (mut told, mut begun) = (0, None);
    // Request after request, until two changes have arrived.
    while told < 2 {
        admin.http.get(admin.gateway.url("/v1/models")).send().await.unwrap();
        if let Ok(event) = tokio::time::timeout(Duration::from_millis(5), events.next()).await {
            assert!(event.unwrap().1["keys"][0]["requests"].is_u64());
            told += 1;
            begun.get_or_insert_with(Instant::now);
        }
    }
    assert!(begun.unwrap().elapsed() > Duration::from_millis(700), "{:?}", begun.unwrap().elapsed());
}

/// An HTTP/2 listener with a small flow-control window that stops reading for a while.
#[tokio::test]
async fn a_lagging_listener_gets_another_snapshot() {
    // The snapshot exceeds the flow-control window.
    let names: Vec<_> = (0..200).map(|number| format!("{number}{}", "\"".repeat(240))).collect();
    let admin = Admin::with(&names.iter().map(String::as_str).chain(["alpha"]).collect::<Vec<_>>()).await;
    let mut body = {
        let connection = TcpStream::connect(admin.gateway.admin_address()).await.unwrap();
        let client = http2::Builder::new(TokioExecutor::new()).initial_stream_window_size(65_535).clone();
        let (mut client, connection) = client.handshake(TokioIo::new(connection)).await.unwrap();
        tokio::spawn(connection);
        let request = Request::get(admin.gateway.admin_url("/admin/api/events"));
        let request = request.header(AUTHORIZATION, format!("Bearer {TOKEN}")).body(String::new()).unwrap();
        client.send_request(request).await.unwrap().into_body()
    };
    for _ in 0..50 {
        admin.act("alpha", "disable").await;
        admin.act("alpha", "enable").await;
    }
    let mut heard = String::new();
    in_time(async {
        while heard.matches("event: snapshot\n").count() < 2 {
            let frame = body.frame().await.unwrap().unwrap();
            heard += std::str::from_utf8(frame.data_ref().unwrap()).unwrap();
        }
    })
    .await;
    let changes = heard.matches("event: changes\n").count();
    assert!(changes < 100, "it has been told of all {changes} changes, and fell behind by none");
}

#[tokio::test]
async fn an_open_event_stream_delays_no_shutdown() {
    let mut admin = Admin::with(&["alpha"]).await;
    let mut events = admin.events().await;
    events.next().await.unwrap();
    let begun = Instant::now();
    admin.gateway.terminate().await;
    assert!(admin.gateway.ended().await.success());
    assert!(begun.elapsed() < 5 * SECOND, "{:?}", begun.elapsed());
    assert!(in_time(events.next()).await.is_none());
}

#[test]
fn no_two_operations_are_called_the_same() {
    let description = description();
    let operations = description["paths"]
        .as_object()
        .unwrap()
        .values()
        .flat_map(|path| path.as_object().unwrap().values());
    let ids: Vec<_> = operations.map(|operation| operation["operationId"].as_str().unwrap()).collect();
    assert_eq!(ids.iter().collect::<HashSet<_>>().len(), ids.len());
}
