//! Decoders: norms by root mean square, rotary positions, attention with shared keys, gated feed-forward parts. One
//! definition for all families ([`architecture::Family`]) and all of burn's devices.
//!
//! On the CPU the weights keep the precision of their file, packed into a form that engines of a host share, and the
//! kernels of [`crate::kernels`] compute; on other devices they are dense tensors of burn. The embedding table stays
//! in the mapped file, as a step needs only a few of its rows. Keys and values lie in blocks that the scheduler
//! hands out (see [`StepEngine::assign`]).
//!
//! **What one sequence gets does not depend on the others, nor on how its prompt was cut.** On the CPU this holds
//! bit for bit, because every sum is taken in an order that depends on the row alone, on every instruction set. So a
//! prompt that is read again with an answer's tokens behind it gives the state that decoding gave. GPUs promise no
//! such thing.

use std::path::Path;
use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};

use crate::dequantize::Format;
use crate::device::Placement;
use crate::gguf::Gguf;
use crate::kernels::{Activation, KV_BLOCK, Kernels, KvLayout, Row};
use crate::spec::ModelOptions;
use crate::{Capabilities, DeviceChoice, EngineError, Logits, StepEngine, StepEntry};

pub(crate) mod architecture;
mod attention;
mod kv;
mod linear;
mod on_device;
pub(crate) mod packed_file;
mod rotary;
pub(crate) mod weights;

#[cfg(test)]
mod tests;

use architecture::Family;
pub use architecture::Hyperparameters;
use kv::KvStore;
use linear::{Cpu, host};
use on_device::{Plan, padded_rows};
use rotary::Rotary;
use weights::Weights;

/// Tokens of a prompt that are computed in one step.
const CHUNK: u32 = 256;

/// A loaded model with room for some sequences.
#[derive(Debug)]
pub struct Model {
    gguf: Arc<Gguf>,
    embedding: Format,
    hyperparameters: Hyperparameters,
    weights: Weights,
    /// For layers that see everything, and for those with a window.
    rotary: (Rotary, Rotary),
    capabilities: Capabilities,
    slots: Vec<Slot>,
    store: KvStore,
    cpu: Cpu,
    device: Device,
}

#[derive(Debug, Default)]
struct Slot {
    /// Tokens whose keys and values are in its blocks.
    length: usize,
    blocks: Vec<u32>,
}

/// A step, checked: which slots take part, and each row's sequence and place.
struct Checked {
    slots: Vec<usize>,
    rows: Vec<Row>,
}

impl Model {
    /// Loads the weights to where they will be computed.
    pub(crate) fn load(gguf: Arc<Gguf>, placement: Placement, options: &ModelOptions) -> Result<Self, EngineError> {
        let Placement { device, backend, numerics } = placement;
        let hyperparameters = Hyperparameters::from_gguf(&gguf)?;
        let Hyperparameters { layers, kv_heads, head_size, .. } = hyperparameters;
        let own = hyperparameters.context_length;
        let slots = options.slots.max(1);
        let context_length = options.context_length.unwrap_or(own).min(own).max(2);
        let layout = KvLayout { kind: options.kv_type, heads: kv_heads, size: head_size };
        let for_one = context_length.div_ceil(KV_BLOCK as u32);
        let block_bytes = KvStore::block_bytes(layout, layers, &device);
        let budget = options.kv_memory.or_else(|| Some(crate::memory::available()? / 4));
        let affordable = budget.map_or(u64::MAX, |bytes| bytes / block_bytes.max(1));
        // One sequence must always fit, or a full context could never be answered.
        let all = u64::from(for_one).saturating_mul(slots.into()).min(u32::MAX.into());
        let blocks = all.min(affordable).max(for_one.into()) as u32;
        crate::memory::refuse_too_large(&gguf, block_bytes.saturating_mul(blocks.into()))?;
        let weights = Weights::load(&gguf, &hyperparameters, &device, options.packed_cache.as_ref())?;
        let damaged = |why| EngineError::Gguf { path: gguf.path().into(), why };
        let embedding = gguf.tensor("token_embd.weight").and_then(Format::of).map_err(damaged)?;
        let rotary = Rotary::pair(&gguf, &hyperparameters, context_length)?;
        let store = KvStore::new(layout, layers, blocks as usize, &device)
            .map_err(|why| EngineError::Step(format!("no memory for keys and values: {why}")))?;
        let is_cpu = device == Device::flex();
        let cpu = is_cpu.then(|| Kernels::new(options.instruction_set(), options.threads()));
        let capabilities = Capabilities {
            slots: options.room(),
            context_length,
            vocabulary: hyperparameters.vocabulary as u32,
            chunk: options.chunk.unwrap_or(CHUNK).max(1),
            blocks,
            block_tokens: KV_BLOCK as u32,
            backend: cpu.as_ref().map_or(backend, in_words),
            numerics: if is_cpu { format!("{numerics}-{:?}", options.kv_type).to_lowercase() } else { numerics },
        };
        let slots = (0..options.room()).map(|_| Slot::default()).collect();
        Ok(Self { gguf, embedding, hyperparameters, weights, rotary, capabilities, slots, store, cpu, device })
    }

    /// Opens a model file and loads it onto a device of the wanted kind.
    pub fn open(path: &Path, device: DeviceChoice, options: &ModelOptions) -> Result<Self, EngineError> {
        let gguf = Arc::new(Gguf::open(path)?);
        Self::load(gguf, crate::device::choose(device)?, options)
    }

    /// The numbers that make it this model.
    pub fn hyperparameters(&self) -> &Hyperparameters {
        &self.hyperparameters
    }

    /// Bytes of weights that a step of decoding reads.
    pub(crate) fn weight_bytes(&self) -> u64 {
        self.weights.sizes(&self.hyperparameters).0
    }

    /// Multiplications with weights for one token of a prompt.
    pub(crate) fn weights_per_token(&self) -> u64 {
        self.weights.sizes(&self.hyperparameters).1
    }

    /// The CPU's kernels, if they compute.
    pub(crate) fn kernels(&mut self) -> Option<&mut Kernels> {
        self.cpu.as_mut()
    }

    /// Where it computes.
    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    /// Checks the entries and sorts out whose they are.
    fn check(&self, entries: &[StepEntry]) -> Result<Checked, EngineError> {
        let impossible = |entry: &StepEntry| EngineError::Step(format!("an impossible entry: {entry:?}"));
        let mut checked = Checked { slots: Vec::new(), rows: Vec::with_capacity(entries.len()) };
        for entry in entries {
            let (slot, position) = (entry.slot as usize, entry.position as usize);
            let Some(state) = self.slots.get(slot) else { return Err(impossible(entry)) };
            let has_room = state.blocks.len() * KV_BLOCK > position;
            if entry.token >= self.capabilities.vocabulary
                || entry.position >= self.capabilities.context_length
                || !has_room
            {
                return Err(impossible(entry));
            }
            let goes_on = checked.slots.last() == Some(&slot);
            let expected = match checked.rows.last() {
                Some(last) if goes_on => last.position + 1,
                _ => state.length,
            };
            if position != expected || !goes_on && checked.slots.contains(&slot) {
                return Err(impossible(entry));
            }
            if !goes_on {
                checked.slots.push(slot);
            }
            let sequence = checked.slots.len() - 1;
            checked.rows.push(Row { sequence, position, sees: position });
        }
        Ok(checked)
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
        if self.hyperparameters.embedding_scale != 1.0 {
            values.iter_mut().for_each(|value| *value *= self.hyperparameters.embedding_scale);
        }
        Ok(Tensor::from_data(TensorData::new(values, [rows, width]), &self.device))
    }

    /// The residual stream behind the last layer, `[rows, embedding]`.
    ///
    /// `real`: rows of `checked` that are entries of the step; the others repeat the last.
    fn layers(&mut self, mut x: Tensor<2>, checked: &Checked, real: usize) -> Tensor<2> {
        let Self { hyperparameters: model, weights, rotary, slots, store, cpu, device, .. } = self;
        let positions = || checked.rows.iter().map(|row| row.position as u32);
        let global = rotary.0.at(positions());
        let local = model.local_rope_base.map(|_| rotary.1.at(positions()));
        let tables: Vec<&[u32]> = checked.slots.iter().map(|slot| slots[*slot].blocks.as_slice()).collect();
        let plan =
            cpu.is_none().then(|| Plan::new(model, (&checked.rows, real), &tables, (&global, local.as_ref()), device));
        let activation = if model.family == Family::Gemma3 { Activation::GeluTanh } else { Activation::Silu };
        for (number, layer) in weights.layers.iter().enumerate() {
            let step = attention::Step {
                rows: &checked.rows,
                tables: &tables,
                plan: plan.as_ref(),
                angles: local.as_ref().filter(|_| !model.is_global(number)).unwrap_or(&global),
                window: model.window_of(number),
            };
            let qkv = layer.query_key_value.apply(&mut x, Some(&layer.attention_norm), cpu);
            let attended = attention::attend(model, (number, layer), qkv, &step, store, cpu);
            layer.attention_output.add_to(&mut x, attended, layer.post_attention_norm.as_ref(), cpu);
            let inner = layer.gate_up.apply(&mut x, &layer.feed_forward_norm, activation, cpu);
            layer.down.add_to(&mut x, inner, layer.post_feed_forward_norm.as_ref(), cpu);
        }
        x
    }
}

impl StepEngine for Model {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn assign(&mut self, slot: u32, blocks: &[u32], length: u32) -> Result<(), EngineError> {
        let known = blocks.iter().all(|block| *block < self.capabilities.blocks);
        let wide_enough = blocks.len() * KV_BLOCK >= length as usize;
        match self.slots.get_mut(slot as usize) {
            Some(slot) if known && wide_enough => {
                slot.blocks.clear();
                slot.blocks.extend_from_slice(blocks);
                slot.length = length as usize;
                Ok(())
            }
            _ => Err(EngineError::Step(format!("slot {slot} cannot have {length} tokens in the blocks {blocks:?}"))),
        }
    }

    fn step(&mut self, entries: &[StepEntry], want_logits: &[usize]) -> Result<Logits, EngineError> {
        let mut checked = self.check(entries)?;
        if let Some(index) = want_logits.iter().find(|index| **index >= entries.len()) {
            return Err(EngineError::Step(format!("logits of entry {index}, of {}", entries.len())));
        }
        let width = self.hyperparameters.vocabulary;
        let (Some(last), Some(last_row)) = (entries.last(), checked.rows.last().copied()) else {
            return Ok(Logits::new(Vec::new(), width));
        };
        let is_cpu = self.cpu.is_some();
        if !is_cpu {
            checked.rows.resize(padded_rows(entries.len()), last_row);
        }
        let tokens: Vec<u32> = entries.iter().map(|entry| entry.token).collect();
        let padding = std::iter::repeat_n(last.token, checked.rows.len() - tokens.len());
        let x = self.embed([tokens, padding.collect()].concat().into_iter())?;
        let x = self.layers(x, &checked, entries.len());
        for (slot, row) in checked.rows.iter().map(|row| (checked.slots[row.sequence], row)) {
            self.slots[slot].length = row.position + 1;
        }
        if want_logits.is_empty() {
            // What a device is told to do it does later: without this, steps would seem to take no time, and pile up.
            let synced = if is_cpu { Ok(()) } else { self.device.sync() };
            synced.map_err(|why| EngineError::Step(format!("the device: {why}")))?;
            return Ok(Logits::new(Vec::new(), width));
        }
        let output_norm = Some(&self.weights.output_norm);
        if is_cpu {
            let rows = want_logits.iter().map(|index| x.clone().slice_dim(0, *index..*index + 1)).collect();
            let mut rows = Tensor::cat(rows, 0);
            let logits = self.weights.output.apply(&mut rows, output_norm, &mut self.cpu);
            return Ok(Logits::new(host(logits), width));
        }
        let mut rows = on_device::chosen(x, want_logits);
        let logits = self.weights.output.apply(&mut rows, output_norm, &mut self.cpu);
        on_device::logits(logits, want_logits.len()).map_err(EngineError::Step)
    }

    fn release(&mut self, slot: u32) {
        if let Some(slot) = self.slots.get_mut(slot as usize) {
            *slot = Slot::default();
        }
    }

    fn set_threads(&mut self, threads: usize) {
        if let Some(kernels) = &mut self.cpu {
            kernels.set_threads(threads);
            self.capabilities.backend = in_words(kernels);
        }
    }
}

/// What the CPU's kernels compute with.
fn in_words(kernels: &Kernels) -> String {
    format!("cpu ({}, {} threads)", kernels.instruction_set().name(), kernels.threads())
}
