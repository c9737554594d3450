//! What the commands do.

mod bench;
mod chat;
mod drain;
mod events;
mod explain;
mod join;
mod models;
mod progress;
mod ps;
mod status;
mod token;
mod up;

pub use models::progress_line;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::anyhow;
use ingle_actors::worker::engine_process::{self, EngineProcessOptions};

use crate::cli::{Cli, Command, Engine};
use crate::config::{Layer, Settings};
use crate::control::ControlError;
use crate::logging::{self, DEFAULT_FILTER, LogFormat, LogSettings};

/// How long the runtime may take to end what is left of it.
const RUNTIME_END: Duration = Duration::from_secs(1);

/// Runs a command.
pub fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let environment = Layer::from_environment(|name| std::env::var_os(name))?;
    let flags = cli.layer();
    let verbose = cli.common.verbose > 0;
    if let Command::Engine(engine) = cli.command {
        return run_engine(engine, environment);
    }
    let settings = Settings::resolve(flags, environment)?;
    logging::start(&settings.log)?;
    match cli.command {
        Command::Up(_) => block_on(node_threads()?, up::run(settings))?,
        Command::Join(join) => block_on(many_threads()?, join::run(&settings, join))?,
        Command::Token(token) => block_on(many_threads()?, token::run(&settings, token))?,
        Command::Status(status) => block_on(one_thread()?, status::run(&settings, status))?,
        Command::Ps(options) => block_on(one_thread()?, ps::run(&settings, options))?,
        Command::Events(options) => block_on(one_thread()?, events::run(&settings, options))?,
        Command::Explain(explain) => block_on(one_thread()?, explain::run(&settings, explain))?,
        Command::Drain(drain) => block_on(one_thread()?, drain::run(&settings, drain))?,
        Command::Chat(chat) => block_on(one_thread()?, chat::run(&settings, chat))?,
        Command::Bench(bench) => block_on(many_threads()?, bench::run(&settings, bench))?,
        Command::Models(models) => block_on(many_threads()?, models::run(&settings, models, verbose))?,
        Command::Engine(_) => {}
    }
    Ok(ExitCode::SUCCESS)
}

/// The engine has a loop of its own and no use for settings of a node.
fn run_engine(engine: Engine, environment: Layer) -> anyhow::Result<ExitCode> {
    logging::start(&LogSettings {
        filter: environment.log_filter.unwrap_or_else(|| DEFAULT_FILTER.into()),
        format: environment.log_format.unwrap_or(LogFormat::Text),
    })?;
    let Engine { socket, model, digest, packed, packed_limit, parameters, device } = engine;
    let options = EngineProcessOptions { socket, model, digest, packed, packed_limit, parameters, device };
    Ok(engine_process::run(options))
}

/// A node waits and passes on; engines compute in processes of their own. One thread does that with the least waking of
/// each other, and several thousand requests a second of it. Whoever serves more sets tokio's variable.
fn node_threads() -> std::io::Result<tokio::runtime::Runtime> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    if std::env::var_os("TOKIO_WORKER_THREADS").is_none() {
        builder.worker_threads(1);
    }
    builder.enable_all().build()
}

fn many_threads() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()
}

fn one_thread() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

fn block_on(runtime: tokio::runtime::Runtime, command: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let result = runtime.block_on(command);
    // Not a plain drop: that would wait for as long as a blocked thread likes.
    runtime.shutdown_timeout(RUNTIME_END);
    result
}

/// A command that needs a node found none, or another error as it is.
fn explain_error(settings: &Settings, error: ControlError) -> anyhow::Error {
    match error {
        ControlError::NoNode => anyhow!(
            "No node runs with the state directory {}. Start one with `ingle up{}`.",
            settings.state_dir.display(),
            settings.state_dir_flag()
        ),
        other => other.into(),
    }
}

/// A reply that does not belong to the question.
fn unexpected() -> anyhow::Error {
    anyhow!("The node gave an answer to another question. Are both sides of one version?")
}
