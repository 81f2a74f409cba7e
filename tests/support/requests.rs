use reqwest::{Method, Request};
use tower::{Service, ServiceExt};

/// A client that ignores the proxies of the environment.
pub fn http() -> reqwest::Client {
    reqwest::Client::builder().no_proxy().build().unwrap()
}

pub fn get_request(url: &str) -> Request {
    Request::new(Method::GET, url.parse().unwrap())
}

pub async fn send<S: Service<Request> + Clone>(
    client: &S,
    request: Request,
) -> Result<S::Response, S::Error> {
    client.clone().oneshot(request).await
}

pub async fn get<S: Service<Request> + Clone>(client: &S, url: &str) -> Result<S::Response, S::Error> {
    send(client, get_request(url)).await
}

/// Returns the status of a GET that must succeed.
pub async fn status<S>(client: &S, url: &str) -> u16
where
    S: Service<Request, Response = reqwest::Response> + Clone,
    S::Error: std::fmt::Debug,
{
    get(client, url).await.unwrap().status().as_u16()
}
