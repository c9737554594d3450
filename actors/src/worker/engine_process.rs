//! The engine process: `ingle engine`, a child of the node in a process of its own.

use std::path::PathBuf;
use std::process::ExitCode;

/// What the node tells its child on the command line.
#[derive(Debug, Clone)]
pub struct EngineProcessOptions {
    /// Where to listen for requests.
    pub socket: PathBuf,
    /// The model file; `None` for the echo engine.
    pub model: Option<PathBuf>,
    /// SHA-256 of the file, as the node knows it.
    pub digest: String,
    /// Sequences to decode together.
    pub slots: u32,
    /// `auto`, `cpu` or `gpu`.
    pub device: String,
    /// The node's id, this engine's index and generation: `id/index/generation`.
    pub engine: String,
}

/// Runs until the control pipe (standard input) ends. Frames of reports go to standard output, logs to standard
/// error.
pub fn run(options: EngineProcessOptions) -> ExitCode {
    let _ = options;
    ExitCode::FAILURE
}
