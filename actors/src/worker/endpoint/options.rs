//! How an endpoint is configured, and the HTTP client that talks to it.

use std::time::Duration;

use ingle_protocol::ModelDigest;

use super::address::{EndpointUrl, Secret};
use crate::models::ClientError;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Servers close idle connections after five seconds or more; who is earlier never writes into one that is closing.
const IDLE_LIMIT: Duration = Duration::from_secs(4);

/// An endpoint as it is configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointOptions {
    /// Where it is.
    pub url: EndpointUrl,
    /// The model's name there; `None` takes the only one that there is.
    pub model: Option<String>,
    /// The model's name here; `None` is the far side's.
    pub name: Option<String>,
    /// Sent as a bearer token.
    pub key: Option<Secret>,
    /// Answers that it writes at once; `None` asks it.
    pub slots: Option<u32>,
    /// It answers requests that name no model.
    pub is_default: bool,
    /// Its model turns texts into numbers, and does not chat.
    pub embeds: bool,
    /// How long it may be silent until the first token.
    pub first_token_timeout: Duration,
    /// How long it may be silent between two pieces of an answer.
    pub silence_timeout: Duration,
    /// The SHA-256 of the file that it answers with, where somebody says so: then it is the same model as on the
    /// machines that run this file, and answers move between them.
    pub sha256: Option<ModelDigest>,
}

impl EndpointOptions {
    /// The usual [`Self::first_token_timeout`]: slow machines read long prompts for minutes, and say nothing.
    pub const FIRST_TOKEN_TIMEOUT: Duration = Duration::from_secs(300);
    /// The usual [`Self::silence_timeout`]: some servers hold a tool call back until it is complete.
    pub const SILENCE_TIMEOUT: Duration = Duration::from_secs(120);
}

/// A client that keeps its connections, follows nobody and has no limit for an answer as a whole.
pub(super) fn client(url: &EndpointUrl) -> Result<reqwest::Client, ClientError> {
    // reqwest is built without a provider of its own. An error means that one is installed: just as well.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut builder = reqwest::Client::builder()
        .user_agent(concat!("ingle/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(CONNECT_TIMEOUT)
        .pool_idle_timeout(IDLE_LIMIT)
        .tcp_nodelay(true)
        .redirect(reqwest::redirect::Policy::none());
    if url.is_loopback() {
        builder = builder.no_proxy();
    }
    builder.build().map_err(|error| ClientError::new(crate::models::in_words(&error)))
}
