//! Weights from the file to the device: dequantized and transposed on all cores.

use burn::tensor::{Device, Tensor, TensorData};
use rayon::prelude::*;

use super::Hyperparameters;
use super::linear::Linear;
use crate::EngineError;
use crate::dequantize::Format;
use crate::gguf::{Gguf, GgufError, TensorInfo};

/// Inputs that one task takes at a time, in whole blocks of the format.
const STRIP: usize = 32;
/// Outputs that are transposed at once: one cache line of `f32`.
const LINE: usize = 16;

/// One layer. Norms are `[1, embedding]`.
#[derive(Debug)]
pub(super) struct Layer {
    pub attention_norm: Tensor<2>,
    /// Queries, keys and values side by side.
    pub query_key_value: Linear,
    pub attention_output: Linear,
    pub feed_forward_norm: Tensor<2>,
    /// Gate and up side by side.
    pub gate_up: Linear,
    pub down: Linear,
}

/// All weights but the embedding table.
#[derive(Debug)]
pub(super) struct Weights {
    pub layers: Vec<Layer>,
    pub output_norm: Tensor<2>,
    pub output: Linear,
}

impl Weights {
    pub fn load(gguf: &Gguf, model: &Hyperparameters, device: &Device) -> Result<Self, EngineError> {
        let path = gguf.path();
        refuse_unknown_tensors(gguf, model.layers)?;
        let loader = Loader { gguf, device };
        let all = || -> Result<Self, GgufError> {
            let Hyperparameters { embedding, feed_forward, heads, kv_heads, head_size, vocabulary, .. } = *model;
            let layers = (0..model.layers).map(|n| {
                let name = |part: &str| format!("blk.{n}.{part}.weight");
                let turned = Order::Pairs { head_size };
                Ok(Layer {
                    attention_norm: loader.norm(&name("attn_norm"), embedding)?,
                    query_key_value: loader.matrices(
                        embedding,
                        &[
                            (name("attn_q"), heads * head_size, turned),
                            (name("attn_k"), kv_heads * head_size, turned),
                            (name("attn_v"), kv_heads * head_size, Order::AsStored),
                        ],
                    )?,
                    attention_output: loader.matrix(&name("attn_output"), heads * head_size, embedding)?,
                    feed_forward_norm: loader.norm(&name("ffn_norm"), embedding)?,
                    gate_up: loader.matrices(
                        embedding,
                        &[
                            (name("ffn_gate"), feed_forward, Order::AsStored),
                            (name("ffn_up"), feed_forward, Order::AsStored),
                        ],
                    )?,
                    down: loader.matrix(&name("ffn_down"), feed_forward, embedding)?,
                })
            });
            let layers = layers.collect::<Result<Vec<_>, GgufError>>()?;
            // Without one of its own, the output shares the embedding's weights.
            let output =
                if gguf.find_tensor("output.weight").is_some() { "output.weight" } else { "token_embd.weight" };
            loader.check("token_embd.weight", &[embedding, vocabulary])?;
            Ok(Self {
                layers,
                output_norm: loader.norm("output_norm.weight", embedding)?,
                output: loader.matrix(output, embedding, vocabulary)?,
            })
        };
        all().map_err(|why| EngineError::Gguf { path: path.into(), why })
    }
}

/// A tensor that we would not use changes what the model says.
fn refuse_unknown_tensors(gguf: &Gguf, layers: usize) -> Result<(), EngineError> {
    const PARTS: [&str; 9] =
        ["attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"];
    const OTHERS: [&str; 4] = ["token_embd.weight", "output.weight", "output_norm.weight", "rope_freqs.weight"];
    let is_known = |name: &str| {
        let of_layer = || {
            let (number, rest) = name.strip_prefix("blk.")?.split_once('.')?;
            let known = number.parse::<usize>().ok()? < layers && PARTS.contains(&rest.strip_suffix(".weight")?);
            known.then_some(())
        };
        OTHERS.contains(&name) || of_layer().is_some()
    };
    match gguf.tensors().find(|info| !is_known(&info.name)) {
        None => Ok(()),
        Some(info) => Err(EngineError::Unsupported {
            path: gguf.path().into(),
            what: format!("tensor {}", info.name),
            hint: "a plain Llama model has no such tensor".into(),
        }),
    }
}

/// In which order the rows of a stored matrix become columns.
#[derive(Debug, Clone, Copy)]
enum Order {
    AsStored,
    /// Within each head, the rows 0, 2, 4 … first, then 1, 3, 5 …
    Pairs {
        head_size: usize,
    },
}

impl Order {
    /// The stored row of column `n`.
    fn row(self, n: usize) -> usize {
        match self {
            Self::AsStored => n,
            Self::Pairs { head_size } => {
                let (head, within, half) = (n / head_size, n % head_size, head_size / 2);
                head * head_size + within % half * 2 + within / half
            }
        }
    }
}

struct Loader<'a> {
    gguf: &'a Gguf,
    device: &'a Device,
}

/// A stored matrix: `outputs` rows of the inputs' weights.
struct Stored<'a> {
    bytes: &'a [u8],
    row_bytes: usize,
    format: Format,
    outputs: usize,
    order: Order,
}

impl Loader<'_> {
    fn check(&self, name: &str, sizes: &[usize]) -> Result<&TensorInfo, GgufError> {
        let info = self.gguf.tensor(name)?;
        let expected = sizes.iter().map(|size| *size as u64);
        if !info.dimensions.iter().copied().eq(expected) {
            let why = format!("it is {:?}, where {sizes:?} is due", info.dimensions);
            return Err(GgufError::Invalid { what: format!("tensor {name}"), why });
        }
        Ok(info)
    }

    fn norm(&self, name: &str, size: usize) -> Result<Tensor<2>, GgufError> {
        let info = self.check(name, &[size])?;
        let mut values = vec![0.0; size];
        Format::of(info)?.dequantize(self.gguf.tensor_bytes(info)?, &mut values);
        Ok(Tensor::from_data(TensorData::new(values, [1, size]), self.device))
    }

    fn matrix(&self, name: &str, inputs: usize, outputs: usize) -> Result<Linear, GgufError> {
        self.matrices(inputs, &[(name.into(), outputs, Order::AsStored)])
    }

    /// Stored matrices with the same inputs, side by side as one `[in, out]`.
    fn matrices(&self, inputs: usize, parts: &[(String, usize, Order)]) -> Result<Linear, GgufError> {
        let stored = parts.iter().map(|(name, outputs, order)| {
            let info = self.check(name, &[inputs, *outputs])?;
            let (format, bytes) = (Format::of(info)?, self.gguf.tensor_bytes(info)?);
            let row_bytes = inputs / format.block_weights() * format.block_bytes();
            Ok(Stored { bytes, row_bytes, format, outputs: *outputs, order: *order })
        });
        let stored = stored.collect::<Result<Vec<_>, GgufError>>()?;
        let outputs: usize = parts.iter().map(|(_, outputs, _)| outputs).sum();
        let strip = stored.iter().map(|part| part.format.block_weights()).max().unwrap_or(1).max(STRIP);
        let mut values = vec![0.0f32; inputs * outputs];
        values.par_chunks_mut(strip * outputs).enumerate().for_each(|(number, values)| {
            let mut from = 0;
            for part in &stored {
                part.transpose_strip(number * strip, values, outputs, from);
                from += part.outputs;
            }
        });
        let weight = Tensor::from_data(TensorData::new(values, [inputs, outputs]), self.device);
        Ok(Linear::new(weight, *self.device == Device::flex(), self.device))
    }
}

impl Stored<'_> {
    /// Fills the columns from `from` on of `values`, whose rows (each `width` long) are the inputs from `input` on.
    fn transpose_strip(&self, input: usize, values: &mut [f32], width: usize, from: usize) {
        let inputs = values.len() / width;
        let block = self.format.block_weights();
        let (start, length) = (input / block * self.format.block_bytes(), inputs / block * self.format.block_bytes());
        let mut tile = vec![0.0f32; LINE * inputs];
        for first in (0..self.outputs).step_by(LINE) {
            let line = LINE.min(self.outputs - first);
            for (n, tile) in tile.chunks_exact_mut(inputs).take(line).enumerate() {
                let row = self.order.row(first + n) * self.row_bytes;
                self.format.dequantize(&self.bytes[row + start..][..length], tile);
            }
            for (i, row) in values.chunks_exact_mut(width).enumerate() {
                for (n, value) in row[from + first..][..line].iter_mut().enumerate() {
                    *value = tile[n * inputs + i];
                }
            }
        }
    }
}
