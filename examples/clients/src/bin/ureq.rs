//! `ureq` blocks: so does the lease.

use std::{error::Error, time::Duration};

use clients::service;
use tower_key_rotation::{KeyLeases, KeyPool, Traits, classify::ResponseHead};

fn main() -> Result<(), Box<dyn Error>> {
    let pool = KeyPool::builder().keys_from_env("KEYS").build()?;
    let keys = KeyLeases::new(&pool).wait_up_to(Duration::from_secs(30));
    let agent = ureq::Agent::config_builder().http_status_as_error(false).build().new_agent();

    let reply = keys.with_key_blocking(&Traits::new(), |key| {
        let mut response = agent
            .post(format!("{}/v1/chat/completions", service()))
            .header("authorization", format!("Bearer {}", key.secret().expose()))
            .content_type("application/json")
            .send(r#"{"model":"gpt-5-mini"}"#)?;
        key.answered(&ResponseHead::new(response.status(), response.headers()));
        response.body_mut().read_to_string()
    })?;
    println!("{}", serde_json::from_str::<serde_json::Value>(&reply)?["choices"][0]["message"]["content"]);
    Ok(())
}
