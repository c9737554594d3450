//! Which tensor gets which format: a simple form of what llama.cpp does (`llama_tensor_get_type` and
//! `tensor_allows_quantization` in `llama-quant.cpp`).
//!
//! 1. Norms, biases, one-dimensional tensors, position and token-type tables and the gates of experts stay `f32`.
//! 2. Below 8 bits, the output matrix gets Q6_K: every answer goes through it. That is `output.weight`, or
//!    `token_embd.weight` where the model has no other; with the K formats, always both.
//! 3. Everything else gets what was asked for.
//! 4. Rows that are no multiple of 256 get the 32-weight format of as many bits instead of a K format (Q4_K → Q4_1,
//!    Q5_K → Q5_1, Q6_K → Q8_0), rows that are no multiple of 32 get F16. These are reported.

use std::fmt;
use std::str::FromStr;

use crate::dequantize::Format;

pub(super) const OUTPUT: &str = "output.weight";
const EMBEDDING: &str = "token_embd.weight";
/// Matrices that stay `f32`, by how their names end.
const KEPT: [&str; 4] = ["_norm.weight", "position_embd.weight", "token_types.weight", "ffn_gate_inp.weight"];

/// What a model is to become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target(Format);

/// The names that people type, for each format; `int8` is Q8_0.
const NAMES: [(&str, Format); 12] = [
    ("int8", Format::Q8_0),
    ("q8_0", Format::Q8_0),
    ("q4_0", Format::Q4_0),
    ("q4_1", Format::Q4_1),
    ("q5_0", Format::Q5_0),
    ("q5_1", Format::Q5_1),
    ("q4_k", Format::Q4K),
    ("q5_k", Format::Q5K),
    ("q6_k", Format::Q6K),
    ("f16", Format::F16),
    ("bf16", Format::Bf16),
    ("f32", Format::F32),
];

impl FromStr for Target {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = NAMES.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
        known
            .map(|(_, format)| Self(*format))
            .ok_or_else(|| format!("there is no format {name:?}: there are {}", NAMES.map(|(name, _)| name).join(", ")))
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.name())
    }
}

/// A tensor that gets another format than it should have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fallback {
    /// The tensor.
    pub tensor: String,
    /// Weights of a row.
    pub row: u64,
    /// What it should have got, as ggml names it.
    pub wanted: String,
    /// What it gets.
    pub got: String,
}

impl Target {
    /// The format that most weights get.
    pub fn format(self) -> Format {
        self.0
    }

    /// How `general.file_type` names it (`llama_ftype` in llama.h).
    pub fn file_type(self) -> u32 {
        match self.0 {
            Format::F32 => 0,
            Format::F16 => 1,
            Format::Q4_0 => 2,
            Format::Q4_1 => 3,
            Format::Q8_0 => 7,
            Format::Q5_0 => 8,
            Format::Q5_1 => 9,
            // The "small" mixtures: theirs is ours, but for the embedding.
            Format::Q4K => 14,
            Format::Q5K => 16,
            Format::Q6K => 18,
            Format::Bf16 => 32,
        }
    }

    /// The format of one tensor (`dimensions` the fastest-moving first), and what it should have been where its
    /// rows do not fit that. `has_output`: the model has an `output.weight`.
    pub(super) fn format_for(self, name: &str, dimensions: &[u64], has_output: bool) -> (Format, Option<Fallback>) {
        let is_matrix = dimensions.len() >= 2 && name.ends_with(".weight");
        if !is_matrix || KEPT.iter().any(|end| name.ends_with(end)) {
            return (Format::F32, None);
        }
        let is_output = name == OUTPUT
            || name == EMBEDDING && (!has_output || matches!(self.0, Format::Q4K | Format::Q5K | Format::Q6K));
        let below_eight_bits = self.0.is_quantized() && self.0 != Format::Q8_0;
        let wanted = if is_output && below_eight_bits { Format::Q6K } else { self.0 };
        let row = dimensions[0];
        let fits = |format: Format| row.is_multiple_of(format.block_weights() as u64);
        let smaller = match wanted {
            Format::Q4K => Format::Q4_1,
            Format::Q5K => Format::Q5_1,
            Format::Q6K => Format::Q8_0,
            other => other,
        };
        let Some(got) = [wanted, smaller, Format::F16].into_iter().find(|format| fits(*format)) else {
            return (Format::F32, None);
        };
        let fallback =
            (got != wanted).then(|| Fallback { tensor: name.into(), row, wanted: wanted.name(), got: got.name() });
        (got, fallback)
    }
}
