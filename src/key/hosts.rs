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
    pub(crate) is_cleartext: bool,
    pub(crate) host: Option<&'a str>,
    pub(crate) port: Option<u16>,
}

/// Whether a request gets a key.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Ruling {
    Key,
    PassThrough,
    RefuseCleartext,
}

impl Hosts {
    /// Whether every host gets a key by https.
    #[inline]
    pub(crate) fn allows_all(&self) -> bool {
        self.allowed.is_none()
    }

    pub(crate) fn rule(&self, to: Destination<'_>) -> Ruling {
        if let Some(allowed) = &self.allowed
            && !listed(allowed, to)
        {
            return Ruling::PassThrough;
        }
        if to.is_cleartext && !is_loopback(to.host) && !listed(&self.cleartext, to) {
            return Ruling::RefuseCleartext;
        }
        Ruling::Key
    }
}

fn listed(hosts: &[Host], to: Destination<'_>) -> bool {
    hosts.iter().any(|host| host.matches(to))
}

fn is_loopback(host: Option<&str>) -> bool {
    let Some(host) = host else { return false };
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

    fn matches(&self, to: Destination<'_>) -> bool {
        let Some(host) = to.host else { return false };
        let host = host.strip_suffix('.').unwrap_or(host);
        let name =
            if self.below { is_below(host, &self.name) } else { host.eq_ignore_ascii_case(&self.name) };
        let default_port = if to.is_cleartext { 80 } else { 443 };
        name && self.port.is_none_or(|port| port == to.port.unwrap_or(default_port))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(hosts: &Hosts, url: &str) -> Ruling {
        crate::message::rule(hosts, &http::Request::get(url).body(()).unwrap())
    }

    fn allowed(host: &str) -> Hosts {
        Hosts { allowed: Some(Host::all([host]).unwrap()), ..Hosts::default() }
    }

    #[test]
    fn a_host_is_matched_whole_and_without_regard_to_case_or_a_last_dot() {
        let hosts = allowed("api.example.com");
        assert_eq!(rule(&hosts, "https://API.example.com./v1"), Ruling::Key);
        for other in [
            "https://example.com",
            "https://api.example.com.evil.test",
            "https://xapi.example.com",
            "https://evil.test/?api.example.com",
            "https://api.example.com@evil.test/",
        ] {
            assert_eq!(rule(&hosts, other), Ruling::PassThrough, "{other}");
        }
    }

    #[test]
    fn a_star_stands_for_everything_below_a_domain_but_not_the_domain() {
        let hosts = allowed("*.example.com");
        assert_eq!(rule(&hosts, "https://a.b.Example.com"), Ruling::Key);
        assert_eq!(rule(&hosts, "https://example.com"), Ruling::PassThrough);
        assert_eq!(rule(&hosts, "https://badexample.com"), Ruling::PassThrough);
    }

    #[test]
    fn a_port_restricts_a_host_to_it() {
        let hosts = allowed("api.example.com:443");
        assert_eq!(rule(&hosts, "https://api.example.com"), Ruling::Key);
        assert_eq!(rule(&hosts, "https://api.example.com:8443"), Ruling::PassThrough);
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
    fn what_is_no_host_is_refused_when_it_is_given() {
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
