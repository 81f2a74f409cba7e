use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    time::sleep,
};

/// What the proxy does to the bytes that pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    None,
    /// Cuts connections, and closes new ones at once.
    Cut,
    /// Delays each answer.
    Delay(Duration),
    /// Keeps connections open and passes nothing.
    Silence,
    /// Passes this many bytes of the next answer on each connection, then cuts it.
    Truncate(usize),
    /// Replaces the message of MongoDB's fail point by as much of this text as has room.
    Quote(&'static str),
}

/// A TCP proxy between a client and a server on this machine.
#[derive(Clone, Debug)]
pub struct Proxy {
    address: SocketAddr,
    fault: watch::Sender<Fault>,
    connections: Arc<AtomicUsize>,
}

impl Proxy {
    pub async fn to(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = Self {
            address: listener.local_addr().unwrap(),
            fault: watch::Sender::new(Fault::None),
            connections: Arc::default(),
        };
        let (fault, connections) = (proxy.fault.clone(), proxy.connections.clone());
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                connections.fetch_add(1, SeqCst);
                tokio::spawn(carry(client, server, fault.subscribe()));
            }
        });
        proxy
    }

    pub fn set(&self, fault: Fault) {
        self.fault.send_replace(fault);
    }

    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// The URI by which a client connects through this proxy.
    pub fn uri(&self) -> String {
        format!("mongodb://{}/?directConnection=true", self.address)
    }

    pub fn connections(&self) -> usize {
        self.connections.load(SeqCst)
    }
}

async fn carry(client: TcpStream, server: SocketAddr, fault: watch::Receiver<Fault>) {
    if *fault.borrow() == Fault::Cut {
        return;
    }
    let Ok(server) = TcpStream::connect(server).await else { return };
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let cut = until_cut(fault.clone());
    tokio::select! {
        () = cut => {}
        _ = pass(from_client, to_server, fault.clone(), false) => {}
        _ = pass(from_server, to_client, fault, true) => {}
    }
}

async fn until_cut(mut fault: watch::Receiver<Fault>) {
    if fault.wait_for(|fault| *fault == Fault::Cut).await.is_err() {
        // The test is over.
    }
}

async fn pass(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut fault: watch::Receiver<Fault>,
    answers: bool,
) -> io::Result<()> {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let count = from.read(&mut buffer).await?;
        if count == 0 {
            return Ok(());
        }
        let _ = fault.wait_for(|fault| *fault != Fault::Silence).await;
        let now = *fault.borrow();
        match now {
            Fault::Delay(time) if answers => sleep(time).await,
            Fault::Truncate(bytes) if answers => {
                to.write_all(&buffer[..bytes.min(count)]).await?;
                return Ok(());
            }
            Fault::Quote(text) if answers => quote(text, &mut buffer[..count]),
            _ => {}
        }
        to.write_all(&buffer[..count]).await?;
    }
}

fn quote(text: &str, answer: &mut [u8]) {
    const TOLD_TO: &[u8] = b"Failing command via 'failCommand' failpoint";
    let found = answer.windows(TOLD_TO.len()).position(|window| window == TOLD_TO);
    if let Some(at) = found {
        answer[at..at + TOLD_TO.len()].copy_from_slice(&text.as_bytes()[..TOLD_TO.len()]);
    }
}
