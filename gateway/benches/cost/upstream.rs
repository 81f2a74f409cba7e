//! An upstream that answers at once, as OpenAI does: with rate limit headers, and with usage in the body.

use std::{
    io::{self, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    thread,
};

use super::load::Messages;

const BODY: &str = r#"{"id":"chatcmpl-B9MBs8CjcvOU2jLn4n570S5qMJKcT","object":"chat.completion","created":1741569952,"model":"gpt-5-mini-2025-08-07","choices":[{"index":0,"message":{"role":"assistant","content":"Hello! How can I help you today? Tell me about the task, the \"input\" that you have,\nand the result that you expect; then I can propose the first steps.","refusal":null,"annotations":[]},"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":19,"completion_tokens":41,"total_tokens":60,"prompt_tokens_details":{"cached_tokens":0,"audio_tokens":0},"completion_tokens_details":{"reasoning_tokens":0,"audio_tokens":0,"accepted_prediction_tokens":0,"rejected_prediction_tokens":0}},"service_tier":"default","system_fingerprint":null}"#;

const HEAD: &str = "HTTP/1.1 200 OK\r\n\
    date: Mon, 02 Nov 2026 12:00:00 GMT\r\n\
    content-type: application/json\r\n\
    openai-version: 2020-10-01\r\n\
    openai-processing-ms: 410\r\n\
    x-request-id: req_5d7dcb5f9c5c4c2f8f8d8a8f5c1f2e3d\r\n\
    x-ratelimit-limit-requests: 1000000\r\n\
    x-ratelimit-limit-tokens: 1000000000\r\n\
    x-ratelimit-remaining-requests: 999999\r\n\
    x-ratelimit-remaining-tokens: 999999000\r\n\
    x-ratelimit-reset-requests: 1ms\r\n\
    x-ratelimit-reset-tokens: 0s\r\n";

pub(crate) fn start() -> io::Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    thread::spawn(move || {
        for connection in listener.incoming().map_while(Result::ok) {
            // An error means that the proxy has ended.
            thread::spawn(move || answer(connection));
        }
    });
    Ok(address)
}

fn answer(connection: TcpStream) -> io::Result<()> {
    connection.set_nodelay(true)?;
    let response = format!("{HEAD}content-length: {}\r\n\r\n{BODY}", BODY.len());
    let mut messages = Messages::new(&connection);
    while messages.next()?.is_some() {
        (&connection).write_all(response.as_bytes())?;
    }
    Ok(())
}
