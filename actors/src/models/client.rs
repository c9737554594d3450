//! The one HTTP client of this program that fetches files: its certificates, its limits, its redirects.

use std::error::Error;
use std::net::IpAddr;
use std::time::Duration;

use reqwest::Url;
use reqwest::redirect::{Attempt, Policy};

use super::lookup::CheckedNames;
use super::source::SourceError;

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

/// A client that fetches a file from `base`: names are looked up once and must not lead into the household's own
/// network, at the beginning or by a redirect, unless they are among `named`. The system's certificates and proxies
/// hold (no proxy where `base` is this machine).
pub(super) fn source_client(
    base: &Url,
    named: impl IntoIterator<Item = String>,
) -> Result<reqwest::Client, SourceError> {
    let names = CheckedNames::new(named);
    if let Some(why) = names.objection(base) {
        return Err(SourceError::Refused(why));
    }
    let client = builder(base, names).build().map_err(|error| ClientError(in_words(&error)))?;
    Ok(client)
}

fn builder(base: &Url, names: CheckedNames) -> reqwest::ClientBuilder {
    // reqwest is built without a provider of its own. An error means that one is installed: just as well.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let builder = reqwest::Client::builder()
        .dns_resolver(names.clone())
        .user_agent(concat!("ingle/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(CONNECT_TIMEOUT)
        .redirect(Policy::custom(move |attempt| match refusal(&attempt, &names) {
            Some(why) => attempt.error(why),
            None => attempt.follow(),
        }));
    if is_loopback(base) { builder.no_proxy() } else { builder }
}

/// Why a redirect is not followed.
fn refusal(attempt: &Attempt<'_>, names: &CheckedNames) -> Option<String> {
    if attempt.previous().len() > MOST_REDIRECTS {
        return Some(format!("redirected more than {MOST_REDIRECTS} times"));
    }
    let to = attempt.url();
    // Only who began on this machine may be sent to it in plain text: tests and local mirrors.
    let from_loopback = attempt.previous().first().is_some_and(is_loopback);
    if to.scheme() == "https" || (from_loopback && is_allowed(to)) {
        // A name is checked when it is looked up.
        names.objection(to).map(|why| format!("redirected: {why}"))
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
        source_client(&"https://hub.example".parse().unwrap(), []).unwrap();
        let error = source_client(&"https://10.0.0.1/m".parse().unwrap(), []).unwrap_err().to_string();
        assert!(error.contains("10.0.0.1 is an address of a private"), "{error}");
    }
}
