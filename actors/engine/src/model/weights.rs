//! Which matrices a model has, and the CPU's: packed, or mapped if that was done before.

use super::Hyperparameters;
use super::architecture::Family;
use super::linear::{Gated, Linear, RmsNorm};
use super::packed_file::{PackedFile, Piece};
use crate::dequantize::Format;
use crate::gguf::{Gguf, GgufError, TensorInfo};
use crate::kernels::{Packed, Shape};
use crate::{EngineError, PackedCache};

/// One layer.
#[derive(Debug)]
pub(super) struct Layer {
    pub attention_norm: RmsNorm,
    /// Queries, keys and values side by side.
    pub query_key_value: Linear,
    /// Norms of single heads of queries and of keys.
    pub head_norms: Option<(RmsNorm, RmsNorm)>,
    pub attention_output: Linear,
    pub post_attention_norm: Option<RmsNorm>,
    pub feed_forward_norm: RmsNorm,
    pub gate_up: Gated,
    pub down: Linear,
    pub post_feed_forward_norm: Option<RmsNorm>,
}

/// All weights but the embedding table.
#[derive(Debug)]
pub(super) struct Weights {
    pub layers: Vec<Layer>,
    pub output_norm: RmsNorm,
    pub output: Linear,
}

/// In which order the rows of a stored matrix become outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Order {
    AsStored,
    /// Within each head, the rows 0, 2, 4 … first, then 1, 3, 5 …
    Pairs {
        head_size: usize,
    },
}

impl Order {
    /// The stored row of output `n`.
    pub fn row(self, n: usize) -> usize {
        match self {
            Self::AsStored => n,
            Self::Pairs { head_size } => {
                let (head, within, half) = (n / head_size, n % head_size, head_size / 2);
                head * head_size + within % half * 2 + within / half
            }
        }
    }
}

/// Some rows of a stored matrix that become outputs.
#[derive(Debug, Clone)]
pub(crate) struct Part {
    /// Without `.weight`.
    pub name: String,
    pub inputs: usize,
    /// Rows of the whole stored matrix.
    pub stored: usize,
    pub first: usize,
    pub outputs: usize,
    pub order: Order,
}

impl Part {
    pub(crate) fn whole(name: String, inputs: usize, outputs: usize) -> Self {
        Self { name, inputs, stored: outputs, first: 0, outputs, order: Order::AsStored }
    }
}

/// The matrices of a layer.
pub(crate) struct LayerParts {
    pub query_key_value: Vec<Part>,
    pub attention_output: Part,
    pub gate: Part,
    pub up: Part,
    pub down: Part,
}

pub(crate) fn layer_parts(model: &Hyperparameters, n: usize) -> LayerParts {
    let Hyperparameters { embedding, feed_forward, heads, kv_heads, head_size, .. } = *model;
    let name = |part: &str| format!("blk.{n}.{part}");
    let joined = model.family == Family::Phi3;
    let turned = match model.family {
        Family::Llama => Order::Pairs { head_size },
        _ => Order::AsStored,
    };
    let (queries, keys) = (heads * head_size, kv_heads * head_size);
    let query_key_value = if joined {
        vec![Part::whole(name("attn_qkv"), embedding, queries + 2 * keys)]
    } else {
        vec![
            Part { order: turned, ..Part::whole(name("attn_q"), embedding, queries) },
            Part { order: turned, ..Part::whole(name("attn_k"), embedding, keys) },
            Part::whole(name("attn_v"), embedding, keys),
        ]
    };
    let half = |first: usize| Part {
        first,
        outputs: feed_forward,
        ..Part::whole(name("ffn_up"), embedding, 2 * feed_forward)
    };
    let (gate, up) = if joined {
        (half(0), half(feed_forward))
    } else {
        let whole = |part: &str| Part::whole(name(part), embedding, feed_forward);
        (whole("ffn_gate"), whole("ffn_up"))
    };
    LayerParts {
        query_key_value,
        attention_output: Part::whole(name("attn_output"), queries, embedding),
        gate,
        up,
        down: Part::whole(name("ffn_down"), feed_forward, embedding),
    }
}

/// Without one of its own, the output shares the embedding's weights.
pub(crate) fn output_part(gguf: &Gguf, model: &Hyperparameters) -> Part {
    let own = gguf.find_tensor("output.weight").is_some();
    Part::whole(if own { "output" } else { "token_embd" }.into(), model.embedding, model.vocabulary)
}

/// All matrices that are multiplied with, those of a layer one after the other.
pub(crate) fn all_parts(gguf: &Gguf, model: &Hyperparameters) -> Vec<Part> {
    let mut parts = Vec::new();
    for n in 0..model.layers {
        let layer = layer_parts(model, n);
        parts.extend(layer.query_key_value);
        parts.extend([layer.attention_output, layer.gate, layer.up, layer.down]);
    }
    parts.push(output_part(gguf, model));
    parts
}

/// The parts' biases side by side; `None` where no part has one.
pub(crate) fn bias_of(gguf: &Gguf, parts: &[Part]) -> Result<Option<Vec<f32>>, GgufError> {
    let name = |part: &Part| format!("{}.bias", part.name);
    if !parts.iter().any(|part| gguf.find_tensor(&name(part)).is_some()) {
        return Ok(None);
    }
    let mut all = Vec::new();
    for part in parts {
        let stored = values(gguf, &name(part), &[part.stored])?;
        all.extend((0..part.outputs).map(|n| stored[part.first + part.order.row(n)]));
    }
    Ok(Some(all))
}

/// Multiplications of one token with the weights of all layers.
pub(super) fn multiplications(model: &Hyperparameters) -> u64 {
    let Hyperparameters { embedding, feed_forward, heads, kv_heads, head_size, layers, .. } = *model;
    let each = embedding * head_size * (2 * heads + 2 * kv_heads) + 3 * embedding * feed_forward;
    (layers * each) as u64
}

/// Refuses a file that has other tensors than such a model, or an embedding table of another size.
pub(super) fn refuse_other_tensors(gguf: &Gguf, model: &Hyperparameters) -> Result<(), EngineError> {
    refuse_unknown_tensors(gguf, model)?;
    check(gguf, "token_embd.weight", &[model.embedding, model.vocabulary])
        .map_err(|why| EngineError::Gguf { path: gguf.path().into(), why })?;
    Ok(())
}

impl Weights {
    pub fn load(gguf: &Gguf, model: &Hyperparameters, cache: Option<&PackedCache>) -> Result<Self, EngineError> {
        let damaged = |why| EngineError::Gguf { path: gguf.path().into(), why };
        if !model.head_size.is_multiple_of(crate::kernels::LANES) || model.head_size > crate::kernels::WIDEST_HEAD {
            return Err(EngineError::Unsupported {
                path: gguf.path().into(),
                what: format!("heads of width {}", model.head_size),
                hint: "on the CPU multiples of 16 up to 256 are".into(),
            });
        }
        let parts = all_parts(gguf, model);
        let pieces = parts.into_iter().map(|part| piece(gguf, part)).collect::<Result<_, _>>().map_err(damaged)?;
        let packed = PackedFile::open(gguf, pieces, cache)?;
        Loader { gguf, packed }.all(model).map_err(damaged)
    }

    /// Bytes of all matrices.
    pub fn bytes(&self) -> u64 {
        let of_parts =
            |parts: &[Packed]| -> u64 { parts.iter().map(|part| part.shape().bytes().unwrap_or(0) as u64).sum() };
        let mut bytes = of_parts(&self.output.parts);
        for layer in &self.layers {
            bytes += of_parts(&layer.query_key_value.parts) + of_parts(&layer.attention_output.parts);
            bytes += of_parts(&layer.down.parts) + of_parts(&[layer.gate_up.gate.clone(), layer.gate_up.up.clone()]);
        }
        bytes
    }
}

/// A part with the format that its file has; refused where the stored matrix has other sizes.
pub(crate) fn piece(gguf: &Gguf, part: Part) -> Result<Piece, GgufError> {
    let info = check(gguf, &format!("{}.weight", part.name), &[part.inputs, part.stored])?;
    let format = Format::of(info)?;
    Ok(Piece { shape: Shape { format, inputs: part.inputs, outputs: part.outputs }, part })
}

/// A tensor that must have these sizes.
pub(crate) fn check<'a>(gguf: &'a Gguf, name: &str, sizes: &[usize]) -> Result<&'a TensorInfo, GgufError> {
    let info = gguf.tensor(name)?;
    let expected = sizes.iter().map(|size| *size as u64);
    if !info.dimensions.iter().copied().eq(expected) {
        let why = format!("it is {:?}, where {sizes:?} is due", info.dimensions);
        return Err(GgufError::Invalid { what: format!("tensor {name}"), why });
    }
    Ok(info)
}

/// A tensor that we would not use changes what the model says.
fn refuse_unknown_tensors(gguf: &Gguf, model: &Hyperparameters) -> Result<(), EngineError> {
    const PARTS: [&str; 8] = [
        "attn_norm.weight",
        "attn_output.weight",
        "ffn_norm.weight",
        "ffn_up.weight",
        "ffn_down.weight",
        "attn_output.bias",
        "ffn_gate.weight",
        "attn_qkv.weight",
    ];
    const SEPARATE: [&str; 6] =
        ["attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_q.bias", "attn_k.bias", "attn_v.bias"];
    const HEAD_NORMS: [&str; 2] = ["attn_q_norm.weight", "attn_k_norm.weight"];
    const POST_NORMS: [&str; 2] = ["post_attention_norm.weight", "post_ffw_norm.weight"];
    const OTHERS: [&str; 4] = ["token_embd.weight", "output.weight", "output_norm.weight", "rope_freqs.weight"];
    const FACTORS: [&str; 2] = ["rope_factors_long.weight", "rope_factors_short.weight"];
    let family = model.family;
    let is_known = |name: &str| {
        let of_layer = || {
            let (number, rest) = name.strip_prefix("blk.")?.split_once('.')?;
            let joined = family == Family::Phi3;
            let known = PARTS.contains(&rest) && (rest != "attn_qkv.weight" || joined)
                || SEPARATE.contains(&rest) && !joined
                || HEAD_NORMS.contains(&rest) && matches!(family, Family::Qwen3 | Family::Gemma3)
                || POST_NORMS.contains(&rest) && family == Family::Gemma3
                // Phi-3's factors are written once a layer by some converters.
                || FACTORS.contains(&rest) && joined;
            (number.parse::<usize>().ok()? < model.layers && known).then_some(())
        };
        OTHERS.contains(&name) || FACTORS.contains(&name) && family == Family::Phi3 || of_layer().is_some()
    };
    match gguf.tensors().find(|info| !is_known(&info.name)) {
        None => Ok(()),
        Some(info) => Err(EngineError::Unsupported {
            path: gguf.path().into(),
            what: format!("tensor {}", info.name),
            hint: format!("a plain {} model has no such tensor", model.architecture),
        }),
    }
}

/// All numbers of a tensor that must have these sizes.
pub(crate) fn values(gguf: &Gguf, name: &str, sizes: &[usize]) -> Result<Vec<f32>, GgufError> {
    let info = check(gguf, name, sizes)?;
    // The file has the bytes of this many, or is refused.
    let bytes = gguf.tensor_bytes(info)?;
    let mut values = vec![0.0; sizes.iter().product()];
    Format::of(info)?.dequantize(bytes, &mut values);
    Ok(values)
}

struct Loader<'a> {
    gguf: &'a Gguf,
    packed: PackedFile,
}

impl Loader<'_> {
    fn all(&self, model: &Hyperparameters) -> Result<Weights, GgufError> {
        let Hyperparameters { embedding, head_size, family, .. } = *model;
        let epsilon = model.norm_epsilon;
        let layers = (0..model.layers).map(|n| {
            let name = |part: &str| format!("blk.{n}.{part}.weight");
            let norm = |part: &str, size: usize| self.norm(&name(part), size, epsilon);
            let parts = layer_parts(model, n);
            let post = |part: &str| (family == Family::Gemma3).then(|| norm(part, embedding)).transpose();
            Ok(Layer {
                attention_norm: norm("attn_norm", embedding)?,
                query_key_value: self.linear(&parts.query_key_value)?,
                head_norms: model
                    .norms_heads()
                    .then(|| Ok((norm("attn_q_norm", head_size)?, norm("attn_k_norm", head_size)?)))
                    .transpose()?,
                attention_output: self.linear(&[parts.attention_output])?,
                post_attention_norm: post("post_attention_norm")?,
                feed_forward_norm: norm("ffn_norm", embedding)?,
                gate_up: self.gated(&parts.gate, &parts.up)?,
                down: self.linear(&[parts.down])?,
                post_feed_forward_norm: post("post_ffw_norm")?,
            })
        });
        Ok(Weights {
            layers: layers.collect::<Result<Vec<_>, GgufError>>()?,
            output_norm: self.norm("output_norm.weight", embedding, epsilon)?,
            output: self.linear(&[output_part(self.gguf, model)])?,
        })
    }

    fn norm(&self, name: &str, size: usize, epsilon: f32) -> Result<RmsNorm, GgufError> {
        Ok(RmsNorm { values: values(self.gguf, name, &[size])?, epsilon })
    }

    fn linear(&self, parts: &[Part]) -> Result<Linear, GgufError> {
        let bias = bias_of(self.gguf, parts)?;
        let parts = parts.iter().map(|part| self.packed.get(part)).collect::<Result<_, _>>()?;
        Ok(Linear { parts, bias })
    }

    fn gated(&self, gate: &Part, up: &Part) -> Result<Gated, GgufError> {
        Ok(Gated { gate: self.packed.get(gate)?, up: self.packed.get(up)? })
    }
}
