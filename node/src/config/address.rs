//! Addresses to listen at, as people write them.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};

/// An address to listen at, not looked up yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listen {
    /// An IP address or a name.
    pub host: String,
    /// 0 for any free port.
    pub port: u16,
}

impl Listen {
    /// Reads `port`, `host` or `host:port` (IPv6 addresses in brackets where a port follows). What is missing is
    /// taken from `default`. The error says what is expected.
    pub fn parse(text: &str, default: &Listen) -> Result<Self, String> {
        let text = text.trim();
        let wrong = |why: &str| format!("`{text}` is no address to listen at: {why}");
        let listen = |host: &str, port| Self { host: host.to_owned(), port };
        if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
            let port = text.parse().map_err(|_| wrong("ports go up to 65535"))?;
            return Ok(listen(&default.host, port));
        }
        if let Ok(address) = text.parse::<SocketAddr>() {
            return Ok(listen(&address.ip().to_string(), address.port()));
        }
        let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
        if let Ok(address) = bare.parse::<IpAddr>() {
            return Ok(listen(&address.to_string(), default.port));
        }
        let (host, port) = match text.split_once(':') {
            None => (text, default.port),
            Some((host, port)) => {
                let port = port.parse().map_err(|_| wrong("what follows the colon is no port"))?;
                (host, port)
            }
        };
        if host.is_empty() {
            return Err(wrong("write a port alone, an address, or address:port"));
        }
        if !host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b)) {
            return Err(wrong("this is no host name"));
        }
        Ok(listen(host, port))
    }

    /// Looks the address up. A name may stand for many; the first one is taken.
    pub async fn resolve(&self) -> io::Result<SocketAddr> {
        if let Ok(ip) = self.host.parse::<IpAddr>() {
            return Ok(SocketAddr::new(ip, self.port));
        }
        let mut found = tokio::net::lookup_host((self.host.as_str(), self.port)).await?;
        found.next().ok_or_else(|| io::Error::other("the name has no address"))
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// Only programs on this machine reach the address.
pub fn is_loopback(ip: IpAddr) -> bool {
    // `::ffff:127.0.0.1` is 127.0.0.1 in other words.
    ip.to_canonical().is_loopback()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_people_write_them() {
        let default = Listen { host: "127.0.0.1".into(), port: 11435 };
        for (text, expected) in [
            ("80", "127.0.0.1:80"),
            ("0", "127.0.0.1:0"),
            ("0.0.0.0", "0.0.0.0:11435"),
            ("0.0.0.0:81", "0.0.0.0:81"),
            ("localhost:82", "localhost:82"),
            ("[::1]:83", "[::1]:83"),
            ("::1", "[::1]:11435"),
            ("[::]", "[::]:11435"),
        ] {
            assert_eq!(Listen::parse(text, &default).unwrap().to_string(), expected, "{text}");
        }
        for text in ["", ":80", "70000", "host:port", "http://localhost:80", "a b:1", "[::1:80"] {
            let error = Listen::parse(text, &default).unwrap_err();
            assert!(error.contains(&format!("`{text}`")), "{error}");
        }
    }

    #[test]
    fn loopback_is_loopback_in_every_spelling() {
        for (ip, expected) in
            [("127.0.0.1", true), ("127.3.2.1", true), ("::1", true), ("::ffff:127.0.0.1", true), ("0.0.0.0", false)]
        {
            assert_eq!(is_loopback(ip.parse().unwrap()), expected, "{ip}");
        }
    }
}
