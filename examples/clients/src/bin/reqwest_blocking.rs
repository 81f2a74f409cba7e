//! `reqwest::blocking`, with keys that are leased.

use std::{error::Error, time::Duration};

use clients::service;
use tower_key_rotation::{KeyLeases, KeyPool, Traits, classify::ResponseHead, same_origin_redirects};

fn main() -> Result<(), Box<dyn Error>> {
    let pool = KeyPool::builder().keys_from_env("KEYS").build()?;
    let keys = KeyLeases::new(&pool).wait_up_to(Duration::from_secs(30));
    let http: reqwest::blocking::ClientBuilder = same_origin_redirects(reqwest::Client::builder()).into();
    let http = http.build()?;

    let reply = keys.with_key_blocking(&Traits::new(), |key| {
        let response = http
            .post(format!("{}/v1/chat/completions", service()))
            .bearer_auth(key.secret().expose())
            .json(&serde_json::json!({ "model": "gpt-5-mini" }))
            .send()?;
        key.answered(&ResponseHead::new(response.status(), response.headers()));
        response.json::<serde_json::Value>()
    })?;
    println!("{}", reply["choices"][0]["message"]["content"]);
    Ok(())
}
