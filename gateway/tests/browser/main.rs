//! The admin page in a real browser.
//!
//! ```text
//! apt-get install chromium chromium-driver
//! cargo test -p key-rotation-gateway --test browser -- --ignored
//! ```
//!
//! `SCREENSHOT=docs/page.png` takes the screenshot for the README. It needs a quarter of an hour, the time span of the
//! page's timelines.

mod browser;
#[path = "../support/mod.rs"]
mod support;

use std::{
    collections::HashMap,
    env, fs,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use browser::Browser;
use serde_json::{Value, json};
use support::{gateway::*, *};
use thirtyfour::Key;
use tokio::{
    io::AsyncReadExt,
    net::TcpListener,
    time::{Instant, sleep},
};

const TOKEN: &str = "the-admin-s-token";

/// The admin page of a gateway in front of a service, open in a browser.
struct Page {
    browser: Browser,
    gateway: Gateway,
    service: Server,
    http: reqwest::Client,
}

impl Page {
    /// Opens the page of a gateway without an admin token.
    async fn of<const N: usize>(keys: &[&str], arguments: [&str; N]) -> Self {
        let page = Self::closed(keys, arguments).await;
        page.browser.open(&page.gateway.admin_url("/admin")).await;
        page.browser.see("document.querySelector('#connection').dataset.state === 'live'").await;
        page
    }

    async fn closed<const N: usize>(keys: &[&str], arguments: [&str; N]) -> Self {
        let service = Server::limiting([]).await;
        let gateway = Gateway::before(service.address(), keys, arguments).await;
        Self { browser: Browser::start().await, gateway, service, http: http() }
    }

    /// Restarts the gateway at the same address with these arguments.
    async fn restart<const N: usize>(&mut self, arguments: [&str; N]) {
        self.gateway.terminate().await;
        self.gateway.ended().await;
        let keys = keys_file("alpha|sk-alpha\n");
        self.start_again(&keys, arguments).await;
    }

    async fn start_again<const N: usize>(&mut self, keys: &TestFile, arguments: [&str; N]) {
        let upstream = format!("http://{}", self.service.address());
        let listen =
            [self.gateway.address(), self.gateway.admin_address()].map(|address| address.to_string());
        let all = [
            "--upstream",
            &upstream,
            "--keys",
            keys.path(),
            "--listen",
            &listen[0],
            "--admin-listen",
            &listen[1],
        ];
        self.gateway = Gateway::start_listening(command(all.into_iter().chain(arguments))).await;
    }

    async fn request(&self) {
        self.http.get(self.gateway.url("/v1/models")).send().await.unwrap();
    }

    /// Sends requests, about ten per second.
    async fn ask_for(&self, time: Duration) {
        let begun = Instant::now();
        while begun.elapsed() < time {
            let request = self.http.post(self.gateway.url("/v1/chat/completions")).body("{}");
            request.send().await.unwrap();
            sleep(Duration::from_millis(90)).await;
        }
    }

    async fn see(&self, expression: &str) -> Duration {
        self.browser.see(expression).await
    }

    async fn see_status(&self, key: &str, status: &str) {
        self.see(&format!("{}?.innerText.includes('{status}')", row(key))).await;
    }

    async fn see_no(&self, key: &str) {
        self.see(&format!("!{}", row(key))).await;
    }

    async fn see_said(&self, text: &str) {
        self.see(&format!("document.querySelector('.announcements').innerText.includes('{text}')")).await;
    }

    async fn click(&self, selector: &str) {
        self.browser.click(selector).await;
    }

    async fn act(&self, key: &str, action: &str) {
        self.click(&format!("tr[data-key='{key}'] [data-action='{action}']")).await;
    }

    async fn type_into(&self, selector: &str, text: &str) {
        self.browser.type_into(selector, text).await;
    }

    async fn eval(&self, expression: &str) -> Value {
        self.browser.eval(expression).await
    }

    /// Checks that the browser logged no violation of the page's policy and no script error.
    async fn end(self) {
        self.end_with([]).await;
    }

    /// The same check, with exceptions for errors that the test provokes.
    async fn end_with<const N: usize>(self, expected: [&str; N]) {
        let complaints = self.browser.complaints().await;
        let is_expected = |complaint: &String| expected.iter().any(|part| complaint.contains(part));
        let others: Vec<_> = complaints.iter().filter(|complaint| !is_expected(complaint)).collect();
        assert!(others.is_empty(), "{others:#?}");
        self.browser.quit().await;
    }
}

fn row(key: &str) -> String {
    format!("document.querySelector(\"tr[data-key='{key}']\")")
}

fn cell(key: &str, name: &str) -> String {
    format!("document.querySelector(\"tr[data-key='{key}'] .c-{name}\").innerText")
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "it needs a browser"]
async fn only_the_right_admin_token_signs_in() {
    let page = Page::closed(&["alpha"], ["--admin-token", TOKEN]).await;
    page.browser.open(&page.gateway.admin_url("/admin")).await;
    page.see("document.activeElement.id === 'token'").await;
    assert_eq!(page.eval("document.querySelector('#token-error').innerText").await, "");
    page.type_into("#token", "wrong").await;
    page.browser.press(Key::Enter).await;
    page.see("document.querySelector('#token-error').innerText === 'That is not the admin token.'").await;
    assert_eq!(page.eval("document.querySelector('#overview').hidden").await, json!(true));
    // A typographic character, as word processors insert, can't be sent in a header.
    page.type_into("#token", &format!("“{TOKEN}”")).await;
    page.eval("document.querySelector('#token-error').innerText = ''").await;
    page.browser.press(Key::Enter).await;
    page.see("document.querySelector('#token-error').innerText === 'That is not the admin token.'").await;

    page.type_into("#token", TOKEN).await;
    page.browser.press(Key::Enter).await;
    page.see_status("alpha", "Healthy").await;
    assert_eq!(page.eval("document.querySelector('#sign-in').hidden").await, json!(true));

    page.browser.open(&page.gateway.admin_url("/admin")).await;
    page.see_status("alpha", "Healthy").await;
    page.click("#sign-out").await;
    page.see("!document.querySelector('#sign-in').hidden").await;
    assert_eq!(page.eval("sessionStorage.length").await, 0);
    page.end_with(["401 (Unauthorized)"]).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "it needs a browser"]
async fn added_keys_leave_no_secret_in_the_page() {
    let page = Page::of(&["alpha"], []).await;
    page.click("#add-key").await;
    page.type_into("#add-id", "alpha").await;
    page.type_into("#add-secret", "sk-Zq7Xw9Kp3Vn8Bt5R").await;
    page.click("#add .primary").await;
    page.see("document.querySelector('#add-error').innerText === 'There is a key alpha already.'").await;
    page.type_into("#add-id", "-2").await;
    page.click("#add .primary").await;
    page.see_status("alpha-2", "Healthy").await;
    page.see_said("alpha-2 was added.").await;
    assert_eq!(page.eval(&cell("alpha-2", "secret")).await, "…Bt5R");
    assert_eq!(page.eval("document.querySelector('#add').open").await, json!(false));
    assert_eq!(page.eval("document.querySelector('#add-secret').value").await, "");
    let all = "document.documentElement.outerHTML + JSON.stringify([{...sessionStorage}, {...localStorage}])";
    assert!(!page.eval(all).await.as_str().unwrap().contains("Zq7Xw9"));
    page.end_with(["409 (Conflict)"]).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "it needs a browser"]
async fn import_names_the_bad_line_and_adds_others() {
    let page = Page::of(&["alpha"], []).await;
    page.click("#import-keys").await;
    page.type_into("#import-text", "beta|sk-beta\nno separator\ngamma|sk-gamma").await;
    page.click("#import .primary").await;
    page.see("document.querySelector('#import-summary').innerText === '2 keys added, 1 refused.'").await;
    let lines =
        page.eval("[...document.querySelectorAll('#import-lines li')].map((l) => l.innerText.split('\\n'))");
    assert_eq!(
        lines.await,
        json!([
            ["Line 1", "beta", "Added."],
            ["Line 2", "–", "The key has no id."],
            ["Line 3", "gamma", "Added."],
        ])
    );
    // The refused line stays in the form, to be corrected.
    assert_eq!(page.eval("document.querySelector('#import-text').value").await, "no separator");
    page.click("#import [data-close]").await;
    page.see_status("beta", "Healthy").await;
    page.see_status("gamma", "Healthy").await;
    page.end().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "it needs a browser"]
async fn the_page_shows_cooldowns_without_reloading() {
    let page = Page::of(&["alpha", "beta"], ["--pace=false", "--wait", "0", "--cooldown", "3"]).await;
    page.eval("(window.isTheSamePage = true)").await;
    page.service.limit("alpha");
    page.request().await;
    page.request().await;
    page.see_status("alpha", "Rate limited").await;
    page.see(&format!("/^0:0[1-3]$/.test({})", cell("alpha", "left"))).await;
    assert_eq!(page.eval(&cell("alpha", "reason")).await, "429");
    assert_eq!(page.eval(&cell("alpha", "limited")).await, "1");
    assert_eq!(page.eval("document.querySelector('[data-count=resting]').innerText").await, "1");
    page.see("/^First back in 0:0[1-3]$/.test(document.querySelector('[data-note=resting]').innerText)")
        .await;
    page.see(&format!("/^0:0[12]$/.test({})", cell("alpha", "left"))).await;

    page.see_status("alpha", "Healthy").await;
    page.see("document.querySelector('[data-count=resting]').innerText === '0'").await;
    assert_eq!(page.eval("window.isTheSamePage").await, json!(true));
    // The rest stays visible in this key's timeline only, about 3 of its 900 seconds wide.
    let rests = |key: &str| format!("{}.querySelector('.t-rate_limited').getAttribute('d')", row(key));
    page.see(&rests("alpha")).await;
    assert_eq!(page.eval(&rests("beta")).await, "");
    page.see(&format!("{}.querySelector('svg.timeline').ariaLabel.includes('1 rest, ')", row("alpha"))).await;
    page.end().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "it needs a browser"]
async fn the_page_resets_disables_and_enables_keys() {
    let page = Page::of(&["alpha", "beta"], ["--pace=false", "--wait", "0", "--cooldown", "600"]).await;
    page.service.limit("alpha");
    page.request().await;
    page.request().await;
    page.see_status("alpha", "Rate limited").await;
    page.act("alpha", "reset").await;
    page.see_status("alpha", "Healthy").await;
    page.see_said("alpha was reset.").await;

    page.act("beta", "toggle").await;
    page.see_status("beta", "Disabled").await;
    page.see("document.querySelector('[data-note=out_of_service]').innerText === '1 disabled'").await;
    page.act("beta", "toggle").await;
    page.see_status("beta", "Healthy").await;
    page.see_said("beta is back in service.").await;
    page.end().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "it needs a browser"]
async fn all_that_rest_are_reset_at_once() {
    let page =
        Page::of(&["alpha", "beta", "gamma"], ["--pace=false", "--wait", "0", "--cooldown", "600"]).await;
    for key in ["alpha", "beta"] {
        page.service.limit(key);
    }
    for _ in 0..3 {
        page.request().await;
    }
    page.see_status("alpha", "Rate limited").await;
    page.see_status("beta", "Rate limited").await;
    page.click("#reset-resting").await;
    page.see_status("alpha", "Healthy").await;
    page.see_status("beta", "Healthy").await;
    page.see_said("2 keys were reset.").await;
    page.see("document.querySelector('#reset-resting').disabled").await;
    page.end().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "it needs a browser"]
async fn removing_a_key_requires_confirmation() {
    let page = Page::of(&["alpha", "beta"], []).await;
    page.act("beta", "remove").await;
    page.see("document.querySelector('#remove-key').open").await;
    assert_eq!(page.eval("document.querySelector('#remove-id').innerText").await, "beta");
    // Enter cancels.
    assert_eq!(page.eval("document.activeElement.innerText").await, "Cancel");
    page.browser.press(Key::Enter).await;
    page.see("!document.querySelector('#remove-key').open").await;
    page.act("beta", "remove").await;
    page.browser.press(Key::Escape).await;
    page.see("!document.querySelector('#remove-key').open").await;
    page.see_status("beta", "Healthy").await;

    page.act("beta", "remove").await;
    page.click("#remove-key .danger").await;
    page.see_no("beta").await;
    page.see_said("beta was removed.").await;
    page.see_status("alpha", "Healthy").await;
    page.end().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "it needs a browser"]
async fn s07_a_script_of_the_upstream_reaches_no_admin() {
    let attack = "<p>shown</p><script>const token = sessionStorage.getItem('admin-token'); \
        document.title = 'run'; fetch('/admin/api/keys/alpha', { method: 'DELETE', headers: \
        { 'x-gateway-admin': '1', authorization: `Bearer ${token}` } })</script>";
    let service = Server::answering(move || answer_with(200, [("content-type", "text/html")], attack)).await;
    let gateway = Gateway::before(service.address(), &["alpha", "beta"], []).await;
    let page = Page { browser: Browser::start().await, gateway, service, http: http() };
    page.browser.open(&page.gateway.admin_url("/admin")).await;
    page.see_status("alpha", "Healthy").await;
    page.browser.open(&page.gateway.url("/page")).await;
    page.see("document.querySelector('p')?.innerText === 'shown'").await;
    // Time for the script to run.
    sleep(SECOND).await;
    assert_eq!(page.eval("document.title").await, "");
    page.browser.open(&page.gateway.admin_url("/admin")).await;
    page.see_status("alpha", "Healthy").await;
    page.end_with(["sandboxed", "favicon"]).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "it needs a browser"]
async fn the_page_reconnects_after_a_gateway_restart() {
    let mut page = Page::of(&["alpha"], []).await;
    page.eval("(window.isTheSamePage = true)").await;
    page.gateway.terminate().await;
    page.gateway.ended().await;
    page.see("document.querySelector('#connection').innerText.startsWith('Connection lost')").await;
    page.see("'stale' in document.body.dataset").await;
    // The last known state stays visible.
    page.see_status("alpha", "Healthy").await;

    let keys = keys_file("alpha|sk-alpha\nomega|sk-omega\n");
    page.start_again(&keys, []).await;
    page.see_status("omega", "Healthy").await;
    page.see("document.querySelector('#connection-text').innerText === 'Live'").await;
    assert_eq!(page.eval("'stale' in document.body.dataset").await, json!(false));
    assert_eq!(page.eval("window.isTheSamePage").await, json!(true));
    page.end_with(["ERR_CONNECTION_REFUSED"]).await;
}

const IS_WAITING: &str = "!document.querySelector('#connect-now').hidden";

/// The page gets responses like those of a proxy whose gateway is down or overloaded.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "it needs a browser"]
async fn only_gateway_refusals_end_an_admin_session() {
    let mut page = Page::closed(&["alpha"], ["--admin-token", TOKEN]).await;
    page.browser.open(&page.gateway.admin_url("/admin")).await;
    page.type_into("#token", TOKEN).await;
    page.browser.press(Key::Enter).await;
    page.see_status("alpha", "Healthy").await;
    page.eval(
        "(window.answers = [403, 404, 429], window.fetch = ((fetch) => (...request) => answers.length \
         ? Promise.resolve(new Response('not now', { status: answers.shift() })) : fetch(...request))(fetch))",
    )
    .await;
    page.restart(["--admin-token", TOKEN]).await;
    // The page need not wait for its next automatic attempt.
    page.see("(dispatchEvent(new Event('online')), answers.length === 0)").await;
    page.see("document.querySelector('#connection-text').innerText === 'Live'").await;
    assert_eq!(page.eval("document.querySelector('#sign-in').hidden").await, json!(true));

    page.restart(["--client-token", "token-one"]).await;
    page.see("document.querySelector('#token-error').innerText.includes('set --admin-token')").await;
    page.end_with(["ERR_CONNECTION_REFUSED", "401 (Unauthorized)", "403 (Forbidden)"]).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "it needs a browser"]
async fn a_gateway_that_says_nothing_is_asked_again() {
    let mut page = Page::of(&["alpha"], []).await;
    // Fake timers: time passes faster here.
    page.eval("(window.setTimeout = ((wait) => (then, time) => wait(then, time / 50))(setTimeout))").await;
    page.gateway.terminate().await;
    page.gateway.ended().await;
    let silent = TcpListener::bind(page.gateway.admin_address()).await.unwrap();
    let mut asked = Vec::new();
    for _ in 0..2 {
        let (mut connection, _) = in_time(silent.accept()).await.unwrap();
        in_time(connection.read_u8()).await.unwrap();
        asked.push(connection);
        page.see(IS_WAITING).await;
    }
    assert_eq!(page.eval("'stale' in document.body.dataset").await, json!(true));
    page.end_with(["ERR_CONNECTION_REFUSED"]).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "it needs a browser"]
async fn upstreams_and_callers_are_told_apart() {
    let (service, keys) = (Server::limiting([]).await, keys_file("alpha|sk-alpha\n"));
    let upstream = |name: &str| {
        let (address, keys) = (service.address(), keys.path());
        format!(
            "[[upstream]]\nname = {name:?}\npath = \"/{name}\"\nurl = \"http://{address}\"\nkeys = {keys:?}\n"
        )
    };
    let caller = "[[caller]]\nname = \"website\"\ntoken = \"token-of-website\"\nrequests-per-minute = 5\n";
    let text = format!("admin-token = {TOKEN:?}\n{}{}{caller}", upstream("one"), upstream("two"));
    let config = file("toml", &text);
    let gateway = Gateway::start(command(["--config", config.path()])).await;
    let page = Page { browser: Browser::start().await, gateway, service, http: http() };
    for _ in 0..2 {
        let request = page.http.get(page.gateway.url("/two/v1")).bearer_auth("token-of-website");
        assert_eq!(request.send().await.unwrap().status(), 200);
    }
    page.browser.open(&page.gateway.admin_url("/admin")).await;
    page.see("!document.querySelector('#sign-in').hidden").await;
    page.type_into("#token", TOKEN).await;
    page.click("#sign-in-form button").await;
    page.see("document.querySelector('#rows').innerText.match(/one|two/g)?.join() === 'one,two'").await;
    page.see("document.querySelector('#caller-rows').innerText.match(/website\\s+2\\s+[23] of 5/)").await;

    let choose = "(() => { const s = document.querySelector('#upstream'); s.value = 'two'; \
                  s.dispatchEvent(new Event('change')); })()";
    page.eval(choose).await;
    page.see("document.querySelectorAll('#rows tr').length === 1").await;
    page.act("alpha", "toggle").await;
    page.see_said("alpha is out of service.").await;
    page.see_status("alpha", "Disabled").await;
    let log = r#"key disabled by the admin key="alpha" upstream="two""#;
    eventually("it is logged", || page.gateway.log().contains(log)).await;

    page.click("#add-key").await;
    page.eval("document.querySelector('#add-upstream').value = 'one'").await;
    page.type_into("#add-id", "beta").await;
    page.type_into("#add-secret", "sk-beta").await;
    page.click("#add button.primary").await;
    page.see_said("beta was added.").await;
    page.eval("(() => { const s = document.querySelector('#upstream'); s.value = ''; s.dispatchEvent(new Event('change')); })()").await;
    page.see("document.querySelectorAll('#rows tr').length === 3").await;
    if let Ok(path) = env::var("SCREENSHOT_OF_UPSTREAMS") {
        fs::write(path, page.browser.screenshot().await).unwrap();
    }
    page.end_with(["401"]).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "it needs a browser"]
async fn limits_are_shown_and_explained_for_each_model() {
    let service = Server::start(|request| async move {
        if key_of(&request) == Some("alpha") {
            return answer_with(429, [("retry-after", "600")], "");
        }
        let headers = [
            ("x-ratelimit-limit-requests", "60"),
            ("x-ratelimit-remaining-requests", "41"),
            ("x-ratelimit-reset-requests", "19s"),
        ];
        answer_with(200, headers, "{}")
    })
    .await;
    let gateway = Gateway::before(service.address(), &["alpha", "beta"], []).await;
    let page = Page { browser: Browser::start().await, gateway, service, http: http() };
    let request = page.http.post(page.gateway.url("/v1/chat/completions"));
    let request = request.json(&json!({ "model": "<gpt-5-mini>" }));
    assert_eq!(request.send().await.unwrap().status(), 200);
    page.browser.open(&page.gateway.admin_url("/admin")).await;
    page.see("document.querySelector('#limit-rows').innerText.match(/<gpt-5-mini>\\s+0\\s+0\\s+[1-9]\\d*\\s.*1 by headers/s)")
        .await;
    page.click("#limit-rows button").await;
    page.see("document.querySelector('#explanation').open").await;
    page.see("document.querySelector('#explained-next').innerText.includes('Next key: beta.')").await;
    let explained = "document.querySelector('#explained-keys').innerText";
    page.see(&format!("{explained}.match(/alpha\\s+Rests for this model, 10 min/)")).await;
    page.see(&format!("{explained}.match(/beta\\s+Has room\\s+\\d+ of \\d+ requests left/)")).await;
    if let Ok(path) = env::var("SCREENSHOT_OF_LIMITS") {
        fs::write(path, page.browser.screenshot().await).unwrap();
    }
    page.click("#explanation [data-close]").await;
    page.see("!document.querySelector('#explanation').open").await;
    page.end().await;
}

/// The longest time for a reaction of the page, chromedriver's overhead included.
const AT_ONCE: Duration = Duration::from_millis(1_500);

#[tokio::test(flavor = "multi_thread")]
#[ignore = "it needs a browser"]
async fn ten_thousand_keys_are_paged_and_searched_quickly() {
    let names: Vec<_> = (1..=10_000).map(|number| format!("key-{number}")).collect();
    let page = Page::of(&names.iter().map(String::as_str).collect::<Vec<_>>(), []).await;
    let rows = "document.querySelectorAll('#rows tr').length";
    page.see("document.querySelector('#range').innerText === '1–50 of 10,000'").await;
    assert_eq!(page.eval(rows).await, 50);

    page.click("#next").await;
    let paging = page.see(&row("key-51")).await;
    page.type_into("#search", "key-999").await;
    let searching = page.see("document.querySelector('#range').innerText === '1–11 of 11'").await;
    assert_eq!(page.eval(rows).await, 11);
    page.click("th[data-sort=requests] button").await;
    page.act("key-9990", "toggle").await;
    page.see_status("key-9990", "Disabled").await;
    page.eval("(() => { const s = document.querySelector('#search'); s.value = ''; s.dispatchEvent(new Event('input')); })()").await;
    page.see("document.querySelector('#range').innerText.endsWith('of 10,000')").await;
    page.click("[data-group=out_of_service]").await;
    let filtering = page.see("document.querySelector('#range').innerText === '1–1 of 1'").await;

    // The page measures the whole reaction itself.
    let frame = page
        .eval(
            "(() => { const begun = performance.now(); const s = document.querySelector('#status'); s.value = ''; \
             s.dispatchEvent(new Event('change')); document.querySelector('th[data-sort=id] button').click(); \
             return performance.now() - begun; })()",
        )
        .await;
    println!("paging {paging:?}, searching {searching:?}, filtering {filtering:?}, handlers {frame} ms");
    for took in [paging, searching, filtering] {
        assert!(took < AT_ONCE, "paging {paging:?}, searching {searching:?}, filtering {filtering:?}");
    }
    assert!(page.eval("document.querySelectorAll('*').length").await.as_u64() < Some(3_000));
    page.end().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "it needs a browser"]
async fn the_page_fits_the_width_of_a_phone() {
    let long = "a-key-with-a-name-that-is-much-longer-than-anybody-would-want-to-read-on-a-phone";
    let page = Page::of(&["alpha", long], ["--pace=false", "--wait", "0", "--cooldown", "600"]).await;
    page.service.limit("alpha");
    page.request().await;
    page.request().await;
    page.see_status("alpha", "Rate limited").await;
    for width in [360, 320] {
        page.browser.looks_through(width, 740, 2.0).await;
        page.see(&format!("innerWidth === {width} && document.scrollingElement.scrollWidth === {width}"))
            .await;
        for action in ["reset", "toggle", "remove"] {
            let button =
                format!("{}.querySelector('[data-action={action}]').getBoundingClientRect()", row(long));
            let right = page.eval(&format!("{button}.right")).await.as_f64().unwrap();
            assert!(right <= f64::from(width), "{action} at {width}");
        }
    }
    page.act("alpha", "reset").await;
    page.see_status("alpha", "Healthy").await;
    page.end().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "it needs a browser"]
async fn dark_mode_follows_the_system_or_the_switch() {
    let page = Page::of(&["alpha"], []).await;
    let background = "getComputedStyle(document.body.parentElement).backgroundColor";
    page.browser.prefers("light").await;
    let light = page.eval(background).await;
    page.browser.prefers("dark").await;
    let dark = page.eval(background).await;
    assert_ne!(light, dark);
    page.click("#theme-switch").await;
    page.see("document.querySelector('#theme-switch').ariaLabel === 'Colours: light'").await;
    assert_eq!(page.eval(background).await, light);
    page.browser.open(&page.gateway.admin_url("/admin")).await;
    assert_eq!(page.eval(background).await, light);
    page.end().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "it needs a browser"]
async fn every_control_has_a_name_and_keyboard_access() {
    let page = Page::of(&["alpha"], []).await;
    page.see_status("alpha", "Healthy").await;
    page.browser.press("/").await;
    page.see("document.activeElement.id === 'search'").await;
    page.browser.press("alph").await;
    page.see("document.querySelector('#range').innerText === '1–1 of 1'").await;
    let unnamed = page.eval(
        "[...document.querySelectorAll('button, input, select, textarea')].filter((e) => \
         !(e.ariaLabel || e.innerText?.trim() || e.textContent.trim() || e.labels?.length)).map((e) => e.outerHTML)",
    );
    assert_eq!(unnamed.await, json!([]));
    // Starting at the search field, each press of Tab must move the visible focus.
    let mut seen = Vec::new();
    loop {
        page.browser.press(Key::Tab).await;
        if page.eval("document.activeElement === document.body").await == json!(true) {
            break;
        }
        let name = page.eval("document.activeElement.ariaLabel ?? document.activeElement.innerText").await;
        assert_ne!(
            page.eval("getComputedStyle(document.activeElement).outlineStyle").await,
            "none",
            "{name}"
        );
        seen.push(name);
    }
    for name in ["Reset alpha", "Disable alpha", "Remove alpha", "Tokens"] {
        assert!(seen.contains(&json!(name)), "{name} in {seen:?}");
    }
    page.end().await;
}

/// Proves that the other tests would notice a forbidden action of the page.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "it needs a browser"]
async fn injected_scripts_and_styles_are_blocked_and_reported() {
    let page = Page::of(&["alpha"], []).await;
    page.eval("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.got=1\"><p style=\"color:red\">')")
        .await;
    page.eval("document.body.append(Object.assign(document.createElement('script'), { textContent: 'window.got=1' }))")
        .await;
    page.see("document.querySelector('p[style]')").await;
    sleep(Duration::from_millis(100)).await;
    assert_eq!(page.eval("window.got").await, Value::Null);
    let complaints = page.browser.complaints().await;
    for directive in ["script-src", "style-src"] {
        assert!(complaints.iter().any(|complaint| complaint.contains(directive)), "{complaints:#?}");
    }
}

/// Realistic key names.
const KEYS: [&str; 12] = [
    "acme-eu-1",
    "acme-eu-2",
    "acme-us-1",
    "acme-us-2",
    "batch-1",
    "batch-2",
    "evals",
    "legacy-2023",
    "research",
    "search-ranking",
    "support-bot",
    "translation",
];

/// A realistic service: an occasional 429 for each key, 402 for an exhausted one, 401 for a revoked one.
async fn moody_service() -> Server {
    let asked: Arc<Mutex<HashMap<String, u32>>> = Arc::default();
    Server::start(move |request| {
        let key = key_of(&request).unwrap_or_default().split('_').next().unwrap_or_default().to_owned();
        let place = KEYS.iter().position(|name| **name == key).unwrap_or_default() as u32;
        let mut asked = asked.lock().unwrap();
        let count = asked.entry(key.clone()).or_default();
        *count += 1;
        let wait = (20 + (*count * 37 + place * 53) % 90).to_string();
        let json = ("content-type", "application/json");
        std::future::ready(match (key.as_str(), *count) {
            ("legacy-2023", 300..) => answer_with(401, [json], r#"{"error":{"code":"invalid_api_key"}}"#),
            ("batch-2", 420..) => answer_with(402, [json], r#"{"error":{"code":"insufficient_quota"}}"#),
            (_, count) if count % (70 + 30 * place) == 0 => {
                answer_with(429, [json, ("retry-after", &wait)], "{}")
            }
            _ => {
                let tokens = 400 + (*count * 97 + place * 31) % 1_900;
                answer_with(200, [json], json!({ "usage": { "total_tokens": tokens } }).to_string())
            }
        })
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "it needs a browser"]
async fn a_screenshot_is_kept() {
    let wanted = env::var("SCREENSHOT").ok();
    let time = if wanted.is_some() { 15 * MINUTE + 5 * SECOND } else { 3 * SECOND };
    let service = moody_service().await;
    let lines = (1_u64..)
        .zip(KEYS)
        .map(|(number, key)| format!("{key}|sk-{key}_{:016x}\n", number.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
    let keys = keys_file(&lines.collect::<String>());
    let upstream = format!("http://{}", service.address());
    let gateway = Gateway::start(command([
        "--upstream",
        &upstream,
        "--keys",
        keys.path(),
        "--pace=false",
        "--cooldown",
        "15",
    ]))
    .await;
    let page = Page { browser: Browser::start().await, gateway, service, http: http() };
    page.browser.looks_through(1280, 690, 1.25).await;
    page.browser.prefers("light").await;
    page.browser.open(&page.gateway.admin_url("/admin")).await;

    // An operator disables a key in the last minutes.
    page.ask_for(time * 4 / 5).await;
    let disable = page.http.post(page.gateway.admin_url("/admin/api/keys/translation/disable"));
    disable.header("x-gateway-admin", "1").send().await.unwrap();
    page.ask_for(time / 5).await;
    page.see_status("translation", "Disabled").await;
    let png = page.browser.screenshot().await;
    assert!(png.starts_with(b"\x89PNG"));
    let path = match &wanted {
        Some(path) => Path::new(env!("CARGO_MANIFEST_DIR")).join(path),
        None => Path::new(env!("CARGO_TARGET_TMPDIR")).join("page.png"),
    };
    fs::write(&path, &png).unwrap();
    println!("{} has {} bytes", path.display(), png.len());
    page.end().await;
}
