//! An encoder's weights: matrices packed for the kernels, lists as floats.

use super::shape::Shape;
use crate::gguf::{Gguf, GgufError};
use crate::kernels::Packed;
use crate::model::packed_file::PackedFile;
use crate::model::weights::{Part, check, piece, values};
use crate::{EngineError, PackedCache};

/// A product with weights and a bias.
#[derive(Debug)]
pub(super) struct Linear {
    /// Matrices side by side.
    pub parts: Vec<Packed>,
    /// As many numbers as all parts have outputs.
    pub bias: Vec<f32>,
}

/// A norm with mean and bias.
#[derive(Debug)]
pub(super) struct LayerNorm {
    pub weight: Vec<f32>,
    pub bias: Vec<f32>,
}

/// One layer; its norms stand behind what they are named after.
#[derive(Debug)]
pub(super) struct Layer {
    pub query_key_value: Linear,
    pub attention_output: Linear,
    pub attention_norm: LayerNorm,
    pub up: Linear,
    pub down: Linear,
    pub feed_forward_norm: LayerNorm,
}

/// All weights but the table of tokens, which stays in the mapped file.
#[derive(Debug)]
pub(super) struct Weights {
    /// `[context_length, embedding]`.
    pub positions: Vec<f32>,
    /// The first token type's vector: texts that stand alone have no other type.
    pub token_type: Vec<f32>,
    pub embedding_norm: LayerNorm,
    pub layers: Vec<Layer>,
}

/// The matrices of a layer.
struct LayerParts {
    query_key_value: [Part; 3],
    attention_output: Part,
    up: Part,
    down: Part,
}

fn layer_parts(shape: &Shape, n: usize) -> LayerParts {
    let part = |name: &str, inputs, outputs| Part::whole(format!("blk.{n}.{name}"), inputs, outputs);
    let Shape { embedding: width, feed_forward, .. } = *shape;
    LayerParts {
        query_key_value: ["attn_q", "attn_k", "attn_v"].map(|name| part(name, width, width)),
        attention_output: part("attn_output", width, width),
        up: part("ffn_up", width, feed_forward),
        down: part("ffn_down", feed_forward, width),
    }
}

impl Weights {
    /// Checks every tensor's sizes and packs the matrices (or maps what was packed before).
    pub fn load(gguf: &Gguf, shape: &Shape, cache: Option<&PackedCache>) -> Result<Self, EngineError> {
        let damaged = |why| EngineError::Gguf { path: gguf.path().into(), why };
        refuse_unknown_tensors(gguf, shape)?;
        check(gguf, "token_embd.weight", &[shape.embedding, shape.vocabulary]).map_err(damaged)?;
        let mut pieces = Vec::new();
        for n in 0..shape.layers {
            let LayerParts { query_key_value, attention_output, up, down } = layer_parts(shape, n);
            for part in query_key_value.into_iter().chain([attention_output, up, down]) {
                pieces.push(piece(gguf, part).map_err(damaged)?);
            }
        }
        let packed = PackedFile::open(gguf, pieces, cache)?;
        Loader { gguf, packed }.all(shape).map_err(damaged)
    }
}

struct Loader<'a> {
    gguf: &'a Gguf,
    packed: PackedFile,
}

impl Loader<'_> {
    fn all(&self, shape: &Shape) -> Result<Weights, GgufError> {
        let width = shape.embedding;
        let layers = (0..shape.layers).map(|n| {
            let parts = layer_parts(shape, n);
            Ok(Layer {
                query_key_value: self.linear(&parts.query_key_value)?,
                attention_output: self.linear(&[parts.attention_output])?,
                attention_norm: self.norm(&format!("blk.{n}.attn_output_norm"), width)?,
                up: self.linear(&[parts.up])?,
                down: self.linear(&[parts.down])?,
                feed_forward_norm: self.norm(&format!("blk.{n}.layer_output_norm"), width)?,
            })
        });
        let types = if self.gguf.tensor("token_types.weight")?.dimensions.len() == 1 {
            values(self.gguf, "token_types.weight", &[width])?
        } else {
            values(self.gguf, "token_types.weight", &[width, shape.token_types])?
        };
        Ok(Weights {
            layers: layers.collect::<Result<_, GgufError>>()?,
            positions: values(self.gguf, "position_embd.weight", &[width, shape.context_length])?,
            token_type: types[..width].to_vec(),
            embedding_norm: self.norm("token_embd_norm", width)?,
        })
    }

    fn norm(&self, name: &str, size: usize) -> Result<LayerNorm, GgufError> {
        let list = |kind: &str| values(self.gguf, &format!("{name}.{kind}"), &[size]);
        Ok(LayerNorm { weight: list("weight")?, bias: list("bias")? })
    }

    fn linear(&self, parts: &[Part]) -> Result<Linear, GgufError> {
        let mut bias = Vec::new();
        for part in parts {
            bias.extend(values(self.gguf, &format!("{}.bias", part.name), &[part.outputs])?);
        }
        Ok(Linear { parts: parts.iter().map(|part| self.packed.get(part)).collect::<Result<_, _>>()?, bias })
    }
}

/// A tensor that we would not use changes the embeddings: gates, head norms, or a classifier's head, as variants of
/// BERT have them.
fn refuse_unknown_tensors(gguf: &Gguf, shape: &Shape) -> Result<(), EngineError> {
    const TABLES: [&str; 3] = ["token_embd.weight", "position_embd.weight", "token_types.weight"];
    const PARTS: [&str; 8] =
        ["attn_q", "attn_k", "attn_v", "attn_output", "attn_output_norm", "ffn_up", "ffn_down", "layer_output_norm"];
    let is_known = |name: &str| {
        let Some((stem, "weight" | "bias")) = name.rsplit_once('.') else { return false };
        let of_layer = || {
            let (number, part) = stem.strip_prefix("blk.")?.split_once('.')?;
            (number.parse::<usize>().ok()? < shape.layers && PARTS.contains(&part)).then_some(())
        };
        TABLES.contains(&name) || stem == "token_embd_norm" || of_layer().is_some()
    };
    match gguf.tensors().find(|info| !is_known(&info.name)) {
        None => Ok(()),
        Some(info) => Err(EngineError::Unsupported {
            path: gguf.path().into(),
            what: format!("tensor {}", info.name),
            hint: "a plain BERT has no such tensor".into(),
        }),
    }
}
