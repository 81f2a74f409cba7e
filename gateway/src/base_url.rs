//! The URL of an API, and the paths below it.

use std::str::FromStr;

use http::{
    Uri,
    uri::{self, Authority, PathAndQuery, Scheme},
};
use percent_encoding::percent_decode_str;

use crate::this_machine;

/// The URL of the API.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct BaseUrl {
    scheme: Scheme,
    authority: Authority,
    /// Path without a trailing slash.
    base: String,
}

impl BaseUrl {
    /// Host and port.
    pub(crate) fn authority(&self) -> &str {
        self.authority.as_str()
    }

    /// Whether keys do not cross a network in cleartext.
    pub(crate) fn is_safe(&self) -> bool {
        self.scheme == Scheme::HTTPS || this_machine::is_loopback(self.authority.host())
    }

    /// Whether its path ends with a version: `https://api.example.com/v1`.
    pub(crate) fn has_version(&self) -> bool {
        let last = self.base.rsplit('/').next().unwrap_or_default();
        last.strip_prefix('v').is_some_and(|rest| rest.starts_with(|first: char| first.is_ascii_digit()))
    }

    /// Returns the URI of a path and query below this URL, or `None` if they are not valid.
    pub(crate) fn uri_of(&self, path: &PathAndQuery) -> Option<Uri> {
        let mut parts = uri::Parts::default();
        parts.scheme = Some(self.scheme.clone());
        parts.authority = Some(self.authority.clone());
        parts.path_and_query = Some(match &*self.base {
            "" => path.clone(),
            base => format!("{base}{path}").try_into().ok()?,
        });
        Uri::from_parts(parts).ok()
    }

    /// Maps a `Location` below this URL to its path below it, and any other to `None`.
    pub(crate) fn path_of(&self, location: &str) -> Option<String> {
        let uri: Uri = location.parse().ok()?;
        let is_here = match uri.authority() {
            Some(authority) => {
                uri.scheme() == Some(&self.scheme)
                    && authority.host().eq_ignore_ascii_case(self.authority.host())
                    && self.port_of(authority) == self.port_of(&self.authority)
            }
            None => true,
        };
        let path = uri.path_and_query()?.as_str().strip_prefix(&*self.base)?;
        let slash = if path.starts_with('/') { "" } else { "/" };
        let is_below = self.base.is_empty() || path.is_empty() || path.starts_with(['/', '?']);
        // A browser reads a host name after these.
        let names_a_host = ["//", "/\\"].iter().any(|slashes| path.starts_with(slashes));
        if !is_here || !is_below || names_a_host || leads_out(uri.path()) {
            return None;
        }
        Some(format!("{slash}{path}"))
    }

    fn port_of(&self, authority: &Authority) -> u16 {
        let default = if self.scheme == Scheme::HTTPS { 443 } else { 80 };
        authority.port_u16().unwrap_or(default)
    }
}

/// Whether any server might read a segment as `..`. Some servers decode a path twice, cut a segment at its parameters,
/// or end it at a NUL.
pub(crate) fn leads_out(path: &str) -> bool {
    // Most paths have nothing to decode.
    if !path.bytes().any(|byte| [b'%', 0].contains(&byte)) && !path.contains("..") {
        return false;
    }
    let mut path = path.to_owned();
    loop {
        if path.contains('\0')
            || path.split(['/', '\\']).any(|segment| segment.split(';').next() == Some(".."))
        {
            return true;
        }
        let decoded = percent_decode_str(&path).decode_utf8_lossy().into_owned();
        // A decoded path is shorter, so the loop ends.
        if decoded.len() >= path.len() {
            return false;
        }
        path = decoded;
    }
}

impl FromStr for BaseUrl {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let uri: Uri = text.parse().map_err(|_| "not a URL")?;
        let parts = uri.into_parts();
        let scheme = parts.scheme.filter(|scheme| [Scheme::HTTP, Scheme::HTTPS].contains(scheme));
        let (Some(scheme), Some(authority)) = (scheme, parts.authority) else {
            return Err("it must be http://… or https://…");
        };
        if authority.as_str().contains('@') {
            return Err("it has a user or password: keys come from --keys, --state or --mongodb");
        }
        let path = parts.path_and_query;
        if path.as_ref().is_some_and(|path| path.query().is_some()) {
            return Err("it has a query, which can't be put before the path of a request");
        }
        let base = path.map_or(String::new(), |path| path.path().trim_end_matches('/').to_owned());
        Ok(Self { scheme, authority, base })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(upstream: &str, location: &str) -> Option<String> {
        let upstream: BaseUrl = upstream.parse().unwrap();
        upstream.path_of(location)
    }

    #[test]
    fn locations_under_the_upstream_become_gateway_paths() {
        for (location, expected) in [
            ("https://api.example.com/tenant/v1/files/1?part=2", "/v1/files/1?part=2"),
            ("https://API.example.com:443/tenant", "/"),
            ("https://api.example.com/tenant?page=2", "/?page=2"),
            ("/tenant/v1/files/1", "/v1/files/1"),
        ] {
            assert_eq!(
                path("https://api.example.com/tenant/", location).as_deref(),
                Some(expected),
                "{location}"
            );
        }
        assert_eq!(path("http://localhost:1", "http://localhost:1/v1").as_deref(), Some("/v1"));
        assert_eq!(path("http://localhost:1", "http://localhost:1?q").as_deref(), Some("/?q"));
    }

    #[test]
    fn one_that_leads_elsewhere_is_none() {
        for location in [
            "https://files.example.com/tenant/1",
            "http://api.example.com/tenant/1",
            "https://api.example.com:8443/tenant/1",
            "https://api.example.com/tenants",
            "https://api.example.com/tenant/../other",
            "https://api.example.com/tenant//files.example.com",
            "https://api.example.com/tenant/\\files.example.com",
            "//files.example.com/tenant",
            "/login",
            "part/2",
            "",
        ] {
            assert_eq!(path("https://api.example.com/tenant", location), None, "{location}");
        }
        assert_eq!(path("https://api.example.com", "//files.example.com"), None);
        assert_eq!(path("https://api.example.com", "https://api.example.com//files.example.com"), None);
    }
}
