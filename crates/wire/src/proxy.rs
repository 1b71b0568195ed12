//! Dialling out through a SOCKS5 proxy (RFC 1928), for sites that may not open connections of their own.
//!
//! The proxy carries bytes and sees no more than lengths and times: TLS and the pinned keys are between the ends, so a
//! proxy can refuse or break a connection and nothing else. Host names go to the proxy as they are and are resolved
//! there. Not for accepting: SOCKS5's BIND is for one connection and few proxies have it.

use base::Hint;
use std::fmt;
use std::io;
use std::str::FromStr;
use tokio::net::TcpStream;
use tokio_socks::tcp::Socks5Stream;

/// How a proxy is written.
const SCHEME: &str = "socks5://";

/// A SOCKS5 proxy that asks for no password, written `socks5://HOST:PORT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proxy {
    /// `host:port`.
    address: String,
}

/// Why a text is no [`Proxy`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProxyParseError {
    /// Another protocol, or none.
    #[error("'{0}' is not a SOCKS5 proxy: it should begin with {SCHEME}")]
    Scheme(String),
    /// A user name or a path.
    #[error("'{0}' has more than a host and a port: proxies with a user name or a path are not spoken to")]
    Surplus(String),
    /// No host, or no port.
    #[error("'{0}' names no host and port")]
    Address(String),
}

impl Hint for ProxyParseError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Scheme(_) | Self::Address(_) => "write it as `--proxy socks5://HOST:PORT`".to_owned(),
            Self::Surplus(_) => "use a proxy that asks for no password, as `ssh -D 1080 HOST` gives: \
                                 `--proxy socks5://127.0.0.1:1080`"
                .to_owned(),
        })
    }
}

impl FromStr for Proxy {
    type Err = ProxyParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refused = || text.chars().filter(|c| !c.is_control()).take(100).collect::<String>();
        let address = text.strip_prefix(SCHEME).ok_or_else(|| ProxyParseError::Scheme(refused()))?;
        let address = address.strip_suffix('/').unwrap_or(address);
        if address.contains(['@', '/', '?', '#']) {
            return Err(ProxyParseError::Surplus(refused()));
        }
        let named = address.rsplit_once(':').filter(|(host, port)| {
            let bare_ipv6 = host.contains(':') && !(host.starts_with('[') && host.ends_with(']'));
            !host.is_empty() && !bare_ipv6 && port.parse::<u16>().is_ok_and(|port| port > 0)
        });
        named.ok_or_else(|| ProxyParseError::Address(refused()))?;
        Ok(Self { address: address.to_owned() })
    }
}

impl fmt::Display for Proxy {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{SCHEME}{}", self.address)
    }
}

/// Why there is no socket to the other end.
#[derive(Debug)]
pub(crate) enum DialError {
    /// Without a proxy: what the system said.
    Unreachable(io::Error),
    /// The proxy itself is not reached.
    ProxyUnreachable(io::Error),
    /// The proxy answers, and does not connect.
    ProxyRefused(io::Error),
}

/// A socket to `address` (host:port), through the proxy if there is one.
pub(crate) async fn dial(proxy: Option<&Proxy>, address: &str) -> Result<TcpStream, DialError> {
    let Some(proxy) = proxy else { return TcpStream::connect(address).await.map_err(DialError::Unreachable) };
    let socket = TcpStream::connect(&proxy.address).await.map_err(DialError::ProxyUnreachable)?;
    // The greeting and the request are small and wait for answers: nothing may hold them back.
    socket.set_nodelay(true).map_err(DialError::ProxyUnreachable)?;
    let connected = Socks5Stream::connect_with_socket(socket, address).await;
    connected.map(Socks5Stream::into_inner).map_err(|error| DialError::ProxyRefused(io::Error::other(error)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proxy_is_a_scheme_a_host_and_a_port() {
        for text in ["socks5://127.0.0.1:1080", "socks5://proxy.example:9050", "socks5://[::1]:1080"] {
            assert_eq!(text.parse::<Proxy>().unwrap().to_string(), text);
        }
        assert_eq!("socks5://a:1/".parse::<Proxy>(), "socks5://a:1".parse());
    }

    #[test]
    fn what_is_no_proxy_is_refused_with_what_mends_it() {
        type Kind = fn(String) -> ProxyParseError;
        let refused: [(&str, Kind); 11] = [
            ("", ProxyParseError::Scheme),
            ("127.0.0.1:1080", ProxyParseError::Scheme),
            ("http://127.0.0.1:3128", ProxyParseError::Scheme),
            ("socks5://", ProxyParseError::Address),
            ("socks5://host", ProxyParseError::Address),
            ("socks5://:1080", ProxyParseError::Address),
            ("socks5://host:0", ProxyParseError::Address),
            ("socks5://host:65536", ProxyParseError::Address),
            ("socks5://::1:1080", ProxyParseError::Address),
            ("socks5://user:word@host:1080", ProxyParseError::Surplus),
            ("socks5://host:1080/path", ProxyParseError::Surplus),
        ];
        for (text, error) in refused {
            let found = text.parse::<Proxy>().unwrap_err();
            assert_eq!(found, error(text.to_owned()));
            assert!(found.hint().unwrap().contains("--proxy socks5://"), "{text}");
        }
    }
}
