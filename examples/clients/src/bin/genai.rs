//! `genai` takes a key for each request, and no service: the key is leased.

use std::{error::Error, time::Duration};

use clients::service;
use futures_util::StreamExt;
use genai::{
    Client, ModelIden, ServiceTarget,
    adapter::AdapterKind,
    chat::{ChatMessage, ChatRequest, ChatStreamEvent},
    resolver::{AuthData, Endpoint},
};
use tower_key_rotation::{KeyLease, KeyLeases, KeyPool, Traits, classify::ResponseHead};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let pool = KeyPool::builder().keys_from_env("KEYS").build()?;
    let keys = KeyLeases::new(&pool).wait_up_to(Duration::from_secs(30));
    let client = Client::new()?;
    let question = ChatRequest::new(vec![ChatMessage::user("Hello")]);

    let reply = keys
        .with_key(&Traits::new(), async |key| {
            let reply = client.exec_chat(target(&key), question.clone(), None).await;
            reply.inspect_err(|error| answered(&key, error))
        })
        .await?;
    println!("{}", reply.first_text().unwrap_or_default());

    // The key stays beside the stream: the request is in flight until its end.
    let (mut stream, _key) = keys
        .with_key(&Traits::new(), async |key| {
            let reply = client.exec_chat_stream(target(&key), question.clone(), None).await;
            let reply = reply.inspect_err(|error| answered(&key, error))?;
            // The status of a stream is known with its first event.
            let mut stream = Box::pin(reply.stream);
            while let Some(event) = stream.next().await {
                match event.inspect_err(|error| answered(&key, error))? {
                    ChatStreamEvent::Start => {}
                    ChatStreamEvent::Chunk(chunk) => {
                        print!("{}", chunk.content);
                        break;
                    }
                    _ => break,
                }
            }
            Ok::<_, genai::Error>((stream, key))
        })
        .await?;
    while let Some(event) = stream.next().await {
        if let ChatStreamEvent::Chunk(chunk) = event? {
            print!("{}", chunk.content);
        }
    }
    println!();
    Ok(())
}

fn target(key: &KeyLease) -> ServiceTarget {
    ServiceTarget {
        endpoint: Endpoint::from_owned(format!("{}/v1/", service())),
        auth: AuthData::from_single(key.secret().expose()),
        model: ModelIden::new(AdapterKind::OpenAI, "gpt-5-mini"),
    }
}

/// Tells the pool what the error means for the key.
fn answered(key: &KeyLease, error: &genai::Error) {
    // That of a stream is inside another one.
    let error = match error {
        genai::Error::WebStream { error: inner, .. } => inner.downcast_ref().unwrap_or(error),
        error => error,
    };
    if let (Some(status), Some(headers)) = (error.status(), error.headers()) {
        key.answered(&ResponseHead::new(status, headers));
    }
}
