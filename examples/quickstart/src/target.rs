//! Where requests go, and what is in them.

use reqwest::{
    Body, Method, Request, Url,
    header::{CONTENT_TYPE, HeaderMap, HeaderValue},
};

use crate::{options::Options, watch::Witness};

const JSON: HeaderValue = HeaderValue::from_static("application/json");

const LOCAL_BODY: &str = r#"{"model":"local","messages":[{"role":"user","content":"Hello?"}]}"#;

pub(crate) struct Target {
    method: Method,
    url: Url,
    headers: HeaderMap,
    body: Option<String>,
    witness: Witness,
}

impl Target {
    /// The local service, which is at that URL.
    pub(crate) fn local(url: &str) -> Result<Self, <Url as std::str::FromStr>::Err> {
        Ok(Self {
            method: Method::POST,
            url: url.parse()?,
            headers: HeaderMap::from_iter([(CONTENT_TYPE, JSON)]),
            body: Some(LOCAL_BODY.to_owned()),
            witness: Witness::Service,
        })
    }

    /// A real one.
    pub(crate) fn upstream(url: &Url, options: &Options) -> Self {
        let mut headers: HeaderMap = options.headers.iter().cloned().collect();
        if options.body.is_some() {
            headers.entry(CONTENT_TYPE).or_insert(JSON);
        }
        let method = if options.body.is_some() { Method::POST } else { Method::GET };
        Self {
            method: options.method.clone().unwrap_or(method),
            url: options.path.as_deref().map_or_else(|| url.clone(), |path| with_path(url, path)),
            headers,
            body: options.body.clone(),
            witness: Witness::Client,
        }
    }

    pub(crate) fn request(&self) -> Request {
        let mut request = Request::new(self.method.clone(), self.url.clone());
        *request.headers_mut() = self.headers.clone();
        *request.body_mut() = self.body.clone().map(Body::from);
        request
    }

    /// Where it is, without what else a URL may hold: a password, a key in the query.
    pub(crate) fn name(&self) -> String {
        let kind = if self.is_local() { "a local service, " } else { "" };
        format!("{kind}{}", self.url.origin().ascii_serialization())
    }

    pub(crate) fn witness(&self) -> Witness {
        self.witness
    }

    pub(crate) fn is_local(&self) -> bool {
        self.witness == Witness::Service
    }
}

/// The path and query in place of the URL's own. It can't lead to another host.
fn with_path(url: &Url, path: &str) -> Url {
    let (path, query) = path.split_once('?').map_or((path, None), |(path, query)| (path, Some(query)));
    let mut url = url.clone();
    url.set_path(path);
    url.set_query(query);
    url
}
