//! A cheap look at a model file before it is loaded.

use std::collections::BTreeMap;
use std::path::Path;

use crate::EngineError;
use crate::dequantize::format_name;
use crate::gguf::Gguf;
use crate::model::architecture::embeds;

/// What a model file says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelSummary {
    /// Its name; the file's own name where it has none.
    pub name: String,
    /// `llama` and the like.
    pub architecture: String,
    /// Tokens of one sequence at most; 0 where the file does not say.
    pub context_length: u32,
    /// The format of most of its weights: `Q4_1` and the like.
    pub quantization: String,
    /// Weights in all.
    pub parameters: u64,
    /// Bytes of the weights in the file (of those in formats that we read).
    pub tensor_bytes: u64,
    /// Bytes of the file.
    pub file_bytes: u64,
}

/// Reads the head of a GGUF file. The weights are not touched, but the file is known to be long enough for them.
pub fn inspect(path: &Path) -> Result<ModelSummary, EngineError> {
    let gguf = Gguf::open(path)?;
    let damaged = |why| EngineError::Gguf { path: path.into(), why };
    let architecture = gguf.text("general.architecture").map_err(damaged)?.unwrap_or("unknown").to_string();
    let name = gguf.text("general.name").map_err(damaged)?.map(ToString::to_string);
    let file_name = || path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let context_length = gguf.number(&format!("{architecture}.context_length")).map_err(damaged)?.unwrap_or(0);
    let mut by_format = BTreeMap::<u32, u64>::new();
    for tensor in gguf.tensors() {
        let elements = by_format.entry(tensor.format).or_default();
        *elements = elements.saturating_add(tensor.elements);
    }
    let main = by_format.iter().max_by_key(|(_, elements)| **elements).map(|(format, _)| *format);
    Ok(ModelSummary {
        name: name.unwrap_or_else(file_name),
        architecture,
        context_length,
        quantization: main.map_or_else(String::new, format_name),
        parameters: by_format.values().fold(0, |sum, elements| sum.saturating_add(*elements)),
        tensor_bytes: gguf.tensors().filter_map(|t| gguf.tensor_bytes(t).ok()).map(|bytes| bytes.len() as u64).sum(),
        file_bytes: gguf.file_bytes(),
    })
}

/// It is a GGUF file of a model that turns texts into numbers. Reads the file's head.
pub fn is_embedding_model(path: &Path) -> bool {
    Gguf::open(path).is_ok_and(|gguf| embeds(&gguf))
}
