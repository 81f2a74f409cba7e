//! `aws-smithy`: the clients that its code generator makes take a connector, for services with bearer tokens or API keys.

use std::{convert::Infallible, error::Error, fmt};

use aws_smithy_runtime::client::orchestrator::operation::Operation;
use aws_smithy_runtime_api::client::{
    http::{HttpConnector, HttpConnectorFuture, SharedHttpConnector, http_client_fn},
    orchestrator::{HttpRequest, HttpResponse},
    result::ConnectorError,
};
use aws_smithy_types::body::SdkBody;
use bytes::Bytes;
use clients::service;
use http_body_util::Full;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector as TcpConnector},
    rt::TokioExecutor,
};
use tower::{BoxError, Layer, ServiceExt};
use tower_key_rotation::{
    Failover, Inject, KeyPool, KeyRotation, KeyRotationLayer, classify::TooManyRequests,
};

type Rotating = KeyRotation<Client<TcpConnector, Full<Bytes>>, TooManyRequests, Failover>;

struct Connector(Rotating);

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Connector")
    }
}

impl HttpConnector for Connector {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        let client = self.0.clone();
        HttpConnectorFuture::new(async move {
            send(client, request).await.map_err(|error| ConnectorError::other(error, None))
        })
    }
}

async fn send(client: Rotating, request: HttpRequest) -> Result<HttpResponse, BoxError> {
    let request = request.try_into_http1x()?;
    // A body in memory can be sent again. One that streams would need a client without failover.
    let (head, body) = request.into_parts();
    let body = body.bytes().ok_or("the body is a stream")?;
    let request = http::Request::from_parts(head, Full::new(Bytes::copy_from_slice(body)));
    let response = client.oneshot(request).await?;
    Ok(HttpResponse::try_from(response.map(SdkBody::from_body_1_x))?)
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let pool = KeyPool::builder().keys_from_env("KEYS").inject(Inject::header("x-api-key")).build()?;
    let http = Client::builder(TokioExecutor::new()).build_http();
    let connector = SharedHttpConnector::new(Connector(
        KeyRotationLayer::new(&pool).failover(Failover::attempts(2)).layer(http),
    ));

    // A generated client takes it by `.http_client(…)` in its configuration.
    let operation = Operation::builder()
        .service_name("notes")
        .operation_name("PutNote")
        .http_client(http_client_fn(move |_, _| connector.clone()))
        .endpoint_url(&service())
        .no_auth()
        .no_retry()
        .serializer(|note: String| {
            let mut request = HttpRequest::new(SdkBody::from(note));
            request.set_method("PUT")?;
            request.set_uri("/notes/1")?;
            Ok(request)
        })
        .deserializer::<_, Infallible>(|response| {
            let body = response.body().bytes().unwrap_or_default();
            Ok(String::from_utf8_lossy(body).into_owned())
        })
        .build();
    println!("{}", operation.invoke("a note".to_owned()).await?);
    Ok(())
}
