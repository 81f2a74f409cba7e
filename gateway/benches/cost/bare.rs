//! The least that a reverse proxy made of hyper does: it removes hop-by-hop headers and the caller's key, and adds one.

use std::{
    error::Error,
    io::{Write, stderr},
    net::SocketAddr,
};

use http::{
    HeaderMap, HeaderValue, Uri,
    header::{AUTHORIZATION, CONNECTION, HOST, TE, TRAILER, TRANSFER_ENCODING, UPGRADE},
    uri::Scheme,
};
use hyper::{Request, Response, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioIo, TokioTimer},
};
use tokio::net::TcpListener;

type HttpClient = Client<HttpConnector, Incoming>;

/// Serves until the process ends.
#[tokio::main]
pub(crate) async fn run(upstream: SocketAddr) -> Result<(), Box<dyn Error>> {
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    let client = Client::builder(TokioExecutor::new()).pool_timer(TokioTimer::new()).build(connector);
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    writeln!(stderr(), "listening on http://{}", listener.local_addr()?)?;
    loop {
        let (connection, _) = listener.accept().await?;
        connection.set_nodelay(true)?;
        let client = client.clone();
        tokio::spawn(async move {
            let service = service_fn(|request| forward(&client, upstream, request));
            let mut http = http1::Builder::new();
            // An error concerns only the caller.
            _ = http.timer(TokioTimer::new()).serve_connection(TokioIo::new(connection), service).await;
        });
    }
}

async fn forward(
    client: &HttpClient,
    upstream: SocketAddr,
    mut request: Request<Incoming>,
) -> Result<Response<Incoming>, Box<dyn Error + Send + Sync>> {
    let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
    *request.uri_mut() =
        Uri::builder().scheme(Scheme::HTTP).authority(upstream.to_string()).path_and_query(path).build()?;
    let headers = request.headers_mut();
    remove_hop_by_hop(headers);
    headers.remove(HOST);
    headers.insert(AUTHORIZATION, HeaderValue::from_static("Bearer sk-0"));
    let mut response = client.request(request).await?;
    remove_hop_by_hop(response.headers_mut());
    Ok(response)
}

fn remove_hop_by_hop(headers: &mut HeaderMap) {
    for name in [CONNECTION, TE, TRAILER, TRANSFER_ENCODING, UPGRADE] {
        headers.remove(name);
    }
}
