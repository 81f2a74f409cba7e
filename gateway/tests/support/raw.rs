//! Raw HTTP/1.1.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use super::in_time;

/// Sends these bytes and reads until the connection closes.
pub async fn exchange(address: SocketAddr, request: &str) -> String {
    let mut connection = TcpStream::connect(address).await.unwrap();
    connection.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    in_time(connection.read_to_string(&mut answer)).await.unwrap();
    answer
}

/// A raw upstream: it sends these bytes in answer to each connection and reports the received request.
pub async fn raw_upstream(answer: &'static str) -> (SocketAddr, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, seen) = (listener.local_addr().unwrap(), Arc::new(Mutex::new(Vec::new())));
    let arrived = seen.clone();
    tokio::spawn(async move {
        while let Ok((mut connection, _)) = listener.accept().await {
            let mut request = Vec::new();
            while !request.windows(4).any(|end| end == b"\r\n\r\n") {
                if connection.read_buf(&mut request).await.unwrap() == 0 {
                    break;
                }
            }
            arrived.lock().unwrap().push(String::from_utf8(request).unwrap());
            connection.write_all(answer.as_bytes()).await.unwrap();
        }
    });
    (address, seen)
}
