//! The one HTTP client of this program: its certificates, its limits, its redirects.

use std::error::Error;
use std::net::IpAddr;
use std::time::Duration;

use reqwest::Url;
use reqwest::redirect::{Attempt, Policy};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const MOST_REDIRECTS: usize = 5;

/// The client could not be made.
#[derive(Debug, thiserror::Error)]
#[error("the HTTPS client cannot start: {0}; check that this system has its CA certificates installed")]
pub struct ClientError(String);

impl ClientError {
    pub(crate) fn new(why: impl Into<String>) -> Self {
        Self(why.into())
    }
}

/// A client for `base`. The system's certificates and proxies hold (no proxy where `base` is this machine).
pub fn http_client(base: &Url) -> Result<reqwest::Client, ClientError> {
    // reqwest is built without a provider of its own. An error means that one is installed: just as well.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut builder = reqwest::Client::builder()
        .user_agent(concat!("ingle/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(CONNECT_TIMEOUT)
        .redirect(Policy::custom(|attempt| match refusal(&attempt) {
            Some(why) => attempt.error(why),
            None => attempt.follow(),
        }));
    if is_loopback(base) {
        builder = builder.no_proxy();
    }
    builder.build().map_err(|error| ClientError(in_words(&error)))
}

/// Why a redirect is not followed.
fn refusal(attempt: &Attempt<'_>) -> Option<String> {
    if attempt.previous().len() > MOST_REDIRECTS {
        return Some(format!("redirected more than {MOST_REDIRECTS} times"));
    }
    let to = attempt.url();
    // Only who began on this machine may be sent to it in plain text: tests and local mirrors.
    let from_loopback = attempt.previous().first().is_some_and(is_loopback);
    if to.scheme() == "https" || (from_loopback && is_allowed(to)) {
        None
    } else {
        Some(format!("redirected to {}://{}, which is not https", to.scheme(), to.host_str().unwrap_or_default()))
    }
}

/// HTTPS, or plain HTTP within this machine.
pub(super) fn is_allowed(url: &Url) -> bool {
    url.scheme() == "https" || (url.scheme() == "http" && is_loopback(url))
}

pub(crate) fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// The error with all its causes in one line, without the address (who reports it knows that).
pub(crate) fn in_words(error: &reqwest::Error) -> String {
    let mut words = match (error.is_timeout(), error.is_connect(), error.is_redirect()) {
        (true, _, _) => "timed out".to_owned(),
        (_, true, _) => "cannot connect".to_owned(),
        (_, _, true) => "redirect refused".to_owned(),
        _ => "the connection broke".to_owned(),
    };
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !words.contains(&text) && !text.starts_with("client error") {
            words = format!("{words}: {text}");
        }
        cause = error.source();
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_http_stays_within_the_machine() {
        for (url, allowed) in [
            ("https://hub.example", true),
            ("http://127.0.0.1:8080", true),
            ("http://[::1]:8080", true),
            ("http://localhost", true),
            ("http://hub.example", false),
            ("http://127.0.0.1.hub.example", false),
            ("ftp://localhost", false),
            ("file:///etc/passwd", false),
        ] {
            assert_eq!(is_allowed(&url.parse().unwrap()), allowed, "{url}");
        }
    }

    #[test]
    fn the_client_for_https_starts_with_this_systems_certificates() {
        http_client(&"https://hub.example".parse().unwrap()).unwrap();
    }
}
