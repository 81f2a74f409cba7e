//! `ollama-rs` takes only an address: that of a gateway, which is a part of this program.

use std::{env, error::Error};

use clients::service;
use key_rotation_gateway::{Config, serve};
use ollama_rs::{
    Ollama,
    generation::chat::{ChatMessage, request::ChatMessageRequest},
};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let keys = env::var("KEYS")?;
    let keys = keys.split(',').filter_map(|key| key.split_once('='));
    let gateway =
        serve(keys.fold(Config::new(service()), |config, (id, secret)| config.key(id, secret))).await?;

    let ollama = Ollama::try_new(gateway.url())?;
    let question = ChatMessageRequest::new("gpt-oss".to_owned(), vec![ChatMessage::user("Hello".to_owned())]);
    println!("{}", ollama.send_chat_messages(question).await?.message.content);
    gateway.shutdown().await?;
    Ok(())
}
