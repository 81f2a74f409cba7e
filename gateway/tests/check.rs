//! `check` and `check --probe`.

mod support;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{self, Output},
};

use bytes::Bytes;
use http::Request;
use support::{
    gateway::{command, ended},
    *,
};

/// An empty folder, removed at the end of its test.
struct Folder(PathBuf);

impl Folder {
    fn named(name: &str) -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.0.join(name), text).unwrap();
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn text(bytes: &[u8]) -> &str {
    str::from_utf8(bytes).unwrap()
}

fn code(output: &Output) -> Option<i32> {
    output.status.code()
}

#[tokio::test]
async fn the_example_in_the_readme_is_valid() {
    let readme = include_str!("../README.md");
    let blocks = readme.split("```toml\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    let example = blocks.into_iter().find(|block| block.contains("[[upstream]]")).unwrap();
    let folder = Folder::named("readme");
    folder.write("gateway.toml", example);
    folder.write("openai-keys.txt", "alpha|sk-1\n");
    folder.write("gemini-keys.txt", "alpha|sk-2\n");
    let mut check = command(["check", "--config", "gateway.toml"]);
    check.current_dir(&folder.0).env("ANTHROPIC_KEYS", "alpha=sk-3");
    check.env("WEBSITE_TOKEN", "token-of-website").env("BATCH_TOKEN", "token-of-batch");
    let output = ended(check).await;
    assert_eq!(code(&output), Some(0), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "the configuration is valid\n");
}

#[tokio::test]
async fn check_says_all_that_is_wrong() {
    let keys = keys_file("alpha|sk-canary\nsk-canary\nbeta|canary \n");
    let config = file(
        "toml",
        &format!(
            r#"
            wait = "canary"
            no-such = "canary"
            [[upstream]]
            name = "one"
            url = "https://example.com"
            keys = {:?}
            [[upstream]]
            name = "two"
            url = "https://example.com"
            path = "/two"
            keys = "no/such/file"
            [[upstream]]
            name = "three"
            url = "ftp://canary"
            kyes = "canary"
            [[caller]]
            name = "website"
            token = "canary"
            "#,
            keys.path()
        ),
    );
    let output = ended(command(["check", "--config", config.path()])).await;
    let said = text(&output.stderr);
    assert_eq!(code(&output), Some(2), "{said}");
    for expected in [
        "line 2: --wait <SECONDS>: not a number of seconds",
        "line 3: ",
        r#"line 15: upstream "three": url: it must be http://"#,
        r#"line 16: upstream "three": there is no field kyes"#,
        r#"line 13: upstream "three": it has no keys"#,
        r#"line 19: caller "website": token: a token is at least 8"#,
        r#"upstream "one": keys: "#,
        "line 2: ",
        "line 3: key beta: the secret begins or ends with",
        r#"upstream "two": keys: no/such/file could not be read"#,
        "the configuration has ",
    ] {
        assert!(said.contains(expected), "{expected} is not in {said}");
    }
    assert!(!said.contains("canary"), "{said}");
}

#[tokio::test]
async fn check_warns_but_needs_no_file() {
    let keys = keys_file("a|sk-a");
    let mut check = command(["check", "--upstream", "https://example.com", "--keys", keys.path()]);
    check.env("GATEWAY_NO_SUCH", "canary");
    let output = ended(check).await;
    assert_eq!(code(&output), Some(0));
    assert!(text(&output.stderr).contains("warning: GATEWAY_NO_SUCH: there is no such setting"));
}

#[tokio::test]
async fn a_probe_tells_which_keys_work() {
    let upstream = Server::start(|request: Request<Bytes>| {
        let is_probe = request.method() == "GET" && request.uri().path() == "/v1/models";
        let status = match key_of(&request) {
            _ if !is_probe => 404,
            Some("good") => 200,
            Some("limited") => 429,
            _ => 401,
        };
        std::future::ready(answer(status, "{}"))
    })
    .await;
    let url = format!("http://{}", upstream.address());
    let probe = async |keys: &str| {
        let keys = keys_file(keys);
        let output = ended(command(["check", "--probe", "--upstream", &url, "--keys", keys.path()])).await;
        (code(&output), text(&output.stdout).to_owned())
    };
    let (code, said) = probe("good|sk-good\nlimited|sk-limited\n").await;
    assert_eq!(code, Some(0), "{said}");
    assert!(
        said.contains("key good works\n") && said.contains("key limited works, and is rate limited"),
        "{said}"
    );
    let (code, said) = probe("good|sk-good\nbad|sk-bad\n").await;
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("key good works\n") && said.contains("key bad is refused (HTTP 401)"), "{said}");
    assert_eq!(upstream.count(), 4, "one request for each key");
}
