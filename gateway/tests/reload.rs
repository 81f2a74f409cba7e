//! Reloads of keys, callers and the configuration, by SIGHUP and by watched files.

mod support;

use std::{fs, sync::Arc};

use support::{
    gateway::{Gateway, command},
    *,
};

/// A gateway whose files a test rewrites.
struct Files {
    gateway: Gateway,
    keys: TestFile,
    config: TestFile,
}

impl Files {
    async fn with(keys: &str, config: &str) -> Self {
        let (keys, file) = (keys_file(keys), file("toml", ""));
        let config = config.replace("KEYS", keys.path());
        fs::write(file.path(), config).unwrap();
        let gateway = Gateway::start(command(["--config", file.path(), "--log", "debug"])).await;
        Self { gateway, keys, config: file }
    }

    /// Rewrites the configuration.
    fn configure(&self, config: &str) {
        fs::write(self.config.path(), config.replace("KEYS", self.keys.path())).unwrap();
    }

    /// Asks for a reload and waits until it is over.
    async fn reload(&self) {
        let before = self.reloads();
        self.gateway.hang_up().await;
        eventually("it is reloaded", || self.reloads() > before).await;
    }

    fn reloads(&self) -> usize {
        self.gateway.log().matches("configuration reloaded").count()
    }

    async fn get(&self, path: &str) -> u16 {
        http().get(self.gateway.url(path)).send().await.unwrap().status().as_u16()
    }
}

/// The settings of one upstream at this server.
fn plain(upstream: &Server) -> String {
    format!(
        "upstream = \"http://{}\"\nkeys = \"KEYS\"\npace = false\nwait = 0\ncooldown = 600\nwatch = false\n",
        upstream.address()
    )
}

#[tokio::test]
async fn keys_come_and_go_and_others_keep_their_rests() {
    let upstream = Server::limiting(["alpha"]).await;
    let files = Files::with("alpha|sk-alpha\nbeta|sk-beta\n", &plain(&upstream)).await;
    assert_eq!((files.get("/").await, files.get("/").await), (200, 200));
    upstream.lift("alpha");
    fs::write(files.keys.path(), "alpha|sk-alpha\ngamma|sk-gamma\ndelta|sk-delta\n").unwrap();
    files.reload().await;
    let before = upstream.count();
    for _ in 0..4 {
        assert_eq!(files.get("/").await, 200);
    }
    let mut used = upstream.keys().split_off(before);
    used.sort_unstable();
    assert_eq!(used, ["delta", "delta", "gamma", "gamma"]);
    let log = files.gateway.log();
    assert!(log.contains("Taken { added: 2, replaced: 0, removed: 1, failed: 0 }"), "{log}");
}

#[tokio::test]
async fn watched_files_are_read_without_a_signal() {
    let upstream = Server::limiting([]).await;
    let config = plain(&upstream).replace("watch = false\n", "");
    let files = Files::with("alpha|sk-alpha\n", &config).await;
    assert_eq!(files.get("/").await, 200);
    fs::write(files.keys.path(), "beta|sk-beta\n").unwrap();
    eventually("it is reloaded", || files.reloads() > 0).await;
    assert_eq!(files.get("/").await, 200);
    assert_eq!(upstream.keys(), ["alpha", "beta"]);
}

#[tokio::test]
async fn an_invalid_file_changes_nothing_and_is_said_once() {
    let upstream = Server::limiting([]).await;
    let files = Files::with("alpha|sk-alpha\n", &plain(&upstream)).await;
    files.configure("upstream = \"canary\"\n");
    let said = || files.gateway.log().matches("was not reloaded, and nothing has changed").count();
    for _ in 0..3 {
        files.gateway.hang_up().await;
        eventually("it is said", || said() > 0).await;
        assert_eq!(files.get("/").await, 200);
    }
    files.configure(&plain(&upstream));
    fs::write(files.keys.path(), "").unwrap();
    files.gateway.hang_up().await;
    eventually("the other error is said", || said() == 2).await;
    assert_eq!(files.get("/").await, 200);
    assert!(files.gateway.log().contains("line 1: --upstream <URL>: it must be http://"));
    assert!(!files.gateway.log().contains("canary"));
}

#[tokio::test]
async fn a_new_secret_of_the_only_key_fails_no_request() {
    let upstream = Server::limiting([]).await;
    let files = Arc::new(Files::with("alpha|sk-0\n", &plain(&upstream)).await);
    let asking = tokio::spawn({
        let files = files.clone();
        async move {
            let http = http();
            loop {
                assert_eq!(http.get(files.gateway.url("/")).send().await.unwrap().status(), 200);
            }
        }
    });
    for number in 1..=10 {
        fs::write(files.keys.path(), format!("alpha|sk-{number}\n")).unwrap();
        files.reload().await;
    }
    assert!(!asking.is_finished(), "{:?}", asking.await);
    asking.abort();
    assert_eq!(files.get("/").await, 200);
    assert_eq!(upstream.keys().last().unwrap(), "10");
}

#[tokio::test]
async fn a_changed_upstream_serves_the_next_request_and_finishes_others() {
    let (chunks, body) = stream();
    let body = Arc::new(std::sync::Mutex::new(Some(body)));
    let old = Server::answering(move || match body.lock().unwrap().take() {
        Some(body) => answer(200, body),
        None => answer(429, ""),
    })
    .await;
    let new = Server::limiting([]).await;
    let files = Files::with("alpha|sk-alpha\nbeta|sk-beta\n", &plain(&old)).await;
    let mut chunks = chunks;
    let mut response = http().get(files.gateway.url("/")).send().await.unwrap();
    let admin = http().post(files.gateway.admin_url("/admin/api/keys")).header("x-gateway-admin", "1");
    let gamma = admin.body(r#"{"id":"gamma","secret":"sk-gamma"}"#).send().await.unwrap();
    assert_eq!(gamma.status(), 201);
    // All three keys rest now.
    assert_eq!(files.get("/").await, 429);
    files.configure(&plain(&new));
    files.reload().await;
    assert_eq!((files.get("/").await, new.count()), (429, 0), "they rest still");
    let reset = http().post(files.gateway.admin_url("/admin/api/keys:reset")).header("x-gateway-admin", "1");
    let reset: serde_json::Value = reset.send().await.unwrap().json().await.unwrap();
    assert_eq!(reset["reset"].as_array().unwrap().len(), 3, "{reset}");
    assert_eq!((files.get("/").await, new.count()), (200, 1));

    chunks.send_data("to the end".into()).await.unwrap();
    drop(chunks);
    assert_eq!(response.chunk().await.unwrap().unwrap(), "to the end");
    assert!(response.chunk().await.unwrap().is_none());
}

#[tokio::test]
async fn callers_come_and_go_and_keep_their_usage() {
    let upstream = Server::limiting([]).await;
    let caller = |name: &str| format!("[[caller]]\nname = {name:?}\ntoken = \"token-of-{name}\"\n");
    let base = format!("admin-token = \"token-of-admin\"\n{}", plain(&upstream));
    let config = |names: [&str; 2]| base.clone() + &names.map(caller).concat();
    let files = Files::with("alpha|sk-alpha\n", &config(["one", "two"])).await;
    let get = async |name: &str| {
        let request = http().get(files.gateway.url("/")).bearer_auth(format!("token-of-{name}"));
        request.send().await.unwrap().status().as_u16()
    };
    assert_eq!((get("one").await, get("two").await, get("three").await), (200, 200, 401));
    files.configure(&config(["two", "three"]));
    files.reload().await;
    assert_eq!((get("one").await, get("two").await, get("three").await), (401, 200, 200));
    let callers = http().get(files.gateway.admin_url("/admin/api/callers")).bearer_auth("token-of-admin");
    let callers: serde_json::Value = callers.send().await.unwrap().json().await.unwrap();
    assert_eq!((&callers[0]["requests"], &callers[1]["requests"]), (&2.into(), &1.into()), "{callers}");

    files.configure(&base);
    files.gateway.hang_up().await;
    let refused = "it has no client token any more, which needs a restart";
    eventually("it is refused", || files.gateway.log().contains(refused)).await;
    assert_eq!(get("two").await, 200);
}

#[tokio::test]
async fn fixed_settings_wait_for_a_restart() {
    let upstream = Server::limiting([]).await;
    let files = Files::with("alpha|sk-alpha\n", &plain(&upstream)).await;
    files.configure(&format!("{}max-requests = 5\n", plain(&upstream)));
    files.reload().await;
    assert!(files.gateway.log().contains("--max-requests has changed, which takes effect at the next start"));
}
