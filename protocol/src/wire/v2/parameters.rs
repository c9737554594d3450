//! Parameters of a running engine, told to it by its node over the control pipe.

use serde::{Deserialize, Serialize};

/// What can change between two steps of an engine. Everything else needs another engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LiveParameters {
    /// Sequences that it decodes together, at least 1.
    pub batch_size: u32,
    /// Tokens of an answer at most; `None`: up to the context's end.
    pub max_tokens: Option<u32>,
    /// Tokens of prompts in one step at most, at least 1.
    pub prefill_budget: u32,
    /// Threads that compute, on the CPU; `None`: one for each core.
    pub threads: Option<u32>,
}

/// The node wants these from now on. Answered by one [`ParametersSet`] with the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetParameters {
    /// Counts the changes of this engine process.
    pub number: u64,
    /// All of them, changed or not.
    pub parameters: LiveParameters,
}

/// The engine has taken them, or has left everything as it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParametersSet {
    /// Which change.
    pub number: u64,
    /// Why they are not taken.
    pub refused: Option<String>,
}
