//! The command line.

use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand};
use ingle_actors::node::DeviceKind;

use crate::config::Layer;
use crate::logging::LogFormat;

mod models;
mod registry;

pub use models::{
    EmbedTexts, EvaluateModels, LoadModel, Models, ModelsCommand, QuantizeModel, SetParameters, ShowParameters,
    TestModel, UnloadModel, VerifyModels,
};
pub use registry::{AddModel, ListModels, PinModel, RemoveModel, SetDefault};

/// The machines of a home or small office as one private AI assistant.
///
/// One command starts a node that answers the OpenAI API on this machine; nodes that join each other answer with
/// each other's models.
#[derive(Debug, Parser)]
#[command(
    name = "ingle",
    version,
    propagate_version = true,
    arg_required_else_help = true,
    after_help = "Examples:\n  ingle up                              start here; the first start fetches a small model\n  ingle chat \"hello\"                    talk to it\n  ingle token                           let another machine join (prints what to type there)\n  ingle status                          who is there, and what they do\n\nA flag goes before an INGLE_* environment variable, that before the configuration file.\nExit codes: 0 all well, 1 something went wrong, 2 wrong usage or configuration."
)]
pub struct Cli {
    /// What holds for every command.
    #[command(flatten)]
    pub common: Common,
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Debug, Default, Args)]
pub struct Common {
    /// The node's folder: identity, members, control socket [env: INGLE_STATE_DIR] [default: your data folder/ingle]
    #[arg(long, global = true, value_name = "DIR", help_heading = "Options of every command")]
    pub state_dir: Option<PathBuf>,
    /// Configuration file [env: INGLE_CONFIG] [default: <state-dir>/ingle.toml where there is one]
    #[arg(long, global = true, value_name = "FILE", help_heading = "Options of every command")]
    pub config: Option<PathBuf>,
    /// Log more to standard error: -v info, -vv debug (INGLE_LOG takes finer filters) [default: warnings]
    #[arg(short, long, global = true, action = ArgAction::Count, help_heading = "Options of every command")]
    pub verbose: u8,
    /// How log lines look [env: INGLE_LOG_FORMAT] [default: text]
    #[arg(long, global = true, value_name = "FORMAT", help_heading = "Options of every command")]
    pub log_format: Option<LogFormat>,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start this machine's node and serve until Ctrl-C
    ///
    /// The first start makes a cluster of one machine and fetches the default model. The node answers the OpenAI
    /// API at http://127.0.0.1:11435/v1 for programs on this machine, and other nodes over QUIC with mutual TLS.
    /// Ctrl-C or SIGTERM lets running answers finish within the drain limit; a second one ends at once.
    Up(Up),
    /// Make this machine a member of another machine's cluster
    ///
    /// Type `ingle token` on a machine of that cluster; it prints the whole line to type here. Works with or
    /// without a node running here.
    Join(Join),
    /// Print a token with which one other machine can join
    ///
    /// The token is good once and for a short time. Works with or without a node running here.
    Token(Token),
    /// Show the nodes, their models and what they do
    Status(Status),
    /// Show what is loaded on which node, and what it takes
    Ps(Processes),
    /// Show what happened in the cluster, and with --follow what happens
    ///
    /// Nodes that come and go, models on all nodes, the registry, the default model, and answers that moved. A node
    /// keeps the last 1,024 events that it saw since it was started.
    Events(Events),
    /// Show who could have answered a request, who was asked, and why
    Explain(Explain),
    /// Let a node take nothing new, until its answers have finished or moved to other nodes
    Drain(Drain),
    /// Ask the assistant and print its answer as it comes
    Chat(Chat),
    /// Measure how fast this machine is with a model, and how near that is to its limits
    ///
    /// Loads the model in this process; stop a node that uses the same processor first, as the two would share it.
    Bench(Bench),
    /// Add, remove, load, unload and show models, set their parameters, convert model files, and measure what that costs
    Models(Models),
    /// The engine process, started by the node
    #[command(hide = true)]
    Engine(Engine),
}

/// Options of `ingle up`.
#[derive(Debug, Default, Args)]
pub struct Up {
    /// Where to answer HTTP: address, address:port or port; 0 picks a free port [env: INGLE_HTTP] [default:
    /// 127.0.0.1:11435]
    #[arg(long, value_name = "ADDR")]
    pub http: Option<String>,
    /// Where to talk to other nodes (UDP): address, address:port or port [env: INGLE_QUIC] [default: [::]:11436]
    #[arg(long, value_name = "ADDR")]
    pub quic: Option<String>,
    /// The node's name, unique in its cluster [env: INGLE_NAME] [default: its last one, else the host name]
    #[arg(long)]
    pub name: Option<String>,
    /// The model: `default`, a path to a GGUF file, or `none` (`echo` is for tests) [env: INGLE_MODEL] [default:
    /// default]
    #[arg(long, value_name = "MODEL", conflicts_with = "no_model")]
    pub model: Option<String>,
    /// Run no model here; forward to the other nodes (the same as --model none)
    #[arg(long)]
    pub no_model: bool,
    /// What the model computes on: `auto`, `cpu` or `gpu` (a GPU needs a build with `--features gpu`) [env:
    /// INGLE_DEVICE] [default: auto]
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<DeviceKind>,
    /// Answer with the model of a server elsewhere, too (Ollama, llama.cpp, vLLM, LM Studio …) [env: INGLE_ENDPOINT]
    #[arg(long, value_name = "URL")]
    pub endpoint: Option<String>,
    /// Which of that server's models [env: INGLE_ENDPOINT_MODEL] [default: the only one]
    #[arg(long, value_name = "NAME")]
    pub endpoint_model: Option<String>,
    /// The environment variable that has that server's key [env: INGLE_ENDPOINT_KEY_ENV]
    #[arg(long, value_name = "VARIABLE")]
    pub endpoint_key_env: Option<String>,
    /// Neither look for nodes on the local network nor be found there [env: INGLE_MDNS=false]
    #[arg(long)]
    pub no_mdns: bool,
    /// How long running answers may take to finish when the node ends, as in 20s or 2m [env: INGLE_DRAIN_LIMIT]
    /// [default: 20s]
    #[arg(long, value_name = "TIME")]
    pub drain_limit: Option<String>,
}

/// Options of `ingle bench`.
#[derive(Debug, Args)]
pub struct Bench {
    /// A model's name or a GGUF file
    #[arg(long, value_name = "MODEL", default_value = "default")]
    pub model: String,
    /// What to compute on: `auto`, `cpu` or `gpu`
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: DeviceKind,
    /// Threads that compute [default: one for each core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Instructions to compute with, for comparisons: `portable`, `avx2` or `avx512-vnni` [default: the best there are]
    #[arg(long, value_name = "SET")]
    pub instructions: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Options of `ingle join`.
#[derive(Debug, Args)]
pub struct Join {
    /// A machine of the cluster: host or host:port
    #[arg(value_name = "HOST[:PORT]")]
    pub address: String,
    /// What `ingle token` printed there
    #[arg(long)]
    pub token: String,
    /// Do not ask for the cluster's signing key: this machine can then not let others in
    #[arg(long)]
    pub guest: bool,
    /// Leave the present cluster also when it has other members
    #[arg(long)]
    pub leave_current: bool,
    /// This node's name in the cluster, where no node runs here [env: INGLE_NAME] [default: its last one,
    /// else the host name]
    #[arg(long)]
    pub name: Option<String>,
}

/// Options of `ingle token`.
#[derive(Debug, Args)]
pub struct Token {
    /// How long the token is good, as in 15m or 1h
    #[arg(long, value_name = "TIME", default_value = "15m", value_parser = crate::duration::parse)]
    pub expires: std::time::Duration,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Options of `ingle status`.
#[derive(Debug, Args)]
pub struct Status {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Options of `ingle ps`.
#[derive(Debug, Args)]
pub struct Processes {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Options of `ingle events`.
#[derive(Debug, Args)]
pub struct Events {
    /// Go on with what happens, until Ctrl-C
    #[arg(long, short)]
    pub follow: bool,
    /// Only what came behind the event of this number (see --json)
    #[arg(long, value_name = "NUMBER")]
    pub since: Option<u64>,
    /// Print a JSON object a line
    #[arg(long)]
    pub json: bool,
}

/// Options of `ingle explain`.
#[derive(Debug, Args)]
pub struct Explain {
    /// The request's id, as the header x-request-id has it, or `last`
    #[arg(value_name = "REQUEST-ID", default_value = "last")]
    pub request: String,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Options of `ingle drain`.
#[derive(Debug, Args)]
pub struct Drain {
    /// The node's name, as `ingle status` shows it
    pub node: String,
    /// How long running answers may take to finish there before they move, as in 20s or 2m
    #[arg(long, value_name = "TIME", default_value = "20s", value_parser = crate::duration::parse)]
    pub limit: std::time::Duration,
    /// Let it take work again
    #[arg(long)]
    pub undo: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Options of `ingle chat`.
#[derive(Debug, Args)]
pub struct Chat {
    /// What to say; `-` reads it from standard input
    pub text: String,
    /// Which model answers [default: the default model]
    #[arg(long, short)]
    pub model: Option<String>,
    /// Instructions for the model
    #[arg(long, short)]
    pub system: Option<String>,
}

/// What the node tells its engine process.
#[derive(Debug, Args)]
pub struct Engine {
    /// Where to listen for requests
    #[arg(long)]
    pub socket: PathBuf,
    /// The model file; none for the echo engine
    #[arg(long)]
    pub model: Option<PathBuf>,
    /// SHA-256 of the file
    #[arg(long, default_value = "")]
    pub digest: String,
    /// Where packed weights are kept
    #[arg(long)]
    pub packed: Option<PathBuf>,
    /// Bytes that all of them may have
    #[arg(long)]
    pub packed_limit: Option<u64>,
    /// What is set for the model, as JSON
    #[arg(long, default_value = "{}")]
    pub parameters: String,
    /// auto, cpu or gpu
    #[arg(long, default_value = "auto")]
    pub device: DeviceKind,
}

impl Cli {
    /// What the flags say about settings.
    pub fn layer(&self) -> Layer {
        let mut layer = Layer {
            state_dir: self.common.state_dir.clone(),
            config: self.common.config.clone(),
            log_format: self.common.log_format,
            log_filter: match self.common.verbose {
                0 => None,
                1 => Some("info".into()),
                _ => Some("info,ingle=debug,ingle_actors=debug,ingle_engine=debug".into()),
            },
            ..Layer::default()
        };
        match &self.command {
            Command::Up(up) => {
                layer.http = up.http.clone();
                layer.quic = up.quic.clone();
                layer.name = up.name.clone();
                layer.model = if up.no_model { Some("none".into()) } else { up.model.clone() };
                layer.device = up.device;
                layer.endpoint = up.endpoint.clone();
                layer.endpoint_model = up.endpoint_model.clone();
                layer.endpoint_key_env = up.endpoint_key_env.clone();
                layer.mdns = up.no_mdns.then_some(false);
                layer.drain_limit = up.drain_limit.clone();
            }
            Command::Join(join) => layer.name = join.name.clone(),
            _ => {}
        }
        layer
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent_and_says_its_exit_codes() {
        Cli::command().debug_assert();
        assert!(Cli::command().render_long_help().to_string().contains("Exit codes: 0"));
    }

    #[test]
    fn flags_become_settings_wherever_the_common_ones_stand() {
        let cli = Cli::try_parse_from(["ingle", "up", "--http", "0", "--no-model", "--no-mdns", "--state-dir", "/s"])
            .unwrap();
        let layer = cli.layer();
        assert_eq!(layer.http.as_deref(), Some("0"));
        assert_eq!(layer.model.as_deref(), Some("none"));
        assert_eq!(layer.mdns, Some(false));
        assert_eq!(layer.state_dir, Some("/s".into()));
        let before = Cli::try_parse_from(["ingle", "--state-dir", "/s", "-v", "status"]).unwrap().layer();
        assert_eq!(before.state_dir, Some("/s".into()));
        assert_eq!(before.log_filter.as_deref(), Some("info"));
        assert!(Cli::try_parse_from(["ingle", "up", "--model", "x", "--no-model"]).is_err());
        assert!(Cli::try_parse_from(["ingle", "token", "--expires", "soon"]).is_err());
    }
}
