//! Logs go to standard error. People see warnings; `INGLE_LOG` and `-v` show more.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::exit::UsageError;

/// What people see who ask for nothing. The actor library warns of every connection that ends; we say what follows.
pub const DEFAULT_FILTER: &str = "warn,ractor=error,ractor_cluster=error";

/// How log lines look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line, for machines.
    Json,
}

/// What is logged, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogSettings {
    /// A filter as tracing knows it: `warn`, `info`, `warn,ingle_actors=debug`.
    pub filter: String,
    /// How lines look.
    pub format: LogFormat,
}

impl LogSettings {
    /// Environment variables that make another process of ours log alike.
    pub fn environment(&self) -> Vec<(String, String)> {
        let format = match self.format {
            LogFormat::Text => "text",
            LogFormat::Json => "json",
        };
        vec![("INGLE_LOG".into(), self.filter.clone()), ("INGLE_LOG_FORMAT".into(), format.into())]
    }
}

/// Starts logging for the life of the process. Fails with [`UsageError`] on a filter that cannot be read.
pub fn start(settings: &LogSettings) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&settings.filter).map_err(|error| {
        UsageError(format!("The log filter `{}` cannot be read: {error}. Write warn, info or debug.", settings.filter))
    })?;
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    let started = match settings.format {
        LogFormat::Text => lines.try_init(),
        LogFormat::Json => lines.json().try_init(),
    };
    started.map_err(|error| anyhow::anyhow!("logging does not start: {error}"))
}
