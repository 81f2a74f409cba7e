//! Which requests go to an upstream: by the path's beginning, by the host, or all that go to no other.

use std::borrow::Cow;

use crate::health;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    /// Requests for one of these hosts, in lower case and without a port.
    Hosts(Vec<String>),
    /// Requests whose path begins with one of these prefixes.
    Paths {
        prefixes: Vec<String>,
        /// Whether the prefix stays in the path that the upstream gets.
        is_kept: bool,
    },
    /// Requests that no other upstream gets.
    Rest,
}

/// A host or prefix, if it is one.
pub(super) fn host(text: &str) -> Result<String, &'static str> {
    let is_host = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
    if text.is_empty() || !text.bytes().all(is_host) {
        return Err("it must be a host name without a port: api.example.com");
    }
    Ok(text.to_ascii_lowercase())
}

pub(super) fn prefix(text: &str) -> Result<String, &'static str> {
    let prefix = text.strip_suffix('/').unwrap_or(text);
    if prefix.is_empty() {
        return Err("leave it out for the upstream that gets all other requests");
    }
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/.-_~:@!$&'()*+,=".contains(&byte);
    let is_segment = |segment: &str| !["", ".", ".."].contains(&segment);
    let segments = prefix.strip_prefix('/').map(|path| path.split('/').all(is_segment));
    if segments != Some(true) || !prefix.bytes().all(is_plain) {
        return Err("it must be a path such as /openai, without query, escapes and empty segments");
    }
    if health::PATHS.iter().any(|own| below(own, prefix).is_some()) {
        return Err("the gateway itself answers /healthz and /readyz");
    }
    Ok(prefix.to_owned())
}

impl Route {
    /// Whether the route says that it gets requests for this host.
    pub(crate) fn has_host(&self, host: &str) -> bool {
        matches!(self, Self::Hosts(hosts) if hosts.iter().any(|own| own.eq_ignore_ascii_case(host)))
    }

    pub(crate) fn has_hosts(&self) -> bool {
        matches!(self, Self::Hosts(_))
    }

    pub(crate) fn is_rest(&self) -> bool {
        *self == Self::Rest
    }

    /// Returns the part of a path that the route takes away, if the route gets requests for this path by its beginning.
    pub(crate) fn prefix_of(&self, path: &str) -> Option<&str> {
        match self {
            Self::Paths { prefixes, is_kept } => {
                let prefix = prefixes.iter().find(|prefix| below(path, prefix).is_some())?;
                Some(if *is_kept { "" } else { prefix })
            }
            Self::Hosts(_) | Self::Rest => None,
        }
    }

    /// Returns a host or path that both routes get.
    pub(super) fn overlap(&self, other: &Self) -> Option<String> {
        match (self, other) {
            (Self::Rest, Self::Rest) => Some("all requests without another upstream".to_owned()),
            (Self::Hosts(here), Self::Hosts(there)) => here.iter().find(|host| there.contains(host)).cloned(),
            (Self::Paths { prefixes: here, .. }, Self::Paths { prefixes: there, .. }) => {
                let both = here.iter().flat_map(|here| there.iter().map(move |there| (here, there)));
                both.filter_map(|(here, there)| {
                    let deeper = if below(here, there).is_some() { here } else { there };
                    (below(here, there).is_some() || below(there, here).is_some()).then(|| deeper.clone())
                })
                .next()
            }
            _ => None,
        }
    }

    /// Returns a description for people: the hosts, or the prefixes.
    pub(crate) fn shown(&self) -> Cow<'static, str> {
        match self {
            Self::Hosts(hosts) => hosts.join(", ").into(),
            Self::Paths { prefixes, .. } => prefixes.join(", ").into(),
            Self::Rest => "/".into(),
        }
    }
}

/// Returns the rest of a path below a prefix, which begins with `/` or is empty.
pub(crate) fn below<'p>(path: &'p str, prefix: &str) -> Option<&'p str> {
    path.strip_prefix(prefix).filter(|rest| rest.is_empty() || rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(prefixes: &[&str]) -> Route {
        let prefixes = prefixes.iter().map(|text| prefix(text).unwrap()).collect();
        Route::Paths { prefixes, is_kept: false }
    }

    #[test]
    fn a_prefix_ends_at_a_segment() {
        let route = paths(&["/openai", "/v1/chat/"]);
        for (path, expected) in [
            ("/openai", Some("/openai")),
            ("/openai/v1/models", Some("/openai")),
            ("/v1/chat/completions", Some("/v1/chat")),
            ("/openai2/v1", None),
            ("/OpenAI/v1", None),
            ("/v1", None),
            ("//openai", None),
        ] {
            assert_eq!(route.prefix_of(path), expected, "{path}");
        }
    }

    #[test]
    fn prefixes_within_another_overlap() {
        assert_eq!(paths(&["/a"]).overlap(&paths(&["/b", "/a/c"])).as_deref(), Some("/a/c"));
        assert_eq!(paths(&["/a/c"]).overlap(&paths(&["/a"])).as_deref(), Some("/a/c"));
        assert_eq!(paths(&["/a"]).overlap(&paths(&["/ab"])), None);
        assert_eq!(Route::Rest.overlap(&paths(&["/a"])), None);
        let host = |name: &str| Route::Hosts(vec![host(name).unwrap()]);
        assert!(host("API.example.com").overlap(&host("api.example.com")).is_some());
        assert!(host("api.example.com").has_host("Api.Example.Com"));
    }

    #[test]
    fn what_is_no_plain_prefix_is_refused() {
        for text in ["", "/", "openai", "/a//b", "/a/../b", "/%61", "/a?b", "/healthz", "/readyz"] {
            assert!(prefix(text).is_err(), "{text}");
        }
        assert!(host("api.example.com:8080").is_err());
    }
}
