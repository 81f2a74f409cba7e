//! An upstream behind TLS, which speaks HTTP/2.

use std::{io, net::SocketAddr, sync::Arc};

use axum::serve::Listener;
use base64::prelude::{BASE64_STANDARD, Engine};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{ServerConfig, pki_types::PrivateKeyDer},
    server::TlsStream,
};

use super::{
    TestFile, file,
    gateway::{Gateway, command},
    keys_file,
};

/// Accepts TLS connections and skips failed handshakes.
pub struct Tls(TcpListener, TlsAcceptor);

impl Listener for Tls {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, SocketAddr) {
        loop {
            if let Ok((connection, address)) = self.0.accept().await
                && let Ok(connection) = self.1.accept(connection).await
            {
                return (connection, address);
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

fn pem(certificate: &[u8]) -> String {
    let text = BASE64_STANDARD.encode(certificate);
    format!("-----BEGIN CERTIFICATE-----\n{text}\n-----END CERTIFICATE-----\n")
}

/// Returns a TLS listener for an HTTP/2 upstream, its address, and its certificate file.
pub async fn listen() -> (Tls, SocketAddr, TestFile) {
    let certificate = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let key = PrivateKeyDer::Pkcs8(certificate.signing_key.serialize_der().into());
    let config = ServerConfig::builder().with_no_client_auth();
    let mut config = config.with_single_cert(vec![certificate.cert.der().clone()], key).unwrap();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let listener = Tls(TcpListener::bind("127.0.0.1:0").await.unwrap(), TlsAcceptor::from(Arc::new(config)));
    let address = listener.local_addr().unwrap();
    (listener, address, file("pem", &pem(certificate.cert.der())))
}

/// A gateway in front of an upstream at this port of `localhost`, whose certificate it trusts.
pub async fn gateway<const N: usize>(port: u16, trusted: &TestFile, arguments: [&str; N]) -> Gateway {
    let (keys, url) = (keys_file("a|sk-a"), format!("https://localhost:{}", port));
    let mut command = command(["--upstream", &url, "--keys", keys.path()].into_iter().chain(arguments));
    command.env("SSL_CERT_FILE", trusted.path());
    Gateway::start(command).await
}
