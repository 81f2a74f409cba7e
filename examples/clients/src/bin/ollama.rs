//! `ollama-rs` takes neither a key nor a service: it talks to the gateway, which has the keys.

use std::error::Error;

use clients::service;
use ollama_rs::{
    Ollama,
    generation::chat::{ChatMessage, request::ChatMessageRequest},
};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    // The gateway's address: `key-rotation-gateway --upstream https://ollama.com --keys keys.txt`.
    let ollama = Ollama::try_new(service())?;
    let question = ChatMessageRequest::new("gpt-oss".to_owned(), vec![ChatMessage::user("Hello".to_owned())]);
    println!("{}", ollama.send_chat_messages(question).await?.message.content);
    Ok(())
}
