//! The Grafana dashboard, parsed by Grafana's own library and run against a Prometheus.
//!
//! ```text
//! apt-get install prometheus
//! cargo test -p key-rotation-gateway --test dashboard -- --include-ignored
//! ```

mod support;

use std::{
    fs,
    future::ready,
    net::{SocketAddr, TcpListener},
    path::PathBuf,
    process::{self, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::StatusCode;
use serde_json::Value;
use support::{gateway::Gateway, python::run_script, *};
use tokio::{
    process::{Child, Command},
    time::{sleep, timeout},
};

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/grafana.json");

fn dashboard() -> Value {
    serde_json::from_slice(&fs::read(FILE).unwrap()).unwrap()
}

/// Lists the parts of `here` that are missing from `there`.
fn missing(here: &Value, there: &Value, path: &str) -> Vec<String> {
    let parts: Vec<_> = match (here, there) {
        (Value::Object(here), Value::Object(there)) => {
            here.iter().map(|(name, part)| (format!("{path}/{name}"), part, there.get(name))).collect()
        }
        (Value::Array(here), Value::Array(there)) if here.len() == there.len() => here
            .iter()
            .zip(there)
            .enumerate()
            .map(|(at, (here, there))| (format!("{path}/{at}"), here, Some(there)))
            .collect(),
        _ if here == there => return Vec::new(),
        _ => return vec![format!("{path}: {here}, and not {there}")],
    };
    let compare = |(path, here, there): (String, &Value, Option<&Value>)| match there {
        Some(there) => missing(here, there, &path),
        None => vec![format!("{path}: {here} is not known")],
    };
    parts.into_iter().flat_map(compare).collect()
}

#[tokio::test]
async fn grafanas_library_knows_every_dashboard_field() {
    let written = run_script("dashboard.py", &[FILE]).await.unwrap_or_else(|error| panic!("{error}"));
    let missing = missing(&dashboard(), &serde_json::from_slice(&written).unwrap(), "");
    assert!(missing.is_empty(), "{missing:#?}");
}

/// A Prometheus that scrapes one gateway five times a second.
struct Prometheus {
    address: SocketAddr,
    folder: PathBuf,
    _child: Child,
}

impl Prometheus {
    async fn of(gateway: &Gateway) -> Self {
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("prometheus-{}", process::id()));
        fs::create_dir_all(&folder).unwrap();
        let config = folder.join("prometheus.yml");
        let job =
            format!("job_name: gateway, static_configs: [{{ targets: ['{}'] }}]", gateway.admin_address());
        let text = format!(
            "global: {{ scrape_interval: 200ms, scrape_timeout: 200ms }}\nscrape_configs: [{{ {job} }}]\n"
        );
        fs::write(&config, text).unwrap();
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let child = Command::new("prometheus")
            .arg(format!("--config.file={}", config.display()))
            .arg(format!("--storage.tsdb.path={}", folder.join("data").display()))
            .arg(format!("--web.listen-address={address}"))
            .arg("--log.level=error")
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .expect("prometheus is needed: apt-get install prometheus");
        Self { address, folder, _child: child }
    }

    /// Repeats a query until its result has finite numbers.
    async fn answer(&self, question: &str) -> Vec<f64> {
        let answer = async {
            loop {
                let numbers = self.ask(question).await;
                if !numbers.is_empty() && numbers.iter().all(|number| number.is_finite()) {
                    return numbers;
                }
                sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(10 * SECOND, answer).await.unwrap_or_else(|_| panic!("nothing answers {question}"))
    }

    /// Runs a query.
    ///
    /// # Panics
    ///
    /// Panics if Prometheus rejects the query.
    async fn ask(&self, question: &str) -> Vec<f64> {
        let query = utf8_percent_encode(question, NON_ALPHANUMERIC);
        let url = format!("http://{}/api/v1/query?query={query}", self.address);
        let Ok(response) = http().get(url).send().await else { return Vec::new() };
        let status = response.status();
        let text = response.text().await.unwrap();
        assert_ne!(status, StatusCode::BAD_REQUEST, "{question}: {text}");
        let answer: Value = serde_json::from_str(&text).unwrap_or_default();
        let series = answer["data"]["result"].as_array().into_iter().flatten();
        series.map(|series| series["value"][1].as_str().unwrap().parse().unwrap()).collect()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// The queries of all panels, for all pools and gateways.
fn questions() -> Vec<String> {
    let dashboard = dashboard();
    let targets =
        dashboard["panels"].as_array().unwrap().iter().flat_map(|panel| panel["targets"].as_array().unwrap());
    targets
        .map(|target| {
            let expression =
                target["expr"].as_str().unwrap().replace("$pool", ".*").replace("$instance", ".*");
            expression.replace("$__rate_interval", "5s")
        })
        .collect()
}

#[tokio::test]
#[ignore = "it needs prometheus, as Debian's package has it"]
async fn prometheus_answers_every_dashboard_query() {
    // Half of the requests are limited, which causes failovers and waits for a key.
    let asked = Arc::new(AtomicU32::new(0));
    let service = Server::start(move |_| {
        let status = if asked.fetch_add(1, Relaxed) % 4 < 2 { 429 } else { 200 };
        ready(answer_with(status, [("retry-after-ms", "100")], "{}"))
    });
    let gateway =
        Gateway::before(service.await.address(), &["alpha", "beta"], ["--pace=false", "--wait", "60"]).await;
    let prometheus = Prometheus::of(&gateway).await;
    let requests = async {
        loop {
            let _ = http().get(gateway.url("/v1/models")).send().await;
        }
    };
    let answers = async {
        for question in questions() {
            if question.contains("key_rotation_pass_seconds") {
                // This metric appears with the first recovery pass, after up to 30 s.
                prometheus.ask(&question).await;
            } else {
                let numbers = prometheus.answer(&question).await;
                assert!(numbers.iter().all(|number| *number >= 0.0), "{question}: {numbers:?}");
            }
        }
    };
    tokio::select! {
        () = answers => {}
        () = requests => {}
    }
}
