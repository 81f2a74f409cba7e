//! What the gateway serves at present. A request sees one state of it from its beginning to its end.

use std::sync::Arc;

use arc_swap::ArcSwap;
use http::uri::PathAndQuery;

use crate::{callers::Callers, upstream::Upstream};

pub(crate) struct Served {
    pub(crate) upstreams: Vec<Arc<Upstream>>,
    pub(crate) callers: Callers,
}

/// The state that the next request sees.
#[derive(Clone)]
pub(crate) struct Current(Arc<ArcSwap<Served>>);

impl Current {
    pub(crate) fn new(served: Served) -> Self {
        Self(Arc::new(ArcSwap::from_pointee(served)))
    }

    pub(crate) fn get(&self) -> Arc<Served> {
        self.0.load_full()
    }

    /// Changes what the next request sees.
    pub(crate) fn set(&self, served: Served) {
        self.0.store(Arc::new(served));
    }
}

impl Served {
    pub(crate) fn upstream(&self, name: &str) -> Option<&Arc<Upstream>> {
        self.upstreams.iter().find(|upstream| upstream.name() == name)
    }

    /// Returns the upstream for a request, and the beginning of the path that it does not get. A host decides before a
    /// path, and an upstream with neither gets the rest.
    pub(crate) fn route(
        &self,
        host: impl FnOnce() -> Option<String>,
        path: &str,
    ) -> Option<(&Arc<Upstream>, &str)> {
        let routes = || self.upstreams.iter().map(|upstream| (upstream, &upstream.config.route));
        let has_hosts = routes().any(|(_, route)| route.has_hosts());
        if has_hosts
            && let Some(host) = host()
            && let Some((upstream, _)) = routes().find(|(_, route)| route.has_host(&host))
        {
            return Some((upstream, ""));
        }
        let by_path = routes().find_map(|(upstream, route)| Some((upstream, route.prefix_of(path)?)));
        by_path.or_else(|| routes().find(|(_, route)| route.is_rest()).map(|(upstream, _)| (upstream, "")))
    }
}

/// Returns a path and query without the beginning of the path.
pub(crate) fn without(prefix: &str, path: &PathAndQuery) -> Option<PathAndQuery> {
    if prefix.is_empty() {
        return Some(path.clone());
    }
    let rest = path.as_str().strip_prefix(prefix)?;
    let slash = if rest.starts_with('/') { "" } else { "/" };
    format!("{slash}{rest}").try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_leaves_a_path_behind() {
        for (path, expected) in
            [("/openai", "/"), ("/openai?a=b", "/?a=b"), ("/openai/v1?a", "/v1?a"), ("/openai/", "/")]
        {
            assert_eq!(without("/openai", &path.parse().unwrap()).unwrap(), expected, "{path}");
        }
    }
}
