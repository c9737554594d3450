//! The configuration file: one struct per part, each field with its default.

use std::path::PathBuf;
use std::time::Duration;

use ingle_actors::gateway::AdmissionOptions;
use ingle_actors::node::{DeviceKind, GivenParameters};
use ingle_actors::worker::EndpointOptions;
use serde::Deserialize;

use crate::logging::{DEFAULT_FILTER, LogFormat};

/// `ingle.toml`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ConfigFile {
    /// The node itself.
    pub node: NodePart,
    /// HTTP on this machine.
    pub http: HttpPart,
    /// QUIC between nodes.
    pub quic: QuicPart,
    /// Other nodes.
    pub cluster: ClusterPart,
    /// The model that runs here.
    pub model: ModelPart,
    /// What may wait for the workers.
    pub admission: AdmissionPart,
    /// Models that are registered for any node.
    pub placement: PlacementPart,
    /// Servers elsewhere that answer for more models.
    pub endpoints: Vec<EndpointPart>,
    /// Logs.
    pub log: LogPart,
}

/// The node itself.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NodePart {
    /// Its name; the host name where missing.
    pub name: Option<String>,
    /// Its folder; `ingle` in the user's data folder where missing.
    pub state_dir: Option<PathBuf>,
}

/// HTTP on this machine.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HttpPart {
    /// `address:port`.
    pub listen: String,
    /// Host names beside localhost under which browsers and proxies may address the node.
    pub allowed_hosts: Vec<String>,
    /// The most connections at a time.
    pub connections: usize,
    /// The longest request body in MiB.
    pub body_limit_mib: usize,
    /// How long an answer is still worth something.
    #[serde(deserialize_with = "crate::duration::deserialize")]
    pub request_timeout: Duration,
    /// How long running answers may take to finish when the node ends.
    #[serde(deserialize_with = "crate::duration::deserialize")]
    pub drain_limit: Duration,
}

impl Default for HttpPart {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:11435".into(),
            allowed_hosts: vec![],
            connections: 10_240,
            body_limit_mib: 8,
            request_timeout: Duration::from_secs(600),
            drain_limit: Duration::from_secs(20),
        }
    }
}

/// QUIC between nodes.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct QuicPart {
    /// `address:port`.
    pub listen: String,
}

impl Default for QuicPart {
    fn default() -> Self {
        Self { listen: "[::]:11436".into() }
    }
}

/// Other nodes.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ClusterPart {
    /// `host:port` of members that are always tried.
    pub peers: Vec<String>,
    /// Find and be found on the local network.
    pub mdns: bool,
}

impl Default for ClusterPart {
    fn default() -> Self {
        Self { peers: vec![], mdns: true }
    }
}

/// The model that runs here.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelPart {
    /// `default`, `none` or a path to a GGUF file.
    #[serde(rename = "use")]
    pub choice: String,
    /// What it computes on.
    pub device: DeviceKind,
    /// Memory that all models together may take, in MiB; as much as there is where missing.
    pub memory_mib: Option<u64>,
    /// Where model files are kept; `ingle/models` in the user's cache folder where missing.
    pub cache: Option<PathBuf>,
    /// GiB that they may have; half of their disk where missing.
    pub cache_limit_gib: Option<u64>,
    /// What is given for the model.
    pub parameters: GivenParameters,
}

impl Default for ModelPart {
    fn default() -> Self {
        Self {
            choice: "default".into(),
            device: DeviceKind::Auto,
            memory_mib: None,
            cache: None,
            cache_limit_gib: None,
            parameters: GivenParameters::default(),
        }
    }
}

/// What this node does by itself about models that are registered for any.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PlacementPart {
    /// It takes them; where missing, unless the node is to run no model.
    pub automatic: Option<bool>,
    /// It takes second copies of those that are asked for more than they can answer; where missing, as `automatic`.
    pub more_copies: Option<bool>,
}

/// What may wait for the workers, for each model.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdmissionPart {
    /// As much may wait as the workers compute in this time.
    #[serde(deserialize_with = "crate::duration::deserialize")]
    pub queue_time: Duration,
    /// Requests that may wait.
    pub queue_requests: u32,
    /// Estimated tokens a minute for each principal; as many as there is room for where missing.
    pub tokens_per_minute: Option<u64>,
}

impl Default for AdmissionPart {
    fn default() -> Self {
        let AdmissionOptions { queue_time, queued, quota_per_minute } = AdmissionOptions::default();
        Self { queue_time, queue_requests: queued, tokens_per_minute: quota_per_minute }
    }
}

/// A server elsewhere.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndpointPart {
    /// Where it is, with or without `/v1`.
    pub url: String,
    /// The model's name there; the only one that there is where missing.
    pub model: Option<String>,
    /// The model's name here; the far side's where missing.
    pub name: Option<String>,
    /// The environment variable that has the key.
    pub api_key_env: Option<String>,
    /// Answers that it writes at once; asked for where missing.
    pub slots: Option<u32>,
    /// SHA-256 of the file that it answers with: then it is the same model as on machines that run this file.
    pub sha256: Option<String>,
    /// It answers requests that name no model.
    #[serde(default)]
    pub default: bool,
    /// How long it may be silent until the first token.
    #[serde(default = "first_token_timeout", deserialize_with = "crate::duration::deserialize")]
    pub first_token_timeout: Duration,
    /// How long it may be silent between two pieces of an answer.
    #[serde(default = "silence_timeout", deserialize_with = "crate::duration::deserialize")]
    pub silence_timeout: Duration,
}

fn first_token_timeout() -> Duration {
    EndpointOptions::FIRST_TOKEN_TIMEOUT
}

fn silence_timeout() -> Duration {
    EndpointOptions::SILENCE_TIMEOUT
}

impl EndpointPart {
    /// The usual one at an address.
    pub fn new(url: String) -> Self {
        Self {
            url,
            model: None,
            name: None,
            api_key_env: None,
            slots: None,
            sha256: None,
            default: false,
            first_token_timeout: first_token_timeout(),
            silence_timeout: silence_timeout(),
        }
    }
}

/// Logs.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogPart {
    /// `warn`, `info`, `debug`, or a filter as tracing knows it.
    pub filter: String,
    /// `text` or `json`.
    pub format: LogFormat,
}

impl Default for LogPart {
    fn default() -> Self {
        Self { filter: DEFAULT_FILTER.into(), format: LogFormat::Text }
    }
}
