//! The Llama family: RMSNorm, rotary positions, grouped-query attention, SwiGLU. One definition for every burn
//! backend.
//!
//! Weights are matrices `[in, out]` in `f32`, dequantized when the model is loaded; what shares its input is
//! joined (query, key and value; gate and up). The embedding table stays quantized in the mapped file, as a step
//! needs only a few of its rows. Keys and values are kept per slot and layer and grow by need.
//!
//! **What one sequence gets does not depend on the others, nor on how its prompt was cut.** On the CPU this holds
//! bit for bit, because every sum is taken in an order that depends on the row alone: see `Linear` for
//! products with weights; and attention always runs over whole blocks of [`BLOCK`] positions, masked behind the row's own, with
//! no group of rows crossing a block's end. So a prompt that is read again with an answer's tokens behind it gives
//! the state that decoding gave. GPUs promise no such thing.

use std::path::Path;
use std::sync::Arc;

use burn::tensor::activation::{silu, softmax};
use burn::tensor::{Device, Tensor, TensorData};

use crate::dequantize::Format;
use crate::gguf::Gguf;
use crate::{Capabilities, DeviceChoice, EngineError, Logits, StepEngine, StepEntry};

mod cache;
mod hyperparameters;
mod linear;
mod rotary;
mod weights;

#[cfg(test)]
mod tests;

use cache::LayerCache;
pub use hyperparameters::Hyperparameters;
use rotary::Rotary;
use weights::{Layer, Weights};

/// Attention runs over whole blocks of so many positions; prompts are read in chunks of one.
pub const BLOCK: usize = 64;

/// Added to a score that must not count. Not infinity, which some GPUs turn into NaN.
const MASKED: f32 = -1e30;

/// A loaded model with room for some sequences.
#[derive(Debug)]
pub struct Llama {
    gguf: Arc<Gguf>,
    embedding: Format,
    hyperparameters: Hyperparameters,
    weights: Weights,
    rotary: Rotary,
    capabilities: Capabilities,
    slots: Vec<Slot>,
    device: Device,
}

#[derive(Debug, Default)]
struct Slot {
    /// Tokens whose keys and values are in the cache.
    length: usize,
    layers: Vec<LayerCache>,
}

/// Some tokens of one slot that lie in one block.
struct Group {
    slot: usize,
    /// Its place in the step's rows.
    row: usize,
    rows: usize,
    /// The first token's place in its sequence.
    position: usize,
    mask: Tensor<4>,
}

impl Group {
    /// Positions up to the end of its block.
    fn span(&self) -> usize {
        (self.position + self.rows).next_multiple_of(BLOCK)
    }
}

impl Llama {
    /// Loads the weights onto `device`. `context_length` bounds the model's own.
    pub(crate) fn load(
        gguf: Arc<Gguf>,
        device: &Device,
        slots: u32,
        context_length: Option<u32>,
        (backend, numerics): (String, String),
    ) -> Result<Self, EngineError> {
        let hyperparameters = Hyperparameters::from_gguf(&gguf)?;
        let weights = Weights::load(&gguf, &hyperparameters, device)?;
        let damaged = |why| EngineError::Gguf { path: gguf.path().into(), why };
        let embedding = gguf.tensor("token_embd.weight").and_then(Format::of).map_err(damaged)?;
        let rotary = Rotary::new(&gguf, &hyperparameters)?;
        let own = hyperparameters.context_length;
        let capabilities = Capabilities {
            slots: slots.max(1),
            context_length: context_length.unwrap_or(own).min(own).max(2),
            vocabulary: hyperparameters.vocabulary as u32,
            chunk: BLOCK as u32,
            backend,
            numerics,
        };
        let slots = (0..capabilities.slots).map(|_| Slot::default()).collect();
        Ok(Self { gguf, embedding, hyperparameters, weights, rotary, capabilities, slots, device: device.clone() })
    }

    /// Opens a model file and loads it onto a device of the wanted kind.
    pub fn open(
        path: &Path,
        device: DeviceChoice,
        slots: u32,
        context_length: Option<u32>,
    ) -> Result<Self, EngineError> {
        let gguf = Arc::new(Gguf::open(path)?);
        let (device, words) = crate::device::choose(device)?;
        Self::load(gguf, &device, slots, context_length, words)
    }

    /// The numbers that make it this model.
    pub fn hyperparameters(&self) -> &Hyperparameters {
        &self.hyperparameters
    }

    /// Checks the entries and cuts them into groups.
    fn groups(&self, entries: &[StepEntry]) -> Result<Vec<Group>, EngineError> {
        let impossible = |entry: &StepEntry| EngineError::Step(format!("an impossible entry: {entry:?}"));
        let mut groups: Vec<Group> = Vec::new();
        for (row, entry) in entries.iter().enumerate() {
            let (slot, position) = (entry.slot as usize, entry.position as usize);
            let Some(state) = self.slots.get(slot) else { return Err(impossible(entry)) };
            if entry.token >= self.capabilities.vocabulary || entry.position >= self.capabilities.context_length {
                return Err(impossible(entry));
            }
            let stands_apart = groups.iter().rev().skip(1).any(|group| group.slot == slot)
                && groups.last().is_some_and(|group| group.slot != slot);
            let previous = groups.last_mut().filter(|group| group.slot == slot);
            let expected = previous.as_ref().map_or(state.length, |group| group.position + group.rows);
            if position != expected || stands_apart {
                return Err(impossible(entry));
            }
            match previous {
                Some(group) if !position.is_multiple_of(BLOCK) => group.rows += 1,
                _ => {
                    let mask = Tensor::empty([1, 1, 1, 1], &self.device);
                    groups.push(Group { slot, row, rows: 1, position, mask });
                }
            }
        }
        for group in &mut groups {
            group.mask = self.mask(group);
        }
        Ok(groups)
    }

    /// `[1, 1, rows, span]`: each token sees itself and those before it.
    fn mask(&self, group: &Group) -> Tensor<4> {
        let span = group.span();
        let mut mask = vec![0.0f32; group.rows * span];
        for (row, mask) in mask.chunks_exact_mut(span).enumerate() {
            mask[group.position + row + 1..].fill(MASKED);
        }
        Tensor::from_data(TensorData::new(mask, [1, 1, group.rows, span]), &self.device)
    }

    /// The rows of the embedding table, straight from the file.
    fn embed(&self, tokens: impl ExactSizeIterator<Item = u32>) -> Result<Tensor<2>, EngineError> {
        let damaged = |why| EngineError::Gguf { path: self.gguf.path().into(), why };
        let table = self.gguf.tensor("token_embd.weight").map_err(damaged)?;
        let bytes = self.gguf.tensor_bytes(table).map_err(damaged)?;
        let width = self.hyperparameters.embedding;
        let row_bytes = width / self.embedding.block_weights() * self.embedding.block_bytes();
        let rows = tokens.len();
        let mut values = vec![0.0f32; rows * width];
        for (token, row) in tokens.zip(values.chunks_exact_mut(width)) {
            self.embedding.dequantize(&bytes[token as usize * row_bytes..][..row_bytes], row);
        }
        Ok(Tensor::from_data(TensorData::new(values, [rows, width]), &self.device))
    }

    fn attention(
        &mut self,
        number: usize,
        x: Tensor<2>,
        groups: &[Group],
        cos_sin: &(Tensor<3>, Tensor<3>),
    ) -> Tensor<2> {
        let Hyperparameters { heads, kv_heads, head_size, .. } = self.hyperparameters;
        let layer = &self.weights.layers[number];
        let rows = x.dims()[0];
        let qkv = layer.query_key_value.apply(x);
        let rotated = (heads + kv_heads) * head_size;
        let qk = qkv.clone().slice([0..rows, 0..rotated]).reshape([rows, heads + kv_heads, head_size]);
        let qk = rotary::rotate(qk, cos_sin);
        let q = qk.clone().slice([0..rows, 0..heads]) * (1.0 / (head_size as f32).sqrt());
        let k = qk.slice([0..rows, heads..heads + kv_heads]);
        let v = qkv.slice([0..rows, rotated..rotated + kv_heads * head_size]).reshape([rows, kv_heads, head_size]);
        let mut outputs = Vec::with_capacity(groups.len());
        for group in groups {
            let of_group = group.row..group.row + group.rows;
            let cache = &mut self.slots[group.slot].layers[number];
            cache.write(group.position, k.clone().slice([of_group.clone()]), v.clone().slice([of_group.clone()]));
            let (keys, values) = cache.read(group.span());
            outputs.push(attend(q.clone().slice([of_group]), keys, values, &group.mask, kv_heads));
        }
        let attended = if outputs.len() == 1 { outputs.swap_remove(0) } else { Tensor::cat(outputs, 0) };
        self.weights.layers[number].attention_output.apply(attended)
    }

    fn feed_forward(layer: &Layer, x: Tensor<2>, width: usize) -> Tensor<2> {
        let rows = x.dims()[0];
        let gate_up = layer.gate_up.apply(x);
        let gate = gate_up.clone().slice([0..rows, 0..width]);
        let up = gate_up.slice([0..rows, width..2 * width]);
        layer.down.apply(silu(gate) * up)
    }
}

fn norm(x: Tensor<2>, weight: &Tensor<2>, epsilon: f32) -> Tensor<2> {
    let mean = x.clone().square().mean_dim(1);
    x / (mean + epsilon).sqrt() * weight.clone()
}

/// One group's queries `[rows, heads, size]` over its keys `[kv_heads, size, span]` and values
/// `[kv_heads, span, size]`, to `[rows, heads · size]`.
fn attend(q: Tensor<3>, keys: Tensor<3>, values: Tensor<3>, mask: &Tensor<4>, kv_heads: usize) -> Tensor<2> {
    let [rows, heads, size] = q.dims();
    let share = heads / kv_heads;
    let (keys, values) = (keys.unsqueeze_dim::<4>(1), values.unsqueeze_dim::<4>(1));
    // The heads that share keys are the rows of one product if there is only one token, else a batch of products.
    let q = if rows == 1 {
        q.reshape([kv_heads, 1, share, size])
    } else {
        q.reshape([rows, kv_heads, share, size]).permute([1, 2, 0, 3])
    };
    let alone = q.dims()[2] == 1;
    let q = if alone { q.repeat_dim(2, 2) } else { q };
    let scores = softmax(q.matmul(keys) + mask.clone(), 3);
    let out = scores.matmul(values);
    let out = if alone { out.slice_dim(2, 0..1) } else { out };
    let out = if rows == 1 { out } else { out.permute([2, 0, 1, 3]) };
    out.reshape([rows, heads * size])
}

impl StepEngine for Llama {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn step(&mut self, entries: &[StepEntry], want_logits: &[usize]) -> Result<Logits, EngineError> {
        let groups = self.groups(entries)?;
        if let Some(index) = want_logits.iter().find(|index| **index >= entries.len()) {
            return Err(EngineError::Step(format!("logits of entry {index}, of {}", entries.len())));
        }
        let epsilon = self.hyperparameters.norm_epsilon;
        let layers = self.weights.layers.len();
        for group in &groups {
            let slot = &mut self.slots[group.slot];
            slot.layers.resize_with(layers, LayerCache::default);
            let shape = (self.hyperparameters.kv_heads, self.hyperparameters.head_size);
            let most = (self.capabilities.context_length as usize).next_multiple_of(BLOCK);
            slot.layers.iter_mut().for_each(|layer| layer.reserve(group.span(), most, shape, &self.device));
            slot.length = group.position + group.rows;
        }
        let cos_sin = self.rotary.at(entries.iter().map(|entry| entry.position), &self.device);
        let mut x = self.embed(entries.iter().map(|entry| entry.token))?;
        for number in 0..layers {
            let normed = norm(x.clone(), &self.weights.layers[number].attention_norm, epsilon);
            x = x + self.attention(number, normed, &groups, &cos_sin);
            let layer = &self.weights.layers[number];
            let normed = norm(x.clone(), &layer.feed_forward_norm, epsilon);
            x = x + Self::feed_forward(layer, normed, self.hyperparameters.feed_forward);
        }
        let width = self.hyperparameters.vocabulary;
        if want_logits.is_empty() {
            return Ok(Logits::new(Vec::new(), width));
        }
        let rows = want_logits.iter().map(|index| x.clone().slice_dim(0, *index..*index + 1)).collect();
        let rows = norm(Tensor::cat(rows, 0), &self.weights.output_norm, epsilon);
        let logits = self.weights.output.apply(rows).into_data();
        let values = logits.try_into_vec::<f32>().map_err(|why| EngineError::Step(format!("{why:?}")))?;
        Ok(Logits::new(values, width))
    }

    fn release(&mut self, slot: u32) {
        if let Some(slot) = self.slots.get_mut(slot as usize) {
            *slot = Slot::default();
        }
    }
}
