//! Whether a request that came over loopback was meant for this machine. A page of any site can send one there from
//! somebody's browser: by an address, which the browser then says, or by a name of its own that it has changed to mean
//! this machine.

use std::net::IpAddr;

use axum::http::{HeaderMap, HeaderName, Uri, header::HOST, uri::Authority};

pub(crate) const FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// Whether a browser sends it for a page of another site.
pub(crate) fn is_for_another_site(headers: &HeaderMap) -> bool {
    headers.get(FETCH_SITE).is_some_and(|site| site == "cross-site")
}

/// By its `Host` and, of HTTP/2, its `:authority`: all that there are, and there is one.
pub(crate) fn is_named_by(headers: &HeaderMap, uri: &Uri) -> bool {
    let hosts = headers.get_all(HOST).iter().map(|host| Authority::try_from(host.as_bytes()).ok());
    let mut hosts = hosts.chain(uri.authority().cloned().map(Some)).peekable();
    hosts.peek().is_some() && hosts.all(|host| host.is_some_and(|host| is_loopback(host.host())))
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

    fn is_named(request: Builder) -> bool {
        let request = request.body(()).unwrap();
        is_named_by(request.headers(), request.uri())
    }

    #[test]
    fn only_names_of_this_machine_are() {
        let is = |host: &str| is_named(Request::get("/admin").header(HOST, host));
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
        ] {
            assert!(!is(host), "{host}");
        }
    }

    #[test]
    fn a_second_name_must_be_of_this_machine_as_well() {
        let request = |uri: &str, host: Option<&str>| {
            let request = Request::get(uri);
            host.into_iter().fold(request, |request, host| request.header(HOST, host))
        };
        assert!(is_named(request("http://localhost/admin", None)));
        assert!(!is_named(request("http://example.com/admin", Some("localhost"))));
        assert!(!is_named(request("/admin", None)));
    }
}
