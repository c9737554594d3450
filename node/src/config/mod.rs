//! Settings: flag > environment > file > default.

mod address;
pub mod endpoints;
mod file;
#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::ValueEnum;
use etcetera::BaseStrategy;
use ingle_actors::gateway::AdmissionOptions;
use ingle_actors::node::{DeviceKind, GivenParameters, ModelChoice, ModelParameters};
use ingle_actors::registry::PlacementRules;

pub use address::{Listen, is_loopback};
pub use file::{ConfigFile, EndpointPart};

use crate::duration;
use crate::exit::UsageError;
use crate::logging::{LogFormat, LogSettings};

/// The longest request body that a request frame between nodes can carry, in MiB.
const LARGEST_BODY_MIB: usize = 14;
const LONGEST_TIME: Duration = Duration::from_secs(7 * 86_400);
/// The longest name of a node in bytes (what a DNS label holds).
const LONGEST_NAME: usize = 63;

/// What flags or the environment say; `None` where they say nothing.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Layer {
    /// The node's folder.
    pub state_dir: Option<PathBuf>,
    /// The configuration file.
    pub config: Option<PathBuf>,
    /// The node's name.
    pub name: Option<String>,
    /// Where HTTP listens.
    pub http: Option<String>,
    /// Where QUIC listens.
    pub quic: Option<String>,
    /// `default`, `none`, `echo` or a path.
    pub model: Option<String>,
    /// What the model computes on.
    pub device: Option<DeviceKind>,
    /// A server elsewhere, instead of those in the file.
    pub endpoint: Option<String>,
    /// Its model's name there.
    pub endpoint_model: Option<String>,
    /// The variable that has its key.
    pub endpoint_key_env: Option<String>,
    /// Where model files are kept.
    pub model_cache: Option<PathBuf>,
    /// Discovery on the local network.
    pub mdns: Option<bool>,
    /// Members that are always tried.
    pub peers: Option<Vec<String>>,
    /// How long running answers may take at the end.
    pub drain_limit: Option<String>,
    /// What is logged.
    pub log_filter: Option<String>,
    /// How it is logged.
    pub log_format: Option<LogFormat>,
}

impl Layer {
    /// Reads `INGLE_*` through `get`. An empty variable counts as none.
    pub fn from_environment(get: impl Fn(&str) -> Option<OsString>) -> Result<Self, UsageError> {
        let raw = |name: &str| get(name).filter(|value| !value.is_empty());
        let path = |name: &str| raw(name).map(PathBuf::from);
        let text = |name: &str| {
            raw(name).map(|v| v.into_string().map_err(|_| UsageError(format!("{name} is not UTF-8")))).transpose()
        };
        let mdns = text("INGLE_MDNS")?.map(|v| match v.as_str() {
            "1" | "true" | "yes" | "on" => Ok(true),
            "0" | "false" | "no" | "off" => Ok(false),
            _ => Err(UsageError(format!("INGLE_MDNS is `{v}`: write true or false"))),
        });
        let log_format = text("INGLE_LOG_FORMAT")?.map(|v| {
            LogFormat::from_str(&v, true)
                .map_err(|_| UsageError(format!("INGLE_LOG_FORMAT is `{v}`: write text or json")))
        });
        let device = text("INGLE_DEVICE")?
            .map(|v| v.parse().map_err(|why| UsageError(format!("INGLE_DEVICE: {why}"))))
            .transpose()?;
        Ok(Self {
            device,
            endpoint: text("INGLE_ENDPOINT")?,
            endpoint_model: text("INGLE_ENDPOINT_MODEL")?,
            endpoint_key_env: text("INGLE_ENDPOINT_KEY_ENV")?,
            state_dir: path("INGLE_STATE_DIR"),
            config: path("INGLE_CONFIG"),
            name: text("INGLE_NAME")?,
            http: text("INGLE_HTTP")?,
            quic: text("INGLE_QUIC")?,
            model: text("INGLE_MODEL")?,
            model_cache: path("INGLE_MODEL_CACHE"),
            mdns: mdns.transpose()?,
            peers: text("INGLE_PEERS")?.map(|list| {
                list.split(',').map(|peer| peer.trim().to_owned()).filter(|peer| !peer.is_empty()).collect()
            }),
            drain_limit: text("INGLE_DRAIN_LIMIT")?,
            log_filter: text("INGLE_LOG")?,
            log_format: log_format.transpose()?,
        })
    }

    /// This layer, and below it the other one.
    fn over(self, below: Self) -> Self {
        Self {
            state_dir: self.state_dir.or(below.state_dir),
            config: self.config.or(below.config),
            name: self.name.or(below.name),
            http: self.http.or(below.http),
            quic: self.quic.or(below.quic),
            model: self.model.or(below.model),
            device: self.device.or(below.device),
            endpoint: self.endpoint.or(below.endpoint),
            endpoint_model: self.endpoint_model.or(below.endpoint_model),
            endpoint_key_env: self.endpoint_key_env.or(below.endpoint_key_env),
            model_cache: self.model_cache.or(below.model_cache),
            mdns: self.mdns.or(below.mdns),
            peers: self.peers.or(below.peers),
            drain_limit: self.drain_limit.or(below.drain_limit),
            log_filter: self.log_filter.or(below.log_filter),
            log_format: self.log_format.or(below.log_format),
        }
    }
}

/// Everything that was decided, checked as far as that goes without touching the network.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// The node's folder, absolute.
    pub state_dir: PathBuf,
    /// The node's name.
    pub name: String,
    /// Where HTTP listens.
    pub http: Listen,
    /// Where QUIC listens.
    pub quic: Listen,
    /// The model that runs here.
    pub model: Option<ModelChoice>,
    /// What it computes on.
    pub device: DeviceKind,
    /// What the file gives for the model.
    pub parameters: GivenParameters,
    /// Bytes of memory that all models together may take.
    pub model_memory: Option<u64>,
    /// Servers elsewhere that answer for more models.
    pub endpoints: Vec<EndpointPart>,
    /// Where model files are kept, absolute.
    pub model_cache: PathBuf,
    /// Bytes that model files may have; half of their disk where missing.
    pub model_cache_limit: Option<u64>,
    /// Discovery on the local network.
    pub mdns: bool,
    /// Members that are always tried.
    pub peers: Vec<String>,
    /// Host names beside localhost that HTTP answers to, in lower case.
    pub allowed_hosts: Vec<String>,
    /// The most HTTP connections at a time.
    pub connections: usize,
    /// The longest request body in bytes.
    pub body_limit: usize,
    /// How long an answer is still worth something.
    pub request_timeout: Duration,
    /// How long running answers may take to finish when the node ends.
    pub drain_limit: Duration,
    /// What may wait for the workers.
    pub admission: AdmissionOptions,
    /// What the node takes of models that are registered for any.
    pub placement: PlacementRules,
    /// Logs.
    pub log: LogSettings,
}

impl Settings {
    /// Puts the layers together. Reads the configuration file, touches nothing else.
    pub fn resolve(flags: Layer, environment: Layer) -> Result<Self, UsageError> {
        let layer = flags.over(environment);
        let named = layer.config.clone();
        let found = match (&named, &layer.state_dir) {
            (Some(path), _) => Some((path.clone(), read(path)?)),
            (None, Some(dir)) => read_if_present(&dir.join("ingle.toml"))?,
            (None, None) => read_if_present(&default_state_dir()?.join("ingle.toml"))?,
        };
        let (base, file) = match found {
            Some((path, file)) => {
                if named.is_none() && file.node.state_dir.is_some() {
                    return Err(UsageError(format!(
                        "The configuration file {} lies in a state directory and names one itself: remove \
                         `state_dir` from it, or name the file with --config.",
                        path.display()
                    )));
                }
                (path.parent().map(Path::to_owned).unwrap_or_default(), file)
            }
            None => (PathBuf::new(), ConfigFile::default()),
        };
        Self::merge(layer, file, &base)
    }

    /// What to write behind `ingle <command>` so that it means this node: ` --state-dir …`, or nothing where the
    /// state directory is the one that is taken anyway.
    pub fn state_dir_flag(&self) -> String {
        match default_state_dir() {
            Ok(default) if default == self.state_dir => String::new(),
            _ => format!(" --state-dir {}", shell_quoted(&self.state_dir.to_string_lossy())),
        }
    }

    /// `base` is the folder that relative paths in the file start from.
    fn merge(layer: Layer, file: ConfigFile, base: &Path) -> Result<Self, UsageError> {
        let in_file = |path: PathBuf| base.join(path);
        let state_dir = match layer.state_dir.or(file.node.state_dir.map(in_file)) {
            Some(dir) => dir,
            None => default_state_dir()?,
        };
        let model_cache = match layer.model_cache.or(file.model.cache.map(in_file)) {
            Some(dir) => dir,
            None => strategy()?.cache_dir().join("ingle").join("models"),
        };
        let name = match layer.name.or(file.node.name) {
            Some(name) => checked_name(name)?,
            // A node keeps its name until it is told another one.
            None => match ingle_actors::node::remembered_name(&state_dir) {
                Some(name) => name,
                None => default_name(&hostname::get().unwrap_or_default().to_string_lossy()),
            },
        };
        let model = match layer.model {
            Some(text) => model_choice(&text, Path::new(""))?,
            None => model_choice(&file.model.choice, base)?,
        };
        let drain_limit = match layer.drain_limit {
            Some(text) => duration::parse(&text).map_err(|why| UsageError(format!("Drain limit: {why}.")))?,
            None => file.http.drain_limit,
        };
        let in_range = |field: &str, value: usize, largest: usize| match (1..=largest).contains(&value) {
            true => Ok(value),
            false => Err(UsageError(format!("[http] {field} is {value}: it must be between 1 and {largest}."))),
        };
        if let Some(host) = file.http.allowed_hosts.iter().find(|host| host.contains([':', '/'])) {
            return Err(UsageError(format!(
                "[http] allowed_hosts has `{host}`: write host names, without port or path."
            )));
        }
        if file.http.request_timeout > LONGEST_TIME || drain_limit > LONGEST_TIME {
            return Err(UsageError("[http] request_timeout and drain_limit can be seven days at most.".into()));
        }
        if file.http.request_timeout.is_zero() {
            return Err(UsageError("[http] request_timeout is 0: nothing could be answered.".into()));
        }
        if file.admission.tokens_per_minute == Some(0) {
            return Err(UsageError("[admission] tokens_per_minute is 0: nobody could ask anything.".into()));
        }
        if let Err(problem) = file.model.parameters.over(ModelParameters::default()) {
            return Err(UsageError(format!("[model.parameters] {problem}.")));
        }
        let automatic = file.placement.automatic.unwrap_or(model.is_some());
        let flags = (layer.endpoint, layer.endpoint_model, layer.endpoint_key_env);
        let endpoints = endpoints::choose(flags, file.endpoints)?;
        Ok(Self {
            state_dir: absolute(state_dir)?,
            name,
            http: listen("HTTP", &layer.http.unwrap_or(file.http.listen), "127.0.0.1", 11435)?,
            quic: listen("QUIC", &layer.quic.unwrap_or(file.quic.listen), "::", 11436)?,
            model,
            device: layer.device.unwrap_or(file.model.device),
            parameters: file.model.parameters,
            model_memory: file.model.memory_mib.map(|mib| mib.saturating_mul(1 << 20)),
            endpoints,
            model_cache: absolute(model_cache)?,
            model_cache_limit: file.model.cache_limit_gib.map(|gib| gib.saturating_mul(1 << 30)),
            mdns: layer.mdns.unwrap_or(file.cluster.mdns),
            peers: layer.peers.unwrap_or(file.cluster.peers),
            allowed_hosts: file.http.allowed_hosts.iter().map(|host| host.to_ascii_lowercase()).collect(),
            connections: in_range("connections", file.http.connections, 1 << 20)?,
            body_limit: in_range("body_limit_mib", file.http.body_limit_mib, LARGEST_BODY_MIB)? << 20,
            request_timeout: file.http.request_timeout,
            drain_limit,
            placement: PlacementRules { automatic, more_copies: file.placement.more_copies.unwrap_or(automatic) },
            admission: AdmissionOptions {
                queue_time: file.admission.queue_time,
                queued: file.admission.queue_requests,
                quota_per_minute: file.admission.tokens_per_minute,
            },
            log: LogSettings {
                filter: layer.log_filter.unwrap_or(file.log.filter),
                format: layer.log_format.unwrap_or(file.log.format),
            },
        })
    }
}

/// Reads a configuration file that somebody named.
fn read(path: &Path) -> Result<ConfigFile, UsageError> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| UsageError(format!("The configuration file {} cannot be read: {error}.", path.display())))?;
    parse(path, &text)
}

/// Reads a configuration file where there is one.
fn read_if_present(path: &Path) -> Result<Option<(PathBuf, ConfigFile)>, UsageError> {
    match std::fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound || error.kind() == ErrorKind::NotADirectory => Ok(None),
        _ => Ok(Some((path.to_owned(), read(path)?))),
    }
}

fn parse(path: &Path, text: &str) -> Result<ConfigFile, UsageError> {
    toml::from_str(text)
        .map_err(|error| UsageError(format!("The configuration file {} is wrong:\n{error}", path.display())))
}

fn strategy() -> Result<impl BaseStrategy, UsageError> {
    etcetera::choose_base_strategy()
        .map_err(|error| UsageError(format!("No home folder ({error}): name the folders, as in --state-dir DIR.")))
}

fn default_state_dir() -> Result<PathBuf, UsageError> {
    Ok(strategy()?.data_dir().join("ingle"))
}

fn absolute(path: PathBuf) -> Result<PathBuf, UsageError> {
    std::path::absolute(&path).map_err(|error| UsageError(format!("`{}` is no folder: {error}.", path.display())))
}

fn listen(what: &str, text: &str, host: &str, port: u16) -> Result<Listen, UsageError> {
    Listen::parse(text, &Listen { host: host.into(), port }).map_err(|why| UsageError(format!("{what}: {why}.")))
}

fn model_choice(text: &str, base: &Path) -> Result<Option<ModelChoice>, UsageError> {
    Ok(match text {
        "none" => None,
        "default" => Some(ModelChoice::Default),
        "echo" => Some(ModelChoice::Echo),
        "" => return Err(UsageError("The model is empty: write `default`, `none` or a path to a GGUF file.".into())),
        path => Some(ModelChoice::File(absolute(base.join(path))?)),
    })
}

/// A name that somebody chose is taken as it is or refused, never changed in silence.
fn checked_name(name: String) -> Result<String, UsageError> {
    let tidy = default_name(&name);
    if tidy == name {
        return Ok(name);
    }
    Err(UsageError(format!(
        "`{name}` is no name for a node: up to {LONGEST_NAME} of a-z, 0-9 and `-`. Perhaps `{tidy}`?"
    )))
}

/// A name made from whatever the host is called: its first label, in `[a-z0-9-]`.
fn default_name(host: &str) -> String {
    let label = host.split('.').next().unwrap_or_default();
    let mut name = String::new();
    for c in label.chars() {
        let c = if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
        if (c != '-' || !name.is_empty()) && name.len() < LONGEST_NAME {
            name.push(c);
        }
    }
    let name = name.trim_end_matches('-');
    if name.is_empty() { "node".into() } else { name.to_owned() }
}

/// `text` as one word of a shell.
fn shell_quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@%,".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}
