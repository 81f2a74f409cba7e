//! Headless Chromium, driven through chromedriver; both from Debian's packages.

use std::{io, process::Stdio, time::Duration};

use serde_json::{Value, json};
use thirtyfour::{
    ChromiumLikeCapabilities, DesiredCapabilities, LoggingPrefsLogLevel, TypingData, WebDriver,
    prelude::ElementQueryable,
};
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStdout, Command},
    time::{Instant, sleep, timeout},
};

use crate::support::http;

const TO_INSTALL: &str = "apt-get install chromium chromium-driver";

/// Background activity of the browser is disabled. The sandbox does not work as root.
const ARGUMENTS: [&str; 8] = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
];

/// A browser for one test, closed on drop.
pub(crate) struct Browser {
    driver: WebDriver,
    _chromedriver: Child,
}

impl Browser {
    pub(crate) async fn start() -> Self {
        let (chromedriver, url) = start_chromedriver().await;
        let mut chromium = DesiredCapabilities::chrome();
        for argument in ARGUMENTS {
            chromium.add_arg(argument).unwrap();
        }
        chromium.set_browser_log_level(LoggingPrefsLogLevel::All).unwrap();
        let driver = WebDriver::builder(url, chromium).client(http()).await;
        let driver = driver.unwrap_or_else(|error| panic!("no Chromium, so {TO_INSTALL}: {error}"));
        let browser = Self { driver, _chromedriver: chromedriver };
        browser.looks_through(1280, 800, 1.0).await;
        browser
    }

    pub(crate) async fn open(&self, url: &str) {
        self.driver.goto(url).await.unwrap();
    }

    /// Emulates a viewport of this size in CSS pixels, because a window can't be as narrow as a phone.
    pub(crate) async fn looks_through(&self, width: u32, height: u32, scale: f32) {
        let size =
            json!({ "width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 700 });
        self.devtools("Emulation.setDeviceMetricsOverride", size).await;
    }

    pub(crate) async fn prefers(&self, scheme: &str) {
        let feature = json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme }] });
        self.devtools("Emulation.setEmulatedMedia", feature).await;
    }

    async fn devtools(&self, command: &str, arguments: Value) {
        self.driver.cdp().send_raw(command, arguments).await.unwrap();
    }

    /// Evaluates an expression in the page.
    pub(crate) async fn eval(&self, expression: &str) -> Value {
        let script = format!("return {expression}");
        let value = self.driver.execute(script, Vec::new()).await;
        value.unwrap_or_else(|error| panic!("{expression}: {error}")).json().clone()
    }

    /// Waits until an expression is true in the page, and returns how long it took.
    pub(crate) async fn see(&self, expression: &str) -> Duration {
        let begun = Instant::now();
        while self.eval(&format!("Boolean({expression})")).await != json!(true) {
            let seen = begun.elapsed() < Duration::from_secs(20);
            assert!(seen, "never seen: {expression}\n{}", self.eval("document.body.innerText").await);
            sleep(Duration::from_millis(20)).await;
        }
        begun.elapsed()
    }

    /// Clicks like a user: the element must be in view and not covered.
    pub(crate) async fn click(&self, selector: &str) {
        let element = self.driver.query(thirtyfour::By::Css(selector)).first().await.unwrap();
        element.click().await.unwrap_or_else(|error| panic!("{selector}: {error}"));
    }

    /// Appends text to a field.
    pub(crate) async fn type_into(&self, selector: &str, text: &str) {
        let element = self.driver.query(thirtyfour::By::Css(selector)).first().await.unwrap();
        element.send_keys(text).await.unwrap_or_else(|error| panic!("{selector}: {error}"));
    }

    /// Sends a key to the focused element.
    pub(crate) async fn press(&self, key: impl Into<TypingData>) {
        self.driver.active_element().await.unwrap().send_keys(key).await.unwrap();
    }

    pub(crate) async fn screenshot(&self) -> Vec<u8> {
        self.driver.screenshot_as_png().await.unwrap()
    }

    /// Closes the browser. In a failed test, it closes on drop.
    pub(crate) async fn quit(self) {
        self.driver.quit().await.unwrap();
    }

    /// Returns the browser's warnings and errors since the last call.
    pub(crate) async fn complaints(&self) -> Vec<String> {
        let log = self.driver.browser_log().await.unwrap();
        log.into_iter()
            .filter(|entry| matches!(entry.level.as_str(), "SEVERE" | "WARNING"))
            .map(|entry| format!("{}: {}", entry.source.unwrap_or_default(), entry.message))
            .collect()
    }
}

/// Starts chromedriver on a free port and returns its URL.
async fn start_chromedriver() -> (Child, String) {
    let mut chromedriver = Command::new("chromedriver")
        .arg("--port=0")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap_or_else(|error| match error.kind() {
            io::ErrorKind::NotFound => panic!("there is no chromedriver: {TO_INSTALL}"),
            _ => panic!("chromedriver: {error}"),
        });
    let said = BufReader::new(chromedriver.stdout.take().unwrap()).lines();
    let port = timeout(Duration::from_secs(20), port_in(said)).await.expect("chromedriver does not start");
    (chromedriver, format!("http://127.0.0.1:{port}"))
}

async fn port_in(mut said: Lines<BufReader<ChildStdout>>) -> u16 {
    while let Some(line) = said.next_line().await.unwrap() {
        if let Some((_, port)) = line.split_once("started successfully on port ") {
            // Keep reading, or chromedriver would block on a full pipe.
            tokio::spawn(async move { while let Ok(Some(_)) = said.next_line().await {} });
            return port.trim_end_matches('.').parse().unwrap();
        }
    }
    panic!("chromedriver has ended: does it run by itself? ({TO_INSTALL})");
}
