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
    pub(crate) fn all(hosts: impl IntoIterator<Item: AsRef<str>>) -> Result<Vec<Self>, InvalidHost> {
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
