//! Whether a request that came over loopback was meant for this machine, and by somebody on it. A page of any site can
//! send one there from somebody's browser: by an address, which the browser then says, or by a name of its own that it
//! has changed to mean this machine. And a proxy on this machine sends there what comes from anywhere.

use std::net::{IpAddr, SocketAddr};

use axum::{
    extract::ConnectInfo,
    http::{
        HeaderMap, HeaderName, Uri,
        header::{FORWARDED, HOST, VIA},
        request::Parts,
        uri::Authority,
    },
};

pub(crate) const FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// What proxies add, beside all that begins with `x-forwarded-`. Not all do: where one of those stands before the
/// gateway, only tokens help.
const BY_A_PROXY: [HeaderName; 3] = [FORWARDED, VIA, HeaderName::from_static("x-real-ip")];

/// Whether somebody on this machine asks: over loopback, through no proxy, and under a name of this machine.
pub(crate) fn asks(head: &Parts) -> bool {
    let peer = head.extensions.get::<ConnectInfo<SocketAddr>>();
    let is_here = peer.is_some_and(|ConnectInfo(peer)| peer.ip().to_canonical().is_loopback());
    is_here && !head.headers.keys().any(is_by_a_proxy) && is_named_by(&head.headers, &head.uri)
}

fn is_by_a_proxy(name: &HeaderName) -> bool {
    BY_A_PROXY.contains(name) || name.as_str().starts_with("x-forwarded-")
}

/// Whether a browser sends it for a page of another site.
pub(crate) fn is_for_another_site(headers: &HeaderMap) -> bool {
    headers.get(FETCH_SITE).is_some_and(|site| site == "cross-site")
}

/// By its `Host` and, of HTTP/2, its `:authority`: all that there are, and there is one.
fn is_named_by(headers: &HeaderMap, uri: &Uri) -> bool {
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

    #[test]
    fn who_comes_from_elsewhere_or_through_a_proxy_is_not_taken_for_somebody_on_this_machine() {
        let asked = |peer: &str, header: &str| {
            let request = Request::get("/").header(HOST, "localhost").header(header, "x");
            let peer = ConnectInfo(peer.parse::<SocketAddr>().unwrap());
            asks(&request.extension(peer).body(()).unwrap().into_parts().0)
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
