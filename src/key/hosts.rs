//! Which hosts get a key.

use std::net::IpAddr;

/// The hosts that may get a key, and those that may get one in cleartext.
#[derive(Clone, Debug, Default)]
pub(crate) struct Hosts {
    /// All, where `None`.
    pub(crate) allowed: Option<Vec<Host>>,
    pub(crate) cleartext: Vec<Host>,
}

/// Where a request goes, as far as it says.
#[derive(Clone, Copy, Debug)]
pub struct Destination<'a> {
    pub(crate) transport: Transport,
    pub(crate) host: Option<&'a str>,
    pub(crate) port: Option<u16>,
}

/// How a request travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    Tls,
    Cleartext,
    /// The URI has no scheme: the connection decides.
    Unknown,
}

/// Whether a request gets a key.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Ruling {
    Key,
    NoKey(NoKeyBecause),
    RefuseCleartext,
}

/// Why a request goes out without a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoKeyBecause {
    NoHost,
    HostNotAllowed,
    NoScheme,
}

impl Hosts {
    /// Whether every host gets a key by https.
    #[inline]
    pub(crate) fn allows_all(&self) -> bool {
        self.allowed.is_none()
    }

    pub(crate) fn rule(&self, to: Destination<'_>) -> Ruling {
        let Some(host) = to.host.filter(|host| !host.is_empty()) else {
            return Ruling::NoKey(NoKeyBecause::NoHost);
        };
        if let Some(allowed) = &self.allowed
            && !listed(allowed, to, if to.transport == Transport::Cleartext { HTTP } else { HTTPS })
        {
            return Ruling::NoKey(NoKeyBecause::HostNotAllowed);
        }
        let fit_for_cleartext = || is_loopback(host) || listed(&self.cleartext, to, HTTP);
        match to.transport {
            Transport::Tls => Ruling::Key,
            Transport::Cleartext if fit_for_cleartext() => Ruling::Key,
            Transport::Cleartext => Ruling::RefuseCleartext,
            Transport::Unknown if self.allowed.is_some() || fit_for_cleartext() => Ruling::Key,
            Transport::Unknown => Ruling::NoKey(NoKeyBecause::NoScheme),
        }
    }
}

/// Default ports.
const HTTP: u16 = 80;
const HTTPS: u16 = 443;

fn listed(hosts: &[Host], to: Destination<'_>, default_port: u16) -> bool {
    hosts.iter().any(|host| host.matches(to, default_port))
}

fn is_loopback(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']');
    // RFC 6761 §6.3 keeps `localhost` and all below it for loopback.
    match address.parse::<IpAddr>() {
        Ok(address) => address.to_canonical().is_loopback(),
        Err(_) => is_below(host, "localhost") || host.eq_ignore_ascii_case("localhost"),
    }
}

fn is_below(host: &str, domain: &str) -> bool {
    let Some(end) = host.len().checked_sub(domain.len()).filter(|end| *end > 1) else {
        return false;
    };
    // Bytes: in a host of another script, `end` may be inside a character.
    let (below, same) = host.as_bytes().split_at(end);
    below.ends_with(b".") && same.eq_ignore_ascii_case(domain.as_bytes())
}

/// A host, or all hosts below a domain; on any port, or on one.
#[derive(Clone, Debug)]
pub(crate) struct Host {
    name: String,
    below: bool,
    port: Option<u16>,
}

/// A text that is not a host: see
/// [`KeyPoolBuilder::allowed_hosts`](crate::KeyPoolBuilder::allowed_hosts).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a host: give `host`, `host:port` or `*.domain`, without scheme or path")]
pub(crate) struct InvalidHost(String);

impl Host {
    pub(crate) fn all<I, H>(hosts: I) -> Result<Vec<Self>, InvalidHost>
    where
        I: IntoIterator<Item = H>,
        H: AsRef<str>,
    {
        hosts.into_iter().map(|host| Self::parse(host.as_ref())).collect()
    }

    fn parse(host: &str) -> Result<Self, InvalidHost> {
        let invalid = || InvalidHost(host.to_owned());
        let (below, rest) = host.strip_prefix("*.").map_or((false, host), |rest| (true, rest));
        let authority: http::uri::Authority = rest.parse().map_err(|_| invalid())?;
        let name = authority.host();
        if authority.port_u16().is_none() && authority.as_str() != name {
            return Err(invalid());
        }
        if name.trim_end_matches('.').is_empty()
            || name.contains('*')
            || authority.as_str().contains('@')
            || authority.as_str().ends_with(':')
        {
            return Err(invalid());
        }
        Ok(Self { name: name.trim_end_matches('.').to_owned(), below, port: authority.port_u16() })
    }

    fn matches(&self, to: Destination<'_>, default_port: u16) -> bool {
        let Some(host) = to.host else { return false };
        let host = host.strip_suffix('.').unwrap_or(host);
        let name =
            if self.below { is_below(host, &self.name) } else { host.eq_ignore_ascii_case(&self.name) };
        name && self.port.is_none_or(|port| port == to.port.unwrap_or(default_port))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(hosts: &Hosts, url: &str) -> Ruling {
        crate::message::rule(hosts, &http::Request::get(url).body(()).unwrap())
    }

    /// Of a request whose URI is only a path.
    fn rule_of_path(hosts: &Hosts, host: Option<&str>) -> Ruling {
        let mut request = http::Request::get("/v1").body(()).unwrap();
        if let Some(host) = host {
            request.headers_mut().insert(http::header::HOST, host.parse().unwrap());
        }
        crate::message::rule(hosts, &request)
    }

    const NOT_ALLOWED: Ruling = Ruling::NoKey(NoKeyBecause::HostNotAllowed);

    fn allowed(host: &str) -> Hosts {
        Hosts { allowed: Some(Host::all([host]).unwrap()), ..Hosts::default() }
    }

    #[test]
    fn hosts_match_exactly_ignoring_case_and_trailing_dot() {
        let hosts = allowed("api.example.com");
        assert_eq!(rule(&hosts, "https://API.example.com./v1"), Ruling::Key);
        for other in [
            "https://example.com",
            "https://api.example.com.evil.test",
            "https://xapi.example.com",
            "https://evil.test/?api.example.com",
            "https://api.example.com@evil.test/",
        ] {
            assert_eq!(rule(&hosts, other), NOT_ALLOWED, "{other}");
        }
    }

    #[test]
    fn a_wildcard_matches_subdomains_but_not_the_domain() {
        let hosts = allowed("*.example.com");
        assert_eq!(rule(&hosts, "https://a.b.Example.com"), Ruling::Key);
        assert_eq!(rule(&hosts, "https://example.com"), NOT_ALLOWED);
        assert_eq!(rule(&hosts, "https://badexample.com"), NOT_ALLOWED);
    }

    #[test]
    fn a_port_restricts_a_host_to_it() {
        let hosts = allowed("api.example.com:443");
        assert_eq!(rule(&hosts, "https://api.example.com"), Ruling::Key);
        assert_eq!(rule(&hosts, "https://api.example.com:8443"), NOT_ALLOWED);
        assert_eq!(rule(&allowed("api.example.com"), "https://api.example.com:8443"), Ruling::Key);
    }

    #[test]
    fn s03_cleartext_goes_to_loopback_or_named_hosts() {
        let hosts = Hosts { cleartext: Host::all(["gateway.internal"]).unwrap(), ..Hosts::default() };
        for fine in [
            "http://127.0.0.1:8080",
            "http://[::1]",
            "http://[::ffff:127.0.0.1]",
            "http://localhost",
            "http://a.LOCALHOST",
            "http://gateway.internal",
            "https://example.com",
        ] {
            assert_eq!(rule(&hosts, fine), Ruling::Key, "{fine}");
        }
        for refused in [
            "http://example.com",
            "http://10.0.0.1",
            "http://notlocalhost",
            "http://.localhost",
            "http://127.0.0.1.evil.test",
        ] {
            assert_eq!(rule(&hosts, refused), Ruling::RefuseCleartext, "{refused}");
        }
    }

    #[test]
    fn s06_a_request_without_a_host_gets_no_key() {
        for hosts in [Hosts::default(), allowed("api.example.com")] {
            for host in [None, Some("")] {
                assert_eq!(rule_of_path(&hosts, host), Ruling::NoKey(NoKeyBecause::NoHost));
            }
        }
    }

    #[test]
    fn s06_schemeless_keys_go_to_listed_hosts_or_loopback() {
        let open = Hosts::default();
        let cleartext = Hosts { cleartext: Host::all(["gateway.internal"]).unwrap(), ..Hosts::default() };
        let no_scheme = || Ruling::NoKey(NoKeyBecause::NoScheme);
        for (hosts, host, expected) in [
            (&open, "api.example.com", no_scheme()),
            (&open, "localhost:8080", Ruling::Key),
            (&open, "[::1]:8080", Ruling::Key),
            (&cleartext, "api.example.com", no_scheme()),
            (&cleartext, "gateway.internal", Ruling::Key),
            (&allowed("api.example.com"), "api.example.com", Ruling::Key),
            (&allowed("api.example.com:443"), "api.example.com", Ruling::Key),
            (&allowed("api.example.com"), "localhost", NOT_ALLOWED),
        ] {
            assert_eq!(rule_of_path(hosts, Some(host)), expected, "{host}");
        }
    }

    #[test]
    fn invalid_host_patterns_are_refused() {
        for wrong in [
            "",
            "https://api.example.com",
            "api.example.com/v1",
            "*",
            ".",
            "*..",
            "*.*.com",
            "me@host",
            "host:",
            "host:99999",
            "host:80a",
        ] {
            assert!(Host::all([wrong]).is_err(), "{wrong}");
        }
    }
}
