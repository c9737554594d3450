//! The numbers in a GGUF's metadata that make a Llama model.

use crate::EngineError;
use crate::gguf::{Gguf, GgufError};

/// Sizes and constants of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Hyperparameters {
    /// Layers.
    pub layers: usize,
    /// Tokens that the model was trained for.
    pub context_length: u32,
    /// Width of the residual stream.
    pub embedding: usize,
    /// Width inside the feed-forward part.
    pub feed_forward: usize,
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_size: usize,
    /// Token ids are below this.
    pub vocabulary: usize,
    /// Added to the mean square before its root.
    pub norm_epsilon: f32,
    /// Base of the rotary frequencies.
    pub rope_base: f32,
    /// Positions are divided by this.
    pub rope_factor: f32,
}

/// The most of anything; keeps products of two far from overflow. Real models stay below 2^18.
const MOST: u32 = 1 << 24;

impl Hyperparameters {
    /// From the `llama.*` metadata. Another architecture is refused by name.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, EngineError> {
        let path = gguf.path();
        let damaged = |why| EngineError::Gguf { path: path.into(), why };
        let unsupported =
            |what: String, hint: &str| EngineError::Unsupported { path: path.into(), what, hint: hint.into() };
        let architecture = gguf.text("general.architecture").map_err(damaged)?.unwrap_or("none");
        if architecture != "llama" {
            return Err(unsupported(format!("the architecture {architecture:?}"), "only \"llama\" is"));
        }
        if gguf.number("llama.expert_count").map_err(damaged)?.unwrap_or(0) > 0 {
            return Err(unsupported("a mixture of experts".into(), "only dense models are"));
        }
        let optional = |key: &str| -> Result<Option<usize>, GgufError> {
            match gguf.number(key)? {
                Some(number) if number == 0 || number > MOST => {
                    Err(GgufError::Invalid { what: key.into(), why: format!("it is {number}") })
                }
                number => Ok(number.map(|number| number as usize)),
            }
        };
        let required = |key: &str| optional(key)?.ok_or_else(|| GgufError::Missing(key.into()));
        let read = || -> Result<Self, GgufError> {
            let embedding = required("llama.embedding_length")?;
            let heads = required("llama.attention.head_count")?;
            let table = gguf.tensor("token_embd.weight")?;
            let epsilon = "llama.attention.layer_norm_rms_epsilon";
            Ok(Self {
                layers: required("llama.block_count")?,
                context_length: required("llama.context_length")? as u32,
                embedding,
                feed_forward: required("llama.feed_forward_length")?,
                heads,
                kv_heads: optional("llama.attention.head_count_kv")?.unwrap_or(heads),
                head_size: optional("llama.attention.key_length")?.unwrap_or(embedding / heads),
                vocabulary: table.dimensions.get(1).and_then(|n| usize::try_from(*n).ok()).unwrap_or(1),
                norm_epsilon: gguf.float(epsilon)?.ok_or_else(|| GgufError::Missing(epsilon.into()))?,
                rope_base: gguf.float("llama.rope.freq_base")?.unwrap_or(10_000.0),
                rope_factor: gguf.float("llama.rope.scaling.factor")?.unwrap_or(1.0),
            })
        };
        let model = read().map_err(damaged)?;
        let invalid = |what: &str, why: String| damaged(GgufError::Invalid { what: what.into(), why });
        let Self { heads, kv_heads, head_size, .. } = model;
        if !heads.is_multiple_of(kv_heads) {
            let why = format!("{heads} heads do not share {kv_heads}");
            return Err(invalid("llama.attention.head_count_kv", why));
        }
        if head_size == 0 || !head_size.is_multiple_of(2) {
            return Err(invalid("llama.attention.key_length", format!("heads of width {head_size}")));
        }
        let rotated = optional("llama.rope.dimension_count").map_err(damaged)?.unwrap_or(head_size);
        let value = optional("llama.attention.value_length").map_err(damaged)?.unwrap_or(head_size);
        if rotated != head_size || value != head_size {
            let what = format!("heads of width {head_size} with {rotated} rotated and values of width {value}");
            return Err(unsupported(what, "the three must be equal"));
        }
        for (key, number) in
            [("llama.rope.freq_base", model.rope_base), ("llama.rope.scaling.factor", model.rope_factor)]
        {
            if !number.is_finite() || number <= 0.0 {
                return Err(invalid(key, format!("it is {number}")));
            }
        }
        if !model.norm_epsilon.is_finite() || model.norm_epsilon < 0.0 {
            return Err(invalid("llama.attention.layer_norm_rms_epsilon", format!("it is {}", model.norm_epsilon)));
        }
        match gguf.text("llama.rope.scaling.type").map_err(damaged)? {
            None | Some("none") => Ok(Self { rope_factor: 1.0, ..model }),
            Some("linear") => Ok(model),
            Some(other) => Err(unsupported(format!("rope scaling {other:?}"), "\"none\" and \"linear\" are")),
        }
    }
}
