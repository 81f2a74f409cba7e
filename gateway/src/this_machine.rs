//! Whether a request comes from a program on this machine. A loopback peer alone does not prove that:
//!
//! - A web page can make the user's browser send requests to a loopback address. The browser adds an `Origin`.
//! - A web page can resolve its own host name to a loopback address (DNS rebinding). The `Host` is then foreign.
//! - A reverse proxy on this machine forwards requests from anywhere. Most proxies add a header.

use std::net::{IpAddr, SocketAddr};

use axum::{
    extract::ConnectInfo,
    http::{
        HeaderName, HeaderValue, Version,
        header::{FORWARDED, HOST, ORIGIN, VIA},
        request::Parts,
        uri::Authority,
    },
};

pub(crate) const FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// Headers that proxies add, beside `x-forwarded-…`. Behind a proxy that adds none of them, only a client token
/// protects the gateway.
const BY_A_PROXY: [HeaderName; 3] = [FORWARDED, VIA, HeaderName::from_static("x-real-ip")];

/// Whether a program on this machine asks: over loopback, not through a proxy, and for a local host name.
pub(crate) fn asks(head: &Parts) -> bool {
    let peer = head.extensions.get::<ConnectInfo<SocketAddr>>();
    let is_here = peer.is_some_and(|ConnectInfo(peer)| peer.ip().to_canonical().is_loopback());
    is_here && !head.headers.keys().any(is_by_a_proxy) && is_named(head)
}

fn is_by_a_proxy(name: &HeaderName) -> bool {
    BY_A_PROXY.contains(name) || name.as_str().starts_with("x-forwarded-")
}

/// Whether a browser sends the request for a page of another origin, by `Sec-Fetch-Site` or `Origin`.
///
/// Older browsers send only `Origin`, and not with every request.
pub(crate) fn is_for_another_page(head: &Parts) -> bool {
    let is_another = |origin: &HeaderValue| !hosts(head).all(|host| is_origin_of(origin, host));
    head.headers.get_all(FETCH_SITE).iter().any(|site| site != "same-origin" && site != "none")
        || head.headers.get_all(ORIGIN).iter().any(is_another)
}

/// Compares with `http://` only, because the gateway speaks no TLS. Both sides omit the default port.
fn is_origin_of(origin: &HeaderValue, host: Option<Authority>) -> bool {
    let origin = origin.to_str().ok().and_then(|origin| origin.strip_prefix("http://"));
    // `Authority` compares without regard to case.
    host.is_some_and(|host| origin.is_some_and(|origin| host == origin))
}

fn is_named(head: &Parts) -> bool {
    hosts(head).next().is_some() && hosts(head).all(|host| host.is_some_and(|host| is_loopback(host.host())))
}

/// Whether a request names exactly one valid host (RFC 9110 section 7.2, RFC 9113 section 8.3.1). HTTP/1.0 may name
/// none.
pub(crate) fn has_valid_host(head: &Parts) -> bool {
    let (lines, target) = (head.headers.get_all(HOST).iter().count(), head.uri.authority());
    let is_one = match head.version {
        Version::HTTP_2 => lines <= 1 && lines + target.iter().len() > 0,
        Version::HTTP_11 => lines == 1,
        _ => lines <= 1,
    };
    let is_same = || hosts(head).flatten().collect::<Vec<_>>().windows(2).all(|two| two[0] == two[1]);
    is_one && hosts(head).all(|host| host.is_some()) && (head.version != Version::HTTP_2 || is_same())
}

/// Returns the host that a request names, without a port.
pub(crate) fn host(head: &Parts) -> Option<String> {
    hosts(head).next().flatten().map(|host| host.host().to_owned())
}

/// Iterates over the values of `Host` and, in HTTP/2, `:authority`. A value that is no valid host is `None`.
fn hosts(head: &Parts) -> impl Iterator<Item = Option<Authority>> {
    let hosts = head.headers.get_all(HOST).iter().map(|host| Authority::try_from(host.as_bytes()).ok());
    hosts.chain(head.uri.authority().cloned().map(Some)).map(|host| host.filter(is_host))
}

/// Whether it is a host with an optional port and nothing else. The parser takes `[::1].example.com` for `[::1]`.
fn is_host(authority: &Authority) -> bool {
    let rest = authority.as_str().strip_prefix(authority.host());
    let is_port = |port: &str| port.parse::<u16>().is_ok() && port.bytes().all(|byte| byte.is_ascii_digit());
    !authority.host().is_empty()
        && rest.is_some_and(|rest| rest.is_empty() || rest.strip_prefix(':').is_some_and(is_port))
}

pub(crate) fn is_loopback(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']');
    host.eq_ignore_ascii_case("localhost")
        || address.parse().is_ok_and(|address: IpAddr| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use axum::http::{Request, request::Builder};

    use super::*;

    fn head(request: Builder) -> Parts {
        request.body(()).unwrap().into_parts().0
    }

    #[test]
    fn remote_peers_and_proxied_requests_are_not_local() {
        let asked = |peer: &str, header: &str| {
            let request = Request::get("/").header(HOST, "localhost").header(header, "x");
            let peer = ConnectInfo(peer.parse::<SocketAddr>().unwrap());
            asks(&head(request.extension(peer)))
        };
        assert!(asked("127.0.0.1:1", "accept"));
        assert!(asked("[::ffff:127.0.0.1]:1", "accept"));
        assert!(!asked("10.0.0.1:1", "accept"));
        for header in
            ["forwarded", "via", "x-real-ip", "x-forwarded-for", "x-forwarded-host", "x-forwarded-x"]
        {
            assert!(!asked("127.0.0.1:1", header), "{header}");
        }
    }

    #[test]
    fn only_names_of_this_machine_are() {
        let is = |host: &str| is_named(&head(Request::get("/admin").header(HOST, host)));
        for host in ["localhost", "LOCALHOST:8080", "127.0.0.1:8080", "127.8.9.1", "[::1]", "[::1]:8080"] {
            assert!(is(host), "{host}");
        }
        for host in [
            "example.com",
            "localhost.example.com",
            "127.0.0.1.example.com",
            "0.0.0.0",
            "10.0.0.1",
            "[::2]:8080",
            "",
            "local host",
            "localhost@example.com",
            "[::1].example.com",
            "[::1]x",
            "localhost:x",
        ] {
            assert!(!is(host), "{host}");
        }
    }

    #[test]
    fn a_request_names_one_host() {
        let is_valid = |version: Version, uri: &str, hosts: &[&str]| {
            let request = Request::get(uri).version(version);
            has_valid_host(&head(hosts.iter().fold(request, |request, host| request.header(HOST, *host))))
        };
        for host in ["localhost", "example.com:8080", "[::1]:8080", "10.0.0.1"] {
            assert!(is_valid(Version::HTTP_11, "/", &[host]), "{host}");
        }
        for host in ["", "two words", "me@localhost", "[::1].example.com", "localhost:", "localhost:99999"] {
            assert!(!is_valid(Version::HTTP_11, "/", &[host]), "{host}");
        }
        assert!(!is_valid(Version::HTTP_11, "/", &[]));
        assert!(!is_valid(Version::HTTP_11, "/", &["localhost", "localhost"]));
        assert!(!is_valid(Version::HTTP_11, "http://localhost/", &[]));
        assert!(is_valid(Version::HTTP_11, "http://localhost/", &["localhost"]));
        assert!(is_valid(Version::HTTP_10, "/", &[]));
        assert!(is_valid(Version::HTTP_2, "http://localhost/", &[]));
        assert!(is_valid(Version::HTTP_2, "http://localhost/", &["LOCALHOST"]));
        assert!(is_valid(Version::HTTP_2, "/", &["localhost"]));
        assert!(!is_valid(Version::HTTP_2, "/", &[]));
        assert!(!is_valid(Version::HTTP_2, "http://localhost/", &["example.com"]));
    }

    #[test]
    fn every_host_of_a_request_must_be_local() {
        let request = |uri: &str, host: Option<&str>| {
            let request = Request::get(uri);
            head(host.into_iter().fold(request, |request, host| request.header(HOST, host)))
        };
        assert!(is_named(&request("http://localhost/admin", None)));
        assert!(!is_named(&request("http://example.com/admin", Some("localhost"))));
        assert!(!is_named(&request("/admin", None)));
    }

    #[test]
    fn only_same_origin_pages_are_trusted() {
        let is_another = |headers: &[(HeaderName, &str)]| {
            let request = Request::get("/").header(HOST, "localhost:8080");
            let request = headers.iter().fold(request, |request, (name, value)| request.header(name, *value));
            is_for_another_page(&head(request))
        };
        assert!(!is_another(&[]));
        assert!(!is_another(&[(ORIGIN, "http://localhost:8080")]));
        for site in ["same-origin", "none"] {
            assert!(!is_another(&[(FETCH_SITE, site)]), "{site}");
        }
        for site in ["cross-site", "same-site", "", "nonsense"] {
            assert!(is_another(&[(FETCH_SITE, site)]), "{site}");
            assert!(is_another(&[(FETCH_SITE, "none"), (FETCH_SITE, site)]), "{site}");
        }
        for origin in [
            "http://example.com",
            "http://localhost",
            "http://localhost:3000",
            "http://127.0.0.1:8080",
            "https://localhost:8080",
            "null",
            "",
        ] {
            assert!(is_another(&[(ORIGIN, origin)]), "{origin}");
            assert!(is_another(&[(ORIGIN, "http://localhost:8080"), (ORIGIN, origin)]), "{origin}");
        }
    }
}
