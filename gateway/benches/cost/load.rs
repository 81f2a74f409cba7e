//! Callers with keep-alive connections, which send one request after the other.

use std::{
    error::Error,
    io::{self, ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use super::TOKEN;

pub(crate) struct Run {
    took: Duration,
    /// Of each request, in seconds, in order.
    latencies: Vec<f64>,
}

impl Run {
    pub(crate) fn a_second(&self) -> f64 {
        self.latencies.len() as f64 / self.took.as_secs_f64()
    }

    /// The latency that this part of the requests does not exceed.
    pub(crate) fn at(&self, part: f64) -> f64 {
        self.latencies[(self.latencies.len() as f64 * part) as usize]
    }
}

/// Sends requests over this many connections and waits for the responses, which must have status 200.
pub(crate) fn run(address: SocketAddr, connections: usize, requests: usize) -> Result<Run, Box<dyn Error>> {
    let callers = (0..connections)
        .map(|number| {
            let share = requests / connections + usize::from(number < requests % connections);
            Ok((TcpStream::connect(address)?, number, share))
        })
        .collect::<io::Result<Vec<_>>>()?;
    let began = Instant::now();
    let callers: Vec<_> = callers
        .into_iter()
        .map(|(connection, number, share)| thread::spawn(move || call(&connection, number, share)))
        .collect();
    let mut latencies = Vec::with_capacity(requests);
    for caller in callers {
        latencies.extend(caller.join().map_err(|_| "a caller has panicked")??);
    }
    let took = began.elapsed();
    latencies.sort_by(f64::total_cmp);
    Ok(Run { took, latencies })
}

/// Each connection carries a conversation of its own.
fn call(mut connection: &TcpStream, number: usize, requests: usize) -> io::Result<Vec<f64>> {
    connection.set_nodelay(true)?;
    let body = format!(
        r#"{{"model":"gpt-5-mini","messages":[{{"role":"system","content":"You are a helpful assistant."}},{{"role":"user","content":"Hello, I am caller {number}."}}],"max_completion_tokens":200}}"#
    );
    let request = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {TOKEN}\r\n\
         content-type: application/json\r\naccept: application/json\r\nuser-agent: OpenAI/Python 2.6.1\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut messages = Messages::new(connection);
    let mut latencies = Vec::with_capacity(requests);
    for _ in 0..requests {
        let began = Instant::now();
        connection.write_all(request.as_bytes())?;
        let head = messages.next()?.ok_or(ErrorKind::UnexpectedEof)?;
        if !head.starts_with("HTTP/1.1 200") {
            return Err(io::Error::other(head));
        }
        latencies.push(began.elapsed().as_secs_f64());
    }
    Ok(latencies)
}

/// Reads messages with a `content-length` from a connection.
pub(crate) struct Messages<'c> {
    connection: &'c TcpStream,
    read: Vec<u8>,
}

impl<'c> Messages<'c> {
    pub(crate) fn new(connection: &'c TcpStream) -> Self {
        Self { connection, read: Vec::new() }
    }

    /// Returns the head of the next message, whose body it has read, or `None` after the last message.
    pub(crate) fn next(&mut self) -> io::Result<Option<String>> {
        loop {
            if let Some(end) = self.read.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
                let head = String::from_utf8_lossy(&self.read[..end]).into_owned();
                let lines = head.lines().filter_map(|line| line.split_once(':'));
                let length = lines
                    .filter(|(name, _)| name.eq_ignore_ascii_case("content-length"))
                    .find_map(|(_, value)| value.trim().parse::<usize>().ok())
                    .unwrap_or(0);
                while self.read.len() < end + 4 + length {
                    if self.read_more()? == 0 {
                        return Err(ErrorKind::UnexpectedEof.into());
                    }
                }
                self.read.drain(..end + 4 + length);
                return Ok(Some(head));
            }
            if self.read_more()? == 0 {
                return Ok(None);
            }
        }
    }

    fn read_more(&mut self) -> io::Result<usize> {
        let mut more = [0; 8192];
        let count = self.connection.read(&mut more)?;
        self.read.extend_from_slice(&more[..count]);
        Ok(count)
    }
}
