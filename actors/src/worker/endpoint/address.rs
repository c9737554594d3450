//! Where an endpoint is, and the key that it wants.

use std::fmt;
use std::str::FromStr;

use reqwest::Url;

/// The base address of an OpenAI-compatible server, with or without `/v1` at its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointUrl {
    /// Without `/v1` and without a slash at the end of the path.
    root: Url,
}

/// That is no address of an endpoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}: write it as in http://127.0.0.1:8080")]
pub struct EndpointUrlError(String);

impl FromStr for EndpointUrl {
    type Err = EndpointUrlError;

    fn from_str(text: &str) -> Result<Self, EndpointUrlError> {
        // What is wrong is said without the text itself: somebody may have written a password into it.
        let wrong = |why: &str| EndpointUrlError(why.to_owned());
        let mut root: Url = text.trim().parse().map_err(|error| wrong(&format!("it is no URL ({error})")))?;
        if !matches!(root.scheme(), "http" | "https") || root.host_str().is_none() {
            return Err(wrong("it is no http or https URL"));
        }
        if !root.username().is_empty() || root.password().is_some() {
            return Err(wrong("it has a password in it, where logs would show it (a key belongs into a variable)"));
        }
        if root.query().is_some() || root.fragment().is_some() {
            return Err(wrong("it has a `?` or `#`"));
        }
        let path = root.path().trim_end_matches('/');
        let path = path.strip_suffix("/v1").unwrap_or(path).trim_end_matches('/').to_owned();
        root.set_path(&path);
        Ok(Self { root })
    }
}

impl EndpointUrl {
    /// `host:port`, for names and messages.
    pub fn host_and_port(&self) -> String {
        let host = self.root.host_str().unwrap_or_default();
        match self.root.port_or_known_default() {
            Some(port) => format!("{host}:{port}"),
            None => host.to_owned(),
        }
    }

    /// The URL of a route, as `v1/models`.
    pub fn route(&self, route: &str) -> Url {
        let mut url = self.root.clone();
        url.set_path(&format!("{}/{route}", self.root.path().trim_end_matches('/')));
        url
    }

    /// It is on this machine.
    pub fn is_loopback(&self) -> bool {
        crate::models::is_loopback(&self.root)
    }
}

impl fmt::Display for EndpointUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.root.as_str().trim_end_matches('/'))
    }
}

/// A text that nobody gets to see.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Takes the text without the spaces and line ends around it.
    pub fn new(text: &str) -> Self {
        Self(text.trim().to_owned())
    }

    /// The text, for the one header that needs it.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// `text` without the secret: a server may repeat it in what it answers.
    pub fn struck_from(&self, text: &str) -> String {
        if self.0.is_empty() { text.to_owned() } else { text.replace(&self.0, "…") }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_with_and_without_v1_are_the_same() {
        for (text, shown, models, host) in [
            ("http://127.0.0.1:8080", "http://127.0.0.1:8080", "http://127.0.0.1:8080/v1/models", "127.0.0.1:8080"),
            ("http://127.0.0.1:8080/v1", "http://127.0.0.1:8080", "http://127.0.0.1:8080/v1/models", "127.0.0.1:8080"),
            ("http://box/v1/", "http://box", "http://box/v1/models", "box:80"),
            (
                "https://far.example/api/v1",
                "https://far.example/api",
                "https://far.example/api/v1/models",
                "far.example:443",
            ),
            ("http://[::1]:1/", "http://[::1]:1", "http://[::1]:1/v1/models", "[::1]:1"),
        ] {
            let url: EndpointUrl = text.parse().unwrap();
            assert_eq!(url.to_string(), shown, "{text}");
            assert_eq!(url.route("v1/models").as_str(), models, "{text}");
            assert_eq!(url.host_and_port(), host, "{text}");
        }
    }

    #[test]
    fn other_addresses_are_refused_without_being_repeated() {
        for (text, expected) in [
            ("127.0.0.1:8080", "URL"),
            ("localhost:8080", "http or https"),
            ("ftp://box", "http or https"),
            ("http://me:hunter2@box", "password"),
            ("http://box/?key=hunter2", "`?`"),
            ("", "URL"),
        ] {
            let error = text.parse::<EndpointUrl>().unwrap_err().to_string();
            assert!(error.contains(expected) && !error.contains("hunter2"), "{text}: {error}");
        }
    }

    #[test]
    fn a_secret_is_never_shown() {
        let secret = Secret::new("sk-1234\n");
        assert_eq!(format!("{secret:?}"), "Secret(…)");
        assert_eq!(secret.struck_from("Incorrect API key: sk-1234."), "Incorrect API key: ….");
        assert_eq!(secret.expose(), "sk-1234");
    }
}
