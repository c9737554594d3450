//! Loopback alone implies no trust: a web page can make the browser of this machine send requests here.
//! A page cannot choose the `Host` that its browser sends after DNS rebinding, nor hide its `Origin`: both are checked.

use std::net::IpAddr;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::openai::ApiError;
use crate::config::is_loopback;

/// Host names that requests may come under.
#[derive(Debug, Clone, Default)]
pub struct Guard {
    /// Beside localhost; lower case.
    pub allowed_hosts: Vec<String>,
}

impl Guard {
    /// Refuses a request that a foreign page may have sent.
    pub fn check(&self, uri: &Uri, headers: &HeaderMap) -> Result<(), ApiError> {
        let mut hosts = headers.get_all(header::HOST).iter();
        let host = match (hosts.next(), hosts.next()) {
            (Some(_), Some(_)) => return Err(ApiError::forbidden("The request has more than one Host header.")),
            (Some(host), None) => host.to_str().unwrap_or_default(),
            (None, _) => uri.authority().map_or("", |authority| authority.as_str()),
        };
        // A request line with a full URL replaces the Host header for whoever routes by it: both must be ours.
        let in_line = uri.authority().is_none_or(|authority| self.is_ours(authority.as_str()));
        if !in_line || !self.is_ours(host) {
            return Err(ApiError::forbidden(format!(
                "The Host header `{}` is not this machine: use localhost, or add the name to [http] allowed_hosts.",
                host.chars().take(100).collect::<String>()
            )));
        }
        for origin in headers.get_all(header::ORIGIN) {
            let text = origin.to_str().unwrap_or_default();
            if !text.split_once("://").is_some_and(|(_, authority)| self.is_ours(authority)) {
                return Err(ApiError::forbidden(
                    "Pages of other origins may not use this node. Ask it from a program, or from a server of yours.",
                ));
            }
        }
        Ok(())
    }

    /// `authority` is `host` or `host:port`, IPv6 addresses in brackets.
    fn is_ours(&self, authority: &str) -> bool {
        let Some(host) = host_of(authority) else { return false };
        let host = host.to_ascii_lowercase();
        host == "localhost" || host.parse::<IpAddr>().is_ok_and(is_loopback) || self.allowed_hosts.contains(&host)
    }
}

/// The host in `host`, `host:port`, `[v6]` or `[v6]:port`; `None` where the text is none of these.
fn host_of(authority: &str) -> Option<&str> {
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']')?;
            (host, if port.is_empty() { None } else { Some(port.strip_prefix(':')?) })
        }
        None => match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        },
    };
    port.is_none_or(|port| port.parse::<u16>().is_ok()).then_some(host)
}

/// The middleware.
pub async fn guard(State(guard): State<Arc<Guard>>, request: Request, next: Next) -> Response {
    match guard.check(request.uri(), request.headers()) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(uri: &str, headers: &[(header::HeaderName, &str)]) -> bool {
        let guard = Guard { allowed_hosts: vec!["ingle.home".into()] };
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(name.clone(), value.parse().unwrap());
        }
        guard.check(&uri.parse().unwrap(), &map).is_ok()
    }

    #[test]
    fn hosts_are_this_machine_or_were_allowed() {
        for (host, expected) in [
            ("localhost", true),
            ("LOCALHOST:11435", true),
            ("127.0.0.1:1", true),
            ("127.0.0.2", true),
            ("[::1]:11435", true),
            ("[::1]", true),
            ("ingle.home:80", true),
            ("Ingle.Home", true),
            ("evil.example", false),
            ("localhost.evil.example", false),
            ("127.0.0.1.evil.example:80", false),
            ("evil.example:11435", false),
            ("192.168.1.5", false),
            ("localhost:80:evil", false),
            ("[::1]evil.example", false),
            ("user@localhost", false),
            ("", false),
        ] {
            assert_eq!(check("/v1/models", &[(header::HOST, host)]), expected, "{host}");
        }
        assert!(!check("/", &[]), "no host at all");
        assert!(!check("/", &[(header::HOST, "localhost"), (header::HOST, "localhost")]), "two");
        assert!(!check("http://evil.example/", &[(header::HOST, "localhost")]), "the full URL counts too");
    }

    #[test]
    fn pages_of_other_origins_are_refused() {
        for (origin, expected) in [
            ("http://localhost:3000", true),
            ("http://127.0.0.1:11435", true),
            ("http://[::1]:8080", true),
            ("https://ingle.home", true),
            ("https://evil.example", false),
            ("http://localhost.evil.example", false),
            ("null", false),
            ("", false),
        ] {
            let headers = [(header::HOST, "localhost"), (header::ORIGIN, origin)];
            assert_eq!(check("/v1/models", &headers), expected, "{origin}");
        }
    }
}
