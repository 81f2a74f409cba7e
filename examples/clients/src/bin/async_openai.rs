//! `async-openai` gives a factory of requests to a service: each attempt is a new request, uploads too.

use std::{error::Error, time::Duration};

use async_openai::{
    Client,
    config::OpenAIConfig,
    error::OpenAIError,
    middleware::HttpRequestFactory,
    types::{
        chat::{
            ChatCompletionRequestUserMessageArgs, CreateChatCompletionRequest,
            CreateChatCompletionRequestArgs,
        },
        files::{CreateFileRequest, FileInput, FilePurpose},
    },
};
use clients::service;
use futures_util::StreamExt;
use http::{HeaderValue, header::AUTHORIZATION};
use http_body_util::BodyExt;
use tower::service_fn;
use tower_key_rotation::{Error as KeyError, KeyLease, KeyLeases, KeyPool, Traits, classify::ResponseHead};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let pool = KeyPool::builder().keys_from_env("KEYS").build()?;
    let keys = KeyLeases::new(&pool).wait_up_to(Duration::from_secs(30));
    let http = reqwest::Client::new();
    let rotating = service_fn(move |factory: HttpRequestFactory| {
        let (keys, http) = (keys.clone(), http.clone());
        async move {
            let traits = Traits::new().scope("gpt-5-mini");
            let sent = keys.with_key(&traits, async |key| {
                let mut request = factory.build().await?;
                let bearer = HeaderValue::try_from(format!("Bearer {}", key.secret().expose()))
                    .map_err(|error| OpenAIError::InvalidArgument(error.to_string()))?;
                request.headers_mut().insert(AUTHORIZATION, bearer);
                let response = http.execute(request).await?;
                key.answered(&ResponseHead::new(response.status(), response.headers()));
                Ok(until_read(response, key))
            });
            sent.await.map_err(|error| match error {
                KeyError::Inner(error) => error,
                no_key => OpenAIError::Boxed(no_key.into()),
            })
        }
    });
    let config =
        OpenAIConfig::new().with_api_base(format!("{}/v1", service())).with_api_key("in each request");
    let client = Client::with_config(config).with_http_service(rotating);

    let reply = client.chat().create(question(false)?).await?;
    println!("{}", reply.choices[0].message.content.as_deref().unwrap_or_default());

    let mut stream = client.chat().create_stream(question(true)?).await?;
    while let Some(part) = stream.next().await {
        print!("{}", part?.choices[0].delta.content.as_deref().unwrap_or_default());
    }
    println!();

    let file = CreateFileRequest {
        file: FileInput::from_vec_u8("lines.jsonl".to_owned(), b"{}\n".repeat(1_000)),
        purpose: FilePurpose::Batch,
        expires_after: None,
    };
    println!("{}", client.files().create(file).await?.id);
    Ok(())
}

fn question(is_streamed: bool) -> Result<CreateChatCompletionRequest, OpenAIError> {
    let message = ChatCompletionRequestUserMessageArgs::default().content("Hello").build()?;
    CreateChatCompletionRequestArgs::default()
        .model("gpt-5-mini")
        .messages([message.into()])
        .stream(is_streamed)
        .build()
}

/// The request is in flight until its response has been read.
fn until_read(response: reqwest::Response, key: KeyLease) -> reqwest::Response {
    let (head, body) = http::Response::from(response).into_parts();
    let body = body.into_data_stream().inspect(move |_| _ = &key);
    http::Response::from_parts(head, reqwest::Body::wrap_stream(body)).into()
}
